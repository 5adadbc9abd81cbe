"""StatePool: the states of all layers, in slots.

A slot is one run of bytes of one allocation (`ssmgen.serving.record`): every layer's conv history
and recurrent state, and the side tables. Each move, be it copy, fork, offload, reload or resize,
moves whole runs, so nothing that belongs to a slot can be left behind.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch

from ..errors import ArgumentTypeError, ArgumentValueError, DeviceError, PoolError
from ..settings import settings
from .allocator import SlotAllocator, integer
from .host import HostSlots
from .memory import SlotMemory, one_device
from .record import LayerSpec, Table
from .validator import Validator

__all__ = ["StatePool"]

Tensor = torch.Tensor


class StatePool:
    """Conv histories and recurrent states of all layers, for `slots` sequences.

    Memory is one allocation, taken at the first use, so that side tables can be registered before
    it. What the methods do to it is enqueued on the current stream and waits for nothing: a caller
    with several streams orders them. Which slots are free is known on the host; allocation is
    thread-safe, and a call that raises has changed nothing.

    A slot from `alloc` is zero and its side tables hold their reset values. A free slot holds
    anything: NaN under ``SSMGEN_DEBUG=1`` (read when the pool is made), which also has the pool
    look at the slots of every step; see `check`.

    Args:
        layers: what each layer keeps in a slot.
        slots: how many slots can be allocated.
        device: where; cpu or cuda.
        pad_slot_id: what an index table holds for a padded row. -1: slots are 0 to slots - 1. 0:
            slots are 1 to slots, and slot 0 is there and never handed out, for engines that pad
            with it.

    Raises:
        ArgumentTypeError, ArgumentValueError, DeviceError: an argument that cannot be.
    """

    def __init__(
        self,
        layers: Iterable[LayerSpec],
        slots: int,
        device: torch.device | str = "cpu",
        *,
        pad_slot_id: int = -1,
    ) -> None:
        self.layers = tuple(layers)
        for layer in self.layers:
            if not isinstance(layer, LayerSpec):
                raise ArgumentTypeError(f"layers: found {type(layer).__name__}; allowed: LayerSpec")
        if not self.layers:
            raise ArgumentValueError("layers: found none; allowed: at least one")
        if pad_slot_id not in (-1, 0):
            raise ArgumentValueError(f"pad_slot_id: found {pad_slot_id}; allowed: -1, 0")
        self.device = one_device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise DeviceError(f"device: found {self.device}; allowed: cpu, cuda")
        self.pad_slot_id = pad_slot_id
        self._slots = SlotAllocator(pad_slot_id + 1, integer("slots", slots, 1))
        self._lock = threading.RLock()
        self._memory = SlotMemory(self.layers, self._slots.end, self.device, settings().debug)
        self._validator: Validator | None = None
        if settings().debug:
            self._validator = Validator(self._slots.end, pad_slot_id, self.device)

    # What there is

    @property
    def slots(self) -> int:
        """How many slots can be allocated."""
        return self._slots.end - self._slots.first

    @property
    def free_slots(self) -> int:
        """How many slots are free."""
        return self._slots.free_slots

    @property
    def slot_nbytes(self) -> int:
        """Bytes from one slot to the next, side tables and padding included."""
        return self._memory.record.pitch

    def register(
        self,
        name: str,
        shape: Sequence[int] = (),
        dtype: torch.dtype = torch.int32,
        *,
        reset: int | float | bool = 0,
        of: str = "state",
    ) -> None:
        """Give every slot a side table, which lies in the slot and moves with it.

        Args:
            name: by which `table` finds it.
            shape, dtype: of the values of one slot.
            reset: what `alloc` sets them to.
            of: "state": they say something of the recurrent state in the slot, such as its layout.
                "request": of the request whose first slot it is, such as its accepted count; a
                `checkpoint`, which belongs to no request, has the reset value.

        Raises:
            PoolError: the memory has been taken already: register before the first use.
            ArgumentValueError: the name is in use, or an argument cannot be.
        """
        if of not in ("state", "request"):
            raise ArgumentValueError(f"of: found {of!r}; allowed: 'state', 'request'")
        sizes = tuple(integer("shape", size, 0) for size in shape)
        with self._lock:
            self._memory.register(Table(name, sizes, dtype, reset, of))

    # Views

    def conv(self, layer: int) -> Tensor:
        """(slots, channels, length): the conv histories of a layer. Valid until `resize`."""
        return self._view("conv", layer)

    def state(self, layer: int) -> Tensor:
        """(slots, *state): the recurrent states of a layer. Valid until `resize`.

        The inner axes are packed, in the order the spec says; ``state(layer).mT`` is the same
        memory with the last two axes exchanged, for a kernel that thinks (K, V) where another
        thinks (V, K).
        """
        return self._view("state", layer)

    def scale(self, layer: int) -> Tensor:
        """(slots, *state without its last axis) fp32: the scales of an integer or fp8 state."""
        return self._view("scale", layer)

    def table(self, name: str) -> Tensor:
        """(slots, *shape): a registered side table. Valid until `resize`."""
        return self._view("table", name)

    def _view(self, part: str, key: int | str) -> Tensor:
        view = self._memory.known(part, key)
        if view is not None:
            return view
        with self._lock:
            return self._memory.view(part, key)

    # Lives

    def alloc(self, count: int = 1, *, zero: int | None = None) -> list[int]:
        """Take free slots.

        Args:
            count: how many.
            zero: how many of them, from the first, have zero states; None: all. The others hold
                anything, NaN under ``SSMGEN_DEBUG``: for slots that are written before they are
                read, such as those that verified drafts will fill. Side tables are always reset.

        Raises:
            PoolExhaustedError: fewer are free.
            ArgumentValueError: `zero` is more than `count`. Nothing has changed.
        """
        count = integer("count", count, 1)
        zeroed = count if zero is None else integer("zero", zero, 0)
        if zeroed > count:
            raise ArgumentValueError(f"zero: found {zeroed}; allowed: 0 to {count}, the count")
        with self._lock:
            taken = self._take(count)
            for i, slot in enumerate(taken):
                if i < zeroed:
                    self._memory.zero_states(slot)
                self._memory.reset_tables(slot)
        return taken

    def free(self, slots: Sequence[int]) -> None:
        """Give slots back.

        Raises:
            PoolError: one is free already, or named twice. Nothing has changed.
        """
        with self._lock:
            freed = self._slots.require("slots", slots)
            for slot in freed:
                self._memory.poison(slot)
            if self._validator is not None:
                self._validator.mark(freed, False)
            self._slots.give_back(freed)

    def _take(self, count: int) -> list[int]:
        self._memory.take()  # before anything changes: the device may have too little
        taken = self._slots.take(count)
        if self._validator is not None:
            self._validator.mark(taken, True)
        return taken

    # Moves

    def copy(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy slot ``src[i]`` to slot ``dst[i]``, side tables included: one copy of bytes each.

        A source may be named more than once.

        Raises:
            PoolError: a slot is not allocated, a destination is named twice or is a source.
            ArgumentValueError: of different lengths. Nothing has changed.
        """
        with self._lock:
            sources = self._slots.require("src", src, once=False)
            targets = self._slots.require("dst", dst)
            if len(sources) != len(targets):
                raise ArgumentValueError(
                    f"dst: found {len(targets)} slots; allowed: {len(sources)}, as in src"
                )
            if both := set(sources) & set(targets):
                raise PoolError(f"dst: slot {min(both)} is a source too")
            for source, target in zip(sources, targets):
                self._memory.copy(source, target)

    def fork(self, slots: Sequence[int], accepted: int | None = None) -> list[int]:
        """Allocate as many slots and copy into them.

        Args:
            slots: what to copy, in order.
            accepted: `slots` is the table row of a request that accepted so many tokens in its last
                step. Then only what lives is copied: the first slot, which holds the conv history,
                and slot ``accepted - 1``, which holds the state. The others hold anything. None:
                all are copied.

        Returns:
            The new slots.

        Raises:
            PoolError: a slot is not allocated.
            PoolExhaustedError: fewer are free. Nothing has changed.
        """
        with self._lock:
            sources = self._slots.require("slots", slots)
            alive = set(range(len(sources)))
            if accepted is not None:
                alive = {0, self._column(accepted, len(sources))}
            forks = self._take(len(sources))
            for i, (source, target) in enumerate(zip(sources, forks)):
                if i in alive:
                    self._memory.copy(source, target)
                else:
                    self._memory.reset_tables(target)
        return forks

    def checkpoint(
        self,
        tables: Sequence[Sequence[int]],
        dst: Sequence[int],
        accepted: Sequence[int] | Tensor | None = None,
        *,
        device_tables: Tensor | None = None,
    ) -> None:
        """Put what request i has come to, the accepted part of its last step, into one slot each.

        The state of slot ``tables[i][n - 1]`` with its side tables, and of the conv history of slot
        ``tables[i][0]`` the columns that n accepted tokens make current, moved to the front. So a
        checkpoint is read as a request that has accepted one token (n = 1); tables of requests have
        their reset values.

        Args:
            tables: the table row of each request: the slots of its states after each token.
            dst: one slot for each.
            accepted: n of each. A tensor on the pool's device is not read by the host; its values
                are clamped to 1 and the columns of the row. None: 1.
            device_tables: `tables` on the device, (requests, columns), if the caller has it there
                and `accepted` is a tensor; it saves an upload.

        Raises:
            PoolError: a slot is not allocated, a destination is named twice or in `tables`.
            ArgumentValueError: lengths that differ, or an n that is no column. Nothing has changed.
        """
        with self._lock:
            rows = [self._slots.require("tables", row) for row in tables]
            targets = self._slots.require("dst", dst)
            counts = [1] * len(rows) if accepted is None else accepted
            for name, found in (("dst", targets), ("accepted", counts)):
                if len(found) != len(rows):
                    raise ArgumentValueError(
                        f"{name}: found {len(found)}; allowed: {len(rows)}, one for each row"
                    )
            if both := set(targets).intersection(*[[s for row in rows for s in row]]):
                raise PoolError(f"dst: slot {min(both)} is in tables too")
            for row in rows:
                self.require_columns("tables", len(row))
            if isinstance(counts, Tensor):
                self._memory.checkpoint_at(rows, targets, counts, device_tables)
                return
            columns = [self._column(n, len(row)) for n, row in zip(counts, rows)]
            for row, target, column in zip(rows, targets, columns):
                self._memory.checkpoint(row, target, column)

    @staticmethod
    def _column(accepted: int, columns: int) -> int:
        n = integer("accepted", accepted)
        if not 1 <= n <= columns:
            raise ArgumentValueError(
                f"accepted: found {n}; allowed: 1 to {columns}, the columns of the table"
            )
        return n - 1

    # For DecodeMetadata

    def require(self, name: str, slots: Sequence[int]) -> None:
        """That each of the slots is allocated, and named once; else a `PoolError` or an
        `ArgumentValueError` that calls them `name`."""
        with self._lock:
            self._slots.require(name, slots)

    def require_columns(self, name: str, columns: int) -> None:
        """That a table row may have so many slots: each conv history has a column for each."""
        if columns < 1:
            raise ArgumentValueError(f"{name}: found a row of no slots; allowed: at least 1")
        if wrong := self._memory.record.too_short(columns):
            raise ArgumentValueError(f"{name}: found {columns} slots in a row; allowed: {wrong}")

    def zero_states(self, slots: Tensor) -> None:
        """Zero the conv histories, states and scales of these slots, (n,) int64 on the device, in
        all layers: one kernel. Side tables stay."""
        with self._lock:
            self._memory.zero_states_at(slots)

    # To the host and back

    def offload(self, slots: Sequence[int]) -> HostSlots:
        """Copy slots to the host, side tables included; they stay allocated.

        On CUDA the memory is pinned and the copy is asynchronous. A slot may be freed at once: what
        comes after on the same stream comes after the copy.

        Raises:
            PoolError: a slot is not allocated, or named twice.
        """
        with self._lock:
            sources = self._slots.require("slots", slots)
            return self._memory.to_host(sources)

    def reload(self, host: HostSlots) -> list[int]:
        """Allocate as many slots and copy them from the host. `host` may be reloaded again.

        Raises:
            PoolExhaustedError: fewer are free.
            ArgumentValueError: it is from a pool of other layers or tables. Nothing has changed.
        """
        if not isinstance(host, HostSlots):
            raise ArgumentTypeError(
                f"host: found {type(host).__name__}; allowed: what offload returned"
            )
        with self._lock:
            if host.layout != self._memory.record.layout:
                raise ArgumentValueError("host: from a pool of other layers or side tables")
            taken = self._take(len(host))
            self._memory.from_host(host, taken)
        return taken

    def resize(self, slots: int) -> None:
        """Grow to so many slots, in new memory; slots keep their numbers and contents.

        Views taken before show the old memory and must be taken again, and CUDA graphs that use
        them captured again. Both memories exist while the copy is made.

        Raises:
            ArgumentValueError: fewer than there are.
        """
        with self._lock:
            end = self._slots.first + integer("slots", slots)
            if end < self._slots.end:
                raise ArgumentValueError(f"slots: found {slots}; allowed: at least {self.slots}")
            self._memory.grow(end)
            if self._validator is not None:
                self._validator.grow(end)
            self._slots.grow(end)

    # SSMGEN_DEBUG

    @property
    def validator(self) -> Validator | None:
        """What looks at the slots of each step; None without ``SSMGEN_DEBUG=1``."""
        return self._validator

    def check(self) -> int:
        """Raise for what steps did wrong with slots since the last call; waits for the device.

        Under ``SSMGEN_DEBUG=1`` every `DecodeMetadata` of this pool notes rows that read or write
        slots which are free or outside the pool, and slots that two rows use and one of them
        writes.

        Returns:
            The number of steps that were looked at: 0 without ``SSMGEN_DEBUG``.

        Raises:
            PoolError: with what was wrong, the row, the slot and the step.
        """
        return 0 if self._validator is None else self._validator.raise_faults()
