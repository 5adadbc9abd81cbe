"""gated_delta_rule_decode on CPU tensors: what users call, and what is refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from gdn_calls import LAYOUTS, STATES, GdnCall, make, verify
from ssu_calls import raw, same, storage

import ssmgen
from ssmgen import KernelConfig
from ssmgen.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ConfigError,
    DeviceError,
    SsmgenError,
)
from ssmgen.families import spec
from ssmgen.families.gdn.contract import ABI_TENSORS
from ssmgen.ops import gdn as module

CALLS = {
    "plain": {},
    "views": {"packing": "flat", "lead": 3, "pitch": 8, "H": 2, "HV": 6},
    "interleaved": {"packing": "interleaved", "H": 2, "HV": 6, "tokens": 2},
    "interleaved, one token": {"packing": "interleaved", "token_axis": True},
    "kda": {"kda": True, "gate": "bounded"},
    "given": {"gate": "given"},
    "accepted, one token": {"accepted": [2, 0, 1], "indices": [[0, 1], [2, 3], [-1, 5]]},
    "sequences": {"lengths": [3, 0, 1], "steps": 3, "dst": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
                  "buffer": 3},
    "large": {"K": 128, "V": 64, "H": 4, "HV": 12, "tokens": 2},
}  # fmt: skip


def run(call: GdnCall, **changes) -> GdnCall:
    """A copy of the call after the op has run on it."""
    after = call.copy()
    out = ssmgen.gated_delta_rule_decode(**{**after.arguments(), **changes})
    assert out is after["out"]
    return after


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("kind", CALLS)
def test_the_op_is_right(kind, order):
    call = make(**CALLS[kind], order=order)
    verify(call, run(call))


@pytest.mark.parametrize(("state", "rounding"), STATES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_op_is_right_for_every_state_rounding_and_dtype(state, rounding, dtype):
    call = make(state, rounding, dtype=dtype, tokens=2, buffer=2)
    verify(call, run(call))


@pytest.mark.parametrize("name", ["state", "q", "k", "v"])
def test_what_is_missing_is_named(name):
    tensors = {"state": torch.zeros(2, 2, 8, 8), "q": torch.zeros(1, 1, 8)}
    tensors |= {"k": tensors["q"], "v": torch.zeros(1, 2, 8), name: None}
    gates = {"A_log": torch.zeros(2), "a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}
    with pytest.raises(ArgumentTypeError, match=f"^{name}: missing"):
        ssmgen.gated_delta_rule_decode(**tensors, **gates)


def test_a_missing_out_is_made():
    call = make(packing="interleaved", tokens=2)
    wanted = run(call)["out"]
    arguments = call.copy().arguments()
    del arguments["out"]
    out = ssmgen.gated_delta_rule_decode(**arguments)
    assert same(out, wanted)
    assert out.is_contiguous()


def test_the_interpreter_runs_the_op(monkeypatch):
    call = make(H=1, HV=2, V=8)
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    verify(call, run(call))


def test_the_registered_op_passes_opcheck_and_compiles_whole():
    call = make(tokens=2, kda=True, H=1, HV=2)
    call["state"].nan_to_num_()
    call["out"].zero_()
    flat = [call.tensors.get(n) for n in ABI_TENSORS]
    switches = [None, None, True, -1, False, 10, "auto", False, 0]
    torch.library.opcheck(torch.ops.ssmgen.gated_delta_rule_decode.default, (*flat, *switches))
    compiled = torch.compile(
        lambda **k: ssmgen.gated_delta_rule_decode(**k), fullgraph=True, backend="aot_eager"
    )
    arguments = call.copy().arguments()
    del arguments["out"]
    assert same(compiled(**arguments), run(call)["out"])


def test_the_names_of_the_operation_are_those_of_the_contract_and_the_function():
    assert module.operation.tensors == ABI_TENSORS
    parameters = set(inspect.signature(ssmgen.gated_delta_rule_decode).parameters)
    assert parameters == {*module.operation.tensors, *module.operation.switches}


def test_what_no_kernel_can_tell_raises_when_checked(monkeypatch):
    call = make(accepted=[3, 1, 1], indices=[[0, 1], [2, 3], [4, 5]], H=1, HV=2, V=8)
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    assert run(call)["out"][0].isnan().all()
    monkeypatch.setenv("SSMGEN_CHECK", "1")
    with pytest.raises(ArgumentValueError, match="num_accepted_tokens: found 3"):
        run(call)


def test_snapshots_by_row_need_no_entry_for_each_slot_when_checked(monkeypatch):
    call = make(indices=[7, 8, 9], buffer=1, buffer_entries=3, H=1, HV=2, V=8)
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    monkeypatch.setenv("SSMGEN_CHECK", "1")
    verify(call, run(call))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"indices": [3, 3]}, "state_batch_indices: found slot 3, that two rows write"),
        ({"indices": [1, 2], "dst": [4, 4]}, "dst_.*: found slot 4, that two rows write"),
        ({"indices": [1, 2], "dst": [2, 5]}, "^state_.*: found slot 2, that another row writes"),
        ({"buffer": 1, "entries": [5, 5]}, "intermediate_.*: found entry 5, that two rows write"),
        # What is only read, padded, or written by the row that has read it.
        ({"indices": [1, 1], "update": False}, None),
        ({"indices": [1, 1], "dst": [4, 5]}, None),
        ({"indices": [-1, -1], "dst": [3, 3]}, None),
        ({"indices": [1, 2], "dst": [1, -1], "buffer": 1}, None),
    ],
)
def test_rows_that_would_race_raise_when_checked(options, words, monkeypatch):
    call = make(batch=2, H=1, HV=2, V=8, **options)
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    monkeypatch.setenv("SSMGEN_CHECK", "1")
    before = call.copy()
    if words is None:
        ssmgen.gated_delta_rule_decode(**call.arguments())
        return
    with pytest.raises(ArgumentValueError, match=words):
        ssmgen.gated_delta_rule_decode(**call.arguments())
    assert all(same(before[name], call[name]) for name in call.tensors)


# What is refused, with which error, before anything is written


def base() -> GdnCall:
    """A call with every argument that can stand beside the others."""
    return make("bf16", "stochastic", tokens=2, buffer=2, entries=[0, 1, 2], dst=[7, 8, 9],
                indices=[[0, 1], [2, 3], [4, 5]], accepted=[1, 2, 1])  # fmt: skip


def cut(axis):
    return lambda t: t.narrow(axis, 0, t.shape[axis] - 1)


def strided(t):
    """The same shape with a last stride of 2."""
    return torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)[..., ::2]


REFUSED = [
    ("q", cut(0), ArgumentValueError, "(2, 2, 2, 16)"),
    ("q", cut(3), ArgumentValueError, "(3, 2, 2, 16)"),
    ("q", lambda t: t[0, 0], ArgumentValueError, "(2, 16)"),
    ("q", lambda t: t[:, :, [0, 0, 0]], ArgumentValueError, "3 heads"),
    ("q", strided, ArgumentValueError, "last stride of 1"),
    ("k", cut(1), ArgumentValueError, "(3, 2, 2, 16)"),
    ("k", lambda t: t.float(), ArgumentTypeError, "bf16 (that of q)"),
    ("v", cut(2), ArgumentValueError, "(3, 2, 4, 24)"),
    ("v", cut(3), ArgumentValueError, "(3, 2, 4, 24)"),
    ("v", strided, ArgumentValueError, "last stride of 1"),
    ("v", lambda t: torch._neg_view(t), ArgumentValueError, "negated"),
    ("a", cut(2), ArgumentValueError, "(3, 2, 4)"),
    ("a", lambda t: t.unsqueeze(-1), ArgumentValueError, "(3, 2, 4, 16)"),
    ("a", lambda t: t.int(), ArgumentTypeError, "int32"),
    ("b", lambda t: t[:, :, :2], ArgumentValueError, "(3, 2, 4)"),
    ("A_log", cut(0), ArgumentValueError, "(4,)"),
    ("A_log", lambda t: None, ArgumentTypeError, "missing"),
    ("dt_bias", lambda t: t[:, None].expand(4, 16), ArgumentValueError, "(4,)"),
    ("g", lambda t: torch.zeros(3, 2, 4), ArgumentTypeError, "beta: missing"),
    ("state", lambda t: t[0], ArgumentValueError, "(slots, HV, V, K)"),
    ("state", lambda t: t.double(), ArgumentTypeError, "float64"),
    ("state", strided, ArgumentValueError, "inner strides (16, 1)"),
    ("state", lambda t: t.repeat(1, 1, 2, 1)[:, :, ::2], ArgumentValueError, "inner strides"),
    ("state", lambda t: t[:1].expand(10, 4, 24, 16), ArgumentValueError, "share no memory"),
    ("state", lambda t: t.float(), ArgumentTypeError, "that of state"),
    ("out", lambda t: t[..., :16], ArgumentValueError, "(3, 2, 4, 24)"),
    ("out", lambda t: t[:, :1].expand(t.shape), ArgumentValueError, "share no memory"),
    ("out", lambda t: t.to("meta"), DeviceError, "meta"),
    ("state_batch_indices", lambda t: t[:, 0], ArgumentValueError, "columns"),
    ("state_batch_indices", lambda t: t.short(), ArgumentTypeError, "int16"),
    ("state_batch_indices", lambda t: None, ArgumentValueError, "state_batch_indices"),
    ("dst_state_batch_indices", cut(0), ArgumentValueError, "(3,)"),
    ("dst_state_batch_indices", lambda t: t.int(), ArgumentTypeError, "int64"),
    ("num_accepted_tokens", cut(0), ArgumentValueError, "(3,)"),
    ("intermediate_states_buffer", cut(1), ArgumentValueError, "at least 2"),
    ("intermediate_states_buffer", lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
     ArgumentValueError, "those of state"),
    ("intermediate_states_buffer", lambda t: None, ArgumentValueError, "without"),
    ("intermediate_state_indices", cut(0), ArgumentValueError, "(3,)"),
    ("rand_seed", lambda t: t.int(), ArgumentTypeError, "int64"),
    ("rand_seed", lambda t: t.repeat(2), ArgumentValueError, "one int64"),
    ("cu_seqlens", lambda t: torch.tensor([0, 1]), ArgumentValueError, "cu_seqlens"),
    ("scale", lambda t: float("nan"), ArgumentValueError, "finite"),
    ("scale", lambda t: 1e39, ArgumentValueError, "finite"),
    ("scale", lambda t: "1", ArgumentTypeError, "'1'"),
    ("lower_bound", lambda t: 0.0, ArgumentValueError, "negative"),
    ("use_qk_l2norm", lambda t: 1, ArgumentTypeError, "True, False"),
    ("pad_slot_id", lambda t: 2**63, ArgumentValueError, "int64"),
    ("cache_steps", lambda t: 1, ArgumentValueError, "cache_steps"),
    ("philox_rounds", lambda t: 17, ConfigError, "philox_rounds"),
    ("algorithm", lambda t: "vertical", ConfigError, "simple"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "error", "words"), REFUSED)
def test_a_wrong_argument_is_refused_and_not_a_byte_is_written(name, change, error, words):
    call = base()
    target = call.switches if name in call.switches or name == "algorithm" else call.tensors
    target[name] = change(target.get(name))
    given = {n: t for n, t in call.tensors.items() if t is not None and not t.is_meta}
    before = {n: storage(t).clone() for n, t in given.items()}
    with pytest.raises(error) as caught:
        ssmgen.gated_delta_rule_decode(**call.arguments())
    assert isinstance(caught.value, SsmgenError)
    assert words in str(caught.value)
    for n, was in before.items():
        assert torch.equal(was, storage(call[n])), f"{n} was written"


def test_the_base_call_is_accepted():
    call = base()
    verify(call, run(call))


@pytest.mark.parametrize(("K", "V"), [(12, 8), (8, 20), (264, 8), (8, 264)])
def test_dims_out_of_range_are_refused(K, V):
    with pytest.raises(ArgumentValueError, match="8 to 256 in multiples of 8"):
        make(K=K, V=V).layout()


def test_gates_are_either_raw_or_ready():
    call = make(gate="given")
    call.tensors["dt_bias"] = torch.zeros(4)
    with pytest.raises(ArgumentValueError, match=r"dt_bias: .* None with g and beta"):
        call.layout()
    call = make(gate="given")
    call.switches["lower_bound"] = -5.0
    with pytest.raises(ArgumentValueError, match=r"lower_bound: .* None with g and beta"):
        call.layout()


# Layouts


@pytest.mark.parametrize("options", [{}, {"pitch": 8}, {"order": "KV"}, {"packing": "flat"}])
def test_what_starts_and_steps_by_16_bytes_is_aligned(options):
    assert make(batch=2, **options).layout().config.aligned == ("packing" not in options)
    for change in ({"offset": 1}, {"pitch": 1}):
        assert not make(**{**options, **change}).layout().config.aligned


def test_flat_views_have_the_kernel_of_packed_tensors_and_interleaved_ones_their_own():
    flat, separate = (make(packing=p, V=24, H=2, HV=4).layout().config for p in ("flat", None))
    assert not flat.grouped
    assert flat.replace(aligned=True) == separate
    assert make(packing="interleaved").layout().config.grouped
    # Heads in groups that step alike are heads in a row.
    call = make(H=2, HV=6, tokens=2)
    wanted = call.layout()
    for name in ("v", "a", "b"):
        call.tensors[name] = call[name].unflatten(2, (2, 3))
    assert call.layout() == wanted
    # One value head for each key head, or one key head: nothing to tell apart.
    for heads in ({"H": 2, "HV": 2}, {"H": 1, "HV": 4}):
        assert not make(packing="interleaved", **heads).layout().config.grouped


@pytest.mark.parametrize("kind", CALLS)
def test_the_integers_of_a_layout_are_those_of_the_family(kind):
    call = make(**CALLS[kind])
    layout = call.layout()
    arguments = spec("gdn").arguments(layout.config)
    pointers = [a for a in arguments if a.pointer]
    assert len(layout.tensors) == len(pointers)
    assert all(a.pointer for a in arguments[: len(pointers)])
    integers = arguments[len(pointers) :]
    assert len(layout.scalars) == len(integers)
    for argument, value in zip(integers, layout.scalars):
        signed, width = argument.type[0] == "i", int(argument.type[1:])
        low, high = (-(2 ** (width - 1)), 2 ** (width - 1)) if signed else (0, 2**width)
        assert low <= value < high, argument.name
        assert value % argument.align == 0, argument.name


def test_a_pool_may_be_larger_than_32_bits():
    """Strides alone: slots lie 2^33 elements apart."""
    call = make(batch=1, slots=1, indices=[0])
    state = call["state"]
    step = 2**33
    call.tensors["state"] = state.as_strided(state.shape, (step, *state.stride()[1:]))
    arguments = spec("gdn").arguments(call.layout().config)
    types = {a.name: a.type for a in arguments}
    assert types["state_slot_stride"] == types["pad_slot_id"] == "i64"


# Configs


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"algorithm": "vertical"}, "algorithm"),
        ({"rounding": "stochastic"}, "rounding"),
        ({"rounding": "stochastic", "state_dtype": "bf16", "update_state": False}, "rounding"),
        ({"philox_rounds": 3}, "philox_rounds"),
        ({"has_dst": True, "index_dtype": None}, "has_dst"),
        ({"accepted_dtype": "int32", "index_dtype": None}, "accepted_dtype"),
        ({"has_dst": True, "update_state": False}, "has_dst"),
        ({"dst_tokens": True, "has_dst": True}, "dst_tokens"),
        ({"entry_dtype": "int32"}, "entry_dtype"),
        ({"head_k_dim": 12}, "head_k_dim"),
        ({"state_dtype": "int8"}, "state_dtype"),
        ({"dim": 64}, "dim"),
    ],
)  # fmt: skip
def test_impossible_configs_are_refused(fields, words):
    with pytest.raises(SsmgenError, match=words):
        KernelConfig(family="gdn", **fields)


def test_a_config_survives_json_and_one_binary_has_one_config():
    config = KernelConfig(family="gdn", state_dtype="bf16", rounding="stochastic", kda=True)
    assert config.philox_rounds == 10
    assert KernelConfig.from_json(config.to_json()) == config
    given = [
        KernelConfig(family="gdn", gate="given", has_dt_bias=x, dt_bias_dtype=y, a_log_dtype=y)
        for x, y in ((True, "bf16"), (False, "fp32"))
    ]
    assert given[0] == given[1]


# split_qkv


@pytest.mark.parametrize("packing", ["flat", "interleaved"])
def test_split_qkv_gives_views_of_the_packed_memory(packing):
    H, HV, K, V = 2, 6, 8, 16
    width = 2 * H * K + HV * V + (4 * H if packing == "interleaved" else 3)
    packed = torch.arange(2 * width).view(2, width)
    q, k, v = ssmgen.split_qkv(packed, H, HV, K, V, packing)
    assert {t.untyped_storage().data_ptr() for t in (q, k, v)} == {
        packed.untyped_storage().data_ptr()
    }
    row = packed[1].tolist()
    if packing == "flat":
        assert q[1].flatten().tolist() == row[: H * K]
        assert k[1].flatten().tolist() == row[H * K : 2 * H * K]
        assert v[1].flatten().tolist() == row[2 * H * K : 2 * H * K + HV * V]
        assert v.shape == (2, HV, V)
    else:
        share = width // H
        for h in range(H):
            of_head = row[h * share : (h + 1) * share]
            assert q[1, h].tolist() == of_head[:K]
            assert k[1, h].tolist() == of_head[K : 2 * K]
            assert v[1, h].flatten().tolist() == of_head[2 * K : 2 * K + 3 * V]
        assert v.shape == (2, H, 3, V)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(2, 127), 2, 6, 8, 16), "width 127"),
        ((torch.zeros(2, 127), 2, 6, 8, 16, "interleaved"), "width 127"),
        ((torch.zeros(2, 126), 2, 6, 8, 16, "interleaved"), "width 126"),
        ((torch.zeros(2, 128), 2, 5, 8, 16), "num_v_heads"),
        ((torch.zeros(2, 128), 0, 6, 8, 16), "num_k_heads: found 0"),
        ((torch.zeros(2, 128), 2, 0, 8, 16), "num_v_heads: found 0"),
        ((torch.zeros(2, 128), 2, 6, 8, 16, "swapped"), "packing"),
        (([1, 2], 2, 6, 8, 16), "packed"),
    ],
)
def test_split_qkv_refuses_what_it_cannot_split(arguments, words):
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match=words):
        ssmgen.split_qkv(*arguments)


def test_outputs_of_no_sequence_are_left_alone():
    call = make(lengths=[1, 2], steps=2, spare=2)
    after = run(call)
    assert same(after["out"][3:], call["out"][3:])
    assert raw(after["out"][:3]).ne(raw(call["out"][:3])).any()


def test_an_empty_batch_is_nothing():
    call = make(batch=1)
    for name in ("q", "k", "v", "a", "b", "out", "state_batch_indices"):
        call.tensors[name] = call[name][:0]
    before = call["state"].clone()
    assert ssmgen.gated_delta_rule_decode(**call.arguments()).shape == (0, 4, 24)
    assert same(call["state"], before)
