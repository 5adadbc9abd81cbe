"""gated_delta_rule_decode on a GPU, at the shapes of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import covering
from gdn_calls import KINDS, LAYOUTS, STATES, GdnCall, make, row_of, token_of, verify
from gdn_steps import Model
from gdn_tolerances import assert_within_fla, assert_within_flashinfer
from launching import launch
from serving import assert_close, assert_same_outputs
from serving_gdn import Server, exact
from ssu_calls import digest, moved, raw, same
from waiting import no_waiting

import ssmgen
from ssmgen.arch import Arch
from ssmgen.families import spec
from ssmgen.families.gdn.contract import ABI_TENSORS
from ssmgen.ops.gdn import operation
from ssmgen.plan import dispatch

pytestmark = pytest.mark.gpu

# Qwen3-Next and its kin by heads; K = V = 128, and K != V, where no layout can be mistaken.
HEADS = [(16, 32), (16, 48), (16, 64)]
DIMS = [(128, 128), (128, 64), (64, 128)]
QWEN = {"H": 16, "HV": 32, "K": 128, "V": 128}
ODD = {"H": 4, "HV": 12, "K": 128, "V": 64}


def run(call: GdnCall, **options: Any) -> GdnCall:
    """What the op makes of `call` on the GPU, back on the CPU."""
    device = moved(call, "cuda")
    result = ssmgen.gated_delta_rule_decode(**{**device.arguments(), **options})
    assert result.data_ptr() == device["out"].data_ptr()
    return moved(device, "cpu")


@pytest.mark.parametrize(
    ("heads", "sizes", "rounded", "order"), covering(HEADS, DIMS, STATES, LAYOUTS)
)
def test_real_shapes_are_right(heads, sizes, rounded, order):
    (H, HV), (K, V), (state, rounding) = heads, sizes, rounded
    call = make(state, rounding, H=H, HV=HV, K=K, V=V, batch=2, slots=4, order=order)
    verify(call, run(call))


@pytest.mark.parametrize(
    ("kind", "state", "order"), covering(tuple(KINDS), ("fp32", "bf16"), LAYOUTS)
)
def test_every_kind_of_call_is_right(kind, state, order):
    call = make(state, order=order, **{**ODD, **KINDS[kind]})
    verify(call, run(call))


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize(("state", "rounding"), STATES)
@pytest.mark.parametrize("tokens", [1, 4])
def test_every_plan_of_the_table_is_right(state, rounding, order, tokens):
    call = make(state, rounding, **QWEN, tokens=tokens, order=order)
    for plan in {choice.plan for choice in dispatch(call.layout().config, Arch.detect())}:
        after = moved(call, "cuda")
        launch(after, plan)
        verify(call, moved(after, "cpu"))


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize(("K", "V"), [(8, 16), (96, 72), (256, 128), (128, 256), (200, 8)])
@pytest.mark.parametrize(("state", "rounding"), [STATES[0], STATES[2]])
def test_odd_sizes_are_right(K, V, state, rounding, order):
    for tokens in (1, 3):
        call = make(state, rounding, H=2, HV=6, K=K, V=V, tokens=tokens, order=order)
        verify(call, run(call))


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"kda": True}, {"gate": "given"}, {"packing": "flat"}])
def test_tokens_in_one_call_give_the_bits_of_single_calls(options, order):
    """For an fp32 state."""
    call = make(tokens=4, order=order, **ODD, **options)
    after = run(call)
    step = call.copy()
    for token in range(4):
        one = run(token_of(step, token))
        raw(step["state"]).copy_(raw(one["state"]))
        assert same(one["out"], after["out"][:, token])
    assert same(step["state"], after["state"])


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize(("state", "rounding"), STATES)
def test_a_row_alone_gives_the_bits_of_the_row_in_a_batch(state, rounding, order):
    call = make(state, rounding, batch=5, tokens=2, order=order, **ODD)
    together = run(call)
    for row in range(5):
        alone = run(row_of(call, row))
        slot = int(call["state_batch_indices"][row])
        assert digest(alone["out"][0]) == digest(together["out"][row])
        assert digest(alone["state"][slot]) == digest(together["state"][slot])


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_batch_invariant_mode_gives_one_plan_and_equal_bits(monkeypatch, state, order):
    monkeypatch.setenv("SSMGEN_BATCH_INVARIANT", "1")
    call = make(state, batch=600, slots=601, order=order, H=8, HV=16, K=128, V=64)
    whole, alone = run(call), run(row_of(call, 7))
    assert digest(alone["out"][0]) == digest(whole["out"][7])


@pytest.mark.parametrize(("state", "rounding"), STATES)
def test_two_launches_on_equal_inputs_give_equal_bits(state, rounding):
    call = make(state, rounding, batch=64, slots=70, **ODD)
    a, b = run(call), run(call)
    assert digest(a["out"], a["state"]) == digest(b["out"], b["state"])


def test_a_pool_of_more_than_two_to_the_31_elements_is_addressed():
    call = make("bf16", batch=3, slots=3, indices=[0, 1, 2], **QWEN)
    slots = 2**31 // call["state"][0].numel() + 40
    far = moved(call, "cuda")
    pool = torch.zeros(slots, *call["state"].shape[1:], dtype=torch.bfloat16, device="cuda")
    where = torch.tensor([5, slots - 30, slots - 1], device="cuda")
    pool[where] = far["state"]
    ssmgen.gated_delta_rule_decode(
        **{**far.arguments(), "state": pool, "state_batch_indices": where}
    )
    near = run(call)
    assert same(pool[where].cpu(), near["state"])
    assert same(far["out"].cpu(), near["out"])
    pool[where] = 0
    assert not pool.any()


def test_unaligned_views_take_another_variant_that_is_right():
    aligned, shifted = (make("bf16", offset=o, pitch=o, **ODD) for o in (0, 1))
    assert {c.layout().config.aligned for c in (aligned, shifted)} == {True, False}
    for call in (aligned, shifted):
        verify(call, run(call))


# Tolerances that others publish for their own kernels, with their inputs


@pytest.mark.parametrize(
    ("batch", "state", "heads", "sizes", "tokens"),
    covering((1, 32), ("fp32", "bf16"), [(16, 32), (16, 16), (16, 64)], DIMS, (1, 2, 4, 8)),
)
def test_results_are_within_the_tolerances_of_flashinfer(batch, state, heads, sizes, tokens):
    (H, HV), (K, V) = heads, sizes
    call = make(state, batch=batch, slots=batch, tokens=tokens, H=H, HV=HV, K=K, V=V,
                indices=list(range(batch)), token_axis=True)  # fmt: skip
    assert_within_flashinfer(call, run, state)


@pytest.mark.parametrize(
    ("rule", "tokens", "sizes", "dtype", "l2norm"),
    covering(
        ("gated_delta_rule", "kda"), (1, 15, 63), [*DIMS, (32, 104), (256, 64)],
        (torch.float32, torch.float16), (False, True),
    ),
)  # fmt: skip
def test_the_adapter_is_within_the_tolerances_of_fla(rule, tokens, sizes, dtype, l2norm):
    K, V = sizes
    for normalizer in (1.0, 0.1, 10.0):
        assert_within_fla(rule, "cuda", dtype, K, V, tokens, l2norm, normalizer)


def test_packed_views_give_the_bits_of_contiguous_tensors():
    call = make(packing="flat", tokens=2, trail=8, **QWEN)
    plain = call.copy()
    for name in ("q", "k", "v"):
        plain.tensors[name] = call[name].contiguous()
    a, b = run(call), run(plain)
    assert same(a["out"], b["out"])
    assert same(a["state"], b["state"])


# Graphs, tracing, handles


def test_a_captured_graph_replays_and_follows_its_tables_and_seed():
    options = {"accepted": [1, 1, 1], "indices": [[0, 1], [2, 3], [4, 5]], "dst": [6, 7, 8]}
    call = moved(make("fp16", "stochastic", **ODD, **options), "cuda")
    call["state"].normal_()
    start = call["state"].clone()
    ssmgen.gated_delta_rule_decode(**call.arguments())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ssmgen.gated_delta_rule_decode(**call.arguments())
    for seed, accepted in ((1, [1, 1, 1]), (2, [2, 1, 2]), (1, [2, 2, 2])):
        call["state"].copy_(start)
        call["rand_seed"].fill_(seed)
        call["num_accepted_tokens"].copy_(torch.tensor(accepted))
        before = moved(call, "cpu")
        graph.replay()
        torch.cuda.synchronize()
        verify(before, moved(call, "cpu"))


def test_the_op_neither_synchronises_nor_allocates():
    call = moved(make("fp16", "stochastic", tokens=2, **ODD), "cuda")
    ssmgen.gated_delta_rule_decode(**call.arguments())
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_waiting():
        ssmgen.gated_delta_rule_decode(**call.arguments())
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("kind", ["plain", "interleaved views", "kda", "snapshots by row"])
def test_opcheck_passes(kind):
    call = moved(make("bf16", "stochastic", **{**ODD, **KINDS[kind]}), "cuda")
    # opcheck compares results by value, and NaN is no equal of NaN.
    for name in ("state", "out", "intermediate_states_buffer"):
        if name in call.tensors:
            call[name].normal_()
    switches = {"lower_bound": None, "algorithm": "auto", **call.switches}
    arguments = [call.tensors.get(n) for n in ABI_TENSORS]
    arguments += [switches[n] for n in operation.switches]
    torch.library.opcheck(torch.ops.ssmgen.gated_delta_rule_decode.default, tuple(arguments))


def test_torch_compile_traces_the_op_whole():
    call, want = (moved(make(tokens=2, **ODD), "cuda") for _ in range(2))

    def layer(arguments: dict[str, Any]) -> torch.Tensor:
        return ssmgen.gated_delta_rule_decode(**arguments) * 2

    compiled = torch.compile(layer, fullgraph=True)
    assert same(compiled(call.arguments()), layer(want.arguments()))
    assert same(call["state"], want["state"])


def test_handle_and_op_give_the_same_bits():
    call, other = (moved(make("bf16", "stochastic", **ODD), "cuda") for _ in range(2))
    kernel = ssmgen.get_kernel(spec("gdn").layout(**call.arguments()).config)
    kernel.bind(**call.tensors)()
    ssmgen.gated_delta_rule_decode(**other.arguments())
    assert same(call["out"], other["out"])
    assert same(call["state"], other["state"])


# Programmatic dependent launch


def _early_writer() -> Any:
    """A kernel that lets the next one start at once, works a while, then writes q, k and v."""
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


@pytest.mark.parametrize("options", [{}, {"accepted": [2, 1, 2], "dst": [6, 7, 8],
                                          "indices": [[0, 1], [2, 3], [4, 5]]}])  # fmt: skip
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_pdl_is_right_behind_a_kernel_that_signals_early(state, options):
    before = make(state, packing="flat", **QWEN, **options)
    before["state"].nan_to_num_()
    want, call = moved(before, "cuda"), moved(before, "cuda")
    steps = 4
    for _ in range(steps):
        ssmgen.gated_delta_rule_decode(**want.arguments())
    target = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    target.set_(call["q"].untyped_storage())
    good = target.clone()
    write = _early_writer()
    arguments = {**call.arguments(), "pdl": True}
    ssmgen.get_kernel(spec("gdn").layout(**arguments).config)
    for _ in range(steps):
        target.fill_(float("nan"))
        write[(-(-good.numel() // 2048),)](good, target, good.numel(), 2000, BLOCK=2048)
        ssmgen.gated_delta_rule_decode(**arguments)
    torch.cuda.synchronize()
    assert same(call["out"], want["out"])
    assert same(call["state"], want["state"])


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("packing", ["flat", "interleaved"])
def test_conv_and_gdn_as_a_chain_of_dependent_launches_give_the_same_bits(packing, state):
    """In a graph of several steps, on one buffer between the two."""
    H, HV, K, V, batch, steps = 16, 32, 128, 64, 4, 6
    gen = torch.Generator("cuda").manual_seed(5)

    def randn(*shape: int, dtype: Any = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=gen, device="cuda").to(dtype)

    width = 2 * H * K + HV * V
    x = [randn(batch, width) for _ in range(steps)]
    gates = [(randn(batch, HV), randn(batch, HV)) for _ in range(steps)]
    weight, A_log, dt_bias = randn(width, 4), randn(HV, dtype=torch.float32) / 4, randn(HV)
    conv, pool = randn(8, width, 3), randn(8, HV, V, K, dtype=getattr(torch, {
        "fp32": "float32", "bf16": "bfloat16"}[state]))  # fmt: skip
    slots = torch.tensor([6, 1, 3, 0], dtype=torch.int32, device="cuda")
    found = []
    for pdl in (False, True):
        history, states = conv.clone(), pool.clone()
        mixed = torch.empty_like(x[0])
        outs = [torch.empty(batch, HV, V, dtype=torch.bfloat16, device="cuda") for _ in x]

        def work(history=history, states=states, mixed=mixed, outs=outs, pdl=pdl) -> None:
            for tokens, (a, b), out in zip(x, gates, outs):
                ssmgen.causal_conv1d_update(
                    tokens, history, weight, activation="silu", conv_state_indices=slots, out=mixed,
                    pdl=pdl,
                )  # fmt: skip
                q, k, v = ssmgen.split_qkv(mixed, H, HV, K, V, packing)
                ssmgen.gated_delta_rule_decode(
                    states, q, k, v, A_log, a, dt_bias, b, out=out, state_batch_indices=slots,
                    pdl=pdl,
                )  # fmt: skip

        work()
        history.copy_(conv)
        states.copy_(pool)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        graph.replay()
        torch.cuda.synchronize()
        found.append([history, states, *outs])
    assert all(same(a, b) for a, b in zip(*found))
    assert not same(found[0][1], pool)


# Speculative serving

SERVED = {"steps": ssmgen, "model": Model(layers=2, H=2, HV=4, K=128, V=64), "device": "cuda",
          "requests": 7, "rows": 3}  # fmt: skip


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("keep", ["slots", "columns", "sequences", "buffer"])
def test_speculation_changes_no_bit_of_what_is_accepted(keep, pdl):
    options = {**SERVED, "keep": keep, "pdl": pdl}
    server = Server(drafts=3, **options)
    close = exact(server)
    found = server.run()
    assert_same_outputs(found, Server(drafts=0, **options).run())
    assert_close(found, close, 1e-5)


@pytest.mark.parametrize("policy", ["original bug", "homogeneous only"])
@pytest.mark.parametrize("keep", ["columns", "sequences", "buffer"])
def test_a_state_that_loses_accepted_tokens_is_caught_however_it_is_kept(keep, policy):
    wanted = Server(drafts=0, keep=keep, **SERVED).run()
    with pytest.raises(AssertionError, match="outputs differ"):
        assert_same_outputs(Server(drafts=3, policy=policy, keep=keep, **SERVED).run(), wanted)
