"""The bytes of a pool: one allocation of slots, and what moves in it. Which slots may is not known
here. Everything is enqueued on the current stream."""

from __future__ import annotations

import torch

from .record import ALIGNMENT, Field, Record

__all__ = ["SlotMemory"]

Tensor = torch.Tensor

# Every float that a state may be made of reads these bytes as NaN, and so do the scales of a state
# of integers.
_POISON = 0xFF


class SlotMemory:
    """`slots` records, one behind the other; with `poison` new memory and retired memory is NaN."""

    def __init__(self, record: Record, slots: int, device: torch.device, poison: bool) -> None:
        self.record, self.slots, self.device = record, slots, device
        self._poison = poison
        with torch.inference_mode(False):
            self._fresh_tables = record.fresh_tables().to(device)
        self._bytes = self._allocate(slots)

    # What is made in inference mode cannot be written outside of it, and any call may be inside.
    @torch.inference_mode(False)
    def _allocate(self, slots: int) -> Tensor:
        nbytes = slots * self.record.pitch
        memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=self.device)
        memory = memory.narrow(0, -memory.data_ptr() % ALIGNMENT, nbytes)
        return memory.fill_(_POISON) if self._poison else memory

    def grow(self, slots: int) -> None:
        """Move to new memory for more slots."""
        grown = self._allocate(slots)
        grown[: len(self._bytes)].copy_(self._bytes)
        if self._poison:
            self._bytes.fill_(_POISON)
        self._bytes, self.slots = grown, slots

    @torch.inference_mode(False)
    def view(self, field: Field) -> Tensor:
        """(slots, *shape) of a field."""
        return field.view(self._bytes, self.record.pitch, self.slots)

    def slot(self, slot: int, begin: int = 0, end: int | None = None) -> Tensor:
        """Bytes `begin` to `end` of a slot."""
        at = slot * self.record.pitch
        return self._bytes[at + begin : at + (self.record.pitch if end is None else end)]

    def copy(self, source: int, target: int) -> None:
        self.slot(target).copy_(self.slot(source))

    def zero_states(self, slot: int) -> None:
        """Conv histories, states and scales of all layers."""
        self.slot(slot, 0, self.record.tables_begin).zero_()

    def poison(self, slot: int) -> None:
        if self._poison:
            self.slot(slot).fill_(_POISON)

    def reset_tables(self, slot: int, *, requests_only: bool = False) -> None:
        """The side tables, or those of requests, to their reset values."""
        first, end = self.record.tables_begin, self.record.tables_end
        begin = self.record.requests_begin if requests_only else first
        if begin < end:
            self.slot(slot, begin, end).copy_(self._fresh_tables[begin - first :])

    def checkpoint(self, row: list[int], target: int, column: int) -> None:
        """The state of ``row[column]`` and the history of ``row[0]``, moved to the front."""
        states = self.record.states_begin, self.record.requests_begin
        self.slot(target, *states).copy_(self.slot(row[column], *states))
        for histories, live in self._histories():
            histories[target, ..., :live] = histories[row[0], ..., column : column + live]
        self.reset_tables(target, requests_only=True)

    def checkpoint_at(self, row: list[int], target: int, column: Tensor, slots: Tensor) -> None:
        """The same with `column`, (1,), on the device, and `row` there too, as `slots`."""
        begin, end = self.record.states_begin, self.record.requests_begin
        words = self._bytes.view(self.slots, self.record.pitch).view(torch.int64)
        states = words[:, begin // 8 : end // 8]
        # The gathered state is a temporary: an op cannot write to the tensor that it reads.
        source = slots.index_select(0, column)
        states[target].copy_(states.index_select(0, source)[0])
        for histories, live in self._histories():
            current = column + torch.arange(live, device=self.device)
            histories[target, ..., :live] = histories[row[0]].index_select(-1, current)
        self.reset_tables(target, requests_only=True)

    def _histories(self) -> list[tuple[Tensor, int]]:
        """((slots, layers, channels, length), columns that live) of layers that are alike."""
        return [
            (first.each(self._bytes, self.record.pitch, self.slots, step, count), live)
            for first, step, count, live in self.record.histories
        ]
