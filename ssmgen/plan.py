"""Plan: how one kernel is built on one architecture; and dispatch, which chooses plans.

Dispatch reads ``cache/dispatch/<family>.json``. A plan there is written for the family's reference
shape; the family fits it to the config at hand.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Any

from . import resources
from .arch import Arch
from .config import ALGORITHMS, KernelConfig, plain, shown
from .errors import ConfigError
from .families import spec
from .settings import settings

__all__ = ["Choice", "Plan", "dispatch"]

# Elements of the largest tile that Triton makes; nothing that a plan counts is larger.
LARGEST = 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Algorithm, tile, warps, stages.

    A program works on tiles of ``block_m`` rows of ``dim`` by ``block_n`` columns of ``dstate``
    with ``num_warps`` warps and, where it walks, ``num_stages`` tiles in flight. ``split``
    programs share the rows of one head in the vertical algorithm. With ``evict_first`` the new
    state is the first to leave the L2. ``maxnreg`` caps the registers of a thread, so that more
    programs fit.
    """

    algorithm: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    split: int = 1
    evict_first: bool = False
    maxnreg: int | None = None

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
        if type(self.evict_first) is not bool:
            raise ConfigError(f"plan.evict_first: {shown(self.evict_first)} is not a bool")
        cap = plain(self.maxnreg)
        if cap is not None and (type(cap) is not int or cap not in range(16, 256)):
            raise ConfigError(f"plan.maxnreg: {shown(cap)} is not None or 16 to 255")
        object.__setattr__(self, "maxnreg", cap)

    def fields(self) -> dict[str, Any]:
        """Every field by name."""
        return dataclasses.asdict(self)

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
        return text


@dataclass(frozen=True)
class Choice:
    """One bucket of a dispatch: `plan` serves up to `limit` (batch x heads); None is no limit."""

    limit: int | None
    plan: Plan
    why: str


def dispatch(config: KernelConfig, arch: Arch) -> tuple[Choice, ...]:
    """The plans that serve `config` on `arch`, by rising limit; the last has none.

    Raises `ConfigError` if the config forces an algorithm that cannot serve it.
    """
    family = spec(config.family)
    table = _table(config.family)
    algorithm = config.algorithm
    where, rows = _rows(table["auto"], family.dispatch_keys(config), arch)
    why = f"table {where}"
    if algorithm != "auto":
        rows = [row for row in rows if row["plan"]["algorithm"] == algorithm]
        why = f"forced, tile from table {where}"
        if not rows:
            rows = [{"plan": table["default"][algorithm]}]
            why = "forced, default tile"
    if config.batch_invariant or settings().batch_invariant:
        rows = rows[-1:]
        why += ", batch-invariant"

    choices: list[Choice] = []
    for row in rows:
        plan = family.fit(config, Plan(**row["plan"]), arch)
        limit = row.get("up_to_heads")
        limit = None if limit is None or row is rows[-1] else family.limit(config, limit)
        if choices and choices[-1].plan == plan:
            choices.pop()
        choices.append(Choice(limit, plan, why))
    return tuple(choices)


def _rows(auto: dict[str, Any], keys: tuple[str, ...], arch: Arch) -> tuple[str, list[Any]]:
    for name in (str(arch), f"sm_{arch.cc // 10 * 10}", "default"):
        for key in keys:
            if key in auto.get(name, {}):
                return f"{name}/{key}", auto[name][key]
    raise ConfigError(f"algorithm: the dispatch table has no entry for {' or '.join(keys)}")


@functools.cache
def _table(family: str) -> dict[str, Any]:
    return json.loads((resources.root() / "cache" / "dispatch" / f"{family}.json").read_text())
