"""Which slots of a pool are allocated. Pure Python: no memory is touched here."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from ..errors import ArgumentTypeError, ArgumentValueError, PoolError, PoolExhaustedError

__all__ = ["SlotAllocator", "integer"]


class SlotAllocator:
    """Slots `first` to ``first + count - 1``, each free or allocated. Not thread-safe by itself."""

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self._live = [False] * (first + count)
        # Handed out from the end: lowest numbers first, and what was freed last before the others.
        self._free = list(range(self.end - 1, first - 1, -1))

    @property
    def end(self) -> int:
        """One more than the last slot."""
        return len(self._live)

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Allocate; `PoolExhaustedError`, with nothing changed, if fewer are free."""
        if count > len(self._free):
            raise PoolExhaustedError(
                f"{count} slots asked for, {len(self._free)} of {self.end - self.first} are free"
            )
        taken = self._free[: -count - 1 : -1]
        del self._free[len(self._free) - count :]
        for slot in taken:
            self._live[slot] = True
        return taken

    def give_back(self, slots: list[int]) -> None:
        """Free slots that `require` has found allocated."""
        for slot in slots:
            self._live[slot] = False
        self._free.extend(reversed(slots))

    def require(self, name: str, slots: Sequence[int], *, once: bool = True) -> list[int]:
        """`slots` as ints: each within the pool, allocated, and, if `once`, named once."""
        if not isinstance(slots, Iterable):
            raise ArgumentTypeError(f"{name}: found {slots!r}; allowed: a list of slots")
        found = [integer(name, slot) for slot in slots]
        for slot in found:
            if not self.first <= slot < self.end:
                raise ArgumentValueError(
                    f"{name}: found slot {slot}; allowed: {self.first} to {self.end - 1}"
                )
            if not self._live[slot]:
                raise PoolError(f"{name}: slot {slot} is not allocated")
        if once and len(set(found)) != len(found):
            twice = next(slot for slot in found if found.count(slot) > 1)
            raise PoolError(f"{name}: slot {twice} is named twice")
        return found

    def grow(self, end: int) -> None:
        """More slots, up to `end`; they are handed out after those that are free now."""
        self._free[:0] = range(end - 1, self.end - 1, -1)
        self._live.extend([False] * (end - self.end))


def integer(name: str, value: int, least: int | None = None) -> int:
    """`value` as an int, of at least `least`; an `ArgumentTypeError` or `ArgumentValueError`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{name}: found {value!r}; allowed: an int") from None
    if least is not None and number < least:
        raise ArgumentValueError(f"{name}: found {number}; allowed: at least {least}")
    return number
