"""causal_conv1d_update and causal_conv1d_fn on CPU tensors: the ops that users call."""

from __future__ import annotations

import inspect

import pytest
import torch
from conv_calls import make_conv, verify_conv
from ssu_calls import same

import ssmgen
from ssmgen.errors import ArgumentTypeError, ArgumentValueError
from ssmgen.families.conv1d.contract import ABI_TENSORS
from ssmgen.ops import conv1d

CALLS = {
    "one": {},
    "bare": {"bias": False, "activation": None, "indices": None},
    "right": {"alignment": "right", "state_len": 4, "order": "length"},
    "circular": {"counts": [0, 5, 9], "state_len": 4},
    "accepted": {"accepted": [1, 3, 2], "state_len": 6, "dst": [0, 1, 2], "indices": [3, 4, 5]},
    "dense": {"form": "dense"},
    "varlen": {"form": "varlen", "lengths": [1, 4, 0], "accepted": [2, 1, 1], "state_len": 6},
    "prefill": {"form": "prefill", "initial": [True, False, True], "lengths": [3, 9, 20]},
    "initial states": {"form": "prefill_dense", "initial": "rows", "alignment": "right",
                       "state_len": 5},
    "no pool": {"form": "prefill", "pool": False},
}  # fmt: skip


def run(call, **changes):
    """A copy of the call after the op has run on it."""
    after = call.copy()
    out = after.op(**{**after.arguments(), **changes})
    assert out is after["out"]
    return after


def flat(call):
    """The arguments of the registered op, and the op."""
    operation = conv1d.prefill if call.prefill else conv1d.update
    name = "causal_conv1d_fn" if call.prefill else "causal_conv1d_update"
    switches = [call.switches[n] for n in operation.switches]
    tensors = [call.tensors.get(n) for n in operation.tensors]
    assert set(call.tensors) <= set(operation.tensors) <= set(ABI_TENSORS)
    return getattr(torch.ops.ssmgen, name).default, (*tensors, *switches)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_op_is_right(name, dtype):
    call = make_conv(**CALLS[name], dtype=dtype)
    verify_conv(call, run(call))


@pytest.mark.parametrize("name", ["one", "varlen", "prefill"])
def test_the_interpreted_op_is_right(name, monkeypatch):
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    call = make_conv(**CALLS[name])
    verify_conv(call, run(call))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_passes(name):
    call = make_conv(**CALLS[name], pad=-1)
    for tensor in ("conv_state", "out"):
        if tensor in call.tensors:
            call[tensor].nan_to_num_(0.5)  # opcheck compares, and NaN is not equal to itself
    op, arguments = flat(call)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor",
              "test_aot_dispatch_dynamic"]  # fmt: skip
    torch.library.opcheck(op, arguments, test_utils=checks)


@pytest.mark.parametrize("name", ["one", "varlen", "prefill"])
@pytest.mark.parametrize("given_out", [True, False])
def test_torch_compile_takes_it_in_one_graph(name, given_out):
    torch._dynamo.reset()
    call = make_conv(**CALLS[name])
    after, wanted = call.copy(), run(call)
    arguments = after.arguments()
    if not given_out:
        del arguments["out"]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(arguments):
        y = call.op(**arguments)
        return y, y.float() + 1

    y, more = step(arguments)
    assert same(y.contiguous(), wanted["out"].contiguous())
    assert same(more.contiguous(), (wanted["out"].float() + 1).contiguous())
    assert same(after["conv_state"].contiguous(), wanted["conv_state"].contiguous())


@pytest.mark.parametrize("name", CALLS)
def test_without_out_one_is_made_whose_channels_lie_side_by_side(name):
    call = make_conv(**CALLS[name])
    wanted = run(call)
    arguments = call.arguments()
    del arguments["out"]
    made = call.op(**arguments)
    assert same(made.contiguous(), wanted["out"].contiguous())
    assert made.stride(1 if made.dim() == 3 else 0 if call.prefill else 1) == 1
    call.tensors["out"] = made
    assert call.layout().config.aligned


@pytest.mark.parametrize("shape", [(3, 16), (3, 16, 1)])
def test_out_may_be_x_where_a_row_has_one_token(shape):
    call = make_conv()
    wanted = run(call)
    call.tensors["x"] = call["x"].view(shape)
    arguments = {**call.arguments(), "out": call["x"]}
    assert ssmgen.causal_conv1d_update(**arguments) is call["x"]
    assert same(call["x"].view(3, 16), wanted["out"])


@pytest.mark.parametrize("form", ["dense", "varlen", "prefill", "prefill_dense"])
def test_out_is_not_x_where_rows_have_several_tokens(form):
    call = make_conv(form)
    with pytest.raises(ArgumentValueError, match="out: found x itself"):
        call.op(**{**call.arguments(), "out": call["x"]})


def test_three_dimensions_with_one_token_take_the_kernel_of_one_token():
    call = make_conv("dense", tokens=1)
    assert not call.layout().config.many
    verify_conv(call, run(call))


@pytest.mark.parametrize("form", ["one", "dense", "varlen", "prefill", "prefill_dense"])
def test_an_empty_batch_is_an_empty_result(form):
    call = make_conv(form, batch=0, lengths=[], slots=4)
    assert 0 in call["out"].shape
    after = run(call)
    assert same(after["conv_state"], call["conv_state"])
    assert call.layout().batch == 0


def test_the_arguments_are_in_the_order_of_vllm():
    # By its version 0.33; ssmgen's own follow as keywords.
    def names(op):
        parameters = inspect.signature(op).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert names(ssmgen.causal_conv1d_update) == [
        "x", "conv_state", "weight", "bias", "activation", "conv_state_indices",
        "num_accepted_tokens", "query_start_loc", "pad_slot_id", "out",
    ]  # fmt: skip
    assert names(ssmgen.causal_conv1d_fn) == [
        "x", "weight", "bias", "conv_states", "query_start_loc", "cache_indices",
        "has_initial_state", "activation", "pad_slot_id",
    ]  # fmt: skip


def test_what_is_no_tensor_is_refused():
    call = make_conv()
    with pytest.raises(ArgumentTypeError, match="x: found list"):
        ssmgen.causal_conv1d_update([1], call["conv_state"], call["weight"])
    with pytest.raises(ArgumentTypeError, match="weight: found int"):
        ssmgen.causal_conv1d_fn(call["x"].t(), 3)
    with pytest.raises(ArgumentTypeError, match="x: missing"):
        ssmgen.causal_conv1d_update(None, call["conv_state"], call["weight"])


def test_tables_are_read_before_the_interpreter_where_checks_are_on(monkeypatch):
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    call = make_conv("varlen", lengths=[1, 5, 2], accepted=[1, 1, 1], state_len=6)
    assert run(call)["out"].isnan().any(1).tolist() == [False] + [True] * 5 + [False] * 2
    monkeypatch.setenv("SSMGEN_CHECK", "1")
    before = call.copy()
    with pytest.raises(ArgumentValueError, match="query_start_loc: found a row of 5"):
        call.op(**call.arguments())
    assert same(call["conv_state"], before["conv_state"])
    prefill = make_conv("prefill", indices=[20, 1, 3])
    with pytest.raises(ArgumentValueError, match="slot 20 lies outside"):
        prefill.op(**prefill.arguments())


@pytest.mark.parametrize(
    ("form", "options", "words"),
    [
        ("one", {"indices": [3, 3]}, "conv_state_indices: found slot 3, that two rows write"),
        ("one", {"indices": [1, 2], "dst": [4, 4]}, "dst_state_indices: found slot 4, that two"),
        ("one", {"indices": [1, 2], "dst": [5, 1]}, "conv_.*: found slot 1, that another row"),
        ("varlen", {"lengths": [1, 2], "indices": [3, 3]}, "found slot 3, that two rows write"),
        ("prefill", {"lengths": [4, 2], "indices": [3, 3]}, "cache_indices: found slot 3, that"),
        ("prefill", {"lengths": [4, 2], "indices": [1, 2], "dst": [5, 1], "initial": [True] * 2},
         "cache_indices: found slot 1, that another row writes"),
        # What is read by no row, padded, only read, or of rows without tokens.
        ("prefill", {"lengths": [4, 2], "indices": [1, 2], "dst": [5, 1]}, None),
        ("one", {"indices": [-1, -1], "dst": [3, 3]}, None),
        ("one", {"indices": [1, 1], "dst": [4, 5]}, None),
        ("varlen", {"lengths": [2, 0], "indices": [3, 3]}, None),
        ("prefill", {"lengths": [4, 2], "pool": False}, None),
    ],
)  # fmt: skip
def test_rows_that_would_race_raise_where_checks_are_on(form, options, words, monkeypatch):
    call = make_conv(form, batch=2, slots=8, **options)
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    monkeypatch.setenv("SSMGEN_CHECK", "1")
    before = call.copy()
    if words is None:
        call.op(**call.arguments())
        return
    with pytest.raises(ArgumentValueError, match=words):
        call.op(**call.arguments())
    assert all(same(before[name], call[name]) for name in call.tensors)
