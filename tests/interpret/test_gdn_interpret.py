"""The rendered kernels of gated_delta_rule_decode, interpreted, against fp64. K is never V."""

from __future__ import annotations

import pytest
import torch
from gdn_calls import KINDS, LAYOUTS, STATES, GdnCall, make, row_of, token_of, verify
from gdn_tolerances import assert_within_flashinfer
from hypothesis import given, settings
from hypothesis import strategies as st
from ssu_calls import raw, same

import ssmgen
from ssmgen import Plan

SMALL = {"H": 1, "HV": 2, "K": 16, "V": 8}


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_call_is_right(kind, order):
    call = make(**{**SMALL, **KINDS[kind], "order": order})
    assert call.layout().config.state_layout == order
    verify(call, call.interpreted())


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize(("state", "rounding"), STATES[1:])
def test_every_rounding_is_right(state, rounding, order):
    options = {"tokens": 2, "buffer": 2, "dst": [[6, 7], [8, 9]], "batch": 2, "indices": [1, 2]}
    call = make(state, rounding, order=order, H=1, HV=2, K=24, V=16, **options)
    share = verify(call, call.interpreted())
    assert share > 0.9  # nearly all bits are determined, so wrong random bits would show


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("rows", [2, 8])
def test_random_bits_do_not_depend_on_plan_or_layout(rows, order):
    call = make("bf16", "stochastic", order=order, **SMALL, indices=[0, 1, 2])
    plan = Plan(algorithm="simple", block_m=rows, block_n=16, num_warps=1)
    verify(call, call.interpreted(plan))
    other = make("bf16", "stochastic", order="VK", **SMALL, indices=[0, 1, 2])
    assert same(call.interpreted(plan)["state"], other.interpreted()["state"])


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_the_source_for_other_architectures_is_right(arch):
    call = make("fp16", "stochastic", **SMALL)
    verify(call, call.interpreted(arch=arch))


@pytest.mark.parametrize(("state", "rounding"), STATES)
def test_a_row_alone_gives_the_bits_of_the_row_in_a_batch(state, rounding):
    call = make(state, rounding, tokens=2, buffer=2, entries=[3, 1, 4], **SMALL)
    together = call.interpreted()
    for row in range(3):
        alone = row_of(call, row).interpreted()
        slot, entry = (int(call[n][row])
                       for n in ("state_batch_indices", "intermediate_state_indices"))  # fmt: skip
        assert same(alone["out"][0], together["out"][row])
        for name, at in (("state", slot), ("intermediate_states_buffer", entry)):
            assert same(alone[name][at], together[name][at])


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("kind", ["plain", "kda", "given", "interleaved views"])
def test_tokens_in_one_call_give_the_bits_of_single_calls(kind, order):
    """For an fp32 state, with the snapshots after each."""
    options = {**SMALL, **KINDS[kind], "order": order, "batch": 2}
    call = make(tokens=3, buffer=3, **options)
    after = call.interpreted()
    step = call.copy()
    for token in range(3):
        one = token_of(step, token)
        one.tensors["intermediate_states_buffer"] = step["intermediate_states_buffer"][:, token:]
        step_after = one.interpreted()
        raw(step["state"]).copy_(raw(step_after["state"]))
        assert same(step_after["out"], after["out"][:, token])
        mine = step_after["intermediate_states_buffer"][:2, 0]
        assert same(mine, after["intermediate_states_buffer"][:2, token])
    assert same(step["state"], after["state"])


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_accepted_column_is_read_on_every_path(tokens):
    """The state of the accepted column is that of a call that starts there; no other is read."""
    table = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    for accepted in ([1, 2, 3], [3, 3, 1]):
        call = make(tokens=tokens, accepted=accepted, indices=table, dst=[9, 0, 3], **SMALL)
        plain = call.copy()
        del plain.tensors["num_accepted_tokens"]
        column = torch.tensor([row[n - 1] for row, n in zip(table, accepted)])
        plain.tensors["state_batch_indices"] = column
        after, wanted = call.interpreted(), plain.interpreted()
        assert not after["out"].isnan().any()
        assert same(after["out"], wanted["out"])
        assert same(after["state"], wanted["state"])


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize(("state", "rounding"), STATES)
def test_a_padded_row_outputs_zero_and_touches_nothing(state, rounding, order):
    options = {"tokens": 2, "buffer": 2, "pad": 9, "indices": [9, 9], "batch": 2, **SMALL}
    call = make(state, rounding, order=order, **options)
    after = call.interpreted()
    assert call["state"].isnan().all()
    assert not raw(after["out"]).any()
    assert all(name == "out" or same(after[name], call[name]) for name in call.tensors)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("accepted", [4, 5, 2**31 - 1])
def test_more_accepted_than_columns_is_nan_and_writes_no_state(tokens, accepted):
    call = make(
        tokens=tokens, accepted=[accepted, 2], indices=[[0, 1, 2], [3, 4, 5]], batch=2, buffer=2,
        entries=[0, 1], **SMALL,
    )  # fmt: skip
    after = call.interpreted()
    assert after["out"][0].isnan().all()
    assert not after["out"][1].isnan().any()
    for name, written in (("state", [4]), ("intermediate_states_buffer", [1])):
        changed = (raw(after[name]) != raw(call[name])).flatten(1).any(1).nonzero()[:, 0]
        assert changed.tolist() == written


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_padded_row_may_hold_any_count(tokens):
    table = [[-1, -1], [3, 4], [5, -6], [1, 7]]
    call = make(tokens=tokens, accepted=[9, 2, 9, 1], indices=table, batch=4, dst="source",
                buffer=2, entries=[0, 1, 2, 3], **SMALL)  # fmt: skip
    verify(call, call.interpreted())
    assert not raw(call.interpreted()["out"])[[0, 2]].any()


@pytest.mark.parametrize("dst", [None, [[-1, 9]] * 4])
def test_padded_sequences_may_have_any_length(dst):
    """They are cut to q, and their outputs are zeros."""
    call = make(lengths=[1, 2, 4, 2], steps=2, spare=0, indices=[-1, 3, -4, -1], buffer=2, dst=dst,
                entries=[0, 1, 2, 3], **SMALL)  # fmt: skip
    call["cu_seqlens"].copy_(torch.tensor([-5, 1, 3, 7, 99]))
    after = call.interpreted()
    assert not raw(after["out"])[[0, 3, 4, 5, 6, 7, 8]].any()
    assert after["out"][1:3].isfinite().all()
    for name, written in (("state", [9 if dst else 3]), ("intermediate_states_buffer", [1])):
        changed = (raw(after[name]) != raw(call[name])).flatten(1).any(1).nonzero()[:, 0]
        assert changed.tolist() == written
    want = call.copy()
    ssmgen.gated_delta_rule_decode(**want.arguments())
    assert torch.allclose(after["out"].float(), want["out"].float(), atol=2e-2)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_results_are_within_the_tolerances_of_flashinfer(state, tokens):
    call = make(state, batch=2, slots=2, tokens=tokens, H=1, HV=2, K=64, V=32, indices=[0, 1],
                token_axis=True)  # fmt: skip
    assert_within_flashinfer(call, GdnCall.interpreted, state)


def test_a_sequence_is_empty_where_the_table_does_not_increase():
    for ends in ([0, 3, 0, 0], [2, 5, 1, 1], [3, 5, 0, 3]):
        call = make(lengths=[3, 1, 1], steps=3, spare=0, indices=[2, 0, 1], **SMALL)
        call["cu_seqlens"].copy_(torch.tensor(ends))
        after, want = call.interpreted(), call.copy()
        ssmgen.gated_delta_rule_decode(**want.arguments())
        assert same(after["out"].isnan(), want["out"].isnan())
        written = [slot for i, slot in enumerate([2, 0, 1]) if ends[i + 1] > ends[i]]
        changed = (raw(after["state"]) != raw(call["state"])).flatten(1).any(1).nonzero()[:, 0]
        assert changed.tolist() == sorted(written)


def test_an_infinite_rate_makes_no_nan_of_columns_that_are_not_there():
    """exp(A_log) overflows; its product with the zeros beyond K would be one."""
    call = make(K=24, V=16, H=1, HV=1, batch=1, kda=True, gate="bounded")
    call["A_log"].fill_(100.0)
    after, want = call.interpreted(), call.copy()
    ssmgen.gated_delta_rule_decode(**want.arguments())
    assert want["out"].isfinite().all()
    assert torch.allclose(after["out"].float(), want["out"].float(), atol=2e-2)


@settings(max_examples=40)
@given(
    ends=st.lists(st.integers(-5, 14), min_size=4, max_size=4),
    accepted=st.lists(st.integers(-3, 6), min_size=3, max_size=3),
)
def test_whatever_the_tables_say_only_sequences_that_are_whole_write(ends, accepted):
    source = torch.arange(9).view(3, 3)
    call = make(
        lengths=[2, 3, 3], steps=4, spare=0, accepted=accepted, indices=source.tolist(), H=1, HV=1,
        K=8, V=16, buffer=4, entries=[0, 1, 2],
    )  # fmt: skip
    call.tensors["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    fits = [ends[i] >= 0 and ends[i + 1] <= 8 and 0 < ends[i + 1] - ends[i] <= 4 for i in range(3)]
    whole = [i for i in range(3) if fits[i] and accepted[i] <= 3]
    after = call.interpreted()
    changed = (raw(after["state"]) != raw(call["state"])).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert changed == [3 * i + max(accepted[i] - 1, 0) for i in whole]
    buffer = "intermediate_states_buffer"
    changed = (raw(after[buffer]) != raw(call[buffer])).flatten(2).any(2).nonzero().tolist()
    assert changed == [[i, t] for i in whole for t in range(ends[i + 1] - ends[i])]


@pytest.mark.parametrize("tokens", [1, 2])
def test_an_overflowing_row_stays_its_own(tokens):
    """With masked columns an infinite state must not become NaN where exact arithmetic has inf. A
    negative beta leaves it infinite for the next token."""
    call = make(K=24, V=16, H=1, HV=1, batch=1, l2norm=False, dtype="fp32", gate="given",
                tokens=tokens, token_axis=True)  # fmt: skip
    for name, value in (("k", 1.0), ("q", 1.0), ("v", 0.0), ("beta", -1.0)):
        call[name].fill_(value)
    call["v"][0, 0, 0, 3] = -torch.inf
    slot = int(call["state_batch_indices"][0])
    after = call.interpreted()
    for out in after["out"][0, :, 0]:
        assert out[3] == torch.inf
        assert out[[0, 1, 2, 4]].isfinite().all()
    assert after["state"][slot, 0, 3].eq(torch.inf).all()


@pytest.mark.parametrize("options", [{}, {"kda": True}, {"l2norm": False}])
def test_an_output_far_smaller_than_the_state_is_right(options):
    """With q = k of length 1, scale 1 and beta 1, o is v, and all that the state held cancels."""
    call = make(dtype="fp32", gate="given", tokens=2, scale=1.0, **SMALL, **options)
    call["state"].mul_(1e3)
    call["beta"].fill_(1.0)
    call["k"].div_(call["k"].norm(dim=-1, keepdim=True))
    call["q"].copy_(call["k"])
    verify(call, call.interpreted())
