"""The grid of ``ssmgen tune --shipped``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .. import tables
from ..config import KernelConfig
from ..families import spec
from ..families.conv1d.config import Conv1dConfig
from ..families.gdn.config import GdnConfig
from ..families.ssu.config import SsuConfig

__all__ = ["grid"]

# Shapes of a head that no shipped manifest has: those between them.
SHAPES = ((96, 128), (64, 96))
# Tokens a row, one for each key up to 8: tables tell no more of them apart.
TOKENS = (2, 4, 6)


def grid(configs: Iterable[KernelConfig]) -> list[KernelConfig]:
    """`configs`, of the manifests, and what these do not name: on the states that they do, drafts
    in the reference shape and heads of other shapes. Of the gated delta nets, and the convolutions
    of 16-bit layers, the plainest come first, so that they stand for those that share a key with
    them. What has a table written by hand is left out."""
    given = [c for c in configs if not tables.by_hand(c.family, spec(c.family).dispatch_keys(c))]
    found: list[KernelConfig] = []
    chained: dict[str, Any] = {"pdl": True}
    verify: dict[str, Any] = {
        "ntokens": 4,
        "has_dst": True,
        "dst_tokens": True,
        "accepted_dtype": "int32",
    }
    for state, rounding in (("fp32", "nearest"), ("bf16", "nearest"), ("bf16", "stochastic")):
        for fields in (dict[str, Any](), chained, verify):
            found.append(GdnConfig(state_dtype=state, rounding=rounding, **fields))
    found += [Conv1dConfig(), Conv1dConfig(**chained),
              Conv1dConfig(many=True, accepted_dtype="int32")]  # fmt: skip
    found += given
    states = dict.fromkeys(
        (c.state_dtype, c.rounding, c.philox_rounds) for c in given if isinstance(c, SsuConfig)
    )
    for state, rounding, rounds in states:
        for dim, dstate in SHAPES:
            found.append(SsuConfig(state_dtype=state, rounding=rounding, philox_rounds=rounds,
                                   dim=dim, dstate=dstate))  # fmt: skip
        found += _drafts(state_dtype=state, rounding=rounding, philox_rounds=rounds)
    return list(dict.fromkeys(found))


def _drafts(**state: Any) -> Iterator[KernelConfig]:
    """Several tokens: each state into a buffer; where the matrix form serves, the last alone."""
    buffer: dict[str, Any] = {
        "has_intermediate": True,
        "update_state": False,
        "entry_dtype": "int64",
    }
    for tokens in TOKENS:
        yield SsuConfig(ntokens=tokens, **state, **buffer)
        last = SsuConfig(ntokens=tokens, **state)
        if not last.outside_matrix():
            yield last
