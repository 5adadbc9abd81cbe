"""The lives of slots: 10,000 operations against a plain model, and every invariant broken once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pool_model import LIVE, OPERATIONS, Engine


@pytest.mark.parametrize("debug", ["0", "1"])
def test_every_slot_holds_what_the_model_says_through_10000_operations(monkeypatch, debug):
    monkeypatch.setenv("SSMGEN_DEBUG", debug)
    engine = Engine(seed=0)
    engine.run(operations := 10_000 if debug == "0" else 2_000)
    assert engine.pool.slots > 24
    least = operations // 100
    assert all(engine.done[name] > least for name in OPERATIONS if name != "resize"), engine.done


def left_behind(part, key):
    """A pool whose `method` moves everything but one view of the slots."""

    def mutate(pool, method):
        original = getattr(pool, method)

        def broken(*arguments, **options):
            before = getattr(pool, part)(key).clone()
            made = original(*arguments, **options)
            view = getattr(pool, part)(key)
            if method == "resize":
                view.zero_()
                return made
            slots = made if isinstance(made, list) else arguments[1]
            view[slots] = before[slots]
            return made

        setattr(pool, method, broken)

    return mutate


MOVES = ("copy", "fork", "checkpoint", "reload", "resize")


@pytest.mark.parametrize("method", MOVES)
@pytest.mark.parametrize(
    ("part", "key"),
    [("table", "layout"), ("state", 1), ("scale", 0), ("conv", 1)],
    ids=lambda value: str(value),
)
def test_what_does_not_move_with_its_slot_is_caught(part, key, method):
    engine = Engine(seed=1)
    left_behind(part, key)(engine.pool, method)
    with pytest.raises(AssertionError, match="wrong"):
        engine.run(1_000)


@pytest.mark.parametrize("table", ["accepted", "seed"])
@pytest.mark.parametrize("method", ["fork", "reload", "resize"])
def test_what_does_not_move_with_its_request_is_caught(table, method):
    engine = Engine(seed=1)
    left_behind("table", table)(engine.pool, method)
    with pytest.raises(AssertionError, match=r"wrong|accepted"):
        engine.run(1_000)


def checkpoint_of_column_0(pool):
    original = pool.checkpoint
    pool.checkpoint = lambda tables, dst, *_, **__: original([t[:1] for t in tables], dst)


def checkpoint_without_shift(pool):
    original = pool.checkpoint

    def broken(tables, dst, *counts, **options):
        original(tables, dst, *counts, **options)
        for layer in range(len(pool.layers)):
            history = pool.conv(layer)
            history[dst[0], :, :LIVE] = history[tables[0][0], :, :LIVE]

    pool.checkpoint = broken


def checkpoint_keeps_counts(pool):
    original = pool.checkpoint

    def broken(tables, dst, *counts, **options):
        original(tables, dst, *counts, **options)
        pool.table("accepted")[dst] = pool.table("accepted")[[t[0] for t in tables]]

    pool.checkpoint = broken


def alloc_without_reset(pool):
    original = pool.alloc

    def broken(count=1, *, zero=None):
        names = ("layout", "accepted", "seed")
        before = [pool.table(name).clone() for name in names]
        slots = original(count, zero=zero)
        for name, values in zip(names, before):
            pool.table(name)[slots] = values[slots]
        return slots

    pool.alloc = broken


def alloc_without_zeros(pool):
    original = pool.alloc
    pool.alloc = lambda count=1, *, zero=None: original(count, zero=0)


def fork_of_column_0(pool):
    original = pool.fork
    pool.fork = lambda slots, accepted=None: original(slots, accepted and 1)


def free_of_all_but_one(pool):
    original = pool.free
    pool.free = lambda slots: original(slots[:-1])


def exhaustion_that_keeps_slots(pool):
    original = pool.alloc

    def broken(count=1, *, zero=None):
        if 0 < pool.free_slots < count:
            original(1)
        return original(count, zero=zero)

    pool.alloc = broken


def free_that_frees_twice(pool):
    original = pool.free

    def broken(slots):
        original(slots)
        pool._slots._free.append(slots[0])

    pool.free = broken


def prompts_that_begin_as_they_are(pool):
    pool.zero_states = lambda slots: None


@pytest.mark.parametrize(
    "mutate",
    [
        prompts_that_begin_as_they_are,
        checkpoint_of_column_0,
        checkpoint_without_shift,
        checkpoint_keeps_counts,
        alloc_without_reset,
        alloc_without_zeros,
        fork_of_column_0,
        free_of_all_but_one,
        exhaustion_that_keeps_slots,
        free_that_frees_twice,
    ],
)
def test_a_broken_invariant_is_caught(monkeypatch, mutate):
    # Memory that is not new may hold zeros, where only an old slot shows what was not cleared.
    engine = Engine(seed=2)
    engine.pool._memory._bytes.fill_(0x55)
    mutate(engine.pool)
    with pytest.raises(AssertionError):
        engine.run(1_000)


def reads_column_0(metadata):
    original = metadata.build

    def broken(*arguments, **options):
        original(*arguments, **options)
        for part in (metadata.plain, metadata.verify, metadata.prefill):
            part.read_slots.copy_(part.write_slots)
        return metadata

    metadata.build = broken


def reads_the_history_at_column_0(metadata):
    original = metadata.build

    def broken(*arguments, **options):
        original(*arguments, **options)
        metadata.plain.num_accepted_tokens.fill_(1)
        return metadata

    metadata.build = broken


def checkpoint_believes_counts_of_all_rows(metadata):
    original = metadata.checkpoint

    def broken(accepted):
        most = metadata._rows.tokens
        object.__setattr__(metadata._rows, "kind", np.ones_like(metadata._rows.kind))
        metadata._tables.get("track_most", 0, 1).copy_(
            torch.from_numpy(most[metadata._rows.tracked].copy())
        )
        original(torch.as_tensor(accepted))

    metadata.checkpoint = broken


BROKEN = [reads_column_0, reads_the_history_at_column_0, checkpoint_believes_counts_of_all_rows]


@pytest.mark.parametrize("mutate", BROKEN)
def test_a_broken_table_is_caught(mutate):
    engine = Engine(seed=2)
    mutate(engine.metadata)
    with pytest.raises(AssertionError):
        engine.run(1_000)


def test_the_two_layouts_are_told_apart():
    """Without K != V a state read in the wrong layout could pass."""
    engine = Engine(seed=3)
    engine.run(50)
    slots, held = engine.requests[-1]
    engine.advance(len(engine.requests) - 1, 1, [0], True, 1)
    slots, held = engine.requests[-1]
    engine.expect(slots, held)
    engine.tables("layout")[slots[0]] = 0
    with pytest.raises(AssertionError, match="states of layer 0"):
        engine.expect(slots, held)
