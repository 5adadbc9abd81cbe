"""What a family declares. The road calls these methods and knows no family by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..arch import Arch
    from ..config import KernelConfig
    from ..plan import Plan

__all__ = ["Argument", "Family", "Layout"]


@dataclass(frozen=True)
class Argument:
    """One kernel argument, in ABI order.

    ``type`` is a pointer (``*bf16``) or an integer (``i32``, ``u32``, ``i64``). ``align`` is what
    the kernel may assume: a pointer is a multiple of so many bytes, an integer of so many elements.
    """

    name: str
    type: str
    align: int = 1

    @property
    def pointer(self) -> bool:
        return self.type.startswith("*")


@dataclass(frozen=True)
class Layout:
    """What a call needs besides its pointers; derived from shapes, strides and dtypes alone.

    ``scalars`` holds the integer arguments in ABI order. ``tensors`` names, in ABI order, the
    tensors whose addresses are the pointer arguments. ``batch`` and ``nheads`` are what the grid is
    made of, and their product what a dispatch table counts; without heads, a family counts what a
    row's work is made of, such as channels.
    """

    config: KernelConfig
    tensors: tuple[str, ...]
    scalars: tuple[int, ...]
    batch: int
    nheads: int


class Family(ABC):
    """One family of kernels: its arguments, plans and grid."""

    name: str

    @abstractmethod
    def arguments(self, config: KernelConfig) -> tuple[Argument, ...]:
        """The kernel's arguments, pointers first, in ABI order."""

    @abstractmethod
    def context(self, config: KernelConfig, plan: Plan, arch: Arch) -> Mapping[str, Any]:
        """What the family's template needs besides config, plan and arch."""

    @abstractmethod
    def dispatch_keys(self, config: KernelConfig) -> tuple[str, ...]:
        """Keys of the dispatch table, the most specific first."""

    @abstractmethod
    def fit(self, config: KernelConfig, plan: Plan, arch: Arch) -> Plan:
        """`plan`, written for the reference shape, made legal for `config`; ConfigError if none."""

    @abstractmethod
    def limit(self, config: KernelConfig, heads: int) -> int:
        """A table's limit, counted in heads of the reference shape, in heads of `config`."""

    @abstractmethod
    def grid(self, config: KernelConfig, plan: Plan, batch: int, nheads: int) -> tuple[int, ...]:
        """Programs along x, y, z."""

    @abstractmethod
    def layout(self, **arguments: Any) -> Layout:
        """Check the arguments of one call against the contract and describe them."""

    @abstractmethod
    def switches(self, config: KernelConfig) -> dict[str, Any]:
        """The non-tensor arguments of `layout` that `config` fixes."""
