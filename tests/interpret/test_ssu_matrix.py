"""The matrix form of many tokens, in Triton's interpreter, against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssu_calls import expected, same, verify
from ssu_matrix import CALLS, bounded, make_matrix
from ssu_tokens import make_tokens, row_of

from ssmgen import Plan
from ssmgen.arch import Arch
from ssmgen.plan import dispatch

SMALL = {"nheads": 2, "ngroups": 1, "dim": 32, "dstate": 32}
STATES = ("fp32", "bf16", "fp16")
# Two bf16 terms leave a 16-bit state's last bit open more often than fp32 does, most often after
# many tokens; no bound decides the bits of an fp32 state.
DETERMINED = {"fp32": 0.0, "bf16": 0.85, "fp16": 0.45}


def plan(rows, warps):
    return Plan(algorithm="matrix", block_m=rows, block_n=128, num_warps=warps)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("state", STATES)
def test_every_call_is_right(state, name):
    call = make_matrix(state, tokens=3, **{**SMALL, **CALLS[name]})
    assert verify(call, call.interpreted(), bounded(call)).determined >= DETERMINED[state]


@pytest.mark.parametrize("tokens", range(2, 17))
@pytest.mark.parametrize("state", STATES)
def test_every_number_of_tokens_is_right(state, tokens):
    call = make_matrix(state, tokens=tokens, **SMALL, z=True)
    assert verify(call, call.interpreted(), bounded(call)).determined >= DETERMINED[state]


@pytest.mark.parametrize(("rows", "warps"), [(16, 1), (32, 1), (64, 1), (32, 2), (64, 4), (128, 4)])
@pytest.mark.parametrize("tokens", [6, 11])
@pytest.mark.parametrize("state", ["fp32", "fp16"])
def test_every_tile_is_right(state, tokens, rows, warps):
    call = make_matrix(state, tokens=tokens, **{**SMALL, "dim": 128, "dstate": 64})
    from ssmgen.families import spec

    fitted = spec("ssu").fit(call.layout().config, plan(rows, warps), Arch.of("sm_90"))
    assert (fitted.block_m, fitted.num_warps) == (rows, warps)
    verify(call, call.interpreted(fitted), bounded(call))


@settings(max_examples=30)
@given(
    state=st.sampled_from(STATES),
    tokens=st.integers(2, 16),
    dim=st.sampled_from([16, 48, 64]),
    dstate=st.sampled_from([32, 64, 256]),
    groups=st.sampled_from([(4, 2), (3, 3), (2, 1)]),
    name=st.sampled_from(sorted(CALLS)),
    arch=st.sampled_from(["sm_80", "sm_90"]),
    random=st.integers(0, 999),
)
def test_any_shape_is_right_and_touches_nothing_else(
    state, tokens, dim, dstate, groups, name, arch, random
):
    sizes = {"nheads": groups[0], "ngroups": groups[1], "dim": dim, "dstate": dstate}
    call = make_matrix(state, tokens=tokens, random=random, **{**sizes, **CALLS[name]})
    verify(call, call.interpreted(arch=arch), bounded(call))


def test_the_smallest_fp32_state_is_right():
    call = make_matrix("fp32", tokens=5, **{**SMALL, "dim": 16, "dstate": 16})
    verify(call, call.interpreted(), bounded(call))


# Accuracy


@pytest.mark.parametrize("options", [{}, {"softplus": False, "dt_bias": False}], ids=str)
@pytest.mark.parametrize("tokens", [2, 6, 16])
@pytest.mark.parametrize("state", STATES)
def test_a_state_is_within_4_times_the_error_of_the_loop(state, tokens, options):
    """A is up to -16 and, without softplus, dt up to 4: decays reach e^-64 a token."""
    call = make_matrix(state, tokens=tokens, batch=4, **SMALL, **options)
    if options:
        call["dt"].mul_(40.0) if call["dt"].stride(-1) else call["dt"][..., 0].mul_(40.0)
    want = expected(call)
    at = list(want.written.items())
    h = torch.stack([want.h[place] for _, place in at])

    def error(after):
        return (after["state"][[slot for slot, _ in at]].double() - h).abs().mean()

    loop = call.copy()
    loop.switches.update(algorithm="simple")
    assert error(call.interpreted()) <= 4 * error(loop.interpreted())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("tokens", [3, 8, 16])
def test_outputs_are_the_fp64_results_rounded(state, tokens):
    """But for 1 in 1000 that lie next to the middle of two bf16: an error of 2^-17, as of two
    terms, would round 1 in 250 the other way."""
    call = make_matrix(state, tokens=tokens, **{**SMALL, "dstate": 64})
    y = expected(call).y.to(torch.bfloat16)
    found = call.interpreted()["out"].flatten(0, 1)
    assert (found != y).double().mean() < 1e-3


@pytest.mark.parametrize("state", STATES)
def test_outputs_are_right_for_C_of_any_size(state):
    """fp16 holds C only after a power of two a token."""
    call = make_matrix(state, tokens=8, **SMALL, D=False)
    call.tensors["C"] = call["C"] * 2.0 ** torch.arange(-60, 60, 15)[:, None, None].bfloat16()
    call["C"][0, 3] = 0
    verify(call, call.interpreted(), bounded(call))


def test_C_is_exact_down_to_2_to_the_minus_31_of_the_largest_of_its_token():
    """The largest meets a state of zero, so that the smallest is all there is to see."""
    call = make_matrix("fp16", tokens=3, **SMALL, D=False)
    call["x"].zero_()
    call["state"][..., 1:].zero_()
    call["C"].fill_(1.0)[..., 0] = 255 * 2.0**-38
    call["state"][..., 0].fill_(1.0)
    verify(call, call.interpreted(), bounded(call))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["B", "C", "dt"])
def test_what_is_not_finite_reaches_no_earlier_token(state, name):
    call = make_matrix(state, tokens=6, batch=1, **SMALL)
    want = call.interpreted()
    call[name][0, 4, ..., :1] = torch.nan
    after = call.interpreted()
    assert same(after["out"][0, :4], want["out"][0, :4])
    assert after["out"][0, 4:].isnan().any(-1).any(-1)[0]


def test_A_that_is_not_a_number_is_seen_in_every_output():
    call = make_matrix("fp16", tokens=3, batch=1, **SMALL)
    call["A"][..., 0, 0] = torch.nan  # one value a head
    assert call.interpreted()["out"].isnan().all()


# Bits


@pytest.mark.parametrize("state", STATES)
def test_a_row_alone_gives_the_bits_of_the_row_in_a_batch(state):
    call = make_matrix(state, tokens=6, **SMALL, z=True)
    together = call.interpreted()
    for row in range(3):
        alone = row_of(call, row).interpreted()
        slot = int(call["state_batch_indices"][row])
        assert same(alone["out"][0], together["out"][row])
        assert same(alone["state"][slot], together["state"][slot])


@pytest.mark.parametrize("state", STATES)
def test_a_padded_row_touches_nothing_and_outputs_as_a_zero_state(state):
    padded = make_matrix(state, tokens=3, batch=2, indices=[7, -2], pad=7, z=True, **SMALL)
    zero = make_matrix(state, tokens=3, batch=2, indices=[0, 1], z=True, **SMALL)
    padded["state"].fill_(torch.nan)
    zero["state"].zero_()
    after = padded.interpreted()
    assert same(after["out"], zero.interpreted()["out"])
    assert same(after["state"], padded["state"])


@pytest.mark.parametrize("state", STATES)
def test_exact_gives_the_bits_of_the_loop_where_auto_takes_the_matrix(state):
    """On sm_90 and with several tokens; the two forms differ somewhere."""
    options = {"tokens": 6, "algorithm": "auto", **SMALL}
    exact = make_tokens(state, **options).interpreted()
    loop = make_tokens(state, **{**options, "algorithm": "simple"}, precision="fast").interpreted()
    fast = make_tokens(state, **{**options, "algorithm": "matrix"}, precision="fast")
    config = make_tokens(state, **options, precision="fast").layout().config
    assert "matrix" in {c.plan.algorithm for c in dispatch(config, Arch.of("sm_90"))}
    assert same(exact["state"], loop["state"])
    assert same(exact["out"], loop["out"])
    if state == "fp32":
        assert not same(exact["state"], fast.interpreted()["state"])
