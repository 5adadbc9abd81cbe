"""StatePool and DecodeMetadata on a GPU: no wait, one pinned upload, graphs, streams."""

from __future__ import annotations

import pytest
import torch
from serving import assert_close, assert_same_outputs
from serving_gdn import Server, exact
from waiting import no_waiting

import ssmgen
from ssmgen.errors import PoolError

pytestmark = pytest.mark.gpu

MAMBA = ssmgen.LayerSpec(state=(4, 16, 32), state_dtype=torch.float16, conv=(96, 6))
STEP = {
    "tokens": [1, 4, 6, 1],
    "accepted": [3, 2, 1, 1],
    "prefill": [False, False, True, False],
    "first": [False, False, True, False],
}


def made(slots=32, **options):
    pool = ssmgen.StatePool([MAMBA] * 3, slots, "cuda", **options)
    pool.register("accepted", reset=1, of="request")
    meta = ssmgen.DecodeMetadata(pool, max_rows=8, max_tokens=64, drafts=3)
    rows = [pool.alloc(4, zero=1) for _ in STEP["tokens"]]
    meta.build(rows, **STEP)
    return pool, meta, rows


@pytest.mark.parametrize("debug", ["0", "1"])
@pytest.mark.parametrize("counts", ["host", "table"])
def test_no_call_waits_for_the_device(monkeypatch, debug, counts):
    monkeypatch.setenv("SSMGEN_DEBUG", debug)
    pool, meta, rows = made()
    saved = pool.alloc(4)
    meta.build(rows, **STEP, track=saved)
    sampled = torch.tensor([1, 2, 1, 1], device="cuda")
    x = torch.zeros(64, 5, device="cuda")
    step = STEP if counts == "host" else STEP | {"accepted": pool.table("accepted")}
    with no_waiting():
        for _ in range(3):
            meta.build(rows, **step, track=saved, plain_rows=4, verify_rows=4)
            for layer in range(3):
                assert pool.state(layer).is_cuda
                for part in (meta.plain, meta.verify, meta.prefill):
                    assert part.recurrent
                    assert part.conv(pool.conv(layer))
                    part.put(x, part.take(x))
            pool.table("accepted").index_copy_(0, meta.first_slots, sampled.int())
            meta.checkpoint(sampled)
            meta.checkpoint([1, 2, 1, 1])
        host = pool.offload(saved)
        pool.free(saved)
        saved = pool.reload(host)
        twin = pool.fork(saved)
        pool.copy(saved, twin)
        pool.free(twin)
        pool.resize(40)
    assert pool.check() == (0 if debug == "0" else 5)


def test_faults_are_found_on_the_device(monkeypatch):
    monkeypatch.setenv("SSMGEN_DEBUG", "1")
    pool, meta, rows = made()
    pool.check()
    pool.free([rows[0][2]])
    meta.build(rows, **STEP)
    with pytest.raises(PoolError, match=f"row 0 reads slot {rows[0][2]}, which is not allocated"):
        pool.check()
    assert pool.state(0)[rows[0][2]].isnan().all()


def test_a_step_uploads_once_from_pinned_memory(monkeypatch):
    _, meta, rows = made()
    copies = []
    original = torch.Tensor.copy_

    def copy(self, source, non_blocking=False):
        copies.append((source.is_pinned(), non_blocking))
        return original(self, source, non_blocking=non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    meta.build(rows, **STEP, plain_rows=4)
    assert copies == [(True, True)]


def test_steps_built_ahead_of_the_device_do_not_overwrite_each_other():
    """The host may be many steps ahead: what it uploads must stay until it is copied."""
    _, meta, _ = made(slots=64)
    torch.cuda._sleep(int(1e9))
    found = []
    for i in range(50):
        meta.build([[i, i + 1]] * 8, [1] * 8, accepted=[2] * 8)
        found.append(meta.plain.read_slots.clone())
    for i, slots in enumerate(found):
        assert slots.tolist() == [i + 1] * 8


def test_host_memory_is_filled_again_once_its_upload_is_done():
    _, meta, _ = made(slots=64)
    ring = meta._tables._ring
    assert all(staging.memory.is_pinned() for staging in ring._ring)
    torch.cuda._sleep(int(1e9))
    for i in range(10):
        meta.build([i], [1])
    ahead = len(ring)
    assert ahead >= 10
    for i in range(40):
        torch.cuda.synchronize()
        meta.build([i], [1])
    assert len(ring) == ahead


def test_prompts_that_begin_are_zeroed_in_all_layers():
    pool, meta, _ = made()
    slots = pool.alloc(6)
    for layer in range(3):
        pool.state(layer).fill_(3)
        pool.conv(layer).fill_(3)
    with no_waiting():
        meta.build(slots, [2] * 6, prefill=[True] * 6, first=[True, False] * 3)
    for layer in range(3):
        for view in (pool.state(layer), pool.conv(layer)):
            assert not view[slots[::2]].any()
            assert (view[slots[1::2]] == 3).all()


def test_a_graph_serves_every_step_of_its_sizes():
    """Captured with one step, replayed with others: the tables are read where they were."""
    pool = ssmgen.StatePool([MAMBA], 40, "cuda")
    meta = ssmgen.DecodeMetadata(pool, max_rows=4, max_tokens=8, drafts=3)
    rows = [pool.alloc(4) for _ in range(5)]
    gen = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=gen)

    total = 4 + 4 * 4
    x, B, C = random(total, 4, 16), random(total, 1, 32), random(total, 1, 32)
    A, dt = -random(4, 1, 1).abs().expand(4, 16, 32), random(total, 4, 1)
    out = torch.zeros_like(x)

    def layer():
        for part in (meta.plain, meta.verify):
            y = ssmgen.selective_state_update(
                pool.state(0), part.take(x), part.take(dt).expand(-1, -1, 16), A, part.take(B),
                part.take(C), dt_softplus=True, **part.recurrent,
            )  # fmt: skip
            part.put(out, y)

    def build(tokens, accepted):
        taken = rows[: len(tokens)]
        meta.build(taken, tokens, accepted=accepted, plain_rows=4, verify_rows=4)
        assert meta.padded_tokens == total
        return sum(tokens)

    build([1, 4], [1, 1])
    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
    for tokens, accepted in (
        ([4, 1, 1], [1, 2, 1]),
        ([2, 3, 1, 4, 1], [1, 2, 3, 4, 2]),
        ([1], [4]),
    ):
        begin = random(*pool.state(0).shape).half()
        real = build(tokens, accepted)
        pool.state(0).copy_(begin)
        layer()
        wanted = out[:real].clone(), pool.state(0).clone()
        pool.state(0).copy_(begin)
        out.zero_()
        graph.replay()
        assert torch.equal(out[:real], wanted[0])
        assert torch.equal(pool.state(0), wanted[1])


def test_slots_go_to_pinned_memory_and_come_back_on_another_stream():
    pool, _, rows = made()
    slots = rows[0]
    for layer in range(3):
        pool.state(layer)[slots] = torch.randn(4, 4, 16, 32, device="cuda").half()
    wanted = [pool.state(layer)[slots].clone() for layer in range(3)]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(1e8))
    host = pool.offload(slots)
    assert host.memory.is_pinned()
    assert not host.ready()
    pool.free(slots)
    reused = pool.alloc(4)
    assert reused == slots
    for layer in range(3):
        pool.state(layer)[reused] = 7
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        back = pool.reload(host)
        found = [pool.state(layer)[back].clone() for layer in range(3)]
    torch.cuda.synchronize()
    assert host.ready()
    assert all(map(torch.equal, found, wanted))
    host.wait()
    on_cpu = ssmgen.StatePool([MAMBA] * 3, 8)
    on_cpu.register("accepted", reset=1, of="request")
    slots = on_cpu.reload(host)
    assert torch.equal(on_cpu.state(2)[slots], wanted[2].cpu())


@pytest.mark.parametrize(
    "options",
    [{}, {"moves": True}, {"counts": "table", "padded": True, "moves": True}, {"uniform": True}],
    ids=lambda options: " ".join(options) or "plain",
)
def test_speculation_changes_no_bit_of_what_is_accepted(monkeypatch, options):
    monkeypatch.setenv("SSMGEN_DEBUG", "1")
    server = Server(device="cuda", **options)
    wanted = exact(server)
    found = server.run()
    server.pool.check()
    assert_same_outputs(found, Server(device="cuda", drafts=0, rows=1).run())
    assert_close(found, wanted, 1e-5)
