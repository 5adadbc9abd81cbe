"""Plan: how one kernel is built on one architecture; and dispatch, which chooses plans.

Dispatch looks for a table (`ssmgen.tables`); where there is none it asks the cost model. A plan in
a table is written for the family's reference shape; the family fits it to the config at hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from . import tables
from .arch import Arch
from .buckets import between, cover
from .config import ALGORITHMS, KernelConfig, plain, shown
from .cost import FITTED, estimate
from .errors import ConfigError
from .families import spec
from .settings import settings

__all__ = ["Choice", "Plan", "dispatch", "fitted", "modelled", "variants"]

# Elements of the largest tile that Triton makes; nothing that a plan counts is larger.
LARGEST = 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Algorithm, tile, warps, stages.

    A program works on tiles of ``block_m`` rows of ``dim`` by ``block_n`` columns of ``dstate``
    with ``num_warps`` warps and, where it walks, ``num_stages`` of them at a time: the one it
    works on, and others on their way to shared memory; with one, the vertical algorithm has the
    next on its way to registers. ``split`` programs share the rows of one head there. With
    ``evict_first`` the new state is the first to leave the L2. ``maxnreg`` caps the registers of a
    thread, so that more programs fit. With programmatic dependent launch, an ``early`` plan loads
    the state while the kernel ahead still runs (ssu, gdn), and lets the kernel behind start before
    its own inputs are there (conv1d); one that is not early leaves the memory to the kernel ahead.
    With ``prefetch`` a program has the state that the one so many further on will load brought to
    the L2, so that more of the memory is under way than registers hold.
    In a ``placed`` plan the source says which thread holds which element (Gluon) and not the
    compiler, so that no vector passes through shared memory.
    """

    algorithm: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    split: int = 1
    evict_first: bool = False
    maxnreg: int | None = None
    early: bool = True
    placed: bool = False
    prefetch: int = 0

    def __post_init__(self) -> None:
        algorithm = plain(self.algorithm)
        if type(algorithm) is not str or algorithm not in ALGORITHMS:
            allowed = ", ".join(ALGORITHMS)
            raise ConfigError(f"plan.algorithm: {shown(algorithm)} found; allowed: {allowed}")
        object.__setattr__(self, "algorithm", algorithm)
        for name in ("block_m", "block_n", "num_warps", "num_stages", "split"):
            value = plain(getattr(self, name))
            if type(value) is not int or not 1 <= value <= LARGEST:
                raise ConfigError(
                    f"plan.{name}: {shown(value)} is not a positive int up to {LARGEST}"
                )
            if name in ("block_m", "block_n", "num_warps") and value & (value - 1):
                raise ConfigError(f"plan.{name}: {value!r} is not a power of two")
            object.__setattr__(self, name, value)
        ahead = plain(self.prefetch)
        if type(ahead) is not int or not 0 <= ahead <= LARGEST:
            raise ConfigError(f"plan.prefetch: {shown(ahead)} is not 0 to {LARGEST}")
        object.__setattr__(self, "prefetch", ahead)
        for name in ("evict_first", "early", "placed"):
            value = getattr(self, name)
            if type(value) is not bool:
                raise ConfigError(f"plan.{name}: {shown(value)} is not a bool")
        cap = plain(self.maxnreg)
        if cap is not None and (type(cap) is not int or cap not in range(16, 256)):
            raise ConfigError(f"plan.maxnreg: {shown(cap)} is not None or 16 to 255")
        object.__setattr__(self, "maxnreg", cap)

    def fields(self) -> dict[str, Any]:
        """Every field by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __str__(self) -> str:
        text = f"{self.algorithm} {self.block_m}x{self.block_n} warps={self.num_warps}"
        if self.algorithm in ("vertical", "horizontal"):
            text += f" stages={self.num_stages}"
        if self.split > 1:
            text += f" split={self.split}"
        if self.evict_first:
            text += " evict_first"
        if self.maxnreg:
            text += f" maxnreg={self.maxnreg}"
        if not self.early:
            text += " late"
        if self.placed:
            text += " placed"
        if self.prefetch:
            text += f" prefetch={self.prefetch}"
        return text


@dataclass(frozen=True)
class Choice:
    """One bucket of a dispatch: `plan` serves up to `limit` (batch x heads); None is no limit."""

    limit: int | None
    plan: Plan
    why: str


# An estimated gain that is not worth one more kernel to compile: of a family without lists, whose
# estimates lack their factors, and where the constants of the estimate were not measured.
TIED, DOUBTFUL = 0.005, 0.05
# A family's sizes times these, in sixteenths, are those at which estimates are compared: closer
# after a power of two, where one program more than the GPU has parts begins another wave.
SIXTEENTHS = (16, 17, 18, 19, 20, 22, 24, 26, 28, 30)


def dispatch(config: KernelConfig, arch: Arch, gpu: str | None = None) -> tuple[Choice, ...]:
    """The plans that serve `config` on `arch`, by rising limit; the last has none.

    They are those of the table of `gpu` (a device's name), else of another GPU of `arch`, else
    those of least estimated cost. Raises `ConfigError` if the config forces an algorithm that
    cannot serve it, or if a table is malformed.
    """
    family = spec(config.family)
    algorithm = config.algorithm
    forced = "" if algorithm == "auto" else "forced, tile from "
    found: list[tuple[int | None, Plan]] = []
    why = f"{forced}cost model"
    if table := tables.find(config.family, family.dispatch_keys(config), arch, gpu):
        rows = [row for row in table.rows if algorithm in ("auto", row.plan.algorithm)]
        if rows:
            why = f"{forced}table {table.name}"
        for row in rows:
            limit = None if row.limit is None else family.limit(config, row.limit)
            found.append((limit, family.fit(config, row.plan, arch)))
    found = found or modelled(config, arch)
    if config.batch_invariant or settings().batch_invariant:
        found = found[-1:]
        why += ", batch-invariant"

    choices: list[Choice] = []
    for i, (limit, plan) in enumerate(found):
        if choices and choices[-1].plan == plan:
            choices.pop()
        choices.append(Choice(None if i + 1 == len(found) else limit, plan, why))
    return tuple(choices)


def variants(config: KernelConfig, arch: Arch, gpu: str | None = None) -> tuple[Plan, ...]:
    """The distinct plans that dispatch may choose on `gpu`, or on any GPU of `arch`."""
    named = (gpu,) if gpu is not None else (None, *tables.gpus(config.family, arch))
    choices = (choice for name in named for choice in dispatch(config, arch, name))
    return tuple(dict.fromkeys(choice.plan for choice in choices))


def fitted(config: KernelConfig, arch: Arch, plans: Iterable[Plan]) -> dict[Plan, Plan]:
    """Of `plans`, written for the reference shape, those that serve `config` in its algorithm: the
    distinct plans they become, each with the first it came from."""
    family = spec(config.family)
    found: dict[Plan, Plan] = {}
    refused: ConfigError | None = None
    for wanted in plans:
        if config.algorithm in ("auto", wanted.algorithm):
            try:
                found.setdefault(family.fit(config, wanted, arch), wanted)
            except ConfigError as error:
                refused = error
    if not found:
        raise refused or ConfigError(
            f"algorithm: {config.algorithm!r} is none that {config.family} has a plan for"
        )
    return found


def modelled(config: KernelConfig, arch: Arch) -> list[tuple[int | None, Plan]]:
    """Buckets of the plans of least estimated cost, whether or not there is a table: a limit on
    batch x heads, None for the last, and the plan up to it."""
    family = spec(config.family)
    factors = family.shortlist(config, arch)
    plans = fitted(config, arch, factors)
    if len(plans) == 1:
        return [(None, plan) for plan in plans]
    listed = [*plans]
    costs = [
        (factors[wanted], estimate(family.work(config, plan), arch))
        for plan, wanted in plans.items()
    ]
    finer = (size * parts // 16 for size in family.sizes for parts in SIXTEENTHS)
    sizes = sorted({family.limit(config, size) for size in finer})
    # By number: to hash a plan takes longer than to cost it.
    cells = [{i: f * cost(size) for i, (f, cost) in enumerate(costs)} for size in sizes]
    slack = 0.0 if family.listings(config) else TIED
    chosen = [listed[i] for i in cover(cells, slack if arch.cc == FITTED else DOUBTFUL)]
    found: list[tuple[int | None, Plan]] = [
        (between(low, high), plan)
        for low, high, plan, after in zip(sizes, sizes[1:], chosen, chosen[1:])
        if plan != after
    ]
    return [*found, (None, chosen[-1])]
