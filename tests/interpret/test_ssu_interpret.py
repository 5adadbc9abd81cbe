"""The rendered ssu kernels, run in Triton's interpreter and held against the fp64 reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssu_calls import (
    ALGORITHMS,
    DTYPES,
    ROUNDINGS,
    SCALED,
    SERVED,
    U,
    decoded,
    expected,
    make,
    raw,
    same,
    verify,
)

import ssmgen
from ssmgen import Arch, Plan
from ssmgen.families import spec
from ssmgen.reference import random_bits, round_to

# Share of the elements whose stored bits the bounds must determine, or a test would prove little.
# A value is uncertain by about 64 units of fp32 roundoff; a step of the storage type has 2^16 of
# them for bf16, 2^13 for fp16, and, at a typical quarter of a row's peak, 2^15, 2^7 and 2^20 for
# int8, int16 and fp8.
DETERMINED = {"fp32": 0.0, "bf16": 0.99, "fp16": 0.96, "int16": 0.4, "int8": 0.99,
              "fp8_e4m3fn": 0.99}  # fmt: skip

TILES = {
    "simple": Plan(algorithm="simple", block_m=8, block_n=128, num_warps=1),
    "vertical": Plan(algorithm="vertical", block_m=4, block_n=128, num_warps=1, num_stages=2),
    "horizontal": Plan(algorithm="horizontal", block_m=64, block_n=16, num_warps=1, num_stages=2),
}


def run(call, algorithm, arch="sm_90", **tile):
    """A copy of the call after the kernel has run on it, in more than one program or step."""
    config = call.layout().config
    wanted = dataclasses.replace(TILES[algorithm], **tile)
    return call.interpreted(spec("ssu").fit(config, wanted, Arch.of(arch)), arch)


def assert_same_call(a, b):
    for name in a.tensors:
        assert same(a[name], b[name]), name


# Every kernel there is


@pytest.mark.parametrize(("algorithm", "state", "rounding"), SERVED)
def test_every_algorithm_state_and_rounding_is_right(algorithm, state, rounding):
    call = make(state, rounding, nheads=3, ngroups=1, batch=2, z=True)
    verdict = verify(call, run(call, algorithm))
    assert verdict.determined >= DETERMINED[state]


@pytest.mark.parametrize("options", [{}, {"indices": [2, -1, 4], "dst": [3, 1, -1]}], ids=str)
@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
def test_a_tile_that_waits_in_registers_is_right(state, rounding, options):
    batch = {} if options else {"batch": 2}
    call = make(state, rounding, nheads=2, ngroups=1, z=True, **batch, **options)
    verify(call, run(call, "vertical", num_stages=1, split=2))


def test_a_destination_is_not_taken_for_a_source():
    sizes = {"nheads": 1, "ngroups": 1, "batch": 1, "dim": 512, "dstate": 256}
    call = make("bf16", **sizes, indices=[2], dst=[1])
    verify(call, run(call, "horizontal", block_m=512, block_n=128, num_warps=16))


@pytest.mark.parametrize(("algorithm", "state", "rounding"), SERVED)
def test_every_mamba1_kernel_is_right(algorithm, state, rounding):
    call = make(state, rounding, headless=True, dim=32, dstate=16, batch=2, z=True)
    verdict = verify(call, run(call, algorithm))
    assert verdict.determined >= DETERMINED[state]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("algorithm", ["simple", "vertical"])
def test_fp8_is_right_with_and_without_hardware_conversion(arch, rounding, algorithm):
    call = make("fp8_e4m3fn", rounding, nheads=2, ngroups=1, batch=2)
    assert verify(call, run(call, algorithm, arch)).determined >= DETERMINED["fp8_e4m3fn"]


@pytest.mark.parametrize("rounds", [1, 5, 7, 16])
@pytest.mark.parametrize("state", ["fp16", "int8"])
def test_the_rounds_of_the_generator_are_those_asked_for(state, rounds):
    call = make(state, "stochastic", rounds=rounds, nheads=1, ngroups=1, batch=2)
    verify(call, run(call, "simple"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("dim", "dstate"), [(8, 8), (80, 24), (24, 80), (96, 16), (40, 40)])
def test_sizes_that_are_no_powers_of_two_are_right(algorithm, dim, dstate):
    call = make("fp16", "stochastic", nheads=1, ngroups=1, batch=2, dim=dim, dstate=dstate)
    verify(call, run(call, algorithm))


@pytest.mark.parametrize("algorithm", ["simple", "vertical"])
@pytest.mark.parametrize("state", SCALED)
def test_the_empty_columns_of_a_row_do_not_move_its_scale(algorithm, state):
    call = make(state, nheads=1, ngroups=1, batch=2, dim=8, dstate=24)
    verify(call, run(call, algorithm))


@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
def test_all_algorithms_give_the_same_result_within_rounding(state, rounding):
    call = make(state, rounding, nheads=2, ngroups=1, batch=2, dim=16, dstate=32)
    want = expected(call)
    plans = [a for a in ALGORITHMS if (a, state, rounding) in SERVED]
    results = [run(call, algorithm) for algorithm in plans]
    slots, rows = list(want.written), list(want.written.values())
    first = results[0]
    for other in results[1:]:
        verify(call, other, want)
        ulp = {"bf16": 2.0**-8}[str(first["out"].dtype).replace("torch.bfloat16", "bf16")]
        allowed = 2 * want.y_error + ulp * want.y.abs()
        assert bool(((first["out"].double() - other["out"].double()).abs() <= allowed).all())
        # Two fp32 values within the bound store within the bound and a step of the storage type.
        one, two = (decoded(r.views)[slots] for r in (first, other))
        h, error = want.h[rows], want.h_error[rows]
        step = {"fp32": 0.0, "bf16": 2.0**-7, "fp16": 2.0**-10, "fp8_e4m3fn": 2.0**-3}
        width = step.get(state, 0.0) * h.abs()
        if state in SCALED:
            codes = {"int16": 32767, "int8": 127, "fp8_e4m3fn": 448 * 2**9}[state]
            width = width + h.abs().amax(-1, keepdim=True) / codes * 1.01
        assert bool(((one - two).abs() <= 2 * error + 1.01 * width + 2.0**-24).all())


# Rounding, bit by bit: with A = 0, dt = 1, x = 1 and a state of -0, the new state is B itself


def stores(values, state, rounding, algorithm, **options):
    """A call whose every row of the new state is `values` (fp32), and the call after it ran."""
    n = values.numel()
    call = make(
        state, rounding, batch=1, slots=2, nheads=1, ngroups=1, dim=8, dstate=n, dtype="fp32",
        D=False, dt_bias=False, softplus=False, indices=[1], **options,
    )  # fmt: skip
    call["x"].fill_(1)
    call["dt"][..., :1].fill_(1)
    call["A"][:, :1, :1].fill_(0)
    call["C"].fill_(0)
    call["B"].copy_(values.view(1, 1, n))
    call["state"].zero_()
    if state not in SCALED:
        call["state"].neg_()
    return call, run(call, algorithm)


def fp32_patterns():
    """Zeros, subnormals, powers of two, both sides of every boundary, infinities and NaNs."""
    edges = [0, 1, 2, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000,
             0x7FFFFFFF]  # fmt: skip
    for exponent in (-149, -140, -133, -126, -25, -24, -15, -14, -1, 0, 1, 15, 16, 127):
        base = torch.tensor(2.0**exponent).view(torch.int32).item()
        for offset in (-1, 0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001):
            edges.append(max(base + offset, 0))
    edges += torch.tensor([65504.0, 65519.996, 65520.0, 65535.0, 65536.0, 3.3895314e38]).view(
        torch.int32
    ).tolist()  # fmt: skip
    both = [e | sign for e in edges for sign in (0, -(2**31))]
    both += [0x3F800000] * (-len(both) % 8)
    return torch.tensor(both, dtype=torch.int64).to(torch.int32).view(torch.float32)


def equal_or_nan(a, b):
    return (raw(a) == raw(b)) | (a.isnan() & b.isnan())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("state", ["bf16", "fp16"])
def test_every_kind_of_value_is_rounded_as_by_the_reference(state, rounding, algorithm):
    values = fp32_patterns()
    call, after = stores(values, state, rounding, algorithm)
    bits = None
    if rounding == "stochastic":
        bits = random_bits(call["rand_seed"], torch.tensor([1]), 1, 8, values.numel(), 10)[0, 0]
    wanted = round_to(values.expand(8, -1), DTYPES[state], bits)
    found = after["state"][1, 0]
    wrong = ~equal_or_nan(found, wanted)
    assert not wrong.any(), [
        (values[j].item(), found[i, j].item(), wanted[i, j].item())
        for i, j in wrong.nonzero()[:5].tolist()
    ]


@pytest.mark.parametrize("state", SCALED)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("algorithm", ["simple", "vertical"])
def test_a_zero_row_has_scale_1_and_zeros(state, rounding, algorithm):
    _, after = stores(torch.zeros(16), state, rounding, algorithm)
    assert not after["state"][1].double().any()
    assert bool((after["state_scale"][1] == 1).all())


@pytest.mark.parametrize("state", SCALED)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("algorithm", ["simple", "vertical"])
def test_a_row_with_a_nan_or_an_infinity_has_scale_nan(state, poison, algorithm):
    values = torch.linspace(-1, 1, 16)
    values[5] = poison
    _, after = stores(values, state, "nearest", algorithm)
    assert bool(after["state_scale"][1].isnan().all())


@pytest.mark.parametrize("state", SCALED)
@pytest.mark.parametrize("exponent", [-149, -120, -100, -30, 0, 100, 126])
def test_a_row_of_any_size_keeps_its_peak_and_passes_no_code(state, exponent):
    values = torch.tensor([1.0, -1.0, 0.5, 0.25, -0.125, 0.0, 0.3, -0.7]) * 2.0**exponent
    for rounding in ("nearest", "stochastic"):
        _, after = stores(values, state, rounding, "simple")
        found = decoded(after.views)[1, 0]
        peak = values.double().abs().max()
        # Half a step of the code, or a whole one; below 2^-100 a row keeps that of 2^-100.
        steps = {"int16": 32767, "int8": 127, "fp8_e4m3fn": 16}[state]
        allowed = max(peak, 2.0**-100) / steps * (1 + (rounding == "stochastic"))
        assert bool(((found - values.double()).abs() <= allowed * (1 + 2.0**-10)).all())
        largest = after["state"].double().abs().max()
        assert largest <= {"int16": 32767, "int8": 127, "fp8_e4m3fn": 448}[state]


# Layouts


@settings(max_examples=120)
@given(
    served=st.sampled_from(SERVED),
    ratio=st.sampled_from([(3, 1), (6, 2), (2, 2), (5, 1)]),
    batch=st.integers(1, 3),
    dim=st.sampled_from([8, 16, 24]),
    dstate=st.sampled_from([8, 16, 40]),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    weight_dtype=st.sampled_from(["bf16", "fp32"]),
    a_dtype=st.sampled_from(["bf16", "fp32"]),
    tied=st.booleans(),
    z=st.booleans(),
    D=st.booleans(),
    dt_bias=st.booleans(),
    softplus=st.booleans(),
    packed=st.booleans(),
    lead=st.integers(0, 9),
    pitch=st.integers(0, 40),
    scale_pitch=st.integers(0, 5),
    scale_axis=st.booleans(),
    offset=st.integers(0, 9),
    token=st.booleans(),
    index_dtype=st.sampled_from(["int32", "int64"]),
    index_width=st.integers(0, 3),
    with_indices=st.booleans(),
    with_dst=st.booleans(),
    pad=st.sampled_from([-1, 3, 2**31 - 1]),
    padded=st.sampled_from([None, -2, -(2**31)]),
    pads=st.lists(st.booleans(), min_size=6, max_size=6),
    update=st.booleans(),
    random=st.integers(0, 999),
)
def test_any_layout_is_right_and_touches_nothing_else(
    served, ratio, batch, with_indices, with_dst, pads, pad, padded, random, **more
):
    algorithm, state, rounding = served
    order = torch.randperm(8, generator=torch.Generator().manual_seed(random)).tolist()
    source, target = order[:batch], order[batch : 2 * batch]
    for i in range(batch):
        # Any negative slot is padding, too.
        source[i] = (padded or pad) if pads[i] else source[i]
        target[i] = (padded or pad) if pads[3 + i] else target[i]
    call = make(
        state,
        rounding,
        batch=batch,
        slots=8,
        nheads=ratio[0],
        ngroups=ratio[1],
        indices=source if with_indices else None,
        dst=target if with_indices and with_dst else None,
        pad=pad,
        random=random,
        **more,
    )
    verify(call, run(call, algorithm))


@settings(max_examples=80)
@given(
    served=st.sampled_from(SERVED),
    dim=st.sampled_from([8, 24, 64, 80, 128]),
    dstate=st.sampled_from([8, 16]),
    batch=st.integers(1, 2),
    z=st.booleans(),
    D=st.booleans(),
    dt_bias=st.booleans(),
    softplus=st.booleans(),
    token=st.booleans(),
    pitch=st.integers(0, 20),
    offset=st.integers(0, 9),
    a_dtype=st.sampled_from(["bf16", "fp32"]),
    random=st.integers(0, 999),
)
def test_any_headless_layout_is_right_and_touches_nothing_else(served, **more):
    algorithm, state, rounding = served
    call = make(state, rounding, headless=True, **more)
    verify(call, run(call, algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("nheads", "ngroups"), [(3, 1), (48, 1), (80, 1), (24, 3), (9, 9)])
def test_any_ratio_of_heads_to_groups_is_right(algorithm, nheads, ngroups):
    call = make("fp32", nheads=nheads, ngroups=ngroups, batch=1, dim=8, dstate=8)
    verify(call, run(call, algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_a_that_is_no_packed_matrix_is_right(algorithm):
    call = make("fp32", headless=True, dim=16, dstate=16, batch=1)
    wide = torch.zeros(16, 3, 16 * 5)
    wide[:, 1, ::5] = call["A"]
    call.tensors["A"] = wide[:, 1, ::5]
    assert not call.layout().config.aligned
    verify(call, run(call, algorithm))


# Slots


def poisoned(call):
    """NaN in every slot of the pool, codes and scales, and in the space between slots."""
    for name in ("state", "state_scale"):
        if name in call.tensors:
            memory = torch.empty(0, dtype=call[name].dtype).set_(call[name].untyped_storage())
            if memory.is_floating_point() and memory.itemsize > 1:
                memory.fill_(torch.nan)
            else:
                raw(memory).fill_(0x7F)
    return call


@pytest.mark.parametrize(("algorithm", "state", "rounding"), SERVED)
def test_padded_row_touches_no_slot_and_outputs_as_a_zero_state(algorithm, state, rounding):
    shape = {"batch": 2, "nheads": 2, "ngroups": 1, "z": True, "pitch": 16}
    padded = poisoned(make(state, rounding, indices=[3, 3], pad=3, **shape))
    zero = make(state, rounding, indices=[0, 1], **shape)
    raw(zero["state"]).zero_()
    after = run(padded, algorithm)
    assert not after["out"].isnan().any()
    assert same(after["out"], run(zero, algorithm)["out"])
    for name in padded.tensors:
        assert name == "out" or same(after[name], padded[name])


@pytest.mark.parametrize(("algorithm", "state", "rounding"), SERVED)
@pytest.mark.parametrize(("pad", "padded"), [(-1, -1), (5, 5), (5, -4)])
def test_padded_destination_is_not_written(algorithm, state, rounding, pad, padded):
    call = make(
        state, rounding, batch=3, indices=[0, padded, 2], dst=[padded, 4, 3], pad=pad, nheads=1,
        ngroups=1,
    )  # fmt: skip
    want = expected(call)
    assert list(want.written) == [3]
    verify(call, run(call, algorithm), want)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_indices_no_row_is_padding(algorithm):
    call = make("fp32", indices=None, pad=1, nheads=1, ngroups=1)
    want = expected(call)
    assert list(want.written) == [0, 1, 2]
    verify(call, run(call, algorithm), want)


@pytest.mark.parametrize(("algorithm", "state", "rounding"), SERVED)
def test_a_row_alone_gives_the_bits_of_the_row_in_a_batch(algorithm, state, rounding):
    def call(rows):
        made = make(state, rounding, batch=3, indices=[4, -1, 2], nheads=2, ngroups=1, z=True)
        for name in ("x", "dt", "B", "C", "z", "out", "state_batch_indices"):
            made.tensors[name] = made[name][rows]
        return run(made, algorithm)

    together = call(slice(0, 3))
    for row, slot in enumerate([4, -1, 2]):
        alone = call(slice(row, row + 1))
        assert same(alone["out"][0], together["out"][row])
        for name in ("state", "state_scale"):
            if slot >= 0 and name in alone.tensors:
                assert same(alone[name][slot], together[name][slot])


@pytest.mark.parametrize(("algorithm", "state", "rounding"), SERVED)
def test_two_launches_on_equal_inputs_give_equal_bits(algorithm, state, rounding):
    call = make(state, rounding, batch=2, nheads=1, ngroups=1, dim=8, dstate=16)
    assert_same_call(run(call, algorithm), run(call, algorithm))


@pytest.mark.parametrize("state", ["bf16", "int8"])
def test_random_bits_do_not_depend_on_the_plan_the_batch_or_the_arch(state):
    call = make(state, "stochastic", batch=2, nheads=2, ngroups=1, dim=32, dstate=32)
    wanted = run(call, "simple")
    others = [
        run(call, "simple", block_m=32),
        run(call, "vertical", split=4),
        run(call, "vertical", "sm_100"),
        run(call, "simple", "sm_120"),
        *([] if state in SCALED else [run(call, "horizontal", block_n=8)]),
    ]
    assert all(same(wanted["state"], other["state"]) for other in others)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_pool_is_addressed_by_slot_not_by_row(algorithm):
    call = make("fp32", batch=3, slots=6, indices=[5, 0, 3], nheads=1, ngroups=1)
    want = expected(call)
    assert want.written == {5: 0, 0: 1, 3: 2}
    verify(call, run(call, algorithm), want)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_disable_state_update_writes_no_state(algorithm):
    for state in ("fp32", "bf16"):
        call = make(state, update=False, nheads=1, ngroups=1, batch=2)
        after = run(call, algorithm)
        verify(call, after)
        assert same(call["state"], after["state"])


def test_an_empty_batch_runs_nothing():
    call = make("fp32", batch=0, indices=[])
    assert_same_call(call, call.interpreted())


# The op


@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
def test_the_op_with_interpret_on_runs_the_kernel(state, rounding, monkeypatch):
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    call = make(state, rounding, batch=2, nheads=2, ngroups=1, z=True)
    after, kernel = call.copy(), call.interpreted()
    out = ssmgen.selective_state_update(**after.arguments())
    assert out is after["out"]
    assert_same_call(after, kernel)
    verify(call, after)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_op_runs_the_algorithm_it_is_told_to(algorithm, monkeypatch):
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    call = make("bf16", batch=2, nheads=2, ngroups=1, algorithm=algorithm)
    after = call.copy()
    ssmgen.selective_state_update(**after.arguments())
    verify(call, after)


# The interpreter itself


def test_softplus_in_fp32_is_accurate_to_a_few_units_in_the_last_place():
    # The new state is softplus(dt) when the old one is 0 and x = B = 1.
    values = torch.cat([torch.linspace(-90, 90, 2041), torch.linspace(-2, 2, 1031)])
    batch = values.numel() // 512 * 512
    call = make(
        "fp32", batch=1, slots=1, nheads=1, ngroups=1, dim=512, dstate=8, headless=True,
        dtype="fp32", D=False, dt_bias=False, indices=[0],
    )  # fmt: skip
    for start in range(0, batch, 512):
        call["state"].zero_()
        call["x"].fill_(1)
        call["B"].fill_(1)
        call["dt"].copy_(values[start : start + 512])
        found = run(call, "simple", block_m=512)["state"][0, :, 0].double()
        v = values[start : start + 512].double()
        exact = v.clamp(min=0) + torch.log1p(torch.exp(-v.abs()))
        # exp of an fp32 argument is good to |v| U; the rest is below 16 roundings.
        assert bool(((found - exact).abs() <= exact * U * (v.abs() + 16)).all())


def test_after_interpreting_kernels_still_compile():
    from ssmgen import compiler

    call = make("fp16", "stochastic", batch=1, nheads=1, ngroups=1)
    config = call.layout().config
    run(call, "vertical")
    fitted = spec("ssu").fit(config, TILES["vertical"], Arch.of(90))
    assert compiler.compile(config, fitted, Arch.of(90)).cubin.startswith(b"\x7fELF")
    run(call, "vertical")
