"""What a family declares. The road calls these methods and knows no family by name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import tables
from ..cost import FITTED, Work
from .layers import Layers

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
    # Problem sizes (batch x heads, of the reference shape) at which plans are compared, and heads
    # that models have, the most first.
    sizes: tuple[int, ...] = (16, *(2**k for k in range(6, 16)))
    heads: tuple[int, ...] = (128, 16)
    # Kinds of layers that models have of it, as manifests describe them.
    layers: tuple[Layers, ...] = ()
    # Whether the compiler may fuse products and sums as it likes. Where it may not, the bits of a
    # formula do not depend on what stands around it, and ``tl.fma`` says what is fused.
    fuses: bool = True

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

    def candidates(self, config: KernelConfig, arch: Arch) -> Sequence[Plan]:
        """Plans worth timing, written as in a dispatch table; those that do not fit are left out.

        By default: simple tiles of 4 to 64 rows in 1 to 8 warps, the new state first to leave the
        L2 or not, and with PDL the state loaded early or not.
        """
        from ..plan import Plan

        return [
            Plan(
                algorithm="simple",
                block_m=rows,
                block_n=128,
                num_warps=warps,
                evict_first=evict,
                early=early,
            )
            for early in ((True, False) if config.pdl else (True,))
            for evict in (False, True)
            for rows in (4, 8, 16, 32, 64)
            for warps in (1, 2, 4, 8)
        ]

    def shortlist(self, config: KernelConfig, arch: Arch) -> Mapping[Plan, float]:
        """The few plans that the cost model chooses among where there is no table, each with a
        factor on its estimate: those of a measured list, else what the family has for all. How
        far ahead to prefetch was measured on one architecture; elsewhere `ssmgen tune` may tell."""
        for name in self.listings(config):
            listed = tables.shortlist(self.name, name).items()
            allowed: dict[Plan, float] = {}
            for plan, factor in listed:
                if config.algorithm not in ("auto", plan.algorithm):
                    continue
                if plan.prefetch and arch.cc != FITTED:
                    plan, factor = replace(plan, prefetch=0), max(1.0, factor)
                allowed.setdefault(plan, factor)
            if allowed:
                return allowed
        return dict.fromkeys(self.general(config, arch), 1.0)

    def listings(self, config: KernelConfig) -> Sequence[str]:
        """Names of the lists that serve `config` (`ssmgen.tables.shortlist`), the best first."""
        return ()

    def general(self, config: KernelConfig, arch: Arch) -> Sequence[Plan]:
        """Plans for what no list serves. The estimate knows nothing of the kernel ahead."""
        return [plan for plan in self.candidates(config, arch) if plan.early]

    def staples(self, config: KernelConfig, arch: Arch) -> Sequence[Plan]:
        """Plans that `ssmgen tune` compiles for any config, and races unless the estimate, where it
        was measured, calls them hopeless."""
        return ()

    def work(self, config: KernelConfig, plan: Plan) -> Work:
        """What `plan` makes one program do, for the cost model.

        By default: it reads and writes one tile, with eight instructions for each element.
        """
        item = {"fp32": 4, "int8": 1, "fp8_e4m3fn": 1}
        size = item.get(getattr(config, "state_dtype", config.dtype), 2)
        programs = math.prod(self.grid(config, plan, 1, 1))
        elements = plan.block_m * plan.block_n / (32 * plan.num_warps)
        return Work(
            programs=programs,
            warps=plan.num_warps,
            bytes=2 * programs * plan.block_m * plan.block_n * size,
            registers=min(255, 24 + 1.4 * elements),
            prologue=100,
            instructions=8 * elements,
        )

    def tuned_at(self, config: KernelConfig) -> Sequence[int]:
        """Problem sizes, counted as `sizes` are, that ``ssmgen tune`` measures `config` at."""
        return self.sizes

    @abstractmethod
    def grid(self, config: KernelConfig, plan: Plan, batch: int, nheads: int) -> tuple[int, ...]:
        """Programs along x, y, z."""

    @abstractmethod
    def layout(self, **arguments: Any) -> Layout:
        """Check the arguments of one call against the contract and describe them."""

    @abstractmethod
    def switches(self, config: KernelConfig) -> dict[str, Any]:
        """The non-tensor arguments of `layout` that `config` fixes."""
