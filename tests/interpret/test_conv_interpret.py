"""The rendered conv1d kernels, run in Triton's interpreter and held against the fp64 reference."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from conv_calls import make_conv, verify_conv
from hypothesis import given, settings
from hypothesis import strategies as st
from ssu_calls import same

from ssmgen.errors import ArgumentValueError
from ssmgen.reference import causal_conv1d

FORMS = ("one", "dense", "varlen", "prefill", "prefill_dense")
UPDATES = FORMS[:3]
PREFILLS = FORMS[3:]


def check(form="one", **options):
    """The call after a kernel of many programs has run on it, verified."""
    call = make_conv(form, **options)
    after = call.interpreted_by()
    verify_conv(call, after)
    return call, after


# Every form there is


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_width_is_right(form, width):
    check(form, width=width, dim=24, initial=[True] * 3 if form in PREFILLS else None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("bias", "activation"), [(False, None), (True, None), (False, "swish")])
def test_bias_and_activation_are_what_is_asked_for(form, bias, activation):
    call, _ = check(form, bias=bias, activation=activation)
    config = call.layout().config
    assert (config.has_bias, config.activation) == (bias, "silu" if activation else None)


@pytest.mark.parametrize("form", ["one", "varlen", "prefill"])
@pytest.mark.parametrize(
    ("dtype", "state", "weight", "width"),
    [("bf16", "bf16", "fp32", 2), ("bf16", "bf16", "fp32", 4), ("fp16", "fp32", "bf16", 4),
     ("fp16", "fp16", "fp16", 2), ("fp32", "fp32", "fp32", 2), ("bf16", "fp32", "bf16", 2),
     ("fp32", "fp32", "fp16", 4)],
)  # fmt: skip
def test_every_dtype_is_right(form, dtype, state, weight, width):
    check(form, dtype=dtype, state_dtype=state, weight_dtype=weight, width=width,
          initial=[True, True, False] if form == "prefill" else None)  # fmt: skip


# Where the past lies


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize(("width", "state_len"), [(2, 4), (4, 4), (4, 9), (6, 7)])
def test_windows_longer_than_the_past_are_read_and_moved_where_it_lies(
    form, alignment, width, state_len
):
    _, after = check(form, alignment=alignment, width=width, state_len=state_len,
                        lengths=[1, 3, 11] if form in ("varlen", "prefill") else None,
                        initial=[True, False, True] if form in PREFILLS else None)  # fmt: skip
    if alignment == "left":
        assert after["conv_state"][:, :, width - 1 :].isnan().all()


@pytest.mark.parametrize("form", UPDATES)
@pytest.mark.parametrize("state_len", [3, 4, 7])
def test_circular_windows_wrap_and_take_the_last_tokens(form, state_len):
    # Rows with no, few and many inputs before; more tokens than columns.
    lengths = [1, 5, 9] if form == "varlen" else None
    check(form, counts=[0, 2, 1000], state_len=state_len, lengths=lengths, tokens=5)


@pytest.mark.parametrize("form", ["one", "dense"])
@pytest.mark.parametrize("alignment", ["left", "right"])
def test_left_and_right_are_one_kernel_where_the_window_is_the_past(form, alignment):
    call, after = check(form, alignment=alignment)
    other, same_after = check(form, alignment=None)
    assert call.layout().config == other.layout().config
    assert same(after["conv_state"], same_after["conv_state"])


# How tensors lie in memory


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "layout",
    [
        {"order": "length"},
        {"order": "length", "state_len": 4, "alignment": "right"},
        {"order": "loose", "pitch": 5, "offset": 3},
        {"pitch": 8},
        {"pitch": 3, "offset": 1},
        {"gap": 8, "lead": 16},
        {"gap": 3, "lead": 1},
        {"weight_order": "channels"},
        {"dim": 21},
        {"dim": 1},
        {"dim": 12, "order": "length"},
    ],
    ids=str,
)
def test_every_layout_is_right(form, layout):
    check(form, **layout, initial="rows" if form in PREFILLS else None)


def test_the_aligned_kernel_is_taken_where_all_start_and_step_by_16_bytes():
    for options in ({}, {"pitch": 8}, {"gap": 8, "lead": 16}, {"order": "length"}):
        assert make_conv(**options).layout().config.aligned
    for options in ({"pitch": 3}, {"offset": 1}, {"gap": 4}, {"lead": 1}, {"dim": 20},
                    {"weight_order": "channels"}, {"offset": 1, "order": "length"},
                    {"batch": 1, "dim": 20, "width": 2, "pitch": 4}):  # fmt: skip
        assert not make_conv(**options).layout().config.aligned
    for order in ("length", "loose"):
        assert not make_conv(order=order).layout().config.packed_channels


# Slots


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "table",
    [
        {"indices": [4, -1, 0]},
        {"indices": [9, 2, 9], "pad": 9},
        {"indices": [-1, -1, -1]},
        {"indices": None},
        {"indices": None, "slots": 3},
        {"index_dtype": "int64", "index_width": 3},
        {"indices": [4, -1, 0], "dst": [1, 2, -1]},
        {"indices": [4, 3, 0], "dst": [4, 3, 0]},
        {"indices": [-3, 3, -(2**40)], "dst": [4, -5, 0], "index_dtype": "int64"},
        {"indices": [4, -9, 0], "pad": 2},
    ],
    ids=str,
)
def test_rows_read_and_write_the_slots_named_and_no_other(form, table):
    # The pool is NaN where it is no row's past, so that a slot read by mistake shows.
    lengths = [1, 2, 5] if form in ("varlen", "prefill") else None
    check(form, **table, lengths=lengths, initial=[True] * 3 if form in PREFILLS else None)


@pytest.mark.parametrize("form", FORMS)
def test_a_padded_row_has_the_output_of_a_past_of_zeros(form):
    call, after = check(form, indices=[-1, 4, -1], bias=True, dtype="fp32",
                        lengths=[2, 1, 3] if form in ("varlen", "prefill") else None)  # fmt: skip
    x, out = call["x"], after["out"]
    if form in ("varlen", "prefill"):
        axis = int(form == "prefill")
        x, out = x.narrow(axis, 0, 2), out.narrow(axis, 0, 2)
        x, out = (x, out) if axis else (x.t(), out.t())
    else:
        x, out = x[0].view(16, -1), out[0].view(16, -1)
    v = torch.cat([torch.zeros(16, 3), x], 1)
    want = causal_conv1d(v, call["weight"], call["bias"], "silu", compute_dtype=torch.float64)
    # Of magnitudes below 16: five roundings each way, and silu's.
    assert ((out - want).abs() <= 256 * 2.0**-24).all()


# Accepted tokens


@pytest.mark.parametrize(("width", "state_len"), [(2, 6), (3, 5), (4, 6), (4, 9), (6, 6)])
def test_the_past_begins_after_the_accepted_tokens(width, state_len):
    most = state_len - width + 2
    for accepted in ([1, most, 0], [2, 1, most - 1]):
        check("one", width=width, state_len=state_len, accepted=accepted)
        check("dense", width=width, state_len=state_len, accepted=accepted, tokens=most)
        lengths = [1, most, 2]
        check("varlen", width=width, state_len=state_len, accepted=accepted, lengths=lengths)
        check("varlen", width=width, state_len=state_len, accepted=accepted, lengths=lengths,
              dst=[0, -1, 2], indices=[5, 4, 2], order="length")  # fmt: skip


@pytest.mark.parametrize("order", ["channels", "length"])
@pytest.mark.parametrize(("width", "state_len"), [(2, 5), (3, 5), (4, 6), (6, 7)])
def test_a_prefill_goes_on_after_the_accepted_tokens(width, state_len, order):
    most = state_len - width + 2
    options = {"width": width, "state_len": state_len, "order": order}
    for accepted, lengths in (([1, most, 0], [1, 20, 2]), ([most, 2, -9], [3, 0, 9])):
        for initial in ([True] * 3, [True, False, True]):
            more = {**options, "accepted": accepted, "initial": initial}
            check("prefill", **more, lengths=lengths)
            check("prefill", **more, lengths=lengths, indices=[3, -1, 5], dst=[0, 1, -1])
            _, after = check("prefill_dense", **more, tokens=lengths[0])
            # What lay beyond the window that it leaves is no past any more, and is left alone.
            assert after["conv_state"][:, :, width - 1 :].isnan().any()


@pytest.mark.parametrize("form", ["one", "varlen", "prefill"])
def test_a_padded_row_may_hold_any_count(form):
    options = {"state_len": 5, "indices": [-1, 3, -8], "lengths": [1, 2, 0]}
    check(form, **options, accepted=[99, 2, -7], initial=[True] * 3 if form == "prefill" else None)
    if form != "prefill":
        check(form, **options, counts=[-3, 2, -7])


@pytest.mark.parametrize("form", ["varlen", "prefill"])
@pytest.mark.parametrize("ends", [[0, 2, 3, 99], [-9, 2, 3, 3], [0, 3, 8, 8]])
def test_padded_sequences_may_have_any_length(form, ends):
    """They are cut to x; every chunk of them has the outputs of zeros."""
    slots = [-1 if begin < 0 or end - begin > 4 else i + 3
             for i, (begin, end) in enumerate(itertools.pairwise(ends))]  # fmt: skip
    accepted, flags = ([1, 2, 1], None) if form == "varlen" else (None, [True] * 3)
    for spare in (0, 30):
        call = make_conv(form, lengths=[1, 1, 1], spare=spare, indices=slots, accepted=accepted,
                         state_len=6, initial=flags)  # fmt: skip
        call["query_start_loc"].copy_(torch.tensor(ends))
        verify_conv(call, call.interpreted_by())


# Rows of sequences


@pytest.mark.parametrize("form", ["varlen", "prefill"])
@pytest.mark.parametrize(
    ("lengths", "index_dtype"),
    [([0], "int32"), ([3], "int64"), ([1, 1, 1], "int32"), ([0, 0, 2, 0], "int64"),
     ([7, 8, 9, 0, 17, 1], "int32"), ([0, 33, 2], "int64")],
)  # fmt: skip
def test_sequences_of_any_length_are_right(form, index_dtype, lengths):
    flags = [i % 3 != 1 for i in range(len(lengths))] if form == "prefill" else None
    check(form, lengths=lengths, index_dtype=index_dtype, spare=2, initial=flags)


def test_more_chunks_than_programs_are_taken_in_turns():
    # 130 sequences of one token: 17 programs, and more begins than are searched at a time.
    lengths = [1] * 130 + [20]
    check("prefill", lengths=lengths, dim=8, slots=140, initial=[True] * 131)


DECREASING = {
    "a tail of zeros": [0, 20, 0, 0],
    "a tail of the last": [0, 20, 20, 20],
    "a tail from before": [3, 20, 9, 2],
    "zeros, then more": [0, 9, 0, 0, 0, 0],
    "in another order": [11, 20, 0, 11],
    "between empty ones": [5, 5, 4, 20, 17, 1, 4],
}


@pytest.mark.parametrize("form", ["varlen", "prefill"])
@pytest.mark.parametrize("table", DECREASING)
def test_a_sequence_is_empty_where_the_table_does_not_increase(form, table):
    ends = DECREASING[table]
    rows = len(ends) - 1
    flags = [True] * rows if form == "prefill" else None
    call = make_conv(form, lengths=[20] + [0] * (rows - 1), initial=flags)
    call["query_start_loc"].copy_(torch.tensor(ends))
    verify_conv(call, call.interpreted_by())


def test_sequences_are_found_after_any_number_of_empty_ones():
    ends = [0, *[9] * 140, 29, *[8] * 130]
    rows = len(ends) - 1
    call = make_conv("prefill", lengths=[29] + [0] * (rows - 1), dim=8, initial=[True] * rows)
    call["query_start_loc"].copy_(torch.tensor(ends))
    verify_conv(call, call.interpreted_by())


def test_every_token_of_sequences_that_share_some_is_written():
    for ends in ([0, 30, 4, 16], [4, 16, 0, 30], [0, 30, 0, 30, 0, 30]):
        rows = len(ends) - 1
        call = make_conv("prefill", lengths=[30] + [0] * (rows - 1), indices=list(range(rows)))
        call["query_start_loc"].copy_(torch.tensor(ends))
        after = call.interpreted_by()
        assert not after["out"].isnan().any()
        with pytest.raises(ArgumentValueError, match=r"query_start_loc: found token \d in two"):
            call.refer()


def test_without_tables_and_pools_it_is_a_plain_convolution():
    for form in PREFILLS:
        for initial in (None, "rows"):
            call, _ = check(form, pool=False, initial=initial, lengths=[9, 2])
            assert not call.layout().config.has_pool


def test_new_columns_older_than_the_initial_states_are_zero():
    for lengths in ([1, 2, 9], [3, 4, 5]):
        check("prefill", initial="rows", alignment="right", state_len=6, lengths=lengths)


# Rows that cannot be followed

REFUSED: dict[str, dict[str, Any]] = {
    "too many tokens": {"lengths": [1, 5, 2], "accepted": [1, 1, 1], "state_len": 6},
    "too many accepted": {"lengths": [1, 2, 2], "accepted": [1, 5, 1], "state_len": 6},
    "a negative count": {"lengths": [1, 2, 2], "counts": [0, -1, 3], "state_len": 6},
    "beyond x": {"lengths": [1, 2, 2]},
}


@pytest.mark.parametrize(
    ("form", "why"),
    [*(("varlen", why) for why in REFUSED), ("prefill", "beyond x"),
     ("prefill", "too many accepted")],
)  # fmt: skip
def test_a_row_that_cannot_be_followed_is_nan_and_alone_in_it(form, why):
    options = REFUSED[why]
    if form == "prefill":
        options = {**options, "initial": [True] * 3, "lengths": [1, 20, 2]}
    row = 2 if why == "beyond x" else 1
    call = make_conv(form, **options, indices=[3, 4, 5])
    sane = call.copy()
    if why == "beyond x":
        call["query_start_loc"][3] += 10**6
    else:
        for name in ("num_accepted_tokens", "cache_seqlens"):
            if name in sane.tensors:
                sane[name][1] = 1
        if why == "too many tokens":
            begins = sane["query_start_loc"]
            begins[2:] -= begins[2] - begins[1] - 2
    after = call.interpreted_by()
    right = sane.interpreted_by()
    ends = call["query_start_loc"].clamp(max=call["x"].shape[1 if form == "prefill" else 0])

    def rows(of, at, ends):
        out = of["out"].t() if form == "prefill" else of["out"]
        return out[ends[at] : ends[at + 1]]

    assert rows(after, row, ends).isnan().all()
    assert rows(after, row, ends).numel()
    assert same(after["conv_state"][3 + row], call["conv_state"][3 + row])
    others = [i for i in range(3) if i != row]
    for other in others:
        found, want = rows(after, other, ends), rows(right, other, sane["query_start_loc"])
        if why != "too many tokens":
            assert same(found.contiguous(), want.contiguous())
            assert same(after["conv_state"][3 + other], right["conv_state"][3 + other])
        assert not found.isnan().any()


def test_one_token_a_row_is_refused_by_its_own_tables():
    call = make_conv(accepted=[1, 5, 4], state_len=6, indices=[3, 4, 5])
    after = call.interpreted_by()
    assert after["out"].isnan().any(1).tolist() == [False, True, False]
    assert same(after["conv_state"][4], call["conv_state"][4])


# Equality of bits


@pytest.mark.parametrize("form", UPDATES)
@pytest.mark.parametrize(
    "options",
    [{}, {"accepted": [1, 3, 2], "state_len": 6}, {"counts": [0, 7, 2], "state_len": 5}],
    ids=str,
)
def test_a_row_alone_gives_the_bits_it_gives_in_a_batch(form, options):
    call = make_conv(form, **options, lengths=[1, 4, 2])
    whole = call.interpreted_by()
    for row in range(3):
        alone = call.copy()
        for name in ("x", "out", "conv_state_indices", "num_accepted_tokens", "cache_seqlens"):
            if name in alone.tensors and (form != "varlen" or name not in ("x", "out")):
                alone.tensors[name] = alone[name][row : row + 1]
        begin, end = row, row + 1
        if form == "varlen":
            begin, end = call["query_start_loc"][row : row + 2].tolist()
            alone.tensors["query_start_loc"] = alone["query_start_loc"][row : row + 2].clone()
        one = alone.interpreted_by()
        got = one["out"][begin:end] if form == "varlen" else one["out"]
        slot = int(call["conv_state_indices"][row])
        assert same(got.contiguous(), whole["out"][begin:end].contiguous())
        assert same(one["conv_state"][slot], whole["conv_state"][slot])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "options",
    [{}, {"alignment": "right", "state_len": 6}, {"counts": [0, 7, 2], "state_len": 5}],
    ids=str,
)
def test_many_tokens_are_single_calls_bit_for_bit(dtype, options):
    call = make_conv("dense", tokens=5, dtype=dtype, **options)
    whole = call.interpreted_by()
    steps = call.copy()
    outs = []
    for token in range(5):
        step = steps.copy()
        step.tensors["x"] = steps["x"][:, :, token]
        step.tensors["out"] = steps["out"][:, :, token].contiguous()
        step = step.interpreted_by()
        outs.append(step["out"])
        steps.tensors["conv_state"] = step["conv_state"]
        if "cache_seqlens" in steps.tensors:
            steps["cache_seqlens"].add_(1)
    assert same(torch.stack(outs, 2), whole["out"].contiguous())
    assert same(steps["conv_state"], whole["conv_state"])


def test_prefill_has_the_bits_of_updates():
    call = make_conv("prefill", lengths=[5, 1, 20], initial=[True] * 3)
    whole = call.interpreted_by()
    update = call.copy()
    del update.tensors["has_initial_state"]
    update.switches["prefill"] = False
    for name in ("x", "out"):
        update.tensors[name] = update[name].t()
    update = update.interpreted_by()
    assert same(update["out"], whole["out"].t())
    assert same(update["conv_state"], whole["conv_state"])


@settings(max_examples=20)
@given(
    form=st.sampled_from(["varlen", "prefill"]),
    lengths=st.lists(st.integers(0, 19), min_size=1, max_size=5),
    width=st.integers(2, 6),
    extra=st.integers(0, 3),
    alignment=st.sampled_from(["left", "right"]),
    order=st.sampled_from(["channels", "length"]),
    state=st.sampled_from([None, "fp32"]),
    block_m=st.sampled_from([1, 4, 16]),
    dim=st.sampled_from([8, 13, 32]),
    seed=st.integers(0, 99),
)
def test_any_sequences_and_windows_are_right(
    form, lengths, width, extra, alignment, order, state, block_m, dim, seed
):
    draw = random.Random(seed)
    slots = draw.sample(range(-1, len(lengths) + 3), len(lengths))
    initial = draw.choice([None, "rows", [draw.random() < 0.5 for _ in lengths]])
    call = make_conv(form, lengths=lengths, width=width, state_len=width - 1 + extra, dim=dim,
                     alignment=alignment, order=order, state_dtype=state, indices=slots,
                     initial=initial if form == "prefill" else None, random=seed)  # fmt: skip
    verify_conv(call, call.interpreted_by(block_m=block_m))


# A server that decodes speculatively


def decode(drafts, *, drop=None, width=4, dim=8, requests=3, seed=0):
    """Outputs at every accepted position, by (request, position), of requests whose inputs are a
    function of both; rejected drafts have others. Rows without drafts stand beside drafting ones.
    `drop`: forget what was accepted, of rows without drafts ("plain") or of all ("all").
    """
    draw = random.Random(seed)
    gen = torch.Generator().manual_seed(5)
    inputs = torch.randn(requests, 24, dim, generator=gen)
    state_len = width - 1 + drafts
    call = make_conv("varlen", lengths=[1] * requests, width=width, dim=dim, state_len=state_len,
                     accepted=[1] * requests, dtype="fp32", slots=requests + 2)  # fmt: skip
    call["conv_state"].fill_(torch.nan)
    call["conv_state"][call["conv_state_indices"].long()] = 0
    done, accepted, outputs = [0] * requests, [1] * requests, {}
    while min(done) < 10:
        counts = [draw.choice([0, 0, draw.randint(0, drafts)]) for _ in range(requests)]
        rows, taken = [], []
        for row, count in enumerate(counts):
            right = draw.randint(0, count)
            tokens = inputs[row, done[row] : done[row] + 1 + count].clone()
            tokens[1 + right :] += 3.0
            rows.append(tokens)
            taken.append(right + 1)
        forgotten = [1 if drop == "all" or (drop == "plain" and not count) else n
                     for n, count in zip(accepted, counts)]  # fmt: skip
        call.tensors |= {
            "x": torch.cat(rows),
            "out": torch.full((sum(map(len, rows)), dim), torch.nan),
            "query_start_loc": torch.tensor([0, *map(len, rows)], dtype=torch.int32)
            .cumsum(0)
            .to(torch.int32),
            "num_accepted_tokens": torch.tensor(forgotten, dtype=torch.int32),
        }
        call = call.interpreted_by(block_m=4)
        ends = call["query_start_loc"].tolist()
        for row, count in enumerate(taken):
            for i in range(count):
                outputs[row, done[row] + i] = call["out"][ends[row] + i]
            done[row] += count
        accepted = taken
    return {at: y for at, y in outputs.items() if at[1] < 10}


def test_speculation_changes_no_bit_of_what_is_accepted():
    plain = decode(0)
    assert len(plain) == 30
    speculative = decode(3)
    assert all(same(speculative[at], plain[at]) for at in plain)
    # What the test is for: each of the two bugs shows.
    for drop in ("plain", "all"):
        wrong = decode(3, drop=drop)
        assert any(not same(wrong[at], plain[at]) for at in plain)
