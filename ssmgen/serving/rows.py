"""The rows of a step as the engine lists them, checked, and sorted into partitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ArgumentTypeError, ArgumentValueError

__all__ = ["KINDS", "StepRows", "step_rows"]

KINDS = ("plain", "verify", "prefill")


@dataclass(frozen=True)
class StepRows:
    """One entry a row: `slots` (rows, columns), the others (rows,).

    `members` has the rows of each kind, in order: every row is in one of them.
    """

    slots: np.ndarray
    tokens: np.ndarray
    starts: np.ndarray
    accepted: np.ndarray
    first: np.ndarray
    track: np.ndarray
    members: dict[str, np.ndarray]

    def ntokens(self, kind: str) -> int:
        """Tokens of the rows of a kind."""
        return int(self.tokens[self.members[kind]].sum())


def step_rows(
    slots: Any,
    tokens: Any,
    accepted: Any,
    prefill: Any,
    first: Any,
    track: Any,
    *,
    columns: int,
    pad_slot_id: int,
) -> StepRows:
    """Rows from what `DecodeMetadata.build` takes; None has the meaning it has there.

    Raises:
        ArgumentValueError, ArgumentTypeError: an entry that cannot be, by name and row.
    """
    counts = _integers("tokens", tokens)
    table = _table(slots, len(counts), columns, pad_slot_id)

    def column(name: str, values: Any, default: Any) -> np.ndarray:
        if values is None:
            return np.full(len(counts), default)
        found = np.asarray(values, np.bool_) if default is False else _integers(name, values)
        if found.shape != counts.shape:
            raise ArgumentValueError(
                f"{name}: found shape {found.shape}; allowed: {counts.shape}, one for each row"
            )
        return found

    chunk = column("prefill", prefill, False)
    begins = column("first", first, False)
    # A request that begins has accepted nothing, whatever a request before it left there.
    taken = np.where(begins, 1, column("accepted", accepted, 1))
    target = column("track", track, pad_slot_id)

    decodes = ~chunk
    _refuse("tokens", counts, counts < 1, "at least 1; leave out a row that has none")
    _refuse("tokens", counts, decodes & (counts > columns), f"at most {columns}: one and the "
            f"{columns - 1} drafts, in a row that is not prefill")  # fmt: skip
    _refuse("first", begins, begins & decodes, "False in a row that is not prefill")
    _refuse("accepted", taken, (taken < 1) | (taken > columns), f"1 to {columns}")
    each = np.arange(columns)
    # Columns that are read, and those that are written: all of a row's drafts, else the first.
    used = (each == taken[:, None] - 1) | (each < np.where(decodes, counts, 1)[:, None])
    missing = (used & (table == pad_slot_id)).any(1)
    _refuse("slots", table, missing, f"no padding, {pad_slot_id}, in a column that is read or "
            "written")  # fmt: skip
    plain = decodes & (counts == 1)
    masks = dict(zip(KINDS, (plain, decodes & ~plain, chunk)))
    return StepRows(
        slots=table,
        tokens=counts,
        starts=np.cumsum(counts) - counts,
        accepted=taken,
        first=begins,
        track=target,
        members={kind: np.flatnonzero(mask) for kind, mask in masks.items()},
    )


def _integers(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ArgumentTypeError(f"{name}: found {array.dtype} values; allowed: integers")
    return array.astype(np.int64)


def _table(slots: Any, rows: int, columns: int, pad_slot_id: int) -> np.ndarray:
    """(rows, columns), filled up with padding; rows may be of different lengths."""
    table = np.full((rows, columns), pad_slot_id)
    if isinstance(slots, np.ndarray) or not slots or not isinstance(slots[0], (list, tuple)):
        found = _integers("slots", slots)
        found = found[:, None] if found.ndim == 1 else found
        if found.ndim != 2 or len(found) != rows or found.shape[1] > columns:
            raise ArgumentValueError(
                f"slots: found shape {found.shape}; allowed: ({rows},) or ({rows}, at most "
                f"{columns})"
            )
        table[:, : found.shape[1]] = found
        return table
    longest = max(map(len, slots))
    if len(slots) != rows or longest > columns:
        raise ArgumentValueError(
            f"slots: found {len(slots)} rows of up to {longest}; allowed: {rows} of up to {columns}"
        )
    for place, row in zip(table, slots):
        place[: len(row)] = row
    return table


def _refuse(name: str, values: np.ndarray, wrong: np.ndarray, allowed: str) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise ArgumentValueError(
            f"{name}: found {values[row].tolist()} in row {row}; allowed: {allowed}"
        )
