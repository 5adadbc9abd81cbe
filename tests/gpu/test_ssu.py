"""selective_state_update on a GPU: every promise of docs/semantics.md on the real kernels."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from launching import launch
from placing import placed
from ssu_calls import (
    ALGORITHMS,
    DTYPES,
    ROUNDINGS,
    SERVED,
    Call,
    digest,
    make,
    moved,
    same,
    verify,
)
from waiting import no_waiting

import ssmgen
from ssmgen.errors import ConfigError
from ssmgen.families import spec
from ssmgen.reference import philox4x32, random_bits

pytestmark = pytest.mark.gpu

MAMBA2 = {"nheads": 24, "ngroups": 3, "dim": 64, "dstate": 128, "slots": 9, "batch": 5}


def run(call: Call, **options: Any) -> Call:
    """What the op makes of `call` on the GPU, back on the CPU."""
    device = moved(call, "cuda")
    arguments = {**device.arguments(), **options}
    result = ssmgen.selective_state_update(**arguments)
    assert result.data_ptr() == device["out"].data_ptr()
    return moved(device, "cpu")


@pytest.mark.parametrize(("algorithm", "state", "rounding"), SERVED)
def test_each_algorithm_state_and_rounding_is_right(algorithm, state, rounding):
    call = make(state, rounding, **MAMBA2, algorithm=algorithm, z=True)
    verify(call, run(call))


@pytest.mark.parametrize("state", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("sizes", [{}, {"dim": 80, "dstate": 96}, {"tied": False, "dstate": 16}])
def test_every_placed_plan_is_right(state, sizes):
    call = make(state, **{**MAMBA2, **sizes}, z=True)
    plans = placed(call.layout().config)
    assert plans
    for plan in plans:
        after = moved(call, "cuda")
        launch(after, plan)
        verify(call, moved(after, "cpu"))


@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
@pytest.mark.parametrize("batch", [1, 3, 33, 150, 600])
def test_every_plan_the_table_chooses_is_right(state, rounding, batch):
    call = make(state, rounding, **{**MAMBA2, "nheads": 16, "ngroups": 1, "batch": batch,
                                    "slots": batch + 2})  # fmt: skip
    verify(call, run(call))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("dim", "dstate"),
    [(8, 8), (80, 128), (96, 96), (160, 16), (192, 256), (64, 512), (512, 64), (72, 40), (64, 16)],
)
def test_odd_dims_are_right(algorithm, dim, dstate):
    call = make("fp16", nheads=6, ngroups=2, dim=dim, dstate=dstate, algorithm=algorithm)
    verify(call, run(call))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("options", [
    {"tied": False, "dim": 64, "dstate": 16},
    {"headless": True, "dim": 5120, "dstate": 16, "z": True},
    {"headless": True, "dim": 24, "dstate": 16},
    {"packed": True, "z": True, "dim": 64, "dstate": 128},
    {"packed": True, "lead": 3, "dim": 64, "dstate": 128},
    {"pitch": 64, "dim": 64, "dstate": 128},
    {"pitch": 3, "offset": 5, "dim": 64, "dstate": 128},
    {"index_dtype": "int32", "index_width": 3},
    {"indices": None},
    {"indices": [2, -1, 4]},
    {"indices": [2, -1, 4], "dst": [3, 1, -1]},
    {"indices": [2, 9, 4], "pad": 9},
    {"update": False},
    {"D": False, "dt_bias": False, "softplus": False},
    {"dtype": "fp32", "dt_dtype": "bf16", "weight_dtype": "bf16", "a_dtype": "fp16"},
    {"dtype": "fp16", "token": True},
    {"nheads": 240, "ngroups": 3}, {"nheads": 48, "ngroups": 1}, {"nheads": 80, "ngroups": 80},
], ids=str)  # fmt: skip
def test_each_layout_and_switch_is_right(algorithm, options):
    call = make("bf16", algorithm=algorithm, **options)
    verify(call, run(call))


@pytest.mark.parametrize("state", ["int16", "int8", "fp8_e4m3fn"])
def test_scaled_states_follow_slots_pads_and_destinations(state):
    for options in ({"indices": [2, -1, 4], "dst": [3, 1, -1], "scale_pitch": 7},
                    {"scale_axis": True, "pitch": 48}, {"indices": None}):  # fmt: skip
        call = make(state, "stochastic", **options)
        verify(call, run(call))


@pytest.mark.parametrize(("state", "rounding"), [r for r in ROUNDINGS if r[1] == "stochastic"])
def test_algorithms_store_the_same_random_rounding(state, rounding):
    plans = [a for a in ALGORITHMS if (a, state, rounding) in SERVED]
    call = make(state, rounding, **MAMBA2)
    first, *others = (run(call, algorithm=a)["state"] for a in plans)
    for other in others:
        differ = (first.float() != other.float()).float().mean()
        # Only where two fp32 values of h differ in the last place across a rounding boundary.
        assert differ < 2e-3


def test_a_batch_of_zero_rows_touches_nothing():
    call = make("fp32", batch=0, indices=[])
    after = run(call)
    assert same(after["state"], call["state"])


def test_no_pad_reads_the_pool_even_where_it_holds_nan():
    call = make("fp32", indices=[-1, -1, -1], dim=64, dstate=128)
    call["state"].fill_(float("nan"))
    after = run(call)
    assert torch.isfinite(after["out"].float()).all()
    assert same(after["state"], call["state"])
    verify(call, after)


@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
def test_a_row_alone_gives_the_bits_it_gives_in_a_batch(monkeypatch, state, rounding):
    """With one plan for all: another may have another order of sums."""
    monkeypatch.setenv("SSMGEN_BATCH_INVARIANT", "1")
    call = make(state, rounding, **MAMBA2, z=True)
    whole = run(call, algorithm="simple")
    for row in range(MAMBA2["batch"]):
        alone = call.copy()
        for name in ("x", "dt", "B", "C", "z", "out", "state_batch_indices"):
            alone.tensors[name] = alone[name][row : row + 1]
        one = run(alone, algorithm="simple")
        slot = int(call["state_batch_indices"][row])
        assert digest(one["out"]) == digest(whole["out"][row : row + 1])
        assert digest(one["state"][slot]) == digest(whole["state"][slot])


def test_batch_invariant_mode_gives_one_plan_and_equal_bits(monkeypatch):
    monkeypatch.setenv("SSMGEN_BATCH_INVARIANT", "1")
    options = {"nheads": 16, "ngroups": 1, "dim": 64, "dstate": 128}
    big = make("fp16", batch=600, slots=601, **options)
    whole = run(big)
    small = big.copy()
    for name in ("x", "dt", "B", "C", "out", "state_batch_indices"):
        small.tensors[name] = small[name][:2]
    assert digest(run(small)["out"]) == digest(whole["out"][:2])


@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
def test_two_launches_on_equal_inputs_give_equal_bits(state, rounding):
    call = make(state, rounding, **{**MAMBA2, "batch": 64, "slots": 70})
    a, b = run(call), run(call)
    assert digest(a["out"], a["state"]) == digest(b["out"], b["state"])


def test_a_pool_of_more_than_two_to_the_31_elements_is_addressed():
    nheads, dim, dstate = 128, 64, 128
    slots = 2**31 // (nheads * dim * dstate) + 40
    call = make("fp16", nheads=nheads, ngroups=8, dim=dim, dstate=dstate, slots=3, batch=3,
                indices=[0, 1, 2])  # fmt: skip
    far = moved(call, "cuda")
    pool = torch.zeros(slots, nheads, dim, dstate, dtype=torch.float16, device="cuda")
    where = torch.tensor([5, slots - 30, slots - 1], device="cuda")
    pool[where] = far["state"]
    ssmgen.selective_state_update(
        **{**far.arguments(), "state": pool, "state_batch_indices": where}
    )
    near = run(call)
    assert same(pool[where].cpu(), near["state"])
    assert same(far["out"].cpu(), near["out"])
    pool[where] = 0
    assert not pool.any()


@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
def test_unaligned_views_take_another_variant_and_give_the_same_result(state, rounding):
    aligned = make(state, rounding, dim=64, dstate=128)
    shifted = make(state, rounding, dim=64, dstate=128, offset=1, pitch=1)
    kernel = {c.layout().config.aligned for c in (aligned, shifted)}
    assert kernel == {True, False}
    a, b = run(aligned), run(shifted)
    verify(shifted, b)
    assert same(a["state"].contiguous(), b["state"].contiguous())


# Graphs, streams, tracing


def test_a_captured_graph_replays_and_follows_its_seed():
    call = moved(make("fp16", "stochastic", **MAMBA2), "cuda")
    start = call["state"].clone()
    ssmgen.selective_state_update(**call.arguments())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ssmgen.selective_state_update(**call.arguments())
    seen = []
    for seed in (1, 2, 1):
        call["state"].copy_(start)
        call["rand_seed"].fill_(seed)
        graph.replay()
        torch.cuda.synchronize()
        seen.append(call["state"].clone())
    assert same(seen[0], seen[2])
    assert not same(seen[0], seen[1])
    expected = make("fp16", "stochastic", **MAMBA2)
    expected["rand_seed"].fill_(1)
    assert same(run(expected)["state"], seen[0].cpu())


def test_a_new_layout_can_be_captured_without_a_warm_up_once_its_kernel_is_loaded():
    call = moved(make("fp32", **MAMBA2), "cuda")
    config = spec("ssu").layout(**call.arguments()).config
    ssmgen.get_kernel(config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ssmgen.selective_state_update(**call.arguments())
    graph.replay()
    torch.cuda.synchronize()
    assert torch.isfinite(call["out"].float()).all()


def test_the_launch_goes_to_the_current_stream():
    call = moved(make("fp32", **MAMBA2), "cuda")
    want = moved(make("fp32", **MAMBA2), "cuda")
    ssmgen.selective_state_update(**want.arguments())
    good = call["x"].clone()
    call["x"].fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        call["x"].copy_(good)
        ssmgen.selective_state_update(**call.arguments())
    stream.synchronize()
    assert same(call["out"], want["out"])


def test_the_op_neither_synchronises_nor_allocates():
    call = moved(make("fp16", "stochastic", **MAMBA2), "cuda")
    ssmgen.selective_state_update(**call.arguments())
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_waiting():
        ssmgen.selective_state_update(**call.arguments())
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize(("state", "rounding"), [("fp32", "nearest"), ("int8", "stochastic")])
def test_opcheck_passes(state, rounding):
    call = moved(make(state, rounding, z=True), "cuda")
    order = ("state", "state_scale", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "out",
             "state_batch_indices", "dst_state_batch_indices", "rand_seed")  # fmt: skip
    tokens = (None,) * 6
    arguments = (*(call.tensors.get(n) for n in order), *tokens, True, -1, False, 10, "auto", False,
                 0, "fast")  # fmt: skip
    torch.library.opcheck(torch.ops.ssmgen.selective_state_update.default, arguments)


def test_torch_compile_traces_the_op_whole():
    call = moved(make("fp32", **MAMBA2), "cuda")
    want = moved(make("fp32", **MAMBA2), "cuda")

    def layer(arguments: dict[str, Any]) -> torch.Tensor:
        return ssmgen.selective_state_update(**arguments) * 2

    compiled = torch.compile(layer, fullgraph=True)
    arguments = call.arguments()
    assert same(compiled(arguments), layer(want.arguments()))
    assert same(call["state"], want["state"])


def test_handle_and_op_give_the_same_bits():
    call, other = (moved(make("fp16", "stochastic", **MAMBA2), "cuda") for _ in range(2))
    config = spec("ssu").layout(**call.arguments()).config
    kernel = ssmgen.get_kernel(config)
    tensors = dict(call.tensors)
    bound = kernel.bind(**tensors)
    bound()
    ssmgen.selective_state_update(**other.arguments())
    assert same(call["state"], other["state"])
    kernel(**tensors)
    ssmgen.selective_state_update(**other.arguments())
    assert same(call["out"], other["out"])


def test_several_devices_in_one_process():
    """On a machine with one GPU: the device guard restores what was current."""
    count = torch.cuda.device_count()
    want = run(make("fp32", **MAMBA2))
    for device in reversed(range(count)):
        call = moved(make("fp32", **MAMBA2), f"cuda:{device}")
        ssmgen.selective_state_update(**call.arguments())
        assert torch.cuda.current_device() == 0
        assert same(call["out"].cpu(), want["out"])
        assert same(call["state"].cpu(), want["state"])


# Programmatic dependent launch


def _early_writer() -> Any:
    """A kernel that lets the next one start at once, works a while, then writes x, B and C."""
    import triton
    import triton.language as tl

    @triton.jit
    def write(source, target, n, spin, BLOCK: tl.constexpr):
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
        total = 0.0
        for i in range(spin):
            total += tl.sin(total + i)
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < n)
        tl.store(target + at, tl.where(total > 1e30, 0.0, value), mask=at < n)

    return write


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("state", ["fp32", "fp16"])
def test_pdl_is_right_behind_a_kernel_that_signals_early(algorithm, state):
    before = make(state, **MAMBA2, packed=True, algorithm=algorithm)
    want = moved(before, "cuda")
    steps = 4
    # The plan is that of PDL, for the same bits, with nothing left to run beside it.
    for _ in range(steps):
        ssmgen.selective_state_update(**{**want.arguments(), "pdl": True})
        torch.cuda.synchronize()
    call = moved(before, "cuda")
    good = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    good.set_(call["x"].untyped_storage())
    target, good = good, good.clone()
    write = _early_writer()
    arguments = {**call.arguments(), "pdl": True}
    ssmgen.get_kernel(spec("ssu").layout(**arguments).config)
    for _ in range(steps):
        target.fill_(float("nan"))
        write[(-(-good.numel() // 2048),)](good, target, good.numel(), 2000, BLOCK=2048)
        ssmgen.selective_state_update(**arguments)
    torch.cuda.synchronize()
    assert same(call["out"], want["out"])
    assert same(call["state"], want["state"])


# Random bits


def test_philox_is_triton_s():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(seed, offset, out, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
        at = tl.arange(0, BLOCK)
        words = tl.randint4x(tl.load(seed), tl.load(offset + at), ROUNDS)
        for i in tl.static_range(4):
            tl.store(out + i * BLOCK + at, words[i].to(tl.uint32, bitcast=True))

    seed = torch.tensor([0x1234_5678_9ABC_DEF0], device="cuda")
    offset = torch.arange(256, device="cuda", dtype=torch.int32) * 7919
    for rounds in (5, 7, 10):
        out = torch.empty(4, 256, dtype=torch.uint32, device="cuda")
        kernel[(1,)](seed, offset, out, BLOCK=256, ROUNDS=rounds)
        k0, k1 = (torch.tensor(v) for v in (0x9ABC_DEF0, 0x1234_5678))
        zero = torch.zeros(256, dtype=torch.int64)
        want = philox4x32(offset.cpu().long(), zero, zero, zero, k0, k1, rounds)
        assert torch.equal(out.cpu().long(), torch.stack(list(want)))


def test_stored_roundings_use_the_documented_bits():
    """fp32 -> bf16 with the state unchanged by the step: h' = h, so the stored bits are known."""
    call = make("fp16", "stochastic", **MAMBA2)
    for name in ("x", "D"):
        call[name].zero_()
    after = run(call)
    verify(call, after)
    bits = random_bits(call["rand_seed"], torch.tensor([0]), 1, 8, 8)
    assert bits.unique().numel() > 32


@pytest.mark.parametrize("state", ["fp16", "bf16"])
def test_special_values_round_correctly(state):
    """h' = exp(0) h - 0: the kernel's rounding alone, on subnormals, zeros, inf, NaN, overflow."""
    dtype = DTYPES[state]
    call = make(state, "stochastic", batch=1, slots=2, nheads=1, ngroups=1, dim=16, dstate=128,
                indices=[1], softplus=False, dt_bias=False)  # fmt: skip
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 6e-8, -6e-8,
                            3e-5, 65504.0, -65504.0, 1.0, -1.0]).to(dtype)  # fmt: skip
    values = special.repeat(200)[: 16 * 128].reshape(16, 128)
    call["state"][1, 0] = values
    call["x"].zero_()
    call["B"].fill_(-1)  # adds -0, which keeps the sign of either zero
    call.tensors["dt"] = torch.zeros(1, 1, 1).expand(1, 1, 16)
    stored = run(call)["state"][1, 0]
    nan = values.isnan()
    assert torch.equal(stored.isnan(), nan)
    assert same(stored[~nan], values[~nan])


def test_a_horizontal_plan_for_scaled_states_is_refused_before_anything_is_written():
    call = moved(make("int8"), "cuda")
    before = call["state"].clone()
    with pytest.raises(ConfigError, match="algorithm"):
        ssmgen.selective_state_update(**{**call.arguments(), "algorithm": "horizontal"})
    assert same(call["state"], before)


# A process and its threads


def test_get_kernel_may_be_the_first_thing_a_process_does_with_the_gpu():
    script = (
        "import ssmgen; from ssmgen import KernelConfig;"
        "k = ssmgen.get_kernel(KernelConfig()); assert k.variants[0].function is not None"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_thread_that_has_touched_no_gpu_may_call_the_op():
    call = moved(make("fp32", **MAMBA2), "cuda")
    want = run(make("fp32", **MAMBA2))
    found: list[Any] = []

    def work() -> None:
        try:
            ssmgen.selective_state_update(**call.arguments())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not found
    torch.cuda.synchronize()
    assert same(call["out"].cpu(), want["out"])
