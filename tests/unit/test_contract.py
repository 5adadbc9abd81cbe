"""The tensor contract: what is refused, with which error, before anything is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ssu_calls import DTYPES, SCALED, Call, make, same, storage

import ssmgen
from ssmgen.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ConfigError,
    ConfigTypeError,
    DeviceError,
    SsmgenError,
)
from ssmgen.families.ssu.contract import STEP_TENSORS, layout

BUILTIN = {
    ArgumentValueError: ValueError,
    ArgumentTypeError: TypeError,
    ConfigError: ValueError,
    ConfigTypeError: TypeError,
    DeviceError: RuntimeError,
}


def base():
    """A call with every argument that can stand beside the others."""
    return make("int8", "stochastic", z=True, dst=[5, 3, 4], indices=[0, 2, 1])


def memory(call):
    return {name: storage(tensor).clone() for name, tensor in call.tensors.items()}


def assert_refused(call, error, *words):
    """The op refuses, and not a byte has changed."""
    before = memory(call)
    with pytest.raises(error) as caught:
        ssmgen.selective_state_update(**call.arguments())
    assert isinstance(caught.value, SsmgenError)
    assert isinstance(caught.value, BUILTIN[error])
    text = str(caught.value)
    assert all(word in text for word in words), text
    for name, was in before.items():
        assert torch.equal(was, storage(call[name])), f"{name} was written"


def test_the_base_call_is_accepted():
    call = base()
    assert set(call.tensors) == set(STEP_TENSORS)
    ssmgen.selective_state_update(**call.arguments())
    assert not call["out"].isnan().any()


# Shapes


def cut(axis):
    return lambda t: t.narrow(axis, 0, t.shape[axis] - 1)


@pytest.mark.parametrize(
    ("name", "change", "found", "allowed"),
    [
        ("x", cut(0), "(2, 4, 16)", None),
        ("x", cut(1), "(3, 3, 16)", "(3, 4, 16)"),
        ("x", cut(2), "(3, 4, 15)", "(3, 4, 16)"),
        ("x", lambda t: t[0], "(4, 16)", None),
        ("dt", cut(0), "(2, 4, 16)", "(3, 4, 16)"),
        ("dt", lambda t: t[..., :1], "(3, 4, 1)", "(3, 4, 16)"),
        ("dt", lambda t: t[..., 0], "(3, 4)", "(3, 4, 16)"),
        ("A", cut(0), "(3, 16, 32)", "(4, 16, 32)"),
        ("A", cut(2), "(4, 16, 31)", "(4, 16, 32)"),
        ("A", lambda t: t[:, 0, 0], "(4,)", "(4, 16, 32)"),
        ("B", cut(0), "(2, 2, 32)", "(3, 2, 32)"),
        ("B", cut(2), "(3, 2, 31)", "(3, 2, 32)"),
        ("B", lambda t: t[:, 0], "(3, 32)", "(batch, ngroups, dstate)"),
        ("B", lambda t: t.repeat(1, 2, 1)[:, :3], "3 groups", "a divisor of the 4 heads"),
        ("B", lambda t: t[:, :0], "0 groups", "a divisor of the 4 heads"),
        ("C", cut(1), "(3, 1, 32)", "(3, 2, 32)"),
        ("D", cut(1), "(4, 15)", "(4, 16)"),
        ("D", lambda t: t[:, 0], "(4,)", "(4, 16)"),
        ("z", cut(0), "(2, 4, 16)", "(3, 4, 16)"),
        ("dt_bias", cut(0), "(3, 16)", "(4, 16)"),
        ("out", cut(2), "(3, 4, 15)", "(3, 4, 16)"),
        ("state", cut(1), "3", None),
        ("state", lambda t: t.flatten(1), "2 dimensions", "(slots, nheads, dim, dstate)"),
        ("state", lambda t: t.new_zeros(6, 4, 12, 32), "dim 12", "8 to 512 in multiples of 8"),
        ("state", lambda t: t.new_zeros(6, 4, 16, 4), "dstate 4", "8 to 512 in multiples of 8"),
        ("state", lambda t: t.new_zeros(6, 4, 520, 32), "dim 520", "8 to 512 in multiples of 8"),
        ("state_scale", cut(0), "(5, 4, 16)", "(6, 4, 16)"),
        ("state_scale", lambda t: t.unsqueeze(-1).expand(-1, -1, -1, 2), "(6, 4, 16, 2)", None),
        ("state_batch_indices", cut(0), "(2,)", "(3,)"),
        ("state_batch_indices", lambda t: t.new_zeros(3, 0), "(3, 0)", "(3,)"),
        ("dst_state_batch_indices", cut(0), "(2,)", "(3,)"),
        ("rand_seed", lambda t: t.repeat(2), "(2,)", "one int64"),
        ("rand_seed", lambda t: t[:0], "(0,)", "one int64"),
    ],
)
def test_a_wrong_shape_is_an_error_that_names_the_argument(name, change, found, allowed):
    call = base()
    call.tensors[name] = change(call[name])
    words = [found, allowed or ""]
    if not (name == "state" and found == "3") and allowed:
        words.append(f"{name}: found")
    assert_refused(call, ArgumentValueError, "allowed", *words)


@pytest.mark.parametrize("name", ["dt", "B", "C", "z", "out"])
def test_one_argument_with_more_tokens_is_refused(name):
    call = make("fp32", token=True, z=True)
    call.tensors[name] = call[name].repeat(1, 2, 1, 1)
    assert_refused(call, ArgumentValueError, f"{name}: found 2 tokens", "one token")


def test_without_indices_every_row_needs_a_slot():
    call = make("fp32", indices=None)
    call.tensors["state"] = call["state"][:2]
    assert_refused(call, ArgumentValueError, "state: found 2 slots", "at least 3")


def test_destinations_without_sources_are_refused():
    call = base()
    del call.tensors["state_batch_indices"]
    assert_refused(call, ArgumentValueError, "dst_state_batch_indices", "state_batch_indices")


def test_a_batch_above_the_grid_is_refused():
    batch = 65536
    call = make("fp32", batch=2, slots=2, nheads=1, ngroups=1, dim=8, dstate=8, token=False)
    for name in ("x", "dt", "B", "C", "state_batch_indices"):
        call.tensors[name] = call[name][:1].expand(batch, *call[name].shape[1:])
    call.tensors["out"] = torch.empty(batch, 1, 8, dtype=torch.bfloat16)
    with pytest.raises(ArgumentValueError, match="x: found batch 65536; allowed: at most 65535"):
        call.layout()


def of_heads(nheads, ngroups):
    with torch.device("meta"):
        rows = torch.empty(1, nheads, 8)
        cols = torch.empty(1, ngroups, 8)
        A = torch.empty(nheads, 1, 1).expand(nheads, 8, 8)
        state = torch.empty(1, nheads, 8, 8)
    return layout(state=state, x=rows, dt=rows, A=A, B=cols, C=cols, out=rows)


@given(st.integers(1, 2**25), st.integers(1, 3000), st.data())
def test_the_group_of_every_head_is_exact_or_the_call_is_refused(ngroups, ratio, data):
    nheads = ngroups * ratio
    if nheads * 64 >= 2**31 or 2 * nheads * ratio >= 2**31:
        with pytest.raises(ArgumentValueError, match=r"heads|elements"):
            of_heads(nheads, ngroups)
        return
    found = of_heads(nheads, ngroups)
    recip = found.scalars[-1]
    start = data.draw(st.integers(0, ngroups - 1)) * ratio
    for head in {0, start, start + ratio - 1, nheads - 1}:
        assert ((2 * head + 1) * recip) >> 32 == head // ratio


def test_a_slot_of_2_31_elements_or_more_is_refused():
    shape = (1, 16384, 512, 512)
    with torch.device("meta"):
        rows, cols = torch.empty(1, 16384, 512), torch.empty(1, 1, 512)
        A = torch.empty(16384, 1, 1).expand(shape[1:])
        state = torch.empty(shape)
    with pytest.raises(ArgumentValueError, match=r"state: .*elements a slot; .*2\^31"):
        layout(state=state, x=rows, dt=rows, A=A, B=cols, C=cols, out=rows)


# Dtypes


@pytest.mark.parametrize(
    ("name", "dtype", "allowed"),
    [
        ("x", torch.float64, "fp32, bf16, fp16"),
        ("x", torch.int8, "fp32, bf16, fp16"),
        ("dt", torch.float64, "fp32, bf16, fp16"),
        ("A", torch.int32, "fp32, bf16, fp16"),
        ("B", torch.float16, "bf16 (that of x)"),
        ("C", torch.float32, "bf16 (that of x)"),
        ("z", torch.float16, "bf16 (that of x)"),
        ("out", torch.float32, "bf16 (that of x)"),
        ("D", torch.float8_e4m3fn, "fp32, bf16, fp16"),
        ("dt_bias", torch.float16, "fp32 (that of D)"),
        ("state", torch.float64, "int8"),
        ("state", torch.uint8, "int8"),
        ("state", torch.float8_e5m2, "fp8_e4m3fn"),
        ("state_scale", torch.float16, "fp32"),
        ("state_batch_indices", torch.int16, "int32, int64"),
        ("state_batch_indices", torch.float32, "int32, int64"),
        ("dst_state_batch_indices", torch.int32, "int64 (that of state_batch_indices)"),
        ("rand_seed", torch.int32, "one int64"),
    ],
)
def test_a_wrong_dtype_is_an_error_that_names_the_argument(name, dtype, allowed):
    call = base()
    call.tensors[name] = torch.zeros_like(call[name], dtype=dtype)
    assert_refused(call, ArgumentTypeError, f"{name}: ", str(dtype).removeprefix("torch."), allowed)


@pytest.mark.parametrize("state", SCALED)
def test_a_scaled_state_needs_its_scales(state):
    call = make(state)
    del call.tensors["state_scale"]
    assert_refused(call, ArgumentTypeError, "state_scale: missing", f"{state} states")


@pytest.mark.parametrize("state", ["fp32", "bf16", "fp16"])
def test_another_state_takes_no_scales(state):
    call = make(state)
    call.tensors["state_scale"] = torch.ones(6, 4, 16)
    assert_refused(call, ArgumentTypeError, "state_scale: given", "allowed: None")


def test_a_seed_with_an_fp32_state_is_refused():
    call = make("fp32")
    call.tensors["rand_seed"] = torch.tensor([1])
    assert_refused(call, ArgumentTypeError, "rand_seed", "fp32")


@pytest.mark.parametrize("name", STEP_TENSORS)
def test_what_is_no_tensor_is_refused_by_name(name):
    call = base()
    call.tensors[name] = call[name].tolist()
    calls = [lambda: ssmgen.selective_state_update(**call.arguments()), call.layout]
    if name == "x":
        calls.append(lambda: ssmgen.selective_state_update(**{**call.arguments(), "out": None}))
    for refuse in calls:
        with pytest.raises(ArgumentTypeError, match=f"^{name}: found list; allowed: a tensor"):
            refuse()


@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C", "out"])
def test_a_missing_argument_is_refused_by_name(name):
    call = base()
    del call.tensors[name]
    with pytest.raises(ArgumentTypeError, match=f"^{name}: missing"):
        call.layout()
    if name != "out":
        arguments = {**base().arguments(), name: None, "out": None}
        with pytest.raises(ArgumentTypeError, match=f"^{name}: missing"):
            ssmgen.selective_state_update(**arguments)


def test_an_unknown_argument_is_refused_by_name():
    call = base()
    with pytest.raises(ArgumentTypeError, match=r"^states: not an argument"):
        layout(**call.arguments(), states=call["state"])


# Strides


def stepped(tensor):
    """The same values at twice the last stride."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    return wide[..., ::2]


def swapped(tensor):
    """The same values with the last two axes the other way round in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize(
    ("name", "change", "allowed"),
    [
        ("state", stepped, "inner strides (512, 32, 1)"),
        ("state", swapped, "inner strides (512, 32, 1)"),
        ("state", lambda t: t[:1].expand(6, -1, -1, -1), "share no memory"),
        ("out", lambda t: t.as_strided(t.shape, (16, 16, 1)), "share no memory"),
        ("state", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "inner strides"),
        ("state_scale", stepped, "inner strides (16, 1)"),
        ("state_scale", lambda t: t[:1].expand(6, -1, -1), "share no memory"),
        ("x", stepped, "a last stride of 1"),
        ("x", swapped, "a last stride of 1"),
        ("z", stepped, "a last stride of 1"),
        ("out", stepped, "a last stride of 1"),
        ("out", lambda t: t[:1].expand(3, -1, -1), "share no memory"),
        ("B", stepped, "a last stride of 1"),
        ("C", swapped, "a last stride of 1"),
    ],
)
def test_a_wrong_stride_is_an_error_that_names_the_argument(name, change, allowed):
    call = base()
    call.tensors[name] = change(call[name])
    strides = str(call[name].stride())
    assert_refused(call, ArgumentValueError, f"{name}: found strides", strides, allowed)


def test_a_sparse_tensor_is_refused():
    call = base()
    call.tensors["A"] = torch.zeros(4, 16, 32).to_sparse()
    with pytest.raises(ArgumentTypeError, match=r"A: found layout torch\.sparse_coo"):
        call.layout()


def test_no_heads_are_refused():
    call = base()
    for name in ("state", "state_scale", "x", "dt", "z", "out", "B", "C"):
        call.tensors[name] = call[name][:, :0]
    for name in ("A", "D", "dt_bias"):
        call.tensors[name] = call[name][:0]
    assert_refused(call, ArgumentValueError, "state: found 0 heads")


def test_the_stride_of_an_axis_of_one_says_nothing():
    plain = make("fp32", batch=1, nheads=1, ngroups=1)
    odd = plain.copy()
    for name in ("x", "B", "C", "dt", "out"):
        t = odd[name]
        odd.tensors[name] = t.as_strided(t.shape, (7, 3, t.stride(-1)), t.storage_offset())
    assert odd.layout() == plain.layout()


def test_a_view_that_spans_more_than_the_kernels_integers_is_refused():
    with torch.device("meta"):
        call = {
            "state": torch.empty(3, 1, 8, 8),
            "dt": torch.empty(3, 1, 1).expand(3, 1, 8),
            "A": torch.empty(1, 1, 1).expand(1, 8, 8),
            "B": torch.empty(3, 1, 8),
            "C": torch.empty(3, 1, 8),
            "x": torch.empty(3 * 2**30).as_strided((3, 1, 8), (2**30, 8, 1)),
            "out": torch.empty(3, 1, 8),
        }
    with pytest.raises(ArgumentValueError, match=r"x: found strides \(1073741824, 8, 1\)"):
        layout(**call)


# Ranges, switches, devices


@pytest.mark.parametrize("rounds", [0, -1, 17])
def test_rounds_outside_1_to_16_are_refused(rounds):
    call = base()
    call.switches["philox_rounds"] = rounds
    assert_refused(call, ConfigError, "philox_rounds", str(rounds), "allowed")


def test_a_forced_algorithm_that_cannot_serve_is_refused():
    call = base()
    call.switches["algorithm"] = "horizontal"
    assert_refused(call, ConfigError, "algorithm: 'horizontal'", "auto, simple, vertical")
    call.switches["algorithm"] = "diagonal"
    assert_refused(call, ConfigError, "algorithm: 'diagonal'", "auto, simple, vertical, horizontal")


@pytest.mark.parametrize("name", [n for n in STEP_TENSORS if n != "state"])
def test_an_argument_on_another_device_is_refused_by_name(name):
    call = base()
    call.tensors[name] = call[name].to("meta")
    with pytest.raises(DeviceError, match=f"^{name}: on meta; allowed: cpu"):
        call.layout()


@pytest.mark.parametrize("slot", [6, 2**31, 2**40])
@pytest.mark.parametrize("name", ["state_batch_indices", "dst_state_batch_indices"])
def test_on_a_cpu_a_slot_outside_the_pool_is_refused(name, slot):
    call = base()
    call[name][1] = slot
    assert_refused(call, ArgumentValueError, name, f"slot {slot}", "6 slots")


# Layouts that are the same call


def results(call):
    """Output, pool and scales after the op has run, in the shape of the plain call."""
    after = call.copy()
    out = ssmgen.selective_state_update(**after.arguments())
    assert out is after["out"]
    views = after.views
    return [views[n].clone() for n in ("out", "state", "state_scale") if n in views]


@given(
    state=st.sampled_from(list(DTYPES)),
    packed=st.booleans(),
    lead=st.integers(0, 9),
    pitch=st.integers(0, 40),
    scale_pitch=st.integers(0, 5),
    offset=st.integers(0, 9),
    token=st.booleans(),
    scale_axis=st.booleans(),
    width=st.integers(0, 3),
    index_dtype=st.sampled_from(["int32", "int64"]),
    random=st.integers(0, 99),
)
def test_every_layout_of_the_same_values_gives_the_same_bits(
    state, packed, lead, pitch, scale_pitch, offset, token, scale_axis, width, index_dtype, random
):
    values = {"state": state, "z": True, "dt_dtype": "bf16", "random": random}
    plain = make(**values)
    other = make(
        **values,
        packed=packed,
        lead=lead,
        pitch=pitch,
        scale_pitch=scale_pitch,
        offset=offset,
        token=token,
        scale_axis=scale_axis,
        index_width=width,
        index_dtype=index_dtype,
    )
    assert all(same(a, b) for a, b in zip(results(plain), results(other), strict=True))


@pytest.mark.parametrize("state", list(DTYPES))
@pytest.mark.parametrize("dim", [8, 48, 64, 80, 1024])
def test_a_headless_call_is_the_call_with_heads_of_up_to_64_rows(state, dim):
    call = make(state, headless=True, dim=dim, dstate=16, z=True, token=dim == 48)
    rows = min(64, dim & -dim)
    config = call.layout().config
    assert (config.dim, config.dstate, config.tie_hdim) == (rows, 16, False)
    views = call.views
    assert views["state"].shape == (6, dim // rows, rows, 16)
    with_heads = Call(views, call.switches)
    assert all(same(a, b) for a, b in zip(results(call), results(with_heads), strict=True))


@pytest.mark.parametrize("dim", [12, 4, 0, 100])
def test_a_headless_dim_that_is_no_multiple_of_8_is_refused(dim):
    call = make("fp32", headless=True, dim=16, dstate=16)
    call.tensors["state"] = torch.zeros(6, dim, 16)
    with pytest.raises(ArgumentValueError, match=f"state: found dim {dim}; .*multiple of 8"):
        call.layout()


@pytest.mark.parametrize("name", ["x", "dt", "A", "D", "dt_bias", "out", "z"])
def test_a_headless_argument_of_another_dim_is_refused_by_name(name):
    call = make("fp32", headless=True, dim=16, dstate=16, z=True)
    axis = 0 if name in ("A", "D", "dt_bias") else 1
    call.tensors[name] = call[name].narrow(axis, 0, 8)
    assert_refused(call, ArgumentValueError, f"{name}: found shape", f"16 along axis {axis}")


# What a layout says


@pytest.mark.parametrize("state", list(DTYPES))
def test_a_layout_reads_the_config_off_the_tensors(state):
    call = make(
        state, z=True, D=False, weight_dtype="bf16", a_dtype="fp16", dtype="fp16", softplus=False,
        pdl=True, algorithm="simple",
    )  # fmt: skip
    config = call.layout().config
    assert {name: getattr(config, name) for name in (
        "state_dtype", "dtype", "dt_dtype", "weight_dtype", "a_dtype", "has_z", "has_d",
        "has_dt_bias", "dt_softplus", "pdl", "algorithm", "index_dtype", "tie_hdim", "has_dst",
    )} == {
        "state_dtype": state, "dtype": "fp16", "dt_dtype": "bf16", "weight_dtype": "bf16",
        "a_dtype": "fp16", "has_z": True, "has_d": False, "has_dt_bias": True,
        "dt_softplus": False, "pdl": True, "algorithm": "simple", "index_dtype": "int64",
        "tie_hdim": True, "has_dst": False,
    }  # fmt: skip


def test_without_an_update_there_is_no_rounding_and_no_destination():
    call = base()
    call.switches["disable_state_update"] = True
    found = call.layout()
    assert (found.config.rounding, found.config.has_dst, found.config.update_state) == (
        "nearest",
        False,
        False,
    )
    assert not {"rand_seed", "dst_state_batch_indices"} & set(found.tensors)


@pytest.mark.parametrize("name", ["dt", "A", "D", "dt_bias"])
def test_one_argument_that_varies_along_dim_takes_the_mamba1_kernel(name):
    call = make("fp32")
    assert call.layout().config.tie_hdim
    call.tensors[name] = call[name].contiguous()
    assert not call.layout().config.tie_hdim


def test_a_layout_reads_no_data_and_needs_no_memory():
    call = make("fp16", "stochastic", z=True)
    on_meta = Call({n: t.to("meta") for n, t in call.tensors.items()}, call.switches)
    assert on_meta.layout().config.fields().keys() == call.layout().config.fields().keys()
    assert on_meta.layout().batch == call.layout().batch == 3
