"""The race: finds the fastest within the noise, and changes nothing for less than that."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from ssmgen.tune.race import FINALISTS, LEAST, MOST, race


class Track:
    """Runs the entrants: true times, noise, and a drift that grows with every timing."""

    def __init__(self, times, noise=0.01, drift=0.0, seed=0):
        self.times, self.noise, self.drift = times, noise, drift
        self.random = random.Random(seed)
        self.now = 0.0
        self.rounds = []

    def clock(self):
        return self.now

    def round(self, entrants):
        self.rounds.append(list(entrants))
        found = []
        for entrant in entrants:
            slow = 1 + self.drift * len(self.rounds)
            micro = self.times[entrant] * slow * math.exp(self.random.gauss(0, self.noise))
            self.now += micro / 1e6
            found.append(micro)
        return found

    def run(self, present, seconds=1.0):
        return race(list(self.times), present, self.round, seconds=seconds, clock=self.clock)


MANY = {f"p{i}": 10 * (1 + 0.03 * i) for i in range(20)}


@pytest.mark.parametrize("seed", range(20))
def test_the_fastest_wins_by_about_what_it_is_faster(seed):
    found = Track(MANY, seed=seed).run("p7")
    assert found.changed
    assert MANY[found.winner] <= 10.3
    assert found.margin == pytest.approx(12.1 / MANY[found.winner] - 1, abs=0.03)
    assert found.margin > found.noise


@pytest.mark.parametrize("drift", [0.05, -0.01])
def test_a_drift_meets_all_alike(drift):
    wins = [Track(MANY, noise=0.002, drift=drift, seed=s).run("p3").winner for s in range(10)]
    assert wins == ["p0"] * 10


def test_the_plan_in_use_stays_if_nothing_is_faster_by_more_than_the_noise():
    same = {f"p{i}": 10.0 for i in range(12)}
    changed = sum(Track(same, noise=0.03, seed=s).run("p5").changed for s in range(200))
    # Of a dozen equals one is always first; it must seldom be first by so many standard errors.
    assert changed <= 20


def test_a_small_gain_counts_where_the_noise_is_smaller_still():
    times = {"old": 10.0, "new": 9.9}
    quiet = [Track(times, noise=0.0005, seed=s).run("old") for s in range(20)]
    assert all(found.winner == "new" for found in quiet)
    loud = [Track(times, noise=0.08, seed=s).run("old") for s in range(100)]
    assert sum(found.changed for found in loud) <= 15
    assert min(found.noise for found in loud) > 0.005


def test_less_than_the_floor_is_no_gain_however_sure():
    found = Track({"old": 10.0, "new": 9.98}, noise=0.0).run("old")
    assert not found.changed
    assert found.margin == 0


def test_half_go_after_each_stage_and_the_plan_in_use_never():
    track = Track(MANY, noise=0.001)
    found = track.run("p19")
    counts = [len(set(entrants)) for entrants in track.rounds]
    assert counts[:3] == [20, 20, 20]
    assert counts == sorted(counts, reverse=True)
    assert counts[3] <= 11
    assert counts[-1] <= FINALISTS + 1
    assert all("p19" in entrants for entrants in track.rounds)
    by_name = {s.entrant: s for s in found.standings}
    assert by_name["p15"].rounds == 3
    assert LEAST <= found.rounds <= MOST
    assert by_name["p0"].rounds == found.rounds
    assert found.standings[0].entrant == "p0"
    assert by_name["p19"].ratio == pytest.approx(1.57, rel=0.01)


def test_twice_as_slow_goes_after_one_round_unless_it_is_in_use():
    times = {"p0": 10.0, "p1": 10.1, "slow": 25.0, "old": 30.0}
    track = Track(times, noise=0.001)
    by_name = {s.entrant: s for s in track.run("old").standings}
    assert by_name["slow"].rounds == 1
    assert by_name["old"].rounds == by_name["p0"].rounds >= LEAST


@pytest.mark.parametrize(("struck", "by"), [("p1", 1.5), ("p3", 0.6)])
def test_one_bad_time_in_the_first_round_decides_nothing(struck, by):
    track = Track({"p0": 10.0, "p1": 9.0, "p2": 9.5, "p3": 10.2}, noise=0.001)
    real = track.round

    def round(entrants):
        found = real(entrants)
        if len(track.rounds) == 1:
            found[entrants.index(struck)] *= by
        return found

    track.round = round
    found = track.run("p0")
    assert found.winner == "p1"
    assert found.noise < 0.01


def test_a_twin_that_ran_once_is_not_yet_a_noise():
    # Nine entrants and a twin, after stages of ten without one: time for one round with it.
    times = {f"p{i}": 10 * (1 + 0.02 * i) for i in range(10)}
    for seconds in range(300, 900, 10):
        track = Track(times, noise=0.0001)
        found = track.run("p4", seconds / 1e6)
        twins = sum(len(r) > len(set(r)) for r in track.rounds)
        if found.rounds > 1 and twins == 1:
            assert found.noise < 0.01
            return
    raise AssertionError("no such race")


def test_the_plan_in_use_runs_beside_itself_and_that_is_the_noise():
    track = Track({"old": 10.0, "new": 9.0}, noise=0.001)
    real = track.round

    def biased(entrants):
        # What runs last in a round is 5% slower: no spread shows it, only the twin does.
        found = real(entrants)
        return [*found[:-1], found[-1] * 1.05]

    track.round = biased
    found = track.run("old")
    assert found.noise == pytest.approx(0.05, abs=0.01)
    assert found.changed
    close = Track({"old": 10.0, "new": 9.7}, noise=0.001)
    real = close.round
    close.round = biased
    assert not close.run("old").changed


def test_every_round_starts_somewhere_else():
    track = Track(MANY, noise=0.0)
    track.run("p0")
    assert [entrants[0] for entrants in track.rounds[:3]] == ["p0", "p1", "p2"]


def test_time_is_kept_and_one_round_is_run_without_any():
    # A round of 20 takes 0.26 ms.
    for seconds, most in ((0.0, 1), (0.0006, 2), (0.002, 20)):
        track = Track(MANY)
        found = track.run("p4", seconds)
        assert 1 <= found.rounds <= most
        assert track.now <= seconds + 0.0003 or found.rounds == 1
    # One round proves little: 3% are none, 24% are.
    assert not Track(MANY).run("p1", 0.0).changed
    assert Track(MANY).run("p8", 0.0).changed


def test_a_clear_case_ends_early_and_a_close_one_late():
    clear = Track({"old": 20.0, "new": 10.0}, noise=0.001).run("old")
    assert clear.rounds == LEAST
    # A gain of just the floor is what takes longest to tell.
    close = Track({"old": 10.03, "new": 10.0}, noise=0.01).run("old")
    assert close.rounds > LEAST


def test_the_same_run_twice_is_the_same():
    first, second = (Track(MANY, seed=3).run("p2") for _ in range(2))
    assert first == second


def test_one_entrant_alone_wins():
    found = Track({"only": 5.0}).run("only")
    assert (found.winner, found.changed, found.margin) == ("only", False, 0.0)
    assert found.standings[0].microseconds == pytest.approx(5, rel=0.05)


def test_standings_say_the_spread():
    found = {noise: Track({"a": 10.0, "b": 11.0}, noise=noise).run("a") for noise in (0.001, 0.05)}
    for (low, a), (high, b) in itertools.pairwise(found.items()):
        assert low < high
        assert a.standings[0].spread < b.standings[0].spread
        assert a.standings[1].error < b.standings[1].error
