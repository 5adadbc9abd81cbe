"""Which plans are worth trying, written for the reference shape as in a dispatch table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .config import ITEMSIZE, SsuConfig
from .fit import placeable

if TYPE_CHECKING:
    from ...plan import Plan

__all__ = ["candidates", "general", "listings", "prefetching", "sizes"]

COLUMNS = 128

# (rows, warps) and (rows, stages, split; one warp) of one token, where no list serves.
SIMPLE = ((4, 1), (8, 1), (16, 1), (16, 2), (16, 4), (16, 8), (32, 1), (32, 8), (64, 8))
VERTICAL = ((4, 3, 2), (4, 4, 4), (8, 1, 1), (8, 3, 2), (8, 4, 1))
# (rows, how many programs ahead; one warp) of one token with a state of 16 bits to nearest: 6 to
# 8 MB. Of others the memory is as busy without it, or it is not the memory that they wait for.
PREFETCH = ((8, 4096), (16, 2048), (16, 1536), (32, 768))
# Of the loop over several tokens: (rows, warps).
LOOP = ((4, 1), (4, 2), (8, 2), (16, 1), (16, 2), (16, 8))
# (rows, warps, cap on registers) of the matrix form for up to 8 tokens, and for up to 16.
MATRIX_8 = ((16, 1, None), (32, 2, None))
MATRIX_16 = ((64, 2, 168),)
MATRIX_16_FP32 = ((16, 1, 160), (32, 2, 160), (64, 4, 168))


def _plans(algorithm: str, *axes: tuple[int | None, ...], **more: bool) -> list[Plan]:
    from ...plan import Plan

    names = ("block_m", "block_n", "num_warps", "num_stages", "split", "maxnreg")
    if algorithm == "matrix":
        axes = (*axes, (1,), (1,), (None, 96, 128, 160, 168))
    return [
        Plan(algorithm=algorithm, **more, **dict(zip(names, values)))  # type: ignore[arg-type]
        for values in itertools.product(*axes)
    ]


def candidates(config: SsuConfig) -> list[Plan]:
    """Every plan that may win somewhere."""
    found: list[Plan] = []
    for evict in (False, True):
        for early in (True, False) if config.pdl else (True,):
            # A warp alone waits for no other where it passes through shared memory.
            for warps, placed in (((1,), False), ((2, 4, 8), placeable(config))):
                found += _plans(
                    "simple", (4, 8, 16, 32, 64), (COLUMNS,), warps,
                    evict_first=evict, early=early, placed=placed,
                )  # fmt: skip
        # With PDL only the simple form loads the state before it waits.
        if not (config.many or config.pdl):
            found += _plans(
                "vertical", (4, 8, 16), (COLUMNS,), (1, 2), (1, 2, 3, 4), (1, 2, 4),
                evict_first=evict,
            )  # fmt: skip
            found += _plans("horizontal", (64,), (16, 32, 64), (2, 4, 8), (2, 3), evict_first=evict)
            # These issue more than they move, with few warps for the registers that are left.
            if ITEMSIZE[config.state_dtype] == 1:
                found += _plans(
                    "vertical", (4, 8), (COLUMNS,), (1,), (1, 3, 4), (1, 2, 4), (80, 96),
                    evict_first=evict,
                )  # fmt: skip
    if config.many:
        found += _plans("matrix", (16, 32, 64), (COLUMNS,), (1, 2, 4))
    return found


def prefetching(config: SsuConfig) -> list[Plan]:
    """Plans whose programs ask for the state that later ones load. To the estimate they are like
    those that do not."""
    from ...plan import Plan

    if config.many or ITEMSIZE[config.state_dtype] != 2 or config.rounding == "stochastic":
        return []
    return [
        Plan(algorithm="simple", block_m=rows, block_n=COLUMNS, num_warps=1, prefetch=ahead)
        for rows, ahead in PREFETCH
    ]


def listings(config: SsuConfig) -> tuple[str, ...]:
    """The names of the lists for a config, its own first: untied states of one token have some, and
    shapes of a head for which the list of all is not good enough. There is none for trees and for
    the matrix form of more than 8 tokens, which were not measured."""
    name = f"{config.state_dtype}.{config.rounding}"
    if config.parents_dtype:
        name += ".tree"
    elif not config.many:
        name += ".pdl" if config.pdl else ""
    elif config.outside_matrix():
        name += ".each"
    else:
        name += ".many" if config.ntokens <= 8 else ".long"
    own = f"{config.dim}x{config.dstate}" if config.tie_hdim else "untied"
    return f"{own}.{name}", name


def general(config: SsuConfig) -> list[Plan]:
    """Plans for what no list serves, and for forms that a list lacks."""
    from ...plan import Plan

    def plan(algorithm: str, rows: int, warps: int, **more: int | None) -> Plan:
        return Plan(algorithm=algorithm, block_m=rows, block_n=COLUMNS, num_warps=warps,
                    evict_first=algorithm != "matrix", **more)  # type: ignore[arg-type]  # fmt: skip

    # With what a loop over tokens keeps beside them other tiles spill, on one GPU or another.
    full = config.many and (config.rounding == "stochastic" or bool(config.parents_dtype))
    tiles = ((8, 1), (16, 2)) if full else LOOP if config.many else SIMPLE
    found = [plan("simple", *tile) for tile in tiles]
    if config.many:
        forms: tuple[tuple[int, int, int | None], ...]
        longer = MATRIX_16_FP32 if config.state_dtype == "fp32" else MATRIX_16
        forms = MATRIX_8 if config.ntokens <= 8 else longer
        found += [plan("matrix", rows, warps, maxnreg=cap) for rows, warps, cap in forms]
    elif not config.pdl or config.algorithm == "vertical":
        found += [
            plan("vertical", rows, 1, num_stages=stages, split=split)
            for rows, stages, split in VERTICAL
        ]
    if config.algorithm == "horizontal":
        found += _plans("horizontal", (64,), (32,), (4,), (2,))
    return found


def sizes(config: SsuConfig, usual: Sequence[int]) -> list[int]:
    """Batch x heads at which plans are measured: more than the usual ones for one token, where a
    launch is a few waves of programs, and more again where it is instructions that bound it, and
    its time goes up in steps."""
    if config.many or config.pdl or not config.tie_hdim:
        return sorted(usual)
    memory = config.rounding == "nearest" and not config.state_scale_t
    # In 32nds; 34, as there are 132 multiprocessors, or 148, and a program more each is a step.
    parts = (34, 38, 48) if memory else (34, 37, 40, 44, 48, 52, 57)
    more = [n * part // 32 for n in (128, 256, 512, 1024, 2048, 4096) for part in parts]
    return sorted({*usual, 96, *more})
