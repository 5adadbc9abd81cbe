"""How launches are timed: cold, in interleaved rounds, with the noise measured beside them.

Every contestant is one CUDA graph of a launch per slot set. A round replays each graph in turn,
and every other round goes backwards, so that a drift of the clocks meets all of them alike.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .problem import Launch

__all__ = ["Record", "Recorded", "Times", "cold", "graph", "host_time", "in_turn", "interleaved",
           "noise"]  # fmt: skip

K = TypeVar("K", bound=Hashable)


class Recorded(Protocol):
    """What can be replayed; `ssmgen.timing.Graph`, or a stand-in for it."""

    def replay(self) -> float:
        """Microseconds a launch, of one replay."""

    def warm_up(self, milliseconds: float) -> None: ...


Record = Callable[[Sequence[Callable[[], Any]]], Recorded]


@dataclass(frozen=True)
class Times:
    """Microseconds a launch, one number a round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def cold(launch: Launch, sets: int) -> list[Callable[[], Any]]:
    """A launch for each slot set, in turn."""
    return [functools.partial(launch, which) for which in range(sets)]


def interleaved(
    contestants: Mapping[K, Sequence[Callable[[], Any]]],
    *,
    rounds: int = 7,
    replays: int = 3,
    warm_up: float = 30.0,
    record: Record | None = None,
) -> dict[K, Times]:
    """Time contestants, each a list of launches, against each other on the current GPU.

    Args:
        contestants: what to launch, in which order; `cold` makes such a list.
        rounds: how often each contestant's turn comes.
        replays: timed replays a turn, after one that is not; the turn's number is their median.
        warm_up: milliseconds for which each graph is replayed before the first round.
        record: makes something to replay of launches; None: a CUDA graph.

    Returns:
        `Times` by contestant, in the order of `contestants`.
    """
    record = record or graph
    recorded = {name: record(launches) for name, launches in contestants.items()}
    return in_turn(recorded, rounds=rounds, replays=replays, warm_up=warm_up)


def graph(launches: Sequence[Callable[[], Any]]) -> Recorded:
    """The launches as one CUDA graph."""
    from ..timing import Graph

    return Graph(launches)


def in_turn(
    recorded: Mapping[K, Recorded], *, rounds: int = 7, replays: int = 3, warm_up: float = 30.0
) -> dict[K, Times]:
    """As `interleaved`, of what has been recorded."""
    for each in recorded.values():
        each.warm_up(warm_up)
    found: dict[K, list[float]] = {name: [] for name in recorded}
    order = list(recorded)
    for _ in range(rounds):
        for name in order:
            recorded[name].replay()
            turn = [recorded[name].replay() for _ in range(replays)]
            found[name].append(statistics.median(turn))
        order.reverse()
    return {name: Times(tuple(times)) for name, times in found.items()}


def noise(pairs: Iterable[tuple[float, float]]) -> float | None:
    """The relative difference that two runs of the same thing seldom exceed.

    The 95th percentile over `pairs` of times of the same thing, the largest if there are fewer
    than 20; None of none.
    """
    apart = sorted(abs(a - b) / min(a, b) for a, b in pairs)
    if not apart:
        return None
    return apart[min(len(apart) - 1, int(0.95 * len(apart)))]


def host_time(
    call: Callable[[], Any],
    *,
    wait: Callable[[], Any] | None = None,
    samples: int = 20,
    calls: int = 100,
) -> float:
    """Microseconds of host time a call: the median over samples of a mean over calls.

    `wait` is called between samples, to drain what the calls have queued; None synchronises the
    current GPU.
    """
    if wait is None:
        import torch

        wait = torch.cuda.synchronize
    for _ in range(2 * calls):
        call()
    found = []
    for _ in range(samples):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    wait()
    return statistics.median(found)
