"""Which cases of a product a run takes: enough that every pair of values meets, or all of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

# Set to 1 by ``make test-all``.
EVERY = "TEST_EVERY_CASE"


def covering(*axes: Sequence[Any], strength: int = 2) -> list[tuple[Any, ...]]:
    """Rows of the product of `axes`: each `strength` values of different axes stand together in
    one row at least. All rows where the environment asks for every case.

    The rows are found greedily, in the order of the product, so every process finds the same.
    """
    rows = list(itertools.product(*(range(len(axis)) for axis in axes)))
    if os.environ.get(EVERY) != "1":
        rows = _cover(rows, list(itertools.combinations(range(len(axes)), strength)))
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in rows]


def _cover(rows: list[tuple[int, ...]], meetings: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    of = {row: {(axes, tuple(row[i] for i in axes)) for axes in meetings} for row in rows}
    missing = set().union(*of.values())
    taken = []
    while missing:
        best = max(rows, key=lambda row: len(of[row] & missing))
        taken.append(best)
        missing -= of[best]
    return sorted(taken)
