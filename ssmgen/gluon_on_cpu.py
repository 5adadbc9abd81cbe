"""What a Gluon kernel needs of its language, on the CPU: layouts mean nothing there.

Generated sources for the interpreter import from here what others import from Gluon. `gl` has what
``triton.language`` has when it is asked, which the interpreter patches while a kernel runs. This
covers the arithmetic, the permutations and the waits for copies; whether a layout fits, the
compiler checks.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

__all__ = ["async_copy", "async_load", "barrier", "gl", "mma_v2"]


class _Shared:
    """Shared memory: the last value stored."""

    def __init__(self, dtype: Any, shape: Any, layout: Any) -> None:
        self._value: Any = None

    def load(self, layout: Any) -> Any:
        assert self._value is not None, "shared memory is read before it is written"
        return self._value

    def store(self, value: Any) -> None:
        self._value = value


def _no_layout(*args: Any, **kwargs: Any) -> None:
    return None


class _Language:
    allocate_shared_memory = _Shared
    BlockedLayout = DistributedLinearLayout = DotOperandLayout = staticmethod(_no_layout)
    NVMMADistributedLayout = SliceLayout = SwizzledSharedLayout = staticmethod(_no_layout)

    @staticmethod
    def convert_layout(value: Any, layout: Any, assert_trivial: bool = False) -> Any:
        return value

    @staticmethod
    def arange(start: int, end: int, layout: Any) -> Any:
        return tl.arange(start, end)

    @staticmethod
    def full(shape: Any, value: Any, dtype: Any, layout: Any) -> Any:
        return tl.full(shape, value, dtype)

    @staticmethod
    def zeros(shape: Any, dtype: Any, layout: Any) -> Any:
        return tl.zeros(shape, dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name)


class _Copies:
    """Asynchronous copies into shared memory, where nothing arrives before it is waited for."""

    def __init__(self) -> None:
        self._begun: list[tuple[_Shared, Any]] = []
        self._groups: list[list[tuple[_Shared, Any]]] = []

    def async_load(self, shared: _Shared, pointers: Any, mask: Any = None) -> None:
        """Begin to fill shared memory from where the pointers point."""
        value = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)
        self._begun.append((shared, value))

    def commit_group(self) -> None:
        """What was begun since the last group is a group."""
        self._groups.append(self._begun)
        self._begun = []

    def wait_group(self, left: int) -> None:
        """Wait until no more than the last `left` groups are under way."""
        while len(self._groups) > left:
            for shared, value in self._groups.pop(0):
                shared.store(value)


def barrier() -> None:
    """Nothing: one thread runs a program."""


def mma_v2(a: Any, b: Any, accumulator: Any) -> Any:
    """a b + accumulator in fp32."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")


gl = _Language()
async_copy = _Copies()
async_load = async_copy.async_load
