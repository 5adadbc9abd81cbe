"""What a step does to the states: prompts that begin, checkpoints; and the host memory it takes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from steps import STEP, VIEWS, Ops, metadata, whole_memory

import ssmgen
from ssmgen.errors import ArgumentValueError, PoolError
from ssmgen.serving.tables import Ring, Staging

# Prompts that begin

STATEFUL = ssmgen.LayerSpec(state=(1, 2, 3), state_dtype=torch.int8, conv=(2, 6))


@pytest.mark.parametrize("counts", ["host", "table"])
def test_a_prompt_that_begins_starts_from_nothing_whatever_its_slot_holds(counts):
    pool = ssmgen.StatePool([STATEFUL] * 2, 12)
    pool.register("accepted", reset=1, of="request")
    pool.register("tag", of="state")
    slots = pool.alloc(12)
    for layer in range(2):
        for view in (pool.state(layer), pool.scale(layer), pool.conv(layer)):
            view.fill_(3)
    pool.table("accepted").fill_(2)
    pool.table("tag").fill_(5)
    accepted = [2, 2, 2, 1] if counts == "host" else pool.table("accepted")
    meta = metadata(pool=pool)
    meta.build([slots[:3], slots[3:6], slots[6:8], [slots[8]]], [1, 4, 2, 1], accepted=accepted,
               prefill=[False, True, True, True], first=[False, True, False, True])  # fmt: skip
    begun = [slots[3], slots[8]]
    assert meta.begun_slots.tolist() == begun
    assert meta.prefill.read_slots.tolist() == [slots[3], slots[7], slots[8]]
    for layer in range(2):
        for view in (pool.state(layer), pool.scale(layer), pool.conv(layer)):
            for slot in slots:
                assert (view[slot].float() == (0 if slot in begun else 3)).all()
    assert (pool.table("tag") == 5).all()
    assert (pool.table("accepted") == 2).all()


def test_the_states_of_all_prompts_that_begin_are_zeroed_by_one_kernel():
    pool = ssmgen.StatePool([STATEFUL] * 4, 12)
    meta, slots = metadata(pool=pool), pool.alloc(8, zero=0)
    step = {"slots": slots, "tokens": [2] * 8, "prefill": [True] * 8}
    meta.build(**step)
    with Ops() as ops:
        meta.build(**step)
    with Ops() as more:
        meta.build(**step, first=[True] * 8)
    extra = Counter(more.names) - Counter(ops.names)
    assert {name: n for name, n in extra.items() if name not in VIEWS} == {"index_fill_": 1}
    assert len(more.copies) == 1


def test_a_prompt_begins_only_in_a_slot_that_is_allocated():
    pool = ssmgen.StatePool([STATEFUL], 12)
    meta, slots = metadata(pool=pool), pool.alloc(2)
    meta.build(slots, [1, 1])
    before = [whole_memory(meta).clone(), pool.state(0).clone()]
    for wrong, error in (
        (7, "slots: slot 7 is not allocated"),
        (slots[0], f"slots: slot {slots[0]} is named twice"),
    ):
        with pytest.raises(PoolError, match=error):
            meta.build([slots[0], wrong], [1, 1], prefill=[1, 1], first=[1, 1])
    with pytest.raises(ArgumentValueError, match=r"slots: found .12, .* allowed: 0 to 11"):
        meta.build([12], [1], prefill=[1], first=[1])
    assert torch.equal(whole_memory(meta), before[0])
    assert torch.equal(pool.state(0), before[1])


def test_one_prompt_twice_in_a_slot_gives_the_same_bits():
    pool = ssmgen.StatePool([ssmgen.LayerSpec(state=(2, 16, 8))], 4)
    meta, slots = metadata(pool=pool), pool.alloc()
    gen = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, *shape, generator=gen) for shape in ((1, 8), (1, 8), (2, 16))]
    a, b = torch.randn(2, 3, 2, generator=gen)

    def run():
        meta.build(slots, [3], prefill=[True], first=[True])
        return ssmgen.gated_delta_rule_decode(
            pool.state(0), *inputs, torch.zeros(2), a, torch.zeros(2), b, **meta.prefill.recurrent
        )

    assert torch.equal(run(), run())


# Host memory


class Event:
    """An upload that is done when the test says so."""

    def __init__(self):
        self.done = True

    def query(self):
        return self.done

    def record(self, stream):
        self.done = False


def test_host_memory_is_filled_again_only_when_its_upload_is_done():
    made = []

    def make():
        made.append(Staging(torch.zeros(8, dtype=torch.uint8), lambda memory: {}, Event()))
        return made[-1]

    ring = Ring(make)

    def step():
        staging = ring.take()
        assert staging.event.done
        staging.event.record(None)
        return staging

    first = [step() for _ in range(5)]
    assert len({*map(id, first)}) == len(ring) == len(made) == 5
    for staging in first[:3]:
        staging.event.done = True
    assert [step() for _ in range(3)] == first[:3]
    assert len(made) == 5
    assert step() not in first
    for staging in made:
        staging.event.done = True
    for _ in range(20):
        step().event.done = True
    assert len(made) == 6


def test_a_step_takes_the_host_memory_of_earlier_ones():
    meta = metadata()
    stagings = []
    begin = meta._tables.begin
    meta._tables.begin = lambda last: stagings.append(begin(last)) or stagings[-1]
    for _ in range(6):
        meta.build(**STEP)
    assert len({*map(id, stagings)}) == len(meta._tables._ring) == 2


# Checkpoints


@pytest.mark.parametrize("on_device", [False, True])
def test_a_tracked_row_without_drafts_accepts_its_one_token_whatever_is_said(on_device):
    pool = ssmgen.StatePool([ssmgen.LayerSpec(state=(1, 2, 3), conv=(2, 6))], 12)
    meta = metadata(pool=pool)
    plain, chunk, saved = (pool.alloc(n) for n in (4, 4, 2))
    for slot in range(12):
        pool.state(0)[slot] = slot
        pool.conv(0)[slot] = 10 * slot + torch.arange(6)
    meta.build([plain, chunk], [1, 3], accepted=[3, 2], prefill=[0, 1], track=saved)
    meta.checkpoint(torch.tensor([3, 3]) if on_device else [3, 3])
    assert pool.state(0)[saved, 0, 0, 0].tolist() == [plain[0], chunk[0]]
    assert pool.conv(0)[saved, 0, 0].tolist() == [10 * plain[0], 10 * chunk[0]]


def test_a_tracked_row_accepts_no_more_than_its_tokens():
    pool = ssmgen.StatePool([ssmgen.LayerSpec(state=(1, 2, 3))], 12)
    meta, row, saved = metadata(pool=pool), pool.alloc(4), pool.alloc()
    for slot in range(12):
        pool.state(0)[slot] = slot
    meta.build([row], [2], track=saved)
    for wrong in (0, 3):
        with pytest.raises(ArgumentValueError, match=f"found {wrong} in row 0; allowed: 1 to 2"):
            meta.checkpoint([wrong])
    # The device clamps: the host does not see the count.
    for n, column in ((0, 0), (1, 0), (2, 1), (4, 1)):
        meta.checkpoint(torch.tensor([n]))
        assert pool.state(0)[saved[0], 0, 0, 0] == row[column]


@pytest.mark.parametrize("on_device", [False, True])
def test_a_tracked_row_is_checkpointed_at_what_it_accepted(on_device):
    pool = ssmgen.StatePool([ssmgen.LayerSpec(state=(1, 2, 3), conv=(2, 6))], 12)
    meta = metadata(pool=pool)
    plain, verify, chunk, saved = (pool.alloc(n) for n in (4, 4, 1, 3))
    for slot in range(12):
        pool.state(0)[slot] = slot
        pool.conv(0)[slot] = 10 * slot + torch.arange(6)
    meta.build([plain, verify, chunk], [1, 3, 5], accepted=[3, 4, 1], prefill=[0, 0, 1],
               track=saved)  # fmt: skip
    counts = [1, 2, 0]
    if not on_device:
        with pytest.raises(ArgumentValueError, match=r"accepted: found None; .* row 1 has drafts"):
            meta.checkpoint()
    with pytest.raises(ArgumentValueError, match="accepted: found 2; allowed: 3"):
        meta.checkpoint(counts[:2])
    meta.checkpoint(torch.tensor(counts) if on_device else counts)
    assert pool.state(0)[saved, 0, 0, 0].tolist() == [plain[0], verify[1], chunk[0]]
    histories = [[10 * slot + n - 1 + i for i in range(3)]
                 for slot, n in ((plain[0], 1), (verify[0], 2), (chunk[0], 1))]  # fmt: skip
    assert pool.conv(0)[saved, 0, :3].tolist() == histories


def test_arrays_may_be_filled_again_once_a_step_is_built():
    """An engine keeps its arrays from step to step; a checkpoint comes after the layers."""
    pool = ssmgen.StatePool([ssmgen.LayerSpec(state=(1, 2, 3))], 12)
    row, (saved,) = pool.alloc(4), pool.alloc()
    for slot in range(12):
        pool.state(0)[slot] = slot
    arrays = {
        "slots": np.array([row]), "tokens": np.array([3]), "accepted": np.array([2]),
        "prefill": np.array([False]), "first": np.array([False]), "track": np.array([saved]),
    }  # fmt: skip
    meta = metadata(pool=pool).build(**arrays)
    for array in arrays.values():
        array[:] = 1
    meta.checkpoint([3])
    assert pool.state(0)[saved, 0, 0, 0] == row[2]
    assert meta.verify.rows.tolist() == [0]


def test_nothing_tracked_is_nothing_done_and_a_pool_is_needed():
    pool = ssmgen.StatePool([ssmgen.LayerSpec(state=(1, 2, 3))], 4)
    meta = metadata(pool=pool).build(pool.alloc(2), [1, 1])
    with Ops() as ops:
        meta.checkpoint()
    assert not ops.copies
    meta = metadata().build([0, 1], [1, 1])
    with pytest.raises(ArgumentValueError, match="pool: found None"):
        meta.checkpoint()
