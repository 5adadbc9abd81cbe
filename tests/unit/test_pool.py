"""StatePool: what a slot is, what its views promise, and what a caller may not do."""

from __future__ import annotations

import contextlib
import random
import threading
import time

import pytest
import torch

import ssmgen
from ssmgen.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    DeviceError,
    PoolError,
    PoolExhaustedError,
)

MAMBA = ssmgen.LayerSpec(state=(4, 8, 16), state_dtype=torch.float16, conv=(24, 6))
SCALED = ssmgen.LayerSpec(state=(2, 8, 24), state_dtype=torch.int8)
GDN = ssmgen.LayerSpec(state=(3, 10, 6), conv=(22, 5), conv_width=3)
LAYERS = [MAMBA, GDN, SCALED, MAMBA]


@pytest.fixture
def pool():
    return ssmgen.StatePool(LAYERS, 6)


def bytes_of(pool, slot):
    return pool._memory.slot(slot).clone()


# Layout


def views(pool):
    for layer, spec in enumerate(pool.layers):
        if spec.conv is not None:
            yield f"conv {layer}", pool.conv(layer), spec.conv, spec.conv_dtype
        if spec.state is not None:
            yield f"state {layer}", pool.state(layer), spec.state, spec.state_dtype
        if spec.scaled:
            yield f"scale {layer}", pool.scale(layer), spec.state[:-1], torch.float32


def test_views_are_packed_inside_aligned_and_of_one_allocation(pool):
    for _, view, shape, dtype in views(pool):
        assert view.shape == (6, *shape)
        assert view.dtype == dtype
        assert view[0].is_contiguous()
        assert view.stride(0) * view.element_size() == pool.slot_nbytes
        assert view.data_ptr() % 128 == 0
        assert view.untyped_storage().data_ptr() == pool.state(0).untyped_storage().data_ptr()
    assert pool.slot_nbytes % 128 == 0


def test_no_two_views_share_a_byte(pool):
    """Each is filled with its own number; then all are looked at."""
    pool.register("tag", (3,), torch.int16)
    pool.register("seed", dtype=torch.int64, of="request")
    named = [(name, view) for name, view, _, _ in views(pool)]
    named += [(name, pool.table(name)) for name in ("tag", "seed")]
    for number, (_, view) in enumerate(named):
        for slot in range(6):
            view[slot] = 10 * number + slot
    for number, (name, view) in enumerate(named):
        for slot in range(6):
            assert (view[slot] == 10 * number + slot).all(), name


def test_a_slot_is_one_run_of_bytes_with_all_layers_and_tables(pool):
    pool.register("tag", dtype=torch.int8)
    a, b = pool.alloc(2)
    for _, view, _, dtype in views(pool):
        view[a] = torch.randn(view[a].shape).mul(50).to(dtype)
    pool.table("tag")[a] = 7
    pool._memory.slot(b).copy_(pool._memory.slot(a))
    for name, view, _, _ in views(pool):
        assert torch.equal(view[a], view[b]), name
    assert pool.table("tag")[b] == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int16, torch.float8_e4m3fn])
def test_views_satisfy_the_contract_of_selective_state_update(dtype):
    layer = ssmgen.LayerSpec(state=(4, 8, 16), state_dtype=dtype, conv=(24, 4))
    pool = ssmgen.StatePool([layer] * 3, 5)
    slots = pool.alloc(3)
    scale = {"state_scale": pool.scale(1)} if layer.scaled else {}
    x, dt = torch.randn(2, 3, 4, 8)
    B, C = torch.randn(2, 3, 2, 16)
    A = -torch.rand(4, 1, 1).expand(4, 8, 16)
    arguments = {"dt": dt[..., :1].expand(3, 4, 8), "A": A, "B": B, "C": C}
    from ssmgen.families.ssu.contract import layout

    indices = torch.tensor(slots, dtype=torch.int32)
    described = layout(state=pool.state(1), x=x, out=x.clone(), state_batch_indices=indices,
                       **arguments, **scale)  # fmt: skip
    assert described.config.aligned
    before = [bytes_of(pool, slot) for slot in pool.alloc(2)]
    y = ssmgen.selective_state_update(
        pool.state(1), x, **arguments, state_batch_indices=indices, **scale
    )
    alone = torch.zeros(3, 4, 8, 16, dtype=dtype)
    alone_scale = {"state_scale": torch.ones(3, 4, 8)} if layer.scaled else {}
    assert torch.equal(y, ssmgen.selective_state_update(alone, x, **arguments, **alone_scale))
    assert torch.equal(pool.state(1)[slots].float(), alone.float())
    assert not pool.state(0)[slots].float().any()
    assert not pool.state(2)[slots].float().any()
    assert all(map(torch.equal, before, [bytes_of(pool, slot) for slot in (3, 4)]))


@pytest.mark.parametrize("transposed", [False, True])
def test_both_layouts_are_views_of_one_memory_and_nothing_converts(transposed):
    """A prefill that thinks (K, V) and a decode that thinks (V, K) see the same state."""
    layer = ssmgen.LayerSpec(
        state=(2, 5, 3), state_transposed=transposed, conv=(4, 6), conv_transposed=transposed
    )
    pool = ssmgen.StatePool([layer], 2)
    [slot] = pool.alloc()
    vk, kv = pool.state(0), pool.state(0).mT
    assert vk.shape[1:] == (2, 5, 3)
    assert kv.shape[1:] == (2, 3, 5)
    assert (kv if transposed else vk)[slot].is_contiguous()
    assert (pool.conv(0).mT if transposed else pool.conv(0))[slot].is_contiguous()
    assert vk.data_ptr() == kv.data_ptr()
    wanted = torch.randn(2, 5, 3)
    kv[slot] = wanted.mT
    assert torch.equal(vk[slot], wanted)
    copy = pool.fork([slot])[0]
    assert torch.equal(pool.state(0)[copy], wanted)
    pool.free([slot])
    [back] = pool.reload(pool.offload([copy]))
    assert torch.equal(pool.state(0).mT[back], wanted.mT)


def test_a_pool_takes_no_memory_before_its_first_use(pool):
    assert not pool._memory.taken
    pool.register("tag")
    assert pool.table("tag").shape == (6,)
    with pytest.raises(PoolError, match="late: registered after the first use"):
        pool.register("late")


@pytest.mark.parametrize("debug", ["0", "1"])
def test_what_is_made_in_inference_mode_can_be_used_outside_of_it(monkeypatch, debug):
    monkeypatch.setenv("SSMGEN_DEBUG", debug)
    with torch.inference_mode():
        pool = ssmgen.StatePool(LAYERS, 6)
        pool.register("n", reset=1)
        meta = ssmgen.DecodeMetadata(pool, max_rows=4, max_tokens=4, drafts=1)
        taken = pool.alloc(2)
        meta.build(taken, [1, 1], prefill=[True, False], first=[True, False])
        pool.free(taken)
        views = pool.state(0), pool.table("n")
    [slot] = pool.alloc()
    for view in views:
        view[slot] = 1
    meta.build([slot], [1], accepted=pool.table("n"))
    with torch.inference_mode():
        pool.resize(8)
        meta.build([slot], [1], prefill=[True], first=[True])
    meta.build([slot], [1], prefill=[True], first=[True])
    pool.copy([slot], pool.alloc())
    pool.state(0)[slot] = 1
    meta.build([slot], [1])
    pool.check()


# Lives


def test_a_fresh_slot_is_zero_and_its_tables_are_reset(pool):
    pool.register("n", reset=1, of="request")
    pool.register("w", (2,), torch.float64, reset=0.5)
    pool.register("on", dtype=torch.bool, reset=True)
    slots = pool.alloc(6)
    for slot in slots:
        pool._memory.slot(slot).fill_(0x77)
    pool.free(slots)
    slots = pool.alloc(4, zero=3)
    for name, view, _, _ in views(pool):
        assert not view[slots[:3]].float().any(), name
        assert view[slots[3]].float().any(), name
    for name, value in (("n", 1), ("w", 0.5), ("on", True)):
        assert (pool.table(name)[slots] == value).all()


def test_exhaustion_changes_nothing(pool):
    pool.alloc(4)
    with pytest.raises(PoolExhaustedError, match="3 slots asked for, 2 of 6 are free") as error:
        pool.alloc(3)
    assert isinstance(error.value, RuntimeError)
    host = pool.offload([0, 1, 2])
    for call in (lambda: pool.fork([0, 1, 2]), lambda: pool.reload(host)):
        with pytest.raises(PoolExhaustedError):
            call()
        assert pool.free_slots == 2
    assert len(set(pool.alloc(2)) | {0, 1, 2, 3}) == 6


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.free([2, 4]), PoolError, "slots: slot 4 is not allocated"),
        (lambda p: p.free([2, 1, 2]), PoolError, "slots: slot 2 is named twice"),
        (lambda p: p.free([6]), ArgumentValueError, "slots: found slot 6; allowed: 0 to 5"),
        (lambda p: p.free([-1]), ArgumentValueError, "slots: found slot -1; allowed: 0 to 5"),
        (lambda p: p.copy([5], [0]), PoolError, "src: slot 5 is not allocated"),
        (lambda p: p.copy([0], [5]), PoolError, "dst: slot 5 is not allocated"),
        (lambda p: p.copy([0, 1], [2, 2]), PoolError, "dst: slot 2 is named twice"),
        (lambda p: p.copy([0, 1], [1, 2]), PoolError, "dst: slot 1 is a source too"),
        (lambda p: p.copy([0, 1], [2]), ArgumentValueError, "dst: found 1 slots; allowed: 2"),
        (lambda p: p.fork([0, 4]), PoolError, "slots: slot 4 is not allocated"),
        (lambda p: p.fork([0, 1], 3), ArgumentValueError, "accepted: found 3; allowed: 1 to 2"),
        (lambda p: p.fork([0, 1], 0), ArgumentValueError, "accepted: found 0; allowed: 1 to 2"),
        (lambda p: p.checkpoint([[0, 4]], [2]), PoolError, "tables: slot 4 is not allocated"),
        (lambda p: p.checkpoint([[0, 1]], [1]), PoolError, "dst: slot 1 is in tables too"),
        (lambda p: p.checkpoint([[0]], [1], [2]), ArgumentValueError, "accepted: found 2"),
        (lambda p: p.checkpoint([[0]], [1], []), ArgumentValueError, "accepted: found 0; allowed"),
        (lambda p: p.checkpoint([[]], [1]), ArgumentValueError, "a row of no slots"),
        (lambda p: p.offload([4]), PoolError, "slots: slot 4 is not allocated"),
        (lambda p: p.resize(5), ArgumentValueError, "slots: found 5; allowed: at least 6"),
        (lambda p: p.alloc(0), ArgumentValueError, "count: found 0; allowed: at least 1"),
        (lambda p: p.alloc(2, zero=3), ArgumentValueError, "zero: found 3; allowed: 0 to 2, the"),
        (lambda p: p.alloc(2, zero=-1), ArgumentValueError, "zero: found -1; allowed: at least 0"),
        (lambda p: p.alloc(1.5), ArgumentTypeError, "count: found 1.5; allowed: an int"),
        (lambda p: p.free(1), ArgumentTypeError, "slots: found 1; allowed: a list of slots"),
        (lambda p: p.reload([0]), ArgumentTypeError, "host: found list; allowed: what offload"),
        (lambda p: ssmgen.DecodeMetadata([p], max_rows=1, max_tokens=1), ArgumentTypeError,
         "pool: found list; allowed: a StatePool"),
        (lambda p: p.free(["1"]), ArgumentTypeError, "slots: found '1'; allowed: an int"),
        (lambda p: p.conv(2), ArgumentValueError, "conv: found 2; this pool has 0, 1, 3"),
        (lambda p: p.table("x"), ArgumentValueError, "table: found 'x'; this pool has n"),
    ],
)  # fmt: skip
def test_misuse_is_an_error_that_changes_nothing(call, error, message):
    pool = ssmgen.StatePool(LAYERS, 6)
    pool.register("n")
    slots = pool.alloc(4)
    for slot in slots:
        pool._memory.slot(slot).random_()
    before = [bytes_of(pool, slot) for slot in range(6)]
    with pytest.raises(error, match=message):
        call(pool)
    assert all(map(torch.equal, before, [bytes_of(pool, slot) for slot in range(6)]))
    assert pool.free_slots == 6 - len(slots)


def test_a_slot_is_freed_once(pool):
    slots = pool.alloc(3)
    pool.free(slots[1:])
    with pytest.raises(PoolError, match=f"slots: slot {slots[1]} is not allocated"):
        pool.free(slots)
    assert pool.free_slots == 5


def test_a_checkpoint_needs_the_columns_of_the_conv_history():
    pool = ssmgen.StatePool([ssmgen.LayerSpec(conv=(2, 5), conv_width=4)], 5)
    *slots, to = pool.alloc(5)
    with pytest.raises(ArgumentValueError, match="found 4 slots in a row; allowed: 1 to 3, as a"):
        pool.checkpoint([slots], [to], [1])
    pool.conv(0)[slots[0]] = torch.arange(5)
    pool.checkpoint([slots[:3]], [to], [3])
    assert pool.conv(0)[to, 0, :3].tolist() == [2, 3, 4]


def test_layers_and_tables_that_cannot_be_are_refused():
    spec = ssmgen.LayerSpec
    for error, message, make in [
        (ArgumentValueError, "neither state nor conv", lambda: spec()),
        (ArgumentValueError, "state: found .8,.; allowed: 2 or more", lambda: spec(state=(8,))),
        (ArgumentValueError, "conv: found .8, 0.", lambda: spec(conv=(8, 0))),
        (ArgumentValueError, "conv_width: found 8; allowed: 2 to 7",
         lambda: spec(conv=(8, 6), conv_width=8)),
        (ArgumentTypeError, "state_dtype: found torch.int32",
         lambda: spec(state=(8, 8), state_dtype=torch.int32)),
        (ArgumentTypeError, "conv_dtype: found torch.int8",
         lambda: spec(conv=(8, 6), conv_dtype=torch.int8)),
        (ArgumentValueError, "state_transposed: found True with a torch.int8",
         lambda: spec(state=(8, 8), state_dtype=torch.int8, state_transposed=True)),
        (ArgumentValueError, "layers: found none", lambda: ssmgen.StatePool([], 4)),
        (ArgumentValueError, "slots: found 0", lambda: ssmgen.StatePool([GDN], 0)),
        (ArgumentTypeError, "layers: found tuple", lambda: ssmgen.StatePool([(1, 2)], 4)),
        (ArgumentValueError, "pad_slot_id: found 1; allowed: -1, 0",
         lambda: ssmgen.StatePool([GDN], 4, pad_slot_id=1)),
        (RuntimeError, "device: found meta", lambda: ssmgen.StatePool([GDN], 4, "meta")),
        (ArgumentValueError, "of: found 'slot'",
         lambda: ssmgen.StatePool([GDN], 4).register("x", of="slot")),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            make()
    pool = ssmgen.StatePool([GDN], 4)
    pool.register("x")
    with pytest.raises(ArgumentValueError, match="x: is registered already"):
        pool.register("x")


@pytest.mark.parametrize(("device", "words"), [("gpu", "cuda:N"), ("cuda", "no GPU here")])
def test_a_device_that_is_not_here_is_named(device, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=f"device: found '{device}'; .*{words}"):
        ssmgen.StatePool([GDN], 3, device)


def test_a_bare_cuda_is_the_current_gpu_from_then_on(monkeypatch):
    monkeypatch.delenv("SSMGEN_DEBUG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    pool = ssmgen.StatePool([GDN], 3, "cuda")
    assert pool.device == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    assert pool.device == torch.device("cuda", 3)
    assert ssmgen.StatePool([GDN], 3, "cuda:1").device.index == 1


def test_slot_0_is_never_handed_out_where_it_is_padding():
    pool = ssmgen.StatePool([GDN], 3, pad_slot_id=0)
    assert len(pool.state(0)) == 4
    assert sorted(pool.alloc(3)) == [1, 2, 3]
    with pytest.raises(ArgumentValueError, match="found slot 0; allowed: 1 to 3"):
        pool.free([0])
    pool.resize(4)
    assert pool.alloc() == [4]


def contend(pool):
    """Eight threads that allocate and free, each losing the processor at random lines of the
    allocator. What went wrong: slots with two owners, errors, slots that are lost."""
    owner, faults = [None] * pool.slots, []
    chance = random.Random(0)

    def yields(frame, event, argument):
        if not frame.f_code.co_filename.endswith("allocator.py"):
            return None
        if event == "line" and chance.random() < 0.3:
            time.sleep(0)
        return yields

    def work(me):
        try:
            for _ in range(60):
                try:
                    slots = pool.alloc(3)
                except PoolExhaustedError:
                    continue
                faults.extend(slot for slot in slots if owner[slot] is not None)
                for slot in slots:
                    owner[slot] = me
                time.sleep(0)
                for slot in slots:
                    owner[slot] = None
                pool.free(slots)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    threading.settrace(yields)
    try:
        for thread in threads:
            thread.start()
    finally:
        threading.settrace(None)
    for thread in threads:
        thread.join()
    lost = pool.slots - pool.free_slots
    return faults + [f"{lost} slots are lost"] * bool(lost)


def test_threads_never_get_one_slot_twice():
    assert not contend(ssmgen.StatePool([ssmgen.LayerSpec(state=(1, 1))], 20))


def test_threads_would_without_the_lock():
    pool = ssmgen.StatePool([ssmgen.LayerSpec(state=(1, 1))], 20)
    pool._lock = contextlib.nullcontext()
    assert contend(pool)


# Moves


def test_reload_takes_only_slots_of_the_same_layers_and_tables(pool):
    host = pool.offload(pool.alloc(2))
    assert len(host) == 2
    assert host.nbytes == 2 * pool.slot_nbytes
    assert host.ready()
    other = ssmgen.StatePool(LAYERS, 6)
    assert len(other.reload(host)) == 2
    other = ssmgen.StatePool(LAYERS, 6)
    other.register("n")
    with pytest.raises(ArgumentValueError, match="other layers or side tables"):
        other.reload(host)
    with pytest.raises(ArgumentValueError, match="other layers or side tables"):
        ssmgen.StatePool([GDN], 6).reload(host)


def test_a_move_of_a_slot_is_one_copy_however_many_layers(pool):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Ops(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.copies = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "copy" in func.name():
                self.copies.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    pool.register("tag")
    a, b = pool.alloc(2)
    with Ops() as ops:
        pool.copy([a], [b])
        pool.fork([a])
        pool.reload(pool.offload([a]))
    assert ops.copies == [pool.slot_nbytes] * 4


def test_resize_keeps_numbers_and_contents(pool):
    slots = pool.alloc(5)
    pool.free([slots.pop(2)])
    for slot in slots:
        pool._memory.slot(slot).random_()
    before = {slot: bytes_of(pool, slot) for slot in slots}
    old = pool.state(0)
    pool.resize(9)
    assert pool.slots == 9
    assert all(torch.equal(bytes_of(pool, slot), was) for slot, was in before.items())
    assert pool.state(0).data_ptr() != old.data_ptr()
    assert len(set(pool.alloc(5)) | set(slots)) == 9
