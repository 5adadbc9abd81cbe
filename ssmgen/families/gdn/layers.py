"""The layers of a gated delta net and of KDA as manifests describe them: a convolution ahead of the
delta rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ..layers import Layers, share

__all__ = ["DeltaNet", "Kda"]


class DeltaNet(Layers):
    """Key heads are dealt out with the value heads that they serve."""

    facts = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
    counts = "linear_layers"

    def rank(self, facts: Mapping[str, int], size: int) -> dict[str, int]:
        if facts["num_v_heads"] % facts["num_k_heads"]:
            raise ConfigError(
                f"{facts['num_k_heads']} num_k_heads do not divide {facts['num_v_heads']} "
                "num_v_heads"
            )
        return {name: share(facts, name, size) for name in ("num_k_heads", "num_v_heads")}

    def needs(self, facts: Mapping[str, int]) -> tuple[dict[str, Any], ...]:
        return _layer(facts, facts["head_k_dim"], facts["head_v_dim"], kda=False)


class Kda(Layers):
    """q, k and v have the same heads, and each channel of a key a decay of its own."""

    facts = ("num_heads", "head_dim")
    counts = "linear_layers"

    def rank(self, facts: Mapping[str, int], size: int) -> dict[str, int]:
        return {"num_heads": share(facts, "num_heads", size)}

    def needs(self, facts: Mapping[str, int]) -> tuple[dict[str, Any], ...]:
        return _layer(facts, facts["head_dim"], facts["head_dim"], kda=True)


def _layer(
    facts: Mapping[str, int], k_dim: int, v_dim: int, kda: bool
) -> tuple[dict[str, Any], ...]:
    return (
        {"family": "gdn", "head_k_dim": k_dim, "head_v_dim": v_dim, "kda": kda},
        {"family": "conv1d", "width": facts["conv_width"]},
    )
