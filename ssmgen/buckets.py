"""From times at single sizes to a few buckets: one plan over neighbouring sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

__all__ = ["between", "cover"]

T = TypeVar("T")


def cover(cells: Sequence[Mapping[T, float]], slack: float | Sequence[float]) -> list[T]:
    """One entry for each cell, changing as seldom as `slack` allows.

    `cells` hold the time of each entry at sizes in order; an entry may be chosen where its time is
    within `slack` (one for all, or one a cell; 0.01 is 1%) of the best there. Of the entries that
    will do for a run of cells the one with the least loss is taken.
    """
    each = slack if isinstance(slack, Sequence) else [slack] * len(cells)
    best = [min(cell.values()) for cell in cells]
    chosen: list[T] = []
    while len(chosen) < len(cells):
        start = end = len(chosen)
        # Entry -> the sum of its losses; a dict, so that ties fall the same way every time.
        good: dict[T, float] = {}
        while end < len(cells):
            cell, least = cells[end], best[end]
            most = least * (1 + each[end])
            of = cell if end == start else good
            joint = {
                k: good.get(k, 0.0) + cell[k] / least for k in of if k in cell and cell[k] <= most
            }
            if not joint:
                break
            good, end = joint, end + 1
        chosen += [min(good, key=good.__getitem__)] * (end - start)
    return chosen


def between(low: int, high: int) -> int:
    """The limit of a bucket: half-way, in ratio, from its last measured size to the next one."""
    return max(low, min(high - 1, math.isqrt(low * high)))
