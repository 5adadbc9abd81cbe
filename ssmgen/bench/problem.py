"""The inputs of a measurement, whatever the family.

A `Problem` has *slot sets*: disjoint random slots of one pool. Launches that take the sets in turn
find none of their states in the L2, if the pool is larger than it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..arch import Arch
from ..config import KernelConfig
from ..errors import ArgumentValueError, UnsupportedError
from ..families import spec
from ..families.base import Layout
from ..plan import Plan, dispatch

if TYPE_CHECKING:
    from ..launcher import Function

__all__ = ["POOL_BYTES", "Launch", "Problem", "Returned", "make", "plan_of", "planned"]

# Larger than the L2 of any GPU, several times over.
POOL_BYTES = 512 * 2**20

# Runs slot set i.
Launch = Callable[[int], Any]


@dataclass(frozen=True)
class Returned:
    """What a launch returns that writes no slot: the output, and the state of each row after its
    last token, which `Problem.verify` puts into the slots."""

    out: Any
    states: Any


class Problem(ABC):
    """Calls of one config on ``sets`` slot sets of one pool.

    A family has its own in ``ssmgen/bench/problems/<family>.py``, as ``PROBLEM``. It is made with
    (config, batch, nheads, device, pool_bytes) and what else of its shapes the config leaves
    open, with defaults.
    """

    config: KernelConfig
    batch: int
    nheads: int
    device: str
    sets: int

    @property
    def times(self) -> int:
        """How many states a call writes for each that it reads."""
        return 1

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes that one call must move: states read and written, inputs, outputs, tables."""

    @abstractmethod
    def arguments(self, which: int) -> dict[str, Any]:
        """What to call the family's op (or its `layout`) with, on slot set `which`.

        Shapes, dtypes and strides are the same for every set, and ask for ``config``.
        """

    @functools.cached_property
    def layout(self) -> Layout:
        """What the family's contract says of the arguments of any set."""
        return spec(self.config.family).layout(**self.arguments(0))

    def addresses(self, which: int) -> list[int]:
        """Those of the tensors of `layout`, on slot set `which`, which are kept."""
        if which not in self._kept:
            arguments = self.arguments(which)
            tensors = [arguments[name] for name in self.layout.tensors]
            self._kept[which] = tensors, [tensor.data_ptr() for tensor in tensors]
        return self._kept[which][1]

    @functools.cached_property
    def _kept(self) -> dict[int, tuple[list[Any], list[int]]]:
        return {}

    @abstractmethod
    def call(self, which: int) -> Callable[[], Any]:
        """The family's op on slot set `which`, as an engine calls it, with its arguments ready."""

    def launch(self, which: int) -> None:
        """The family's op on slot set `which`."""
        self.call(which)()

    @abstractmethod
    def verify(self, launch: Launch, which: int = 0, rows: int = 32, forgiven: float = 0.0) -> str:
        """Run ``launch(which)`` on poisoned outputs and compare it with fp64.

        Where it returns a tensor, that is the output, or it returns it with the states
        (`Returned`). What is compared is `rows` rows of the batch, or more. State elements may be
        off by `forgiven` besides what rounding allows. Returns what is wrong, or "".
        """


def make(
    config: KernelConfig,
    batch: int,
    nheads: int,
    *,
    device: str = "cuda",
    pool_bytes: int = POOL_BYTES,
    **shape: int,
) -> Problem:
    """The problem of a config; `shape` is what the family's config leaves open (ssu:
    ngroups, gdn: k_heads, conv1d: tokens).

    Raises `UnsupportedError` for a family that has no problems.
    """
    name = f"{__package__}.problems.{config.family}"
    if importlib.util.find_spec(name) is None:
        raise UnsupportedError(f"bench: the family {config.family} has no problems to measure")
    module = importlib.import_module(name)
    return module.PROBLEM(config, batch, nheads, device=device, pool_bytes=pool_bytes, **shape)


def plan_of(problem: Problem, arch: Arch) -> Plan:
    """The plan that serves a problem on `arch`."""
    work = problem.batch * problem.nheads
    choices = dispatch(problem.config, arch)
    return next(c.plan for c in choices if c.limit is None or work <= c.limit)


def planned(problem: Problem, function: Function, plan: Plan) -> Launch:
    """Launches of one loaded kernel, of that plan, on a problem: no dispatch, no checks."""
    from torch._C import _cuda_getCurrentRawStream as current_stream

    from ..launcher import Launch as KernelLaunch

    layout = problem.layout
    if layout.config.key_fields() != problem.config.key_fields():
        raise ArgumentValueError(
            f"problem: {problem.batch} rows of {problem.nheads} heads ask for another config than "
            f"{problem.config}"
        )
    grid = spec(layout.config.family).grid(layout.config, plan, layout.batch, layout.nheads)
    early = layout.config.pdl and Arch.detect(function.device).pdl
    launch = KernelLaunch(function, grid, layout.scalars, early)

    def run(which: int) -> None:
        launch(current_stream(function.device), *problem.addresses(which))

    return run
