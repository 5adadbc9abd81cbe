"""causal_conv1d_update, then the op that takes its output, as one graph: what PDL with early state
loads saves. The op is selective_state_update, or gated_delta_rule_decode of Qwen3-Next's heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..ops.conv1d import causal_conv1d_update
from .grid import config_of, gdn_config
from .measure import cold, interleaved
from .problem import POOL_BYTES, Launch, Problem
from .problems.gdn import GdnProblem
from .problems.ssu import SsuProblem
from .report import line

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Links", "chain", "in_chain"]

WIDTH = 4
# What an op is called here, its problem, and the heads of its layers on one GPU and on several.
OPS: dict[str, tuple[Callable[..., SsuProblem | GdnProblem], tuple[int, ...]]] = {
    "SSU": (partial(SsuProblem, config_of("fp16")), (128, 16)),
    "GDN": (partial(GdnProblem, gdn_config("fp32")), (32, 8)),
}


class Links:
    """A conv whose output is the packed input of an op, on the slots of the op."""

    def __init__(self, problem: SsuProblem | GdnProblem) -> None:
        self.problem = p = problem
        width = p.packed.shape[-1]
        options: dict[str, Any] = {"dtype": p.packed.dtype, "device": p.device}
        # Column by column, as vLLM lays windows out.
        memory = torch.randn(len(p.pool), WIDTH - 1, width, **options)
        self.windows = memory.transpose(1, 2)
        self.x = torch.randn(p.batch, width, **options)
        self.weight = 0.5 * torch.randn(width, WIDTH, **options)
        self._ops = [p.call(which) for which in range(p.sets)]

    def conv(self, which: int, pdl: bool) -> None:
        assert self.problem.sources is not None
        causal_conv1d_update(
            self.x, self.windows, self.weight, activation="silu", out=self.problem.packed,
            conv_state_indices=self.problem.sources[which], pdl=pdl,
        )  # fmt: skip

    def op(self, which: int, pdl: bool) -> None:
        self._ops[which](pdl=pdl)  # type: ignore[call-arg]

    def both(self, which: int, pdl: bool) -> None:
        self.conv(which, pdl)
        self.op(which, pdl)

    def check(self, pdl: bool) -> str:
        """Two links in a graph against fp64, with everything in between poisoned."""
        self.both(1, pdl)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.both(1, pdl)
            self.both(0, pdl)
        return self.verify(graph.replay)

    def verify(self, replay: Callable[[], None]) -> str:
        """What is wrong with links on slot set 1, then on 0, or ""."""
        p = self.problem
        assert p.sources is not None
        first, last = p.sources[1], p.sources[0]
        # The input of the op, by the formula.
        past = torch.cat([self.windows[last.long()], self.x.unsqueeze(-1)], dim=-1).double()
        exact = (past * self.weight.double()).sum(-1)
        exact = exact / (1 + torch.exp(-exact))

        def launch(which: int) -> None:
            # The check allows slot set 0 alone to change.
            kept = p.pool[first].clone()
            p.packed.fill_(math.nan)
            replay()
            p.pool[first] = kept

        if fault := p.verify(launch):
            return fault
        off = ((p.packed.double() - exact).abs() - 2.0**-7 * exact.abs()).max().item()
        return "" if off <= 1e-4 else f"output of the conv off by {off:.2e}"


def in_chain(problem: Problem, pool_bytes: int = POOL_BYTES) -> Callable[[Launch], Launch]:
    """What puts launches with PDL where models have them: behind the convolution that writes the
    op's input; those of a convolution ahead of a gated delta net as wide as it. Of rows with
    several tokens, of chunks, or without slots it leaves them alone."""
    config: Any = problem.config
    alone = config.many or config.index_dtype is None or getattr(config, "accepted_dtype", None)
    if not config.pdl or alone:
        return lambda launch: launch
    if isinstance(problem, SsuProblem | GdnProblem):
        links = Links(problem)

        def behind(launch: Launch) -> Launch:
            def both(which: int) -> None:
                links.conv(which, True)
                launch(which)

            return both

        return behind
    # q and k of half as many heads as v, of 128 each.
    net = GdnProblem(
        gdn_config("fp32", pdl=True),
        problem.batch,
        max(1, problem.nheads // 256),
        device=problem.device,
        pool_bytes=pool_bytes,
    )
    calls = [net.call(which) for which in range(net.sets)]

    def ahead(launch: Launch) -> Launch:
        def both(which: int) -> None:
            launch(which)
            calls[which % len(calls)]()

        return both

    return ahead


def chain(session: Session, result: dict[str, Any]) -> None:
    """Cells of `us`: conv alone, the op alone, the chain, and the chain with PDL."""
    wanted = session.wanted
    batches = wanted.batches or ((1, 16) if wanted.quick else (1, 4, 8, 16, 64))
    result["cells"] = found = []
    sizes = [
        (name, nheads, batch)
        for name, (_, layers) in OPS.items()
        for nheads, batch in itertools.product(
            wanted.heads or (layers[:1] if wanted.quick else layers), batches
        )
    ]
    for done, (name, nheads, batch) in enumerate(sizes):
        session.note(done, len(sizes), f"conv and {name}, {nheads} heads, batch {batch}")
        problem = OPS[name][0](
            batch, nheads, device=session.device, pool_bytes=session.pool_bytes
        )  # fmt: skip
        cell: dict[str, Any] = {"op": name, "heads": nheads, "batch": batch}
        found.append(cell | _measured(name, Links(problem), session))
        session.tell(line(found[-1]))
        del problem
        torch.cuda.empty_cache()


def _measured(name: str, links: Links, session: Session) -> dict[str, Any]:
    runs: dict[str, Callable[[int], None]] = {
        "conv alone": partial(links.conv, pdl=False),
        f"{name} alone": partial(links.op, pdl=False),
    }
    wrong = {}
    early = session.arch is not None and session.arch.pdl
    for title, pdl in (("chain", False), *((("chain with PDL", True),) if early else ())):
        if fault := links.check(pdl):
            wrong[title] = fault
        else:
            runs[title] = partial(links.both, pdl=pdl)
    sets = links.problem.sets
    calls = {title: cold(each, sets) for title, each in runs.items()}
    times = interleaved(calls, rounds=session.rounds, record=session.record)
    return {
        "us": {title: each.median for title, each in times.items()},
        "rounds": {title: list(each.rounds) for title, each in times.items()},
        "wrong": wrong,
    }
