"""The rows of a step as the engine lists them, checked, and sorted into partitions."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np

from ..errors import ArgumentTypeError, ArgumentValueError

__all__ = ["KINDS", "StepRows", "step_rows"]

KINDS = ("plain", "verify", "prefill")
_NONE = np.arange(0)


@dataclass(frozen=True)
class StepRows:
    """One entry a row: `slots` (rows, columns), the others (rows,).

    `order` has the rows by kind, in their own order within a kind, and `bounds` where in it each
    kind begins and the last one ends. `ends` has the tokens of the rows up to each, in that order.
    `begun`: the first slots of rows that begin a prompt. `tracked`: the rows that are tracked.
    """

    slots: np.ndarray
    tokens: np.ndarray
    accepted: np.ndarray
    first: np.ndarray
    track: np.ndarray
    kind: np.ndarray
    order: np.ndarray
    bounds: list[int]
    ends: np.ndarray
    begun: np.ndarray
    tracked: np.ndarray

    def ntokens(self) -> list[int]:
        """Tokens of each kind."""
        ends = [int(self.ends[bound - 1]) if bound else 0 for bound in self.bounds]
        return [end - begin for begin, end in pairwise(ends)]

    def most_accepted(self, of: np.ndarray) -> np.ndarray:
        """How many tokens each of these rows can accept in this step."""
        return np.where(self.kind[of] == KINDS.index("verify"), self.tokens[of], 1)


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
    end: int | None = None,
) -> StepRows:
    """Rows from what `DecodeMetadata.build` takes; None has the meaning it has there. Slots are
    below `end`, if that is known.

    Raises:
        ArgumentValueError, ArgumentTypeError: an entry that cannot be, by name and row.
    """
    counts = _integers("tokens", tokens)
    if counts.ndim != 1:
        raise ArgumentValueError(f"tokens: found shape {counts.shape}; allowed: (rows,)")
    table = _table(slots, len(counts), columns, pad_slot_id)

    def column(name: str, values: Any, default: Any) -> np.ndarray:
        if values is None:
            return np.full(len(counts), default)
        found = _flags(values) if default is False else _integers(name, values)
        if found.shape != counts.shape:
            raise ArgumentValueError(
                f"{name}: found shape {found.shape}; allowed: {counts.shape}, one for each row"
            )
        return found

    chunk = column("prefill", prefill, False)
    begins = column("first", first, False)
    taken = column("accepted", accepted, 1)
    target = column("track", track, pad_slot_id)
    decodes = ~chunk
    _refuse("tokens", counts, counts < 1, "at least 1; leave out a row that has none")
    _refuse("tokens", counts, decodes & (counts > columns), f"at most {columns}: one and the "
            f"{columns - 1} drafts, in a row that is not prefill")  # fmt: skip
    if first is not None:
        _refuse("first", begins, begins & decodes, "False in a row that is not prefill")
        # A request that begins has accepted nothing, whatever a request before it left there.
        taken = np.where(begins, 1, taken)
    _refuse("accepted", taken, (taken < 1) | (taken > columns), f"1 to {columns}")
    padded = table == pad_slot_id
    if end is not None:
        allowed = f"0 to {end - 1}, the slots of the pool, or {pad_slot_id}"
        _refuse("slots", table, (~padded & ((table < 0) | (table >= end))).any(1), allowed)
        outside = (target != pad_slot_id) & ((target < 0) | (target >= end))
        _refuse("track", target, outside, allowed)
    if np.count_nonzero(padded):
        _refuse("slots", table, (padded[:, :-1] & ~padded[:, 1:]).any(1), f"padding, "
                f"{pad_slot_id}, after the slots of a row only")  # fmt: skip
        # Columns that are read, and those that are written: all of a row's drafts, else the first.
        needed = np.maximum(taken, np.where(decodes, counts, 1))
        _refuse("slots", table, (~padded).sum(1) < needed, f"no padding, {pad_slot_id}, in a "
                "column that is read or written")  # fmt: skip
    kind = np.where(chunk, 2, counts > 1)
    # Of bytes: those are sorted by counting.
    order = kind.astype(np.int8).argsort(kind="stable")
    return StepRows(
        slots=table,
        tokens=counts,
        accepted=taken,
        first=begins,
        track=target,
        kind=kind,
        order=order,
        bounds=[0, *np.bincount(kind, minlength=len(KINDS)).cumsum().tolist()],
        ends=counts.take(order).cumsum(),
        begun=table[:0, 0] if first is None else table[begins, 0],
        tracked=_NONE if track is None else np.flatnonzero(target != pad_slot_id),
    )


def _integers(name: str, values: Any) -> np.ndarray:
    if isinstance(values, (list, tuple)):
        try:
            return _packed("q", np.int64, values)
        except struct.error:
            pass  # numpy says better what is wrong with them
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ArgumentTypeError(f"{name}: found {array.dtype} values; allowed: integers")
    # A copy: the caller may fill its array again before the step is over.
    return array.astype(np.int64)


def _flags(values: Any) -> np.ndarray:
    if isinstance(values, (list, tuple)):
        try:
            return _packed("b", np.int8, values) != 0
        except struct.error:
            pass
    return np.array(values, np.bool_)


def _packed(code: str, dtype: type, values: Sequence[int]) -> np.ndarray:
    """`values` as an array, which `struct` makes several times faster than numpy; read-only."""
    return np.frombuffer(struct.pack(f"{len(values)}{code}", *values), dtype)


def _table(slots: Any, rows: int, columns: int, pad_slot_id: int) -> np.ndarray:
    """(rows, columns) int32, filled up with padding; rows may be of different lengths."""
    nested = isinstance(slots, (list, tuple)) and slots and isinstance(slots[0], (list, tuple))
    if not nested:
        found = _integers("slots", slots)
        found = found[:, None] if found.ndim == 1 else found
        if found.ndim != 2 or len(found) != rows or found.shape[1] > columns:
            raise ArgumentValueError(
                f"slots: found shape {found.shape}; allowed: ({rows},) or ({rows}, at most "
                f"{columns})"
            )
        widths = {found.shape[1]}
    else:
        try:
            widths = set(map(len, slots))
        except TypeError:
            raise ArgumentTypeError("slots: found rows that are no lists; allowed: all are, or "
                                    "none is") from None  # fmt: skip
        if len(slots) != rows or max(widths) > columns:
            raise ArgumentValueError(
                f"slots: found {len(slots)} rows of up to {max(widths)}; allowed: {rows} of up to "
                f"{columns}"
            )
        found = _integers("slots", list(chain.from_iterable(slots)))
    if found.size and not -(2**31) <= found.min() <= found.max() < 2**31:
        raise ArgumentValueError(f"slots: found {found.min()} to {found.max()}; allowed: an int32")
    table = np.full((rows, columns), pad_slot_id, np.int32)
    if len(widths) == 1:
        table[:, : max(widths)] = found.reshape(rows, max(widths))
    else:
        lengths = np.array([*map(len, slots)])
        table[np.arange(columns) < lengths[:, None]] = found
    return table


def _refuse(name: str, values: np.ndarray, wrong: np.ndarray, allowed: str) -> None:
    if np.count_nonzero(wrong):
        row = int(wrong.argmax())
        raise ArgumentValueError(
            f"{name}: found {values[row].tolist()} in row {row}; allowed: {allowed}"
        )
