"""SSMGEN_DEBUG: what a step does wrong with slots is noted on the device, and said when asked."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ssmgen
from ssmgen.errors import ArgumentValueError, PoolError

LAYER = ssmgen.LayerSpec(state=(2, 3, 4), conv=(5, 6), state_dtype=torch.float8_e4m3fn)
INTS = ssmgen.LayerSpec(state=(2, 3, 4), state_dtype=torch.int16)


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setenv("SSMGEN_DEBUG", "1")


@pytest.fixture
def pool(debug):
    return ssmgen.StatePool([LAYER, INTS], 12)


def metadata(pool):
    return ssmgen.DecodeMetadata(pool, max_rows=8, max_tokens=32, drafts=2)


def is_nan(pool, slot):
    """Which of the states of a slot, as a kernel decodes them, are all NaN."""
    decoded = pool.state(1)[slot].float() * pool.scale(1)[slot][..., None]
    return [
        t.float().isnan().all().item() for t in (pool.state(0)[slot], pool.conv(0)[slot], decoded)
    ]


def test_what_is_free_or_not_zeroed_is_nan(pool):
    assert is_nan(pool, 7) == [True] * 3
    zeroed, other = pool.alloc(2, zero=1)
    assert is_nan(pool, zeroed) == [False] * 3
    assert is_nan(pool, other) == [True] * 3
    pool.free([zeroed])
    assert is_nan(pool, zeroed) == [True] * 3
    old, kept = pool.state(0), pool.fork([other])
    pool.state(0)[kept] = 1
    pool.resize(20)
    assert old.float().isnan().all()
    assert (pool.state(0)[kept].float() == 1).all()
    assert is_nan(pool, 19) == [True] * 3


def test_a_reset_table_is_no_poison(pool):
    pool = ssmgen.StatePool([INTS], 4)
    pool.register("n", reset=1)
    slots = pool.alloc(4)
    assert (pool.table("n")[slots] == 1).all()


def test_right_steps_are_counted_and_nothing_is_raised(pool):
    meta = metadata(pool)
    rows = [pool.alloc(3), pool.alloc(3), pool.alloc(1)]
    for _ in range(4):
        meta.build(rows, [1, 3, 5], accepted=[3, 2, 1], prefill=[0, 0, 1], plain_rows=3)
    assert pool.check() == 4
    assert pool.check() == 0


# Rows of a step whose slots are wrong, and what is said of it. Slots 0 to 8 are allocated.
WRONG = {
    "row 1 reads slot 10, which is not allocated": ([[0], [10]], [1, 1], None),
    "row 2 writes slot 11, which is not allocated": ([[0], [1], [2, 3, 11]], [1, 1, 3], None),
    "row 0 writes slot 5, which another row writes too": ([[5], [6, 5]], [1, 2], None),
    "row 1 reads slot 6, which another row writes": ([[6], [7, 6]], [1, 1], [1, 2]),
    "row 1 writes slot 6 after two of its tokens": ([[5], [6, 7, 6]], [1, 3], None),
    "row 0 writes slot 8 after two of its tokens": ([[8, 8]], [2], None),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_slot_is_said_with_row_slot_and_step(pool, said):
    meta = metadata(pool)
    pool.alloc(9)
    slots, tokens, accepted = WRONG[said]
    meta.build([[0]], [1])
    meta.build(slots, tokens, accepted=accepted, plain_rows=4, verify_rows=2)
    meta.build([[0]], [1])
    with pytest.raises(PoolError, match=f"in 3 steps: .*{said} .step 2"):
        pool.check()
    assert pool.check() == 0


@pytest.mark.parametrize(
    ("said", "reads", "writes"),
    [("row 1 reads slot 40", [0, 40], [0, 1]), ("row 0 reads slot 12", [12, 0], [1, 0]),
     ("row 1 writes slot -3", [0, 1], [0, -3])],
)  # fmt: skip
def test_a_slot_outside_the_pool_is_seen_on_the_device(pool, said, reads, writes):
    pool.alloc(9)
    pool.validator.look(torch.arange(2), torch.tensor(reads), torch.tensor(writes)[:, None])
    with pytest.raises(PoolError, match=f"{said}, which lies outside the pool"):
        pool.check()


@pytest.mark.parametrize("slots", [[[0], [40]], [[0], [12]], [[0], [1, -3]], [[0], [-2]]])
def test_the_host_refuses_slots_outside_the_pool_before_anything_is_uploaded(pool, slots):
    meta = metadata(pool).build([[3]], [1])
    with pytest.raises(ArgumentValueError, match=r"slots: .* in row 1; allowed: 0 to 11"):
        meta.build(slots, [1, 1])
    with pytest.raises(ArgumentValueError, match=r"track: found 12 in row 0; allowed: 0 to 11"):
        meta.build([[0]], [1], track=[12])
    assert meta.plain.slots[:, 0].tolist() == [3]


def test_faults_are_counted_and_the_first_is_said(pool):
    meta = metadata(pool)
    pool.alloc(3)
    for slot in (7, 8, 9):
        meta.build([[0], [slot]], [1, 1])
    with pytest.raises(PoolError, match=r"row 1 reads slot 7, .* \(step 1; 3 in all\)"):
        pool.check()


def test_a_slot_twice_in_columns_that_are_not_written_is_nothing(pool):
    meta = metadata(pool)
    pool.alloc(9)
    meta.build([[1, 2, 2], [3, 3], [4, 5, 5]], [1, 1, 2], accepted=[3, 2, 1])
    assert pool.check() == 1


def test_a_slot_of_two_rows_is_said_of_both_even_where_one_has_it_twice(pool):
    meta = metadata(pool)
    pool.alloc(9)
    meta.build([[1, 2, 2], [3, 2]], [3, 2])
    with pytest.raises(
        PoolError, match=r"slot 2, which another row writes too .*3 in all"
    ) as error:
        pool.check()
    assert "after two" not in str(error.value)


def test_rows_of_all_partitions_are_looked_at_together(pool):
    meta = metadata(pool)
    pool.alloc(9)
    meta.build([[1], [3, 4], [1]], [1, 2, 4], prefill=[0, 0, 1])
    with pytest.raises(PoolError, match="writes slot 1, which another row writes too"):
        pool.check()


def test_a_freed_slot_is_seen_until_it_is_allocated_again(pool):
    meta = metadata(pool)
    slots = pool.alloc(3)
    pool.free([slots[1]])
    meta.build(slots, [1, 1, 1])
    with pytest.raises(PoolError, match=f"row 1 reads slot {slots[1]}, which is not allocated"):
        pool.check()
    assert pool.fork([slots[0]]) == [slots[1]]
    meta.build(slots, [1, 1, 1])
    pool.check()
    host = pool.offload([slots[1]])
    pool.free([slots[1]])
    assert pool.reload(host) == [slots[1]]
    pool.resize(30)
    meta.build([*slots, pool.alloc(pool.free_slots)[-1]], [1, 1, 1, 1])
    assert pool.check() == 1


@pytest.mark.parametrize(("count", "wrong"), [(0, True), (1, False), (2, False), (3, True)])
def test_a_count_on_the_device_that_names_no_column_is_seen(debug, count, wrong):
    pool = ssmgen.StatePool([INTS], 4)
    pool.register("n", reset=1, of="request")
    meta = metadata(pool)
    row = pool.alloc(2)
    pool.table("n")[row[0]] = count
    meta.build([row], [1], accepted=pool.table("n"), plain_rows=3)
    if wrong:
        with pytest.raises(
            PoolError, match=f"row 0 of slot {row[0]} has an accepted count outside"
        ):
            pool.check()
    else:
        assert pool.check() == 1


def test_slot_0_of_padding_is_no_slot_of_a_row(debug):
    pool = ssmgen.StatePool([INTS], 4, pad_slot_id=0)
    meta = metadata(pool)
    meta.build(pool.alloc(2), [1, 1], plain_rows=8)
    assert pool.check() == 1


def test_looking_waits_for_nothing(pool):
    waits = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(n in func.name() for n in ("_local_scalar_dense", "nonzero", "unique", "equal",
                                              "bincount", "masked_select")):  # fmt: skip
                waits.append(func.name())
            return func(*args, **(kwargs or {}))

    meta = metadata(pool)
    pool.alloc(9)
    with Waits():
        meta.build([[1, 10], [3, 4], [1, 11]], [1, 2, 4], accepted=[2, 1, 2], prefill=[0, 0, 1])
    assert not waits
    with pytest.raises(PoolError):
        pool.check()


def test_without_debug_nothing_is_looked_at(monkeypatch):
    monkeypatch.delenv("SSMGEN_DEBUG", raising=False)
    pool = ssmgen.StatePool([INTS], 4)
    metadata(pool).build([3], [1])
    assert pool.validator is None
    assert pool.check() == 0
