"""The layers of Mamba1 and Mamba2 as manifests describe them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ..layers import Layers, share

__all__ = ["Mamba1", "Mamba2"]


class Mamba2(Layers):
    """Groups are dealt out where they divide; where there are fewer of them than ranks, each rank
    has a copy of the one group that its heads belong to."""

    facts = ("d_state", "nheads", "head_dim", "n_groups")
    counts = "mamba_layers"

    def rank(self, facts: Mapping[str, int], size: int) -> dict[str, int]:
        heads, groups = share(facts, "nheads", size), facts["n_groups"]
        if groups % size and size % groups:
            raise ConfigError(f"{size} ranks do not divide {groups} groups")
        return {"nheads": heads, "n_groups": max(1, groups // size)}

    def needs(self, facts: Mapping[str, int]) -> tuple[dict[str, Any], ...]:
        return (_state(facts["head_dim"], facts, tied=True),)


class Mamba1(Layers):
    """``dim`` rows without heads."""

    facts = ("d_state", "dim")
    counts = "mamba_layers"

    def rank(self, facts: Mapping[str, int], size: int) -> dict[str, int]:
        return {"dim": share(facts, "dim", size)}

    def needs(self, facts: Mapping[str, int]) -> tuple[dict[str, Any], ...]:
        # A headless state is cut into heads of a power of two rows, at most 64.
        return (_state(min(64, facts["dim"] & -facts["dim"]), facts, tied=False),)


def _state(dim: int, facts: Mapping[str, int], tied: bool) -> dict[str, Any]:
    return {"family": "ssu", "dim": dim, "dstate": facts["d_state"], "tie_hdim": tied}
