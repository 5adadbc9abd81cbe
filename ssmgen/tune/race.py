"""Race: which of several plans is fastest, by successive halving over interleaved rounds.

Every entrant that is left is timed once in each round, so that what drifts drifts for all, and
entrants are compared by the ratios of their times within rounds. The plan in use runs twice in the
later rounds: how far it is from itself is the noise. Another plan takes its place only if it is
faster by more than that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Outcome", "Standing", "race"]

T = TypeVar("T", bound=Hashable)

# Rounds before the first half goes, and before each later one.
ROUNDS = 3
# Entrants of the last stage, besides the one in use, and the rounds it has at least and at most.
FINALISTS = 4
LEAST, MOST = 8, 24
# An entrant so far behind the first goes at once: after the first round, in which any of them may
# have been unlucky, and after each stage.
FAR, HOPELESS = 2.0, 1.25
# Below this nothing is a difference: two runs of a process differ by as much.
FLOOR = 0.003
# The standard error of what was seen in one round alone: it is under 1%, but the first of many
# entrants is likely to have had luck.
ONCE = 0.025
# Standard errors that a lead must have.
SURE = 2.5


@dataclass(frozen=True)
class Standing(Generic[T]):
    """An entrant: the median of its times in microseconds, their relative spread (median absolute
    deviation), its rounds, and by which factor it was slower than the first, give or take."""

    entrant: T
    microseconds: float
    spread: float
    rounds: int
    ratio: float
    error: float


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The standings, the first first. `winner` is the first of them, or the one in use if the first
    was not ahead of it by more than `noise`; `margin` is how far it was ahead (0.02 is 2%)."""

    winner: T
    present: T
    margin: float
    noise: float
    rounds: int
    standings: tuple[Standing[T], ...]

    @property
    def changed(self) -> bool:
        return self.winner != self.present


def race(
    entrants: Sequence[T],
    present: T,
    time_round: Callable[[Sequence[T]], Sequence[float]],
    *,
    seconds: float,
    clock: Callable[[], float],
) -> Outcome[T]:
    """Race `entrants`, of which `present` is in use, for about `seconds`.

    ``time_round`` times each of its arguments once, in the order given, and returns microseconds.
    One round is run however little time there is.
    """
    end = clock() + seconds
    alive = list(dict.fromkeys((present, *entrants)))
    times: dict[T, dict[int, float]] = {entrant: {} for entrant in alive}
    twin: dict[int, float] = {}
    done = 0
    longest = 0.0

    def stage(rounds: int) -> bool:
        """Whether there was time for all of them."""
        nonlocal done, longest
        for _ in range(rounds):
            start = clock()
            if done and start + longest > end:
                return False
            # Every round begins somewhere else, so that no entrant always follows the same one.
            shift = done % len(alive)
            order = alive[shift:] + alive[:shift]
            twice = len(alive) <= 2 * FINALISTS + 1
            found = time_round([*order, present] if twice else order)
            for entrant, micro in zip(order, found):
                times[entrant][done] = micro
            if twice:
                twin[done] = found[-1]
            done += 1
            longest = max(longest, clock() - start)
        return True

    def keep(most: int, within: float) -> None:
        """So many of those that are left and not that far behind, and the one in use."""
        nonlocal alive
        ranked = _ranked(alive, times)
        first, far = ranked[0], math.log(within)
        near = [a for a in ranked[:most] if _ratio(times[a], times[first])[0] < far]
        alive = [a for a in alive if a in near or a == present]

    more = stage(1)
    keep(len(alive), FAR)
    more = more and stage(ROUNDS - 1)
    while more and len(alive) > FINALISTS + 1:
        keep(max(FINALISTS, math.ceil(len(alive) / 2)), HOPELESS)
        more = stage(ROUNDS)
    if more:
        more = stage(LEAST - ROUNDS)
    while more and done < MOST and not _decided(alive, times, present, twin):
        more = stage(2)

    ranked = _ranked(alive, times)
    first = ranked[0]
    noise = _noise(times[present], twin)
    lead, error = _ratio(times[present], times[first])
    noise = max(noise, SURE * error)
    winner = first if lead > noise else present
    standings = sorted(
        (_standing(entrant, times[entrant], times[first]) for entrant in times),
        key=lambda s: (s.entrant not in alive, s.ratio),
    )
    margin = math.expm1(lead) if winner != present else 0.0
    return Outcome(winner, present, margin, noise, done, tuple(standings))


def _ratio(a: dict[int, float], b: dict[int, float]) -> tuple[float, float]:
    """By how much (logarithm) `a` was slower than `b` in the rounds they share, and the standard
    error of that."""
    if a is b:
        return 0.0, 0.0
    found = [math.log(a[r] / b[r]) for r in a.keys() & b.keys()]
    middle = statistics.median(found)
    if len(found) < 2:
        return middle, ONCE
    # 1.2533: how much less a median knows than a mean.
    return middle, 1.2533 * _sigma(found) / math.sqrt(len(found))


def _sigma(values: Sequence[float]) -> float:
    """Standard deviation from the median absolute one, which an outlier does not move."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(v - middle) for v in values)


def _ranked(alive: Sequence[T], times: dict[T, dict[int, float]]) -> list[T]:
    """The fastest first, by the rounds that all of `alive` share."""
    shared = set.intersection(*(set(times[a]) for a in alive))
    middle = {a: statistics.median(times[a][r] for r in shared) for a in alive}
    guess = min(alive, key=middle.__getitem__)
    return sorted(alive, key=lambda a: _ratio(times[a], times[guess])[0])


def _noise(present: dict[int, float], twin: dict[int, float]) -> float:
    if not twin:
        return FLOOR
    apart, error = _ratio(present, twin)
    # Of a twin that ran once it is not known; that of the lead counts, too.
    return max(FLOOR, abs(apart), error if len(twin) > 1 else 0.0)


def _decided(
    alive: Sequence[T], times: dict[T, dict[int, float]], present: T, twin: dict[int, float]
) -> bool:
    """Whether more rounds would change nothing: the lead over the plan in use is beyond doubt, or
    too small to count."""
    first = _ranked(alive, times)[0]
    noise = _noise(times[present], twin)
    lead, error = _ratio(times[present], times[first])
    return lead - SURE * error > noise or lead + SURE * error < noise


def _standing(entrant: T, own: dict[int, float], first: dict[int, float]) -> Standing[T]:
    middle = statistics.median(own.values())
    spread = statistics.median(abs(v - middle) for v in own.values()) / middle
    ratio, error = _ratio(own, first)
    return Standing(entrant, middle, spread, len(own), math.exp(ratio), error)
