"""The functions with other libraries' names: their arguments mean what they mean there. K != V."""

from __future__ import annotations

import inspect

import pytest
import torch
from gdn_tolerances import FLA, assert_within_fla
from ssu_calls import same

from ssmgen.adapters import fla, flashinfer, vllm
from ssmgen.errors import ArgumentValueError, UnsupportedError
from ssmgen.families.gdn.contract import layout
from ssmgen.reference import delta_gates, delta_step

B, T, H, HV, K, V = 3, 2, 2, 4, 16, 24
SIGNATURES = {
    fla.fused_recurrent_gated_delta_rule: (
        "q k v g gk gv beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
        "use_gate_in_kernel A_log dt_bias use_beta_sigmoid_in_kernel allow_neg_eigval "
        "state_v_first cu_seqlens"
    ),
    fla.fused_recurrent_kda: (
        "q k v g beta A_log dt_bias scale initial_state output_final_state "
        "use_qk_l2norm_in_kernel use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval "
        "lower_bound state_v_first cu_seqlens"
    ),
    flashinfer.gated_delta_rule_decode_pretranspose: (
        "q k v state A_log a dt_bias b scale output use_qk_l2norm initial_state "
        "initial_state_indices output_state_indices intermediate_states_buffer "
        "disable_state_update backend"
    ),
    flashinfer.gated_delta_rule_decode: "q k v state A_log a dt_bias b scale output use_qk_l2norm",
    flashinfer.gated_delta_rule_mtp: (
        "q k v initial_state initial_state_indices A_log a dt_bias b scale output "
        "intermediate_states_buffer ssm_state_indices disable_state_update use_qk_l2norm "
        "output_state_indices"
    ),
    vllm.fused_recurrent_gated_delta_rule_packed_decode: (
        "mixed_qkv a b A_log dt_bias scale initial_state out ssm_state_indices "
        "use_qk_l2norm_in_kernel"
    ),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_arguments_stand_in_the_order_of_the_original(function):
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == SIGNATURES[function].split()
    # Some callers keep only the keywords they find in the signature.
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters)


@pytest.fixture
def data():
    gen = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=gen)

    return {
        "q": randn(B, T, H, K), "k": randn(B, T, H, K), "v": randn(B, T, HV, V),
        "a": randn(B, T, HV), "b": randn(B, T, HV), "A_log": 0.3 * randn(HV), "dt_bias": randn(HV),
        "state": randn(B, HV, V, K), "wide": randn(B, T, HV, K),
    }  # fmt: skip


def walk(data, state, g, beta, *, tokens=T, **options):
    """Outputs and the state after each token, by the recurrence alone."""
    outputs, states = [], []
    for t in range(tokens):
        inputs = [data[n][:, t] for n in ("q", "k", "v")] + [g[:, t], beta[:, t]]
        o, state = delta_step(state, *inputs, **options)
        outputs.append(o)
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def raw_gates(data, **options):
    return delta_gates(data["A_log"], data["a"], data["dt_bias"], data["b"], **options)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# fla


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_fla_makes_a_new_state_unless_told_otherwise(data, state_v_first, inplace):
    g, beta = raw_gates(data)
    o, states = walk(data, data["state"], g, beta, use_qk_l2norm=True, scale=0.5)
    initial = data["state"] if state_v_first else data["state"].transpose(-1, -2).contiguous()
    before = initial.clone()
    out, final = fla.fused_recurrent_gated_delta_rule(
        data["q"], data["k"], data["v"], g, beta=beta, scale=0.5, initial_state=initial,
        output_final_state=True, use_qk_l2norm_in_kernel=True, state_v_first=state_v_first,
        inplace_final_state=inplace,
    )  # fmt: skip
    close(out, o)
    close(final if state_v_first else final.transpose(-1, -2), states[:, -1])
    assert (final is initial) == inplace
    assert same(initial, before) != inplace


def test_fla_reads_a_state_of_any_strides(data):
    g, beta = raw_gates(data)
    o, _ = walk(data, data["state"], g, beta, use_qk_l2norm=False)
    strided = torch.stack([data["state"]] * 2, -1)[..., 0]
    out, final = fla.fused_recurrent_gated_delta_rule(
        data["q"], data["k"], data["v"], g, beta=beta, initial_state=strided, state_v_first=True
    )
    close(out, o)
    assert final is None
    assert same(strided, data["state"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rule", FLA)
def test_fla_is_within_the_tolerances_of_its_own_tests(rule, dtype, monkeypatch):
    for l2norm in (False, True):
        assert_within_fla(rule, "cpu", dtype, 64, 32, 15, l2norm)
    # Below the rounding of fp16 itself, none would hold.
    monkeypatch.setitem(FLA, rule, 5e-5)
    if dtype == torch.float16:
        with pytest.raises(AssertionError, match=rule):
            assert_within_fla(rule, "cpu", dtype, 64, 32, 15, True)


def test_fla_without_state_gates_or_norm(data):
    zeros, ones = torch.zeros(B, T, HV), torch.ones(B, T, HV)
    o, states = walk(data, torch.zeros(B, HV, V, K), zeros, ones, use_qk_l2norm=False)
    out, none = fla.fused_recurrent_gated_delta_rule(data["q"], data["k"], data["v"])
    close(out, o)
    assert none is None
    _, final = fla.fused_recurrent_gated_delta_rule(
        data["q"], data["k"], data["v"], output_final_state=True
    )
    close(final.transpose(-1, -2), states[:, -1])
    assert final.shape == (B, HV, K, V)
    assert final.dtype == torch.float32


@pytest.mark.parametrize(("sigmoid", "negative"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("gate", [False, True])
def test_fla_gates_in_the_kernel_or_ahead_of_it(data, gate, sigmoid, negative):
    g, beta = raw_gates(data)
    o, _ = walk(data, data["state"], g, beta * (2 if negative else 1), use_qk_l2norm=True)
    out, _ = fla.fused_recurrent_gated_delta_rule(
        data["q"], data["k"], data["v"], data["a"] if gate else g,
        beta=data["b"] if sigmoid else beta, initial_state=data["state"], state_v_first=True,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=gate, A_log=data["A_log"],
        dt_bias=data["dt_bias"], use_beta_sigmoid_in_kernel=sigmoid, allow_neg_eigval=negative,
    )  # fmt: skip
    close(out, o)


def test_fla_channels_of_gk_add_to_g(data):
    g, beta = raw_gates(data)
    gk = -data["wide"].abs()
    o, _ = walk(data, data["state"], gk + g.unsqueeze(-1), beta, use_qk_l2norm=False)
    out, _ = fla.fused_recurrent_gated_delta_rule(
        data["q"], data["k"], data["v"], g, gk, beta=beta, initial_state=data["state"],
        state_v_first=True,
    )  # fmt: skip
    close(out, o)


def test_fla_sequences_have_a_batch_axis_of_one(data):
    lengths = [2, 0, 3, 1]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    g, beta = raw_gates(data)
    flat = {n: t.flatten(0, 1).unsqueeze(0) for n, t in (*data.items(), ("g", g), ("beta", beta))
            if n in ("q", "k", "v", "g", "beta")}  # fmt: skip
    state = torch.randn(4, HV, V, K, generator=torch.Generator().manual_seed(2))
    out, final = fla.fused_recurrent_gated_delta_rule(
        flat["q"], flat["k"], flat["v"], flat["g"], beta=flat["beta"], initial_state=state,
        output_final_state=True, state_v_first=True, cu_seqlens=ends,
    )  # fmt: skip
    assert out.shape == (1, 6, HV, V)
    for i, length in enumerate(lengths):
        if not length:
            assert same(final[i], state[i])
            continue
        piece = {n: t[:, ends[i] : ends[i + 1]] for n, t in flat.items()}
        o, states = walk(piece, state[i : i + 1], piece["g"], piece["beta"], tokens=length,
                         use_qk_l2norm=False)  # fmt: skip
        close(out[:, ends[i] : ends[i + 1]], o)
        close(final[i : i + 1], states[:, -1])


@pytest.mark.parametrize("sequences", [False, True])
def test_fla_lengths_share_kernels(monkeypatch, sequences):
    """One of each power of two, of 1 to 40 tokens."""
    configs, original = set(), fla.gated_delta_rule_decode

    def seen(state, q, k, v, **options):
        out = original(state, q, k, v, **options)
        configs.add(layout(state=state, q=q, k=k, v=v, out=out, **options).config)
        return out

    monkeypatch.setattr(fla, "gated_delta_rule_decode", seen)
    gen = torch.Generator().manual_seed(3)
    whole = [torch.randn(2, 40, *n, generator=gen) for n in ((1, 8), (1, 8), (1, 16), (1,))]
    for tokens in (1, 2, 3, 5, 7, 8, 17, 21, 32, 33, 39, 40):
        q, k, v, g = (t[:, :tokens] for t in whole)
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        if sequences:
            options["cu_seqlens"] = torch.tensor([0, tokens])
            q, k, v, g = (t[:1] for t in (q, k, v, g))
        out, final = fla.fused_recurrent_gated_delta_rule(q, k, v, -g.abs(), **options)
        assert out.shape == v.shape
        for row in range(len(q)):
            state = torch.zeros(1, 1, 16, 8)
            one = {"q": q[row : row + 1], "k": k[row : row + 1], "v": v[row : row + 1]}
            o, states = walk(one, state, -g[row : row + 1].abs(), torch.ones(1, tokens, 1),
                             tokens=tokens, use_qk_l2norm=True)  # fmt: skip
            close(out[row], o[0])
            close(final[row].mT, states[0, -1])
    assert len(configs) <= 7


@pytest.mark.parametrize("bias", ["flat", "matrix", "heads", None])
@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_kda_gates_of_channels(data, bias, bound, sigmoid):
    full = None if bias is None else data["wide"][0, 1]
    if bias == "heads":
        full = data["dt_bias"][:, None].expand(HV, K)
    A_log = None if bound and bias is None else data["A_log"]
    used = torch.zeros(HV) if A_log is None else A_log
    g, beta = delta_gates(used, data["wide"], full, data["b"], lower_bound=bound)
    o, _ = walk(data, data["state"], g, beta, use_qk_l2norm=True)
    given = {"flat": lambda: full.flatten(), "matrix": lambda: full,
             "heads": lambda: data["dt_bias"], None: lambda: None}[bias]()  # fmt: skip
    out, _ = fla.fused_recurrent_kda(
        data["q"], data["k"], data["v"], data["wide"], data["b"] if sigmoid else beta, A_log,
        given, initial_state=data["state"], state_v_first=True, use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=sigmoid, lower_bound=bound,
    )  # fmt: skip
    close(out, o)


def test_fla_refuses_what_it_does_not_have(data):
    inputs = (data["q"], data["k"], data["v"])
    call = fla.fused_recurrent_gated_delta_rule
    with pytest.raises(UnsupportedError, match="gv"):
        call(*inputs, gv=data["v"])
    with pytest.raises(UnsupportedError, match="beta"):
        call(*inputs, beta=data["v"])
    with pytest.raises(UnsupportedError, match="gk"):
        call(*inputs, data["a"], data["wide"], use_gate_in_kernel=True, A_log=data["A_log"])
    for options, words in (
        ({"use_gate_in_kernel": True}, "A_log"),
        ({"allow_neg_eigval": True, "beta": data["b"]}, "use_beta_sigmoid_in_kernel"),
        ({"use_beta_sigmoid_in_kernel": True}, "with beta"),
        ({"inplace_final_state": True}, "initial_state"),
        ({"cu_seqlens": torch.tensor([0, 1])}, "batch 3"),
        ({"initial_state": data["state"]}, "initial_state"),
    ):
        with pytest.raises(ArgumentValueError, match=words):
            call(*inputs, **options)
    with pytest.raises(ArgumentValueError, match="A_log"):
        fla.fused_recurrent_kda(*inputs, data["wide"], data["b"], use_gate_in_kernel=True)


# FlashInfer


def inputs_of(data, tokens):
    names = ("q", "k", "v", "A_log", "a", "dt_bias", "b")
    cut = {n: data[n] if n in ("A_log", "dt_bias") else data[n][:, :tokens] for n in names}
    return [cut[n] for n in names[:3]], [cut[n] for n in names[3:]]


def test_flashinfer_decodes_states_of_a_batch(data):
    o, states = walk(data, data["state"], *raw_gates(data), tokens=1, use_qk_l2norm=True)
    inputs, gates = inputs_of(data, 1)
    state = data["state"].clone()
    output = torch.empty(B, 1, HV, V)
    out, same_state = flashinfer.gated_delta_rule_decode_pretranspose(
        *inputs, state, *gates, None, output
    )
    assert out is output
    assert same_state is state
    close(out, o)
    close(state, states[:, 0])
    turned = data["state"].transpose(-1, -2).contiguous()
    out, same_state = flashinfer.gated_delta_rule_decode(*inputs, turned, *gates)
    assert same_state is turned
    close(out, o)
    close(turned.transpose(-1, -2), states[:, 0])


@pytest.mark.parametrize("tokens", [1, 2])
def test_flashinfer_pool_with_other_destinations_and_snapshots(data, tokens):
    """-1 as source: zeros and nothing touched; as destination: not written."""
    o, states = walk(data, data["state"], *raw_gates(data), tokens=tokens, scale=0.2,
                     use_qk_l2norm=False)  # fmt: skip
    inputs, gates = inputs_of(data, tokens)
    pool = torch.full((8, HV, V, K), torch.nan)
    pool[5], pool[2] = data["state"][0], data["state"][2]
    before = pool.clone()
    buffer = torch.full((B, tokens, HV, V, K), torch.nan)
    out, same_pool = flashinfer.gated_delta_rule_decode_pretranspose(
        *inputs, None, *gates, 0.2, None, False, pool, torch.tensor([5, -1, 2], dtype=torch.int32),
        torch.tensor([6, 7, -1]), buffer,
    )  # fmt: skip
    assert same_pool is pool
    close(out[[0, 2]], o[[0, 2]])
    assert not out[1].any()
    close(pool[6], states[0, -1])
    others = [0, 1, 2, 3, 4, 5, 7]
    assert same(pool[others], before[others])
    close(buffer[[0, 2]], states[[0, 2]])
    assert buffer[1].isnan().all()
    flashinfer.gated_delta_rule_decode_pretranspose(
        *inputs, None, *gates, initial_state=pool, disable_state_update=True,
        initial_state_indices=torch.tensor([5, -1, 2]),
    )  # fmt: skip
    assert same(pool[others], before[others])


def test_flashinfer_mtp_keeps_the_pool_unless_told_to_write(data):
    o, states = walk(data, data["state"], *raw_gates(data), use_qk_l2norm=True)
    inputs, gates = inputs_of(data, T)
    indices = torch.tensor([4, 0, 2], dtype=torch.int32)
    pool = torch.full((9, HV, V, K), torch.nan)
    pool[indices.long()] = data["state"]

    def run(**options):
        after = pool.clone()
        out, same_pool = flashinfer.gated_delta_rule_mtp(*inputs, after, indices, *gates, **options)
        assert same_pool is after
        close(out, o)
        return after

    assert same(run(), pool)
    assert same(run(disable_state_update=True), pool)
    close(run(disable_state_update=False)[indices.long()], states[:, -1])
    split = run(disable_state_update=False, output_state_indices=torch.tensor([1, 3, 5]))
    close(split[[1, 3, 5]], states[:, -1])
    assert same(split[indices.long()], pool[indices.long()])
    table = torch.tensor([[1, 3], [5, 6], [-1, 7]], dtype=torch.int32)
    scattered = run(ssm_state_indices=table)
    close(scattered[[1, 3, 5, 6, 7]], torch.stack([*states[0], *states[1], states[2, 1]]))
    assert same(scattered[[0, 2, 4, 8]], pool[[0, 2, 4, 8]])
    with pytest.raises(UnsupportedError, match="output_state_indices"):
        run(ssm_state_indices=table, output_state_indices=indices)


def test_flashinfer_refuses_half_a_pool(data):
    inputs, gates = inputs_of(data, 1)
    state, indices = data["state"], torch.tensor([0, 1, 2])
    call = flashinfer.gated_delta_rule_decode_pretranspose
    for options, words in (
        ({"initial_state": state}, "initial_state_indices"),
        ({"initial_state_indices": indices}, "initial_state_indices"),
        ({}, "either"),
        ({"output_state_indices": indices, "state": state}, "output_state_indices"),
    ):
        with pytest.raises(ArgumentValueError, match=words):
            call(*inputs, options.pop("state", None), *gates, **options)
    with pytest.raises(UnsupportedError, match="backend"):
        call(*inputs, state, *gates, backend="cutlass")


# vLLM


def packed(data):
    flat = [data[n][:, 0].flatten(1) for n in ("q", "k", "v")]
    return torch.cat(flat, 1)


def test_vllm_packed_decode_on_a_pool_whose_slot_0_is_null(data):
    o, states = walk(data, data["state"], *raw_gates(data), tokens=1, scale=0.3, use_qk_l2norm=True)
    pool = torch.full((6, HV, V, K), torch.nan)
    pool[3], pool[5] = data["state"][0], data["state"][2]
    before, out = pool.clone(), torch.full((B, 1, HV, V), torch.nan)
    gates = [data["a"][:, 0], data["b"][:, 0], data["A_log"], data["dt_bias"]]
    indices = torch.tensor([3, 0, 5], dtype=torch.int32)
    found = vllm.fused_recurrent_gated_delta_rule_packed_decode(
        packed(data), *gates, 0.3, pool, out, indices, True
    )
    assert found[0] is out
    assert found[1] is pool
    close(out[[0, 2]], o[[0, 2]])
    assert not out[1].any()
    close(pool[[3, 5]], states[[0, 2], 0])
    assert same(pool[[0, 1, 2, 4]], before[[0, 1, 2, 4]])


def test_vllm_packed_decode_starts_from_the_accepted_slot_and_writes_the_first(data):
    o, states = walk(data, data["state"], *raw_gates(data), tokens=1, scale=0.3)
    table = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.int32)
    pool = torch.full((10, HV, V, K), torch.nan)
    pool[[3, 4, 8]] = data["state"]
    before, out = pool.clone(), torch.full((B, 1, HV, V), torch.nan)
    vllm.fused_recurrent_gated_delta_rule_packed_decode(
        packed(data), data["a"][:, 0], data["b"][:, 0], data["A_log"], data["dt_bias"], 0.3, pool,
        out, table, True, num_accepted_tokens=torch.tensor([3, 1, 2]),
    )  # fmt: skip
    close(out, o)
    close(pool[[1, 4, 7]], states[:, 0])
    others = [0, 2, 3, 5, 6, 8, 9]
    assert same(pool[others], before[others])


def test_vllm_refuses_counts_without_a_slot_for_each(data):
    pool = torch.zeros(4, HV, V, K)
    with pytest.raises(ArgumentValueError, match=r"ssm_state_indices: found shape \(3,\)"):
        vllm.fused_recurrent_gated_delta_rule_packed_decode(
            packed(data), data["a"][:, 0], data["b"][:, 0], data["A_log"], data["dt_bias"], 0.3,
            pool, torch.empty(B, 1, HV, V), torch.arange(3), num_accepted_tokens=torch.arange(3),
        )  # fmt: skip
    assert not pool.any()


def test_vllm_refuses_a_width_that_no_heads_explain(data):
    gates = [data["a"][:, 0], data["b"][:, 0], data["A_log"], data["dt_bias"]]
    for mixed in (packed(data)[:, :-8], packed(data)[:, : HV * V]):
        with pytest.raises(ArgumentValueError, match="mixed_qkv"):
            vllm.fused_recurrent_gated_delta_rule_packed_decode(
                mixed, *gates, 0.3, data["state"], torch.empty(B, 1, HV, V), torch.arange(3)
            )
