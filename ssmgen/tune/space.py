"""Which plans of a config enter the race: the family's candidates, without those that cannot win.

What cannot win is told from an estimate before anything is compiled, and after that from what the
compiler made of a plan: registers, spills, shared memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..arch import Arch
from ..config import KernelConfig
from ..cost import FITTED, Work, estimate, evenly, resident
from ..families import spec
from ..plan import Plan, fitted

__all__ = ["entrants", "fill", "prune"]

# An estimate may be off by so much, where its constants were measured (there no plan that won was
# estimated above 1.23 times the least) and elsewhere; what is slower still is left out.
DOUBT, DOUBT_ELSEWHERE = 1.35, 1.6
# The most plans of one config that are compiled, and that enter one race, for their estimate alone.
COMPILED, ENTRANTS = 8, 5
# How many of those that were the fastest at the sizes next to one enter its race.
AROUND = 6


def entrants(
    config: KernelConfig, arch: Arch, sizes: Sequence[int], present: Iterable[Plan]
) -> dict[Plan, Plan]:
    """The plans to compile for `sizes` (batch x heads), each with the form a table holds of it.

    Those in use are always among them, and the family's staples; of others at most `COMPILED`, the
    best by estimate at any size first.
    """
    family = spec(config.family)
    plans = fitted(config, arch, family.candidates(config, arch))
    best = _places({plan: family.work(config, plan) for plan in plans}, arch, sizes)
    kept = {plan: plans[plan] for plan in [*best][:COMPILED]}
    staples = _staples(config, arch)
    for plan in (*present, *staples):
        kept.setdefault(plan, plans.get(plan) or staples.get(plan, plan))
    return kept


def _staples(config: KernelConfig, arch: Arch) -> dict[Plan, Plan]:
    named = spec(config.family).staples(config, arch)
    return fitted(config, arch, named) if named else {}


def prune(
    config: KernelConfig, arch: Arch, size: int, built: Mapping[Plan, Mapping[str, Any]],
    present: Plan, *others: Plan, around: Sequence[Plan] = (),
) -> tuple[list[Plan], dict[Plan, str]]:  # fmt: skip
    """Of `built`, plans and their manifests, those to race at `size`, the one in use first; and why
    not the rest.

    A plan goes that no multiprocessor can hold, that spills registers, or whose estimate with the
    registers and shared memory it really has is hopeless; of `others` the estimate is not asked,
    nor of the family's staples where its constants were not measured. With `around`, the plans
    that were the fastest next to this size, the first first, only those and `others` stay.
    """
    family = spec(config.family)
    works: dict[Plan, Work] = {}
    out: dict[Plan, str] = {}
    for plan, manifest in built.items():
        work = family.work(config, plan)
        registers = manifest["registers"] or work.registers
        work = dataclasses.replace(work, registers=registers, shared=manifest["shared"])
        if plan != present:
            if resident(work, arch) < 1:
                out[plan] = (
                    f"does not fit: {work.registers} registers a thread, {work.shared} bytes shared"
                )
                continue
            if manifest["spills"]:
                out[plan] = f"spills {manifest['spills']} bytes"
                continue
        works[plan] = work
    why = "not among the fastest at the sizes around" if around else "estimated to be slow"
    sure = [*others]
    if around:
        chosen = [plan for plan in around if plan in works and plan != present][:AROUND]
    else:
        best = _places(works, arch, [size])
        chosen = [plan for plan in best if plan != present][:ENTRANTS]
        sure += [plan for plan in _staples(config, arch) if plan in best or arch.cc != FITTED]
    chosen += [p for p in dict.fromkeys(sure) if p in works and p not in (present, *chosen)]
    out |= {p: why for p in works if p != present and p not in chosen}
    return [present, *chosen], out


def fill(config: KernelConfig, plan: Plan, multiprocessors: int) -> float:
    """As many heads as give every part of so many multiprocessors one program, or as many warps."""
    work = spec(config.family).work(config, plan)
    return multiprocessors * evenly(work) / work.programs


def _places(works: Mapping[Plan, Work], arch: Arch, sizes: Sequence[int]) -> list[Plan]:
    """Plans by the best place they have at any size, without those that are slow at every one."""
    place: dict[Plan, tuple[int, float]] = {}
    doubt = DOUBT if arch.cc == FITTED else DOUBT_ELSEWHERE
    for size in sizes:
        cost = {plan: estimate(work, arch)(size) for plan, work in works.items()}
        least = min(cost.values())
        for i, plan in enumerate(sorted(cost, key=cost.__getitem__)):
            if cost[plan] <= doubt * least:
                place[plan] = min(place.get(plan, (i, cost[plan] / least)), (i, cost[plan] / least))
    return sorted(place, key=place.__getitem__)
