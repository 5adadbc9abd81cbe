"""Rig: what times plans. On a GPU it is `GpuRig`; a test has one of its own."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ..arch import Arch, gpu_name
from ..config import KernelConfig
from ..kernel import build
from ..launcher import Function, load
from ..plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..bench.problem import Problem

__all__ = ["Bench", "GpuRig", "Rig", "turns"]

# A graph has so many launches, if the pool has as many slot sets; more where states are so small
# that these would not go through so many times the L2.
LAUNCHES, L2S = 256, 2.5
# Microseconds of a replay that need no other one before it.
LONG = 2000.0


class Bench(Protocol):
    """Loaded plans of one config and the inputs of one problem size."""

    wrong: Mapping[Plan, str]

    def round(self, plans: Sequence[Plan]) -> list[float]:
        """Time each plan once, in this order: microseconds a launch."""


class Rig(Protocol):
    """One GPU and its clock."""

    arch: Arch
    gpu: str
    multiprocessors: int
    identity: dict[str, Any]

    def clock(self) -> float:
        """Seconds."""

    def measures(self, family: str) -> bool:
        """Whether there are inputs for kernels of that family."""

    def open(
        self, config: KernelConfig, batch: int, nheads: int, plans: Sequence[Plan]
    ) -> AbstractContextManager[Bench]:
        """Make inputs and load `plans`, which are compiled already; ``wrong`` of what is returned
        says which of them give wrong results, and how. With PDL plans are timed in a chain, with
        the kernel that models have ahead of them or behind."""


class GpuRig:
    """The current CUDA device."""

    def __init__(self) -> None:
        import torch

        from ..bench.session import environment

        self.arch = Arch.detect()
        self.gpu = gpu_name(None)
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.multiprocessors = self._properties.multi_processor_count
        here = environment()
        names = ("gpu", "driver", "torch", "triton", "python", "ssmgen")
        self.identity = {name: here[name] for name in names}
        self._judged: dict[tuple[KernelConfig, Plan], str] = {}
        # Of the config that was measured last: its sizes follow one another.
        self._loaded: tuple[KernelConfig | None, dict[Plan, Function]] = (None, {})
        self._warm = False

    def clock(self) -> float:
        return time.monotonic()

    def measures(self, family: str) -> bool:
        return importlib.util.find_spec(f"ssmgen.bench.problems.{family}") is not None

    @contextmanager
    def open(
        self, config: KernelConfig, batch: int, nheads: int, plans: Sequence[Plan]
    ) -> Iterator[_GpuBench]:
        import torch

        from ..bench.chain import in_chain
        from ..bench.problem import POOL_BYTES, make, planned
        from ..timing import warm_clocks

        if not self._warm:
            warm_clocks()
            self._warm = True
        device = torch.cuda.current_device()
        problem = make(config, batch, nheads)
        placed = in_chain(problem, POOL_BYTES)
        launches = {}
        for plan in plans:
            launch = planned(problem, self._function(config, plan, device), plan)
            # A plan is right or wrong at any size: the first one tells.
            if (config, plan) not in self._judged:
                self._judged[config, plan] = problem.verify(launch, rows=2)
            launches[plan] = placed(launch)
        wrong = {plan: why for plan in plans if (why := self._judged[config, plan])}
        yield _GpuBench(
            {plan: launch for plan, launch in launches.items() if plan not in wrong},
            turns(problem, self._properties.L2_cache_size),
            wrong,
        )

    def _function(self, config: KernelConfig, plan: Plan, device: int) -> Function:
        if self._loaded[0] != config:
            self._loaded = config, {}
        functions = self._loaded[1]
        if plan not in functions:
            functions[plan] = load(build(config, plan, self.arch), device)
        return functions[plan]


def turns(problem: Problem, cache: int) -> int:
    """Slot sets to go through, with an L2 of so many bytes."""
    states = problem.bytes / (1 + problem.times)
    return min(problem.sets, max(LAUNCHES, math.ceil(L2S * cache / states)))


class _GpuBench:
    def __init__(self, launches: Mapping[Plan, Any], sets: int, wrong: Mapping[Plan, str]) -> None:
        from ..bench.measure import cold
        from ..timing import Graph

        self.wrong = wrong
        self._graphs = {plan: Graph(cold(launch, sets)) for plan, launch in launches.items()}
        self._sets = sets
        self._last: dict[Plan, float] = {}

    def round(self, plans: Sequence[Plan]) -> list[float]:
        found = []
        for plan in plans:
            # The first replay finds what the one before it left: clocks, caches, an idle host.
            if self._last.get(plan, 0.0) * self._sets < LONG:
                self._graphs[plan].replay()
            self._last[plan] = self._graphs[plan].replay()
            found.append(self._last[plan])
        return found
