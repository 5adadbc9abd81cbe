"""conv1d update, then selective_state_update, as one graph: what PDL with early state loads saves.

The conv here is a plain kernel of width 4 that lets its dependents start as soon as its own wait is
over.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from .grid import config_of
from .measure import cold, interleaved
from .problems.ssu import SsuProblem
from .report import line

if TYPE_CHECKING:
    from .session import Session

__all__ = ["chain"]


@triton.jit
def conv_update(xin, pool, weight, xout, slots, slot_stride, WIDTH: tl.constexpr,
                BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1)
    slot = tl.load(slots + batch).to(tl.int64)
    row = pool + slot * slot_stride + at
    w0 = tl.load(weight + at * 4).to(tl.float32)
    w1 = tl.load(weight + at * 4 + 1).to(tl.float32)
    w2 = tl.load(weight + at * 4 + 2).to(tl.float32)
    w3 = tl.load(weight + at * 4 + 3).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    c0 = tl.load(row)
    c1 = tl.load(row + WIDTH)
    c2 = tl.load(row + 2 * WIDTH)
    x = tl.load(xin + batch * WIDTH + at)
    v = c0.to(tl.float32) * w0 + c1.to(tl.float32) * w1 + c2.to(tl.float32) * w2
    v += x.to(tl.float32) * w3
    v = v / (1.0 + tl.exp(-v))
    tl.store(row, c1)
    tl.store(row + WIDTH, c2)
    tl.store(row + 2 * WIDTH, x)
    tl.store(xout + batch * WIDTH + at, v.to(tl.bfloat16))


class Links:
    """A conv whose output is the packed x, B and C of an SSU, on the slots of the SSU."""

    def __init__(self, batch: int, nheads: int) -> None:
        self.problem = p = SsuProblem(config_of("fp16"), batch, nheads)
        self.width = p.packed.shape[-1]
        self.pool = torch.randn(len(p.pool), 3, self.width, device="cuda").bfloat16()
        self.weight = torch.randn(self.width, 4, device="cuda").bfloat16()
        self.xin = torch.randn(batch, self.width, device="cuda").bfloat16()
        self._calls = [p.call(which) for which in range(p.sets)]

    def conv(self, which: int, pdl: bool) -> None:
        assert self.problem.sources is not None
        block = math.gcd(self.width, 256)
        conv_update[(self.width // block, self.problem.batch)](
            self.xin, self.pool, self.weight, self.problem.packed, self.problem.sources[which],
            3 * self.width, WIDTH=self.width, BLOCK=block, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip

    def ssu(self, which: int, pdl: bool) -> None:
        self._calls[which](pdl=pdl)  # type: ignore[call-arg]

    def both(self, which: int, pdl: bool) -> None:
        self.conv(which, pdl)
        self.ssu(which, pdl)

    def check(self, pdl: bool) -> str:
        """Two links in a graph against fp64, with everything in between poisoned."""
        p = self.problem
        assert p.sources is not None
        self.both(1, pdl)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.both(1, pdl)
            self.both(0, pdl)
        first = p.sources[1]

        def launch(which: int) -> None:
            # The check allows slot set 0 alone to change.
            kept = p.pool[first].clone()
            p.packed.fill_(math.nan)
            graph.replay()
            p.pool[first] = kept

        return p.verify(launch)


def chain(session: Session, result: dict[str, Any]) -> None:
    """Cells of `us`: conv alone, SSU alone, the chain, and the chain with PDL."""
    wanted = session.wanted
    heads = wanted.heads or ((128,) if wanted.quick else (128, 16))
    batches = wanted.batches or ((1, 16) if wanted.quick else (1, 4, 8, 16, 64))
    result["cells"] = found = []
    sizes = list(itertools.product(heads, batches))
    for done, (nheads, batch) in enumerate(sizes):
        session.note(done, len(sizes), f"{nheads} heads, batch {batch}")
        cell: dict[str, Any] = {"heads": nheads, "batch": batch}
        found.append(cell | _measured(Links(batch, nheads), session))
        session.tell(line(found[-1]))
        torch.cuda.empty_cache()


def _measured(links: Links, session: Session) -> dict[str, Any]:
    runs: dict[str, Callable[[int], None]] = {
        "conv alone": partial(links.conv, pdl=False),
        "SSU alone": partial(links.ssu, pdl=False),
    }
    wrong = {}
    early = session.arch is not None and session.arch.pdl
    for name, pdl in (("chain", False), *((("chain with PDL", True),) if early else ())):
        if fault := links.check(pdl):
            wrong[name] = fault
        else:
            runs[name] = partial(links.both, pdl=pdl)
    sets = links.problem.sets
    calls = {name: cold(each, sets) for name, each in runs.items()}
    times = interleaved(calls, rounds=session.rounds, record=session.record)
    return {
        "us": {name: each.median for name, each in times.items()},
        "rounds": {name: list(each.rounds) for name, each in times.items()},
        "wrong": wrong,
    }
