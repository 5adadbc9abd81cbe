"""The config and the tensor contract of causal_conv1d: what is served, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from conv_calls import PREFILL_NAMES, make_conv
from hypothesis import given
from hypothesis import strategies as st

from ssmgen import Arch, KernelConfig, Plan
from ssmgen.errors import ArgumentTypeError, ArgumentValueError, ConfigError, DeviceError
from ssmgen.families import spec
from ssmgen.families.contract import overlaps_itself, share_memory
from ssmgen.families.conv1d import Conv1dConfig
from ssmgen.families.conv1d.contract import ABI_TENSORS, layout
from ssmgen.plan import dispatch
from ssmgen.template import key

SM_90 = Arch.of("sm_90")
PLAN = Plan(algorithm="simple", block_m=1, block_n=256, num_warps=1)

# The config


def test_what_is_left_out_is_resolved_and_read_back():
    config = Conv1dConfig(dtype="fp16", width=5)
    assert (config.state_dtype, config.depth) == ("fp16", 4)
    assert KernelConfig.from_json(config.to_json()) == config
    assert config.replace(dtype="bf16").state_dtype == "bf16"
    assert config.replace(width=3).depth == 2


@pytest.mark.parametrize("width", [1, 7, 0])
def test_widths_are_2_to_6(width):
    with pytest.raises(ConfigError, match=r"width: .* allowed: 2 to 6"):
        Conv1dConfig(width=width)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"dtype": "fp32", "state_dtype": "bf16"}, "state_dtype"),
        ({"state_dtype": "fp16"}, "state_dtype"),
        ({"depth": 2}, "depth: 2"),
        ({"depth": 17}, "depth: 17"),
        ({"algorithm": "vertical"}, "algorithm"),
        ({"prefill": True}, "prefill"),
        ({"seqlens_dtype": "int32"}, "seqlens_dtype"),
        ({"history": None}, "history"),
        ({"history": "rows"}, "history"),
        ({"update_state": False}, "update_state"),
        ({"has_initial": True}, "has_initial"),
        ({"has_initial": True, "history": "rows", "many": True, "prefill": True}, "has_initial"),
        ({"has_dst": True, "index_dtype": None}, "has_dst"),
        ({"accepted_dtype": "int32", "depth": 5}, "accepted_dtype"),
        ({"accepted_dtype": "int32", "counts_dtype": "int32"}, "accepted_dtype"),
        ({"accepted_dtype": "int32", "many": True, "prefill": True}, "accepted_dtype"),
        ({"accepted_dtype": "int32", "many": True, "prefill": True, "history": "rows"},
         "accepted_dtype"),
        ({"counts_dtype": "int32", "depth": 5}, "counts_dtype"),
        ({"counts_dtype": "int32", "has_dst": True}, "counts_dtype"),
        ({"many": True, "prefill": True, "history": None, "update_state": False}, "index_dtype"),
        ({"many": True, "prefill": True, "history": "rows", "update_state": False,
          "index_dtype": None, "depth": 5}, "depth"),
    ],
    ids=str,
)  # fmt: skip
def test_what_no_kernel_serves_is_refused(fields, match):
    with pytest.raises(ConfigError, match=f"^{match}"):
        Conv1dConfig(**fields)


def test_without_a_state_its_dtype_and_order_make_no_second_binary():
    fields = {"many": True, "prefill": True, "history": None, "update_state": False,
              "index_dtype": None}  # fmt: skip
    plain = Conv1dConfig(**fields)
    assert Conv1dConfig(**fields, state_dtype="fp32", packed_channels=False) == plain


@pytest.mark.parametrize("width", [2, 4, 6])
@pytest.mark.parametrize("state", ["bf16", "fp32"])
@pytest.mark.parametrize("form", [{}, {"many": True}, {"many": True, "prefill": True}])
def test_every_plan_has_room_for_the_past_and_whole_vectors(width, state, form):
    config = Conv1dConfig(width=width, state_dtype=state, **form)
    for choice in dispatch(config, SM_90):
        plan = choice.plan
        assert plan.block_m >= (width - 1 if config.prefill else 1)
        assert plan.block_m == 1 or config.many
        assert plan.block_m >= 4 or not config.many  # a token and three drafts are one block
        # Warps beside the first one only where all threads have whole vectors.
        elements = plan.block_n * (plan.block_m if config.prefill else 1)
        assert elements >= 32 * plan.num_warps * (8 if plan.num_warps > 1 else 1)


# What a call says of its kernel


@given(
    batch=st.integers(0, 5),
    dim=st.sampled_from([8, 24, 256, 8192]),
    pitch=st.sampled_from([0, 8, 800]),
    gap=st.sampled_from([0, 8]),
    lead=st.sampled_from([0, 64]),
    pad=st.sampled_from([-1, 0, 2**40]),
    state_len=st.integers(3, 6),
    index_width=st.sampled_from([0, 3]),
)
def test_shapes_and_strides_change_no_binary(batch, dim, pitch, gap, lead, pad, state_len,
                                             index_width):  # fmt: skip
    config = make_conv(batch=batch, dim=dim, pitch=pitch, gap=gap, lead=lead, pad=pad,
                       state_len=state_len, index_width=index_width).layout().config  # fmt: skip
    assert key(config, PLAN, SM_90) == key(make_conv().layout().config, PLAN, SM_90)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "indices": None},
     {"form": "varlen", "accepted": [1, 2, 1], "state_len": 6},
     {"counts": [1, 2, 3], "state_len": 5},
     {"form": "dense", "order": "length", "lead": 1},
     {"form": "prefill", "initial": [True] * 3, "dst": [1, 2, 3]},
     {"form": "prefill_dense", "initial": "rows", "order": "loose"}],
    ids=str,
)  # fmt: skip
def test_a_layout_has_the_arguments_of_its_kernel(options):
    call = make_conv(**options)
    described = call.layout()
    arguments = spec("conv1d").arguments(described.config)
    pointers = [a for a in arguments if a.pointer]
    assert len(described.tensors) == len(pointers)
    assert len(described.scalars) == len(arguments) - len(pointers)
    assert list(described.tensors) == [n for n in ABI_TENSORS if n in call.tensors]
    for argument, name in zip(pointers, described.tensors):
        size = {"*bf16": 2, "*fp32": 4, "*int32": 4, "*int64": 8, "*int8": 1}[argument.type]
        assert call[name].element_size() == size, name
        assert call[name].data_ptr() % argument.align == 0
    for argument, value in zip([a for a in arguments if not a.pointer], described.scalars):
        assert value % argument.align == 0, argument.name
    values = dict(zip([a.name for a in arguments if not a.pointer], described.scalars))
    state = call.tensors.get("conv_state")
    assert values["state_slot_stride"] == state.stride(0)
    assert values["state_column_stride"] == state.stride(2)
    assert values["dim"] == 16


def test_a_tensor_off_by_less_than_16_bytes_takes_the_unaligned_variant_whichever_it_is():
    # Also the windows of columns side by side, which are never loaded 16 bytes at a time: an
    # operation knows a layout by one bit for all addresses.
    for name in ("x", "weight", "bias", "out", "conv_state"):
        for order in ("channels", "length"):
            call = make_conv(order=order)
            tensor = call[name]
            memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:]
            call.tensors[name] = memory.as_strided(tensor.shape, tensor.stride(), 1)
            assert not call.layout().config.aligned, name


def test_a_kernel_takes_arguments_of_the_config_it_was_made_from():
    family = spec("conv1d")
    for options in ({"alignment": "right", "state_len": 4}, {"counts": [1, 2, 3], "state_len": 4},
                    {"activation": None}, {"form": "prefill", "pdl": True}):  # fmt: skip
        call = make_conv(**options)
        config = call.layout().config
        assert layout(**call.tensors, **family.switches(config)).config == config


# What is refused, before anything is written


def changed(name, change, **options):
    call = make_conv(**options)
    call.tensors[name] = change(call.tensors[name]) if name in call.tensors else change(None)
    return call


WRONG = {
    "width 7": (changed("weight", lambda w: torch.zeros(16, 7)), "weight"),
    "width 1": (changed("weight", lambda w: torch.zeros(16, 1)), "weight"),
    "width 7 prefill": (changed("weight", lambda w: torch.zeros(16, 7), form="prefill"), "weight"),
    "3-D weight": (changed("weight", lambda w: w[:, None]), "weight"),
    "weight of other channels": (changed("weight", lambda w: w[:8]), "weight"),
    "bias": (changed("bias", lambda b: b[:8]), "bias"),
    "out": (changed("out", lambda o: o[:, :8]), "out"),
    "4-D x": (changed("x", lambda x: x[None, None]), "x"),
    "3-D x of sequences": (changed("x", lambda x: x[None], form="varlen"), "x"),
    "2-D x without sequences": (changed("x", lambda x: x[0], form="prefill_dense"), "x"),
    "few columns": (changed("conv_state", lambda s: s[:, :, :2]), "conv_state"),
    "other channels": (changed("conv_state", lambda s: s[:, :8]), "conv_state"),
    "few slots": (changed("conv_state", lambda s: s[:2], indices=None), "conv_state"),
    "no alignment": (make_conv(state_len=4, alignment=None), "alignment"),
    "another alignment": (make_conv(alignment="centre"), "alignment"),
    "circular alone": (make_conv(alignment="circular"), "alignment"),
    "counts, left": (changed("cache_seqlens", lambda _: torch.ones(3, dtype=torch.int32)),
                     "alignment"),
    "circular prefill": (make_conv("prefill", alignment="circular"), "alignment"),
    "wide right": (make_conv(alignment="right", state_len=17), "conv_state"),
    "accepted, right": (make_conv(accepted=[1] * 3, alignment="right", state_len=5), "alignment"),
    "accepted, circular": (make_conv(accepted=[1] * 3, counts=[1] * 3, state_len=5),
                           "cache_seqlens"),
    "too many drafts": (make_conv("dense", accepted=[1] * 3, state_len=5, tokens=4), "x"),
    "circular, dst": (make_conv(counts=[1] * 3, dst=[1, 2, 3]), "dst_state_indices"),
    "dst alone": (make_conv(indices=None, dst=[1, 2, 3]), "dst_state_indices"),
    "accepted in prefill without a past": (
        changed("num_accepted_tokens", lambda _: torch.ones(3).int(), form="prefill"),
        "num_accepted_tokens"),
    "counts in prefill": (changed("cache_seqlens", lambda _: torch.ones(3).int(), form="prefill"),
                          "cache_seqlens"),
    "flags in update": (changed("has_initial_state", lambda _: torch.ones(3).bool()),
                        "has_initial_state"),
    "initial states in update": (changed("initial_states", lambda _: torch.ones(3, 16, 3)),
                                 "initial_states"),
    "flags and initial states": (changed("has_initial_state", lambda _: torch.ones(3).bool(),
                                         form="prefill", initial="rows"), "has_initial_state"),
    "flags without a pool": (make_conv("prefill", pool=False, initial=[True] * 3),
                             "has_initial_state"),
    "initial states of wrong width": (changed("initial_states", lambda s: s[:, :, :2],
                                              form="prefill", initial="rows"), "initial_states"),
    "counts of another batch": (changed("num_accepted_tokens", lambda n: n[:2],
                                        accepted=[1] * 3), "num_accepted_tokens"),
    "no sequences": (changed("query_start_loc", lambda s: s[:0], form="varlen"),
                     "query_start_loc"),
    "strided sequences": (changed("query_start_loc", lambda s: s.repeat_interleave(2)[::2],
                                  form="varlen"), "query_start_loc"),
    "few columns prefill": (changed("conv_state", lambda s: s[:, :, :2], form="prefill"),
                            "conv_state"),
    "slots of another batch, prefill": (changed("conv_state_indices", lambda s: s[:2],
                                                form="prefill"), "conv_state_indices"),
    "overlapping windows": (changed("conv_state", lambda s: s[:1].expand(9, 16, 3)), "conv_state"),
    "overlapping outputs": (changed("out", lambda o: o[:1].expand(3, 16)), "out"),
    "negated view": (changed("x", lambda x: torch._neg_view(x)), "x"),
    "activation": (make_conv(activation="gelu"), "activation"),
    "huge pad": (make_conv(pad=2**63), "pad_slot_id"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_call_outside_the_contract_is_refused_by_name(name):
    call, argument = WRONG[name]
    before = call.copy()
    with pytest.raises(ArgumentValueError, match=rf"^{argument}: found .*; allowed: "):
        call.layout()
    arguments = call.arguments()
    if arguments.keys() <= inspect.signature(call.op).parameters.keys():
        shown = PREFILL_NAMES.get(argument, argument) if call.prefill else argument
        with pytest.raises(ArgumentValueError, match=rf"^{shown}: found .*; allowed: "):
            call.op(**arguments)
    for tensor in ("conv_state", "out"):
        if tensor in call.tensors:
            assert torch.equal(call[tensor].nan_to_num(9), before[tensor].nan_to_num(9))


@pytest.mark.parametrize("form", ["one", "dense", "varlen", "prefill", "prefill_dense"])
def test_an_out_in_the_memory_of_x_is_refused_unless_it_is_x_of_one_token_a_row(form):
    call = make_conv(form, gap=16)
    x = call["x"]
    call.tensors["out"] = x[:]
    if form == "one":
        want = make_conv(form, gap=16)
        assert torch.equal(call.op(**call.arguments()), want.op(**want.arguments()))
        call.tensors["out"] = x.as_strided(x.shape, x.stride(), 8)
    for _ in range(2):
        with pytest.raises(ArgumentValueError, match="out: found memory of x; allowed: "):
            call.op(**call.arguments())
        # Another start, and some of the same channels.
        call.tensors["out"] = x.as_strided(x.shape, x.stride(), 8)
    # Beside x in the rows of one buffer: nothing is shared.
    call.tensors["out"] = x.as_strided(x.shape, x.stride(), 16)
    call.op(**call.arguments())


@given(
    shapes=st.lists(st.lists(st.integers(1, 4), min_size=3, max_size=3), min_size=2, max_size=2),
    strides=st.lists(st.sampled_from([1, 2, 3, 4, 5, 8, 12, 20]), min_size=3, max_size=3),
    starts=st.lists(st.integers(0, 60), min_size=2, max_size=2),
)
def test_two_views_of_one_buffer_are_known_to_share_memory(shapes, strides, starts):
    buffer = torch.zeros(300)
    a, b = (buffer.as_strided(*of, start) for of, start in zip(zip(shapes, [strides] * 2), starts))
    if overlaps_itself(a) or overlaps_itself(b):
        return
    places = [set(torch.arange(300).as_strided(t.shape, t.stride(), t.storage_offset())
                  .flatten().tolist()) for t in (a, b)]  # fmt: skip
    axes = [{s for s, n in zip(t.stride(), t.shape) if n > 1} for t in (a, b)]
    if axes[0] == axes[1]:
        assert share_memory(a, b) == bool(places[0] & places[1])
    assert share_memory(a, b) or not places[0] & places[1]


DTYPES = [
    ("x", torch.float64, {}), ("x", torch.int32, {}), ("out", torch.float16, {}),
    ("weight", torch.float64, {}), ("bias", torch.float32, {}), ("conv_state", torch.float16, {}),
    ("conv_state", torch.bfloat16, {"dtype": "fp32"}), ("conv_state_indices", torch.int16, {}),
    ("dst_state_indices", torch.int64, {"dst": [1, 2, 3]}),
    ("num_accepted_tokens", torch.float32, {"accepted": [1] * 3}),
    ("cache_seqlens", torch.int16, {"counts": [1] * 3}),
    ("query_start_loc", torch.int16, {"form": "varlen"}),
    ("has_initial_state", torch.int32, {"form": "prefill", "initial": [True] * 3}),
    ("initial_states", torch.float32, {"form": "prefill", "initial": "rows"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "options"), DTYPES, ids=str)
def test_a_wrong_dtype_is_refused_by_name(name, dtype, options):
    call = changed(name, lambda t: t.to(dtype), **options)
    with pytest.raises(ArgumentTypeError, match=rf"^{name}: found dtype .*; allowed: "):
        call.layout()


def test_what_is_no_tensor_no_switch_or_missing_is_refused():
    call = make_conv()
    for name, value, match in [
        ("weight", None, "weight: missing"), ("conv_state", None, "conv_state: missing"),
        ("x", 3.0, "x: found float"), ("pdl", 1, "pdl: found 1"), ("z", None, "z: not an argument"),
        ("pad_slot_id", True, "pad_slot_id: found True"),
    ]:  # fmt: skip
        with pytest.raises(ArgumentTypeError, match=match):
            layout(**{**call.tensors, **call.switches, name: value})


def test_tensors_of_two_devices_are_refused():
    call = changed("weight", lambda w: w.to("meta"))
    with pytest.raises(DeviceError, match="weight: on meta; allowed: cpu"):
        call.layout()


def test_every_field_is_one_of_a_contract():
    # What `layout` never sets would be an option that does nothing.
    seen = {f.name: set() for f in dataclasses.fields(Conv1dConfig)}
    for options in (
        {}, {"dtype": "fp16", "weight_dtype": "fp32", "state_dtype": "fp32", "bias": False},
        {"width": 6, "alignment": "right", "state_len": 7, "activation": None, "dst": [1, 2, 3]},
        {"form": "varlen", "accepted": [1] * 3, "index_dtype": "int64", "order": "length"},
        {"counts": [1] * 3, "lead": 1, "pdl": True}, {"form": "prefill", "initial": "rows"},
        {"form": "prefill", "initial": [True] * 3}, {"form": "prefill", "pool": False},
    ):  # fmt: skip
        for name, value in make_conv(**options).layout().config.fields().items():
            seen[name].add(value)
    shared = {"family", "algorithm", "batch_invariant"}
    assert {name for name, values in seen.items() if len(values) == 1} == shared
