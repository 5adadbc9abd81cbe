"""selective_state_update on CPU tensors: the op that users call."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ssu_calls import DTYPES, ROUNDINGS, Call, make, same, verify
from ssu_tokens import make_tokens

import ssmgen
from ssmgen.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    DeviceError,
    SsmgenError,
    UnsupportedError,
)
from ssmgen.families.ssu.contract import ABI_TENSORS
from ssmgen.ops import ssu as module

SWITCHES = (
    "dt_softplus", "pad_slot_id", "disable_state_update", "philox_rounds", "algorithm", "pdl",
    "cache_steps", "precision",
)  # fmt: skip


def run(call, **changes):
    """A copy of the call after the op has run on it."""
    after = call.copy()
    out = ssmgen.selective_state_update(**{**after.arguments(), **changes})
    assert out is after["out"]
    return after


def flat(call):
    """The arguments of the registered op."""
    return (
        *(call.tensors.get(name) for name in ABI_TENSORS),
        *({"cache_steps": 0, "precision": "fast", **call.switches}[name] for name in SWITCHES),
    )


def assert_same_call(a, b):
    assert all(same(a[name], b[name]) for name in a.tensors)


# What it computes


@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_op_is_right_for_every_state_rounding_and_dtype(state, rounding, dtype):
    call = make(state, rounding, dtype=dtype, z=True, dim=80, dstate=96, nheads=6, ngroups=2)
    verify(call, run(call))


@given(
    state=st.sampled_from(ROUNDINGS),
    nheads=st.sampled_from([(3, 1), (24, 1), (4, 4), (48, 1), (80, 1), (6, 2)]),
    dim=st.sampled_from([8, 16, 24]),
    dstate=st.sampled_from([8, 16, 40]),
    tied=st.booleans(),
    z=st.booleans(),
    D=st.booleans(),
    dt_bias=st.booleans(),
    softplus=st.booleans(),
    indices=st.sampled_from(["random", None, [-1, 2, -1], [4, 1, 5], [-1, -1, -1]]),
    dst=st.sampled_from([None, [3, 0, -1], [5, 4, 3]]),
    update=st.booleans(),
    random=st.integers(0, 99),
)
def test_the_op_is_right_whatever_is_absent_padded_or_redirected(
    state, nheads, indices, dst, **more
):
    call = make(
        *state,
        nheads=nheads[0],
        ngroups=nheads[1],
        indices=indices,
        dst=None if indices is None else dst,
        **more,
    )
    verify(call, run(call))


@pytest.mark.parametrize("dim", [8, 64, 520, 1024, 4096])
def test_headless_mamba1_with_any_dim(dim):
    call = make("fp32", headless=True, dim=dim, dstate=16, z=True)
    verify(call, run(call))


def test_a_dim_above_512_needs_the_headless_layout():
    call = make("fp32", dim=520)
    with pytest.raises(ArgumentValueError, match="state: found dim 520"):
        run(call)


@pytest.mark.parametrize("state", list(DTYPES))
@pytest.mark.parametrize("indices", [None, []])
def test_an_empty_batch_is_an_empty_result(state, indices):
    call = make(state, batch=0, slots=4, indices=indices)
    after = run(call)
    assert after["out"].shape == (0, 4, 16)
    assert_same_call(call, after)


def test_without_out_a_packed_one_is_made():
    call = make("bf16", packed=True, z=True)
    written = run(call)
    call.tensors.pop("out")
    made = ssmgen.selective_state_update(**call.copy().arguments())
    assert made.is_contiguous()
    assert made.dtype == call["x"].dtype
    assert same(made, written["out"])


def test_out_may_be_any_view_and_is_returned():
    call = make("fp32")
    wide = torch.full((3, 9, 48), torch.nan, dtype=torch.bfloat16)
    call.tensors["out"] = wide[:, 2:6, 16:32]
    after = run(call)
    verify(call, after)
    assert int((~wide.isnan()).sum()) == 0
    whole = torch.empty(0, dtype=torch.bfloat16).set_(after["out"].untyped_storage())
    assert int((~whole.isnan()).sum()) == after["out"].numel()


def test_disable_state_update_changes_only_the_output():
    call = make("bf16", update=False)
    after = run(call)
    assert same(call["state"], after["state"])
    assert same(after["out"], run(make("bf16"))["out"])


def test_arguments_are_in_flashinfers_order_with_its_defaults():
    found = inspect.signature(ssmgen.selective_state_update).parameters
    names = [
        "state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus",
        "state_batch_indices", "pad_slot_id", "state_scale", "out", "disable_state_update",
        "intermediate_states_buffer", "intermediate_state_indices", "intermediate_state_scales",
        "rand_seed", "philox_rounds", "cache_steps", "algorithm", "dst_state_batch_indices",
        "cu_seqlens", "num_accepted_tokens", "backend",
    ]  # fmt: skip
    assert [n for n, p in found.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == names
    own = ["pdl", "parent_tokens", "precision"]
    assert [n for n, p in found.items() if p.kind is p.KEYWORD_ONLY] == own
    required = {"state", "x", "dt", "A", "B", "C"}
    assert {n for n, p in found.items() if p.default is p.empty} == required
    other = {
        "dt_softplus": False, "pad_slot_id": -1, "disable_state_update": False, "pdl": False,
        "philox_rounds": 10, "cache_steps": 0, "algorithm": "auto", "backend": "auto",
        "precision": "fast",
    }  # fmt: skip
    for name, parameter in found.items():
        if name not in required:
            assert parameter.default == other.get(name), name


def test_another_backend_is_refused_by_name():
    call = make("fp32")
    before = call.copy()
    with pytest.raises(UnsupportedError, match="backend: 'cake'; allowed: 'auto'") as caught:
        ssmgen.selective_state_update(**call.arguments(), backend="cake")
    assert isinstance(caught.value, NotImplementedError)
    assert isinstance(caught.value, SsmgenError)
    assert_same_call(call, before)


@pytest.mark.parametrize("rounds", [1, 5, 16])
def test_the_seed_and_the_rounds_decide_the_rounding(rounds):
    call = make("fp16", "stochastic", rounds=rounds)
    again, other_seed, other_rounds = (call.copy() for _ in range(3))
    other_seed["rand_seed"][0] ^= 0x1234_5678_9ABC_DEF0
    other_rounds.switches["philox_rounds"] = rounds % 16 + 1
    wanted = run(call)["state"]
    assert same(run(again)["state"], wanted)
    assert not same(run(other_seed)["state"], wanted)
    assert not same(run(other_rounds)["state"], wanted)


# torch.library, torch.compile


CALLS = {
    "mamba2": {"state": "bf16", "z": True},
    "stochastic": {"state": "fp16", "rounding": "stochastic"},
    "scaled": {"state": "int8", "rounding": "stochastic", "dst": [5, 4, 3], "indices": [0, 1, 2]},
    "fp8": {"state": "fp8_e4m3fn"},
    "mamba1": {"state": "fp32", "headless": True, "dstate": 16, "dim": 64},
    "bare": {"state": "fp32", "D": False, "dt_bias": False, "softplus": False, "indices": None},
    "no-update": {"state": "fp32", "update": False},
    "tokens": {"state": "bf16", "tokens": 3, "z": True},
    "intermediate": {"state": "int8", "rounding": "stochastic", "tokens": 2, "buffer": 2},
    "varlen": {
        "state": "fp32", "lengths": [2, 0, 3], "steps": 3, "accepted": [2, 0, 1],
        "indices": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "dst": "source", "spare": 0,
    },
    "tree": {"state": "fp16", "tokens": 3, "parents": [[-1, 0, 0]] * 3},
}  # fmt: skip


def called(name):
    fields = CALLS[name]
    return make_tokens(**fields) if {"tokens", "lengths"} & set(fields) else make(**fields)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_passes(name):
    call = called(name)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor",
              "test_aot_dispatch_dynamic"]  # fmt: skip
    if name == "fp8":
        checks.remove("test_schema")  # compares with torch.allclose, which knows no fp8
    op = torch.ops.ssmgen.selective_state_update.default
    torch.library.opcheck(op, flat(call), test_utils=checks)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("given_out", [True, False])
def test_torch_compile_takes_it_in_one_graph(name, given_out):
    torch._dynamo.reset()
    call = called(name)
    after, wanted = call.copy(), run(call)
    if not given_out:
        del after.tensors["out"]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tensors):
        y = ssmgen.selective_state_update(**tensors, **call.switches)
        return y, y.float() + 1

    y, more = step(after.tensors)
    assert same(y, wanted["out"])
    assert same(more, wanted["out"].float() + 1)
    for written in ("state", "state_scale", *(n for n in wanted.tensors if n[:5] == "inter")):
        if written in after.tensors:
            assert same(after[written], wanted[written])


def test_torch_compile_serves_other_batch_sizes():
    step = torch.compile(
        ssmgen.selective_state_update, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for batch in (2, 3, 5, 7):
        call = make("bf16", batch=batch, slots=9)
        after, wanted = call.copy(), run(call)
        assert same(step(**after.arguments()), wanted["out"])
        assert same(after["state"], wanted["state"])


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_has_the_op(strict):
    class Step(torch.nn.Module):
        def forward(self, tensors):
            return ssmgen.selective_state_update(**tensors, **call.switches)

    call = make("bf16")
    after = call.copy()
    program = torch.export.export(Step(), (call.tensors,), strict=strict)
    op = torch.ops.ssmgen.selective_state_update.default
    assert [node.target for node in program.graph.nodes].count(op) == 1
    y = program.module()(after.tensors)
    wanted = run(call)
    assert same(y, wanted["out"])
    assert same(after["state"], wanted["state"])


def test_the_dispatcher_gives_the_bits_of_the_direct_call():
    for name in CALLS:
        call = called(name)
        through = call.copy()
        torch.ops.ssmgen.selective_state_update(*flat(through))
        assert_same_call(through, run(call))


def test_the_schema_says_what_is_written():
    schema = torch.ops.ssmgen.selective_state_update.default._schema
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    buffer = {"intermediate_states_buffer", "intermediate_state_scales"}
    assert written == {"state", "state_scale", "out", *buffer}
    assert [a.name for a in schema.arguments] == [*ABI_TENSORS, *SWITCHES]
    assert not schema.returns


def test_fake_tensors_get_a_fake_result_and_errors():
    call = make("bf16")
    with torch._subclasses.FakeTensorMode() as mode:
        fake = Call({n: mode.from_tensor(t) for n, t in call.tensors.items()}, call.switches)
        out = ssmgen.selective_state_update(**{**fake.arguments(), "out": None})
        assert out.shape == fake["x"].shape
        assert out.dtype == fake["x"].dtype


def test_a_subclass_of_tensor_goes_through_the_dispatcher():
    class Mine(torch.Tensor):
        pass

    call = make("fp32")
    after = call.copy()
    after.tensors["x"] = after["x"].as_subclass(Mine)
    ssmgen.selective_state_update(**after.arguments())
    assert_same_call(
        Call({n: t.as_subclass(torch.Tensor) for n, t in after.tensors.items()}), run(call)
    )


def test_threads_may_call_it_at_once():
    calls = [make("bf16", random=i) for i in range(4)]
    wanted = [run(call) for call in calls]
    found = [None] * 4

    def work(i):
        for _ in range(20):
            found[i] = run(calls[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, wanted, strict=True):
        assert_same_call(a, b)


# Where it runs


def test_interpret_switch_runs_the_generated_kernel(monkeypatch):
    call = make("fp16", "stochastic", batch=2, nheads=2, ngroups=1)
    ran = []
    real = module.operation.reference
    spy = lambda *a: (ran.append("reference"), real(*a))  # noqa: E731
    monkeypatch.setattr(module.operation, "reference", spy)
    run(call)
    assert ran == ["reference"]
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    verify(call, run(call))
    assert ran == ["reference"]


def test_tensors_on_no_device_are_refused():
    call = make("fp32")
    on_meta = {n: t.to("meta") for n, t in call.tensors.items()}
    with pytest.raises((DeviceError, NotImplementedError)):
        ssmgen.selective_state_update(**on_meta, **call.switches)


def test_autograd_records_nothing_on_the_cpu():
    call = make("fp32")
    call.tensors["A"] = torch.nn.Parameter(call["A"].contiguous())
    out = ssmgen.selective_state_update(**call.arguments())
    assert out.grad_fn is None
    assert call["state"].grad_fn is None
    assert not call["state"].requires_grad


def test_a_lazily_negated_view_is_refused():
    call = make("fp32", tied=False)
    call.tensors["dt"] = torch.view_as_complex(torch.randn(*call["dt"].shape, 2)).conj().imag
    with pytest.raises(ArgumentValueError, match="dt: found a lazily negated view"):
        ssmgen.selective_state_update(**call.arguments())


@pytest.mark.parametrize(
    ("name", "value"),
    [("pad_slot_id", None), ("pad_slot_id", 1.5), ("pad_slot_id", True), ("dt_softplus", 1),
     ("disable_state_update", "no")],
)  # fmt: skip
def test_a_switch_of_another_type_is_refused(name, value):
    call = make("fp32")
    with pytest.raises(ArgumentTypeError, match=name):
        ssmgen.selective_state_update(**{**call.arguments(), name: value})


def test_a_pool_whose_slots_overlap_is_refused():
    call = make("fp32")
    state = call["state"]
    call.tensors["state"] = state.as_strided(state.shape, (8, *state.stride()[1:]))
    with pytest.raises(ArgumentValueError, match="state: found strides"):
        ssmgen.selective_state_update(**call.arguments())


def test_overflow_gives_infinity_also_where_columns_are_masked():
    for dstate in (16, 24):
        call = make("fp32", dstate=dstate, dtype="fp32", batch=1, indices=[0])
        for name in ("state", "B", "C"):
            call[name].copy_(call[name].abs() + 1)
        call["x"].fill_(3e38)
        call.tensors["dt"] = torch.full((1, 4, 1), 30.0).expand(1, 4, 16)
        for algorithm in ("simple", "vertical", "horizontal"):
            call.switches["algorithm"] = algorithm
            assert call.interpreted()["out"].isinf().all(), (dstate, algorithm)


def test_inductor_keeps_the_expanded_dt_of_mamba2(monkeypatch):
    call = make("fp32")
    raw_dt = call["dt"][..., 0].contiguous()
    seen = []
    contract = module.operation.layout

    def spy(**arguments):
        seen.append(arguments["dt"].stride())
        return contract(**arguments)

    def layer(arguments, dt):
        rows = (dt * 2)[:, :, None].expand(*dt.shape, call["x"].shape[-1])
        return ssmgen.selective_state_update(**{**arguments, "dt": rows})

    monkeypatch.setattr(module.operation, "layout", spy)
    torch.compile(layer, fullgraph=True)(call.arguments(), raw_dt)
    assert seen
    assert all(stride[-1] == 0 for stride in seen)
