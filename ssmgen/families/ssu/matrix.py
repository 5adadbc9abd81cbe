"""The matrix form of many tokens: which configs it serves, its tiles, who holds what.

The state is the M side of ``mma.m16n8k16``, tokens are the N side: 8 of them, or 16. A layout is
the bits of (register, lane, warp), each by the element it steps to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import ITEMSIZE, SsuConfig

if TYPE_CHECKING:
    from ...plan import Plan

__all__ = ["fit", "layouts", "tokens_held"]

Bases = list[list[int]]


def tokens_held(config: SsuConfig) -> int:
    """Tokens of the tile: those of the config and, up to a multiple of 8, repeats of the last."""
    return 8 if config.ntokens <= 8 else 16


def fit(config: SsuConfig, plan: Plan) -> tuple[int, int]:
    """Rows and warps of a program: each warp has 1, 2 or 4 times 16 rows of one head."""
    rows = min(plan.block_m, config.dim & -config.dim)
    # Two hundred and fifty-six columns of more rows do not fit the registers.
    each = 1 if config.dstate > 128 else min(4, max(1, plan.block_m // (16 * plan.num_warps)))
    each = min(each, rows // 16)
    warps = min(8, rows // (16 * each))
    return 16 * each * warps, warps


def _bits(n: int) -> int:
    return n.bit_length() - 1


def layouts(config: SsuConfig, plan: Plan) -> dict[str, Any]:
    """What the template writes out: ``tile``, ``tokens``, ``output`` and ``pairs`` as (bases of
    registers, lanes, warps), and the sizes they are made of."""
    held, warps, columns = tokens_held(config), plan.num_warps, config.dstate
    vector = 16 // ITEMSIZE[config.state_dtype]  # what a lane loads at once
    own = plan.block_m // (8 * warps)  # neighbouring rows of a lane
    wide = held == 16

    inner: Bases = [[0, 1 << b] for b in range(_bits(vector))]
    outer: Bases = [[0, 4 * vector << b] for b in range(_bits(columns // (4 * vector)))]
    neighbours: Bases = [[1 << b, 0] for b in range(_bits(own))]
    # Two rows a lane: two bits of the row change places, against bank conflicts.
    low, high = (4, 2) if own == 2 else (own, 2 * own)
    row_lanes: Bases = [[low, 0], [high, 0], [4 * own, 0]]
    row_warps: Bases = [[8 * own << b, 0] for b in range(_bits(warps))]
    token_lanes: Bases = [[1, 0], [2, 0], [4, 0]]
    alike: Bases = [[0, 0] for _ in range(_bits(warps))]
    return {
        "held": held,
        "vector": vector,
        "own": own,
        "each": own // 2,
        "tile": (inner + neighbours + outer, [[0, vector], [0, 2 * vector], *row_lanes], row_warps),
        "tokens": (
            inner + outer + [[8, 0]] * wide,
            [[0, vector], [0, 2 * vector], *token_lanes],
            alike,
        ),
        "output": (
            [*neighbours, [0, 1], *[[0, 8]] * wide],
            [[0, 2], [0, 4], *row_lanes],
            row_warps,
        ),
        "pairs": ([[0, 1], *[[0, 8], [8, 0]] * wide], [[0, 2], [0, 4], *token_lanes], alike),
        "across_tile": min(32, columns // vector),
        "across_tokens": min(32, columns // 8),
    }
