"""The bytes of a pool: one allocation of slots, and what moves in it. Which slots may is not known
here. Everything is enqueued on the current stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ArgumentValueError, DeviceError, PoolError
from .host import HostSlots
from .record import ALIGNMENT, LayerSpec, Record, Table

__all__ = ["SlotMemory", "one_device"]

Tensor = torch.Tensor

# Every float that a state may be made of reads these bytes as NaN, and so do the scales of a state
# of integers.
_POISON = 0xFF


class SlotMemory:
    """`slots` records, one behind the other; with `poison` new memory and retired memory is NaN.

    It is allocated when it is first used: until then side tables can be registered. Not thread-safe
    by itself.
    """

    def __init__(
        self, layers: tuple[LayerSpec, ...], slots: int, device: torch.device, poison: bool
    ) -> None:
        self.record, self.slots, self.device = Record(layers), slots, device
        self._poison = poison
        self._taken: Tensor | None = None
        self._views: dict[tuple[str, int | str], Tensor] = {}

    @property
    def taken(self) -> bool:
        """Whether it is allocated."""
        return self._taken is not None

    @property
    def _bytes(self) -> Tensor:
        if self._taken is None:
            with torch.inference_mode(False):
                self._fresh_tables = self.record.fresh_tables().to(self.device)
            self._taken = self._allocate(self.slots)
        return self._taken

    # What is made in inference mode cannot be written outside of it, and any call may be inside.
    @torch.inference_mode(False)
    def _allocate(self, slots: int) -> Tensor:
        nbytes = slots * self.record.pitch
        memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=self.device)
        memory = memory.narrow(0, -memory.data_ptr() % ALIGNMENT, nbytes)
        return memory.fill_(_POISON) if self._poison else memory

    def register(self, table: Table) -> None:
        """One more side table."""
        if self.taken:
            raise PoolError(f"{table.name}: registered after the first use of the pool")
        if table.name in self.record.table:
            raise ArgumentValueError(f"{table.name}: is registered already")
        self.record = Record(self.record.layers, (*self.record.tables, table))

    def take(self) -> None:
        """Allocate it, if that is still to be done."""
        self._bytes  # noqa: B018

    def grow(self, slots: int) -> None:
        """Move to new memory for more slots."""
        if self.taken:
            grown = self._allocate(slots)
            grown[: len(self._bytes)].copy_(self._bytes)
            if self._poison:
                self._bytes.fill_(_POISON)
            self._taken, self._views = grown, {}
        self.slots = slots

    def known(self, part: str, key: int | str) -> Tensor | None:
        """What `view` has made already; needs no lock."""
        return self._views.get((part, key))

    @torch.inference_mode(False)
    def view(self, part: str, key: int | str) -> Tensor:
        """(slots, *shape) of a field of a part of the record: conv, state, scale, table."""
        fields = getattr(self.record, part)
        if key not in fields:
            names = ", ".join(map(str, sorted(fields))) or "none"
            raise ArgumentValueError(f"{part}: found {key!r}; this pool has {names}")
        # Made once: an op is asked for it on every call.
        view = self.known(part, key)
        if view is None:
            view = fields[key].view(self._bytes, self.record.pitch, self.slots)
            self._views[part, key] = view
        return view

    def slot(self, slot: int, begin: int = 0, end: int | None = None) -> Tensor:
        """Bytes `begin` to `end` of a slot."""
        at = slot * self.record.pitch
        return self._bytes[at + begin : at + (self.record.pitch if end is None else end)]

    def copy(self, source: int, target: int) -> None:
        self.slot(target).copy_(self.slot(source))

    def zero_states(self, slot: int) -> None:
        """Conv histories, states and scales of all layers."""
        self.slot(slot, 0, self.record.tables_begin).zero_()

    def zero_states_at(self, slots: Tensor) -> None:
        """The same of all these slots, (n,) int64 on the device, by one kernel."""
        self._words(0, self.record.tables_begin).index_fill_(0, slots, 0)

    def _words(self, begin: int, end: int) -> Tensor:
        """Bytes `begin` to `end` of all slots, (slots, words) int64."""
        words = self._bytes.view(self.slots, self.record.pitch).view(torch.int64)
        return words[:, begin // 8 : end // 8]

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

    def checkpoint_at(
        self,
        rows: Sequence[list[int]],
        targets: Sequence[int],
        accepted: Tensor,
        tables: Tensor | None,
    ) -> None:
        """The same of several rows, with what each accepted on the device, clamped to its columns.
        `tables`: `rows` on the device, if the caller has them there."""
        states = self._words(self.record.states_begin, self.record.requests_begin)
        for i, (row, target) in enumerate(zip(rows, targets)):
            column = (accepted[i : i + 1].long() - 1).clamp(0, len(row) - 1)
            slots = self._uploaded(row) if tables is None else tables[i]
            # The gathered state is a temporary: an op cannot write to the tensor that it reads.
            source = slots.index_select(0, column)
            states[target].copy_(states.index_select(0, source)[0])
            for histories, live in self._histories():
                current = column + torch.arange(live, device=self.device)
                histories[target, ..., :live] = histories[row[0]].index_select(-1, current)
            self.reset_tables(target, requests_only=True)

    def _uploaded(self, values: list[int]) -> Tensor:
        host = torch.tensor(values, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

    def to_host(self, slots: list[int]) -> HostSlots:
        """A copy of the slots; on CUDA pinned, and perhaps still under way."""
        on_gpu = self.device.type == "cuda"
        memory = torch.empty(len(slots), self.record.pitch, dtype=torch.uint8, pin_memory=on_gpu)
        for place, slot in zip(memory, slots):
            place.copy_(self.slot(slot), non_blocking=True)
        event = None
        if on_gpu:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        return HostSlots(memory, self.record.layout, event)

    def from_host(self, host: HostSlots, slots: list[int]) -> None:
        """Copy them back, once the copy to the host is done."""
        if host.event is not None and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(host.event)
        else:
            host.wait()
        for place, slot in zip(host.memory, slots):
            self.slot(slot).copy_(place, non_blocking=True)

    def _histories(self) -> list[tuple[Tensor, int]]:
        """((slots, layers, channels, length), columns that live) of layers that are alike."""
        return [
            (first.each(self._bytes, self.record.pitch, self.slots, step, count), live)
            for first, step, count, live in self.record.histories
        ]


def one_device(device: torch.device | str) -> torch.device:
    """The device, with the number of the current GPU where a bare "cuda" has none: tensors compare
    theirs with it, and which GPU is current may change."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise DeviceError(f"device: found {device!r}; allowed: cpu, cuda, cuda:N") from None
    if found.type == "cuda" and found.index is None:
        if not torch.cuda.is_available():
            raise DeviceError(f"device: found {device!r}; torch sees no GPU here; allowed: cpu")
        return torch.device("cuda", torch.cuda.current_device())
    return found
