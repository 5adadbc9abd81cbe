"""The gated delta rule reference, against scalar Python and the promises every op makes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmgen.errors import ArgumentTypeError, ArgumentValueError
from ssmgen.reference import (
    delta_gates,
    delta_step,
    gated_delta_rule_decode,
    random_bits,
    round_to,
)

F64 = torch.float64


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def scalar_step(S, q, k, v, g, beta, scale, norm):
    """One head in Python's floats: S (V, K) lists."""

    def unit(x):
        return [e / math.sqrt(sum(y * y for y in x) + 1e-6) for e in x] if norm else list(x)

    q, k = [scale * e for e in unit(q)], unit(k)
    S = [[math.exp(g[j]) * s for j, s in enumerate(row)] for row in S]
    for i, row in enumerate(S):
        delta = beta * (v[i] - sum(s * e for s, e in zip(row, k)))
        S[i] = [s + delta * e for s, e in zip(row, k)]
    return [sum(s * e for s, e in zip(row, q)) for row in S], S


@settings(max_examples=40)
@given(
    heads=st.integers(1, 3), ratio=st.sampled_from([1, 2, 3, 4]), k_dim=st.integers(1, 5),
    v_dim=st.integers(1, 5), norm=st.booleans(), channels=st.booleans(),
    scale=st.sampled_from([None, 0.7]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_step_is_that_of_scalar_python(heads, ratio, k_dim, v_dim, norm, channels, scale, seed):
    value_heads = heads * ratio
    S = randn(seed, 2, value_heads, v_dim, k_dim)
    q, k = randn(seed + 1, 2, heads, k_dim), randn(seed + 2, 2, heads, k_dim)
    v, beta = randn(seed + 3, 2, value_heads, v_dim), randn(seed + 4, 2, value_heads)
    g = -randn(seed + 5, 2, value_heads, *([k_dim] * channels)).abs()
    o, after = delta_step(S, q, k, v, g, beta, scale=scale, use_qk_l2norm=norm, compute_dtype=F64)
    for row in range(2):
        for head in range(value_heads):
            log = g[row, head].tolist() if channels else [float(g[row, head])] * k_dim
            wanted = scalar_step(
                S[row, head].tolist(), q[row, head // ratio].tolist(),
                k[row, head // ratio].tolist(), v[row, head].tolist(), log,
                float(beta[row, head]), k_dim**-0.5 if scale is None else scale, norm,
            )  # fmt: skip
            for found, want in zip((o[row, head], after[row, head]), wanted):
                torch.testing.assert_close(found, torch.tensor(want, dtype=F64))


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bound", [None, -5.0])
def test_the_gates_are_those_of_scalar_python(channels, bias, bound):
    own = (3,) if channels else ()
    A_log, a, b = randn(0, 4), 30 * randn(1, 2, 4, *own), 5 * randn(2, 2, 4)
    dt_bias = randn(3, 4, *own) if bias else None
    g, beta = delta_gates(A_log, a, dt_bias, b, lower_bound=bound, compute_dtype=F64)
    for at in torch.cartesian_prod(*map(torch.arange, a.shape)).tolist():
        row, head, *channel = at
        x = float(a[tuple(at)]) + (float(dt_bias[(head, *channel)]) if bias else 0.0)
        rate = math.exp(A_log[head])
        # softplus without its overflow: log(1 + e^x) = x + log(1 + e^-x)
        soft = math.log1p(math.exp(x)) if x < 0 else x + math.log1p(math.exp(-x))
        wanted = -rate * soft if bound is None else bound / (1 + math.exp(-rate * x))
        assert float(g[tuple(at)]) == pytest.approx(wanted, rel=1e-12)
        assert float(beta[row, head]) == pytest.approx(1 / (1 + math.exp(-float(b[row, head]))))


def call(seed=0, *, batch=3, tokens=2, slots=8, dtype=torch.float32, **options):
    """Arguments of one call, K != V."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=gen)

    found = {
        "state": normal(slots, 4, 16, 8).to(dtype), "q": normal(batch, tokens, 2, 8),
        "k": normal(batch, tokens, 2, 8), "v": normal(batch, tokens, 4, 16),
        "A_log": normal(4), "a": normal(batch, tokens, 4), "b": normal(batch, tokens, 4),
        "dt_bias": normal(4), "state_batch_indices": torch.tensor([5, 0, 3]),
    }  # fmt: skip
    return {**found, **options}


def token_by_token(arguments):
    """The same call as one call a token, on a copy of the pool; outputs and the pool."""
    state = arguments["state"].clone()
    outputs = []
    for t in range(arguments["q"].shape[1]):
        one = {n: x[:, t] if n in ("q", "k", "v", "a", "b") else x for n, x in arguments.items()}
        outputs.append(gated_delta_rule_decode(**{**one, "state": state}))
    return torch.stack(outputs, 1), state


def test_tokens_of_a_row_are_steps_one_after_the_other():
    arguments = call(tokens=4)
    outputs, after = token_by_token(arguments)
    out = gated_delta_rule_decode(**arguments)
    assert torch.equal(out, outputs)
    assert torch.equal(arguments["state"], after)


def test_a_narrow_state_is_rounded_once_however_many_tokens_a_row_has():
    arguments = call(tokens=3, dtype=torch.bfloat16)
    exact = {**arguments, "state": arguments["state"].float()}
    out, wanted = gated_delta_rule_decode(**arguments), gated_delta_rule_decode(**exact)
    assert torch.equal(out, wanted)
    assert torch.equal(arguments["state"], exact["state"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_bits_are_those_of_what_is_written(dtype):
    seed = torch.tensor([77])
    dst, buffer = torch.tensor([1, 2, 7]), torch.zeros(5, 2, 4, 16, 8, dtype=dtype)
    arguments = call(dtype=dtype, dst_state_batch_indices=dst, rand_seed=seed,
                     intermediate_states_buffer=buffer, philox_rounds=7)  # fmt: skip
    exact = {n: x for n, x in arguments.items() if n != "rand_seed"}
    exact |= {"state": arguments["state"].float(), "intermediate_states_buffer": buffer.float()}
    gated_delta_rule_decode(**arguments)
    gated_delta_rule_decode(**exact)
    for pool, slots, token, of_buffer in (
        ("state", dst, 1, False),
        ("intermediate_states_buffer", torch.arange(3), 1, True),
    ):
        found, wanted = arguments[pool][slots], exact[pool][slots]
        if of_buffer:
            found, wanted = found[:, token], wanted[:, token]
        bits = random_bits(seed, slots, 4, 16, 8, 7, token, of_buffer)
        assert torch.equal(found, round_to(wanted, dtype, bits))


def test_padding_is_zero_and_touches_nothing():
    buffer = torch.full((3, 2, 4, 16, 8), 7.0)
    arguments = call(state_batch_indices=torch.tensor([5, 1, 3]), pad_slot_id=1,
                     intermediate_states_buffer=buffer)  # fmt: skip
    before = arguments["state"].clone()
    out = gated_delta_rule_decode(**arguments)
    assert not out[1].any()
    assert out[[0, 2]].abs().min() > 0
    changed = (arguments["state"] != before).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert changed == [3, 5]
    assert (buffer[1] == 7).all()
    assert not (buffer[[0, 2]] == 7).any()


def test_snapshots_go_to_the_row_of_the_batch_even_if_it_is_the_number_of_padding():
    buffer = torch.full((3, 2, 4, 16, 8), 7.0)
    gated_delta_rule_decode(**call(pad_slot_id=0, state_batch_indices=torch.tensor([5, 1, 3]),
                                   intermediate_states_buffer=buffer))  # fmt: skip
    assert not (buffer == 7).any()


def test_heads_may_lie_in_groups():
    arguments = call()
    grouped = {**arguments, "state": arguments["state"].clone()}
    for name in ("v", "a", "b"):
        grouped[name] = arguments[name].unflatten(2, (2, 2))
    assert torch.equal(gated_delta_rule_decode(**arguments), gated_delta_rule_decode(**grouped))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"state": torch.zeros(8, 4, 16, 8, dtype=torch.int8)}, ArgumentTypeError, "state"),
        ({"rand_seed": 3}, ArgumentValueError, "rand_seed"),
        ({"out": torch.zeros(3, 2, 4, 8)}, ArgumentValueError, "out"),
        ({"q": torch.zeros(3, 2, 3, 8)}, ArgumentValueError, "multiple of H"),
        ({"state_batch_indices": torch.tensor([5, 0, 8])}, ArgumentValueError, "slot 8"),
        ({"num_accepted_tokens": torch.tensor([1, 3, 1]),
          "state_batch_indices": torch.tensor([[0, 1], [2, 3], [4, 5]])},
         ArgumentValueError, "num_accepted_tokens: found 3"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_raises_before_anything_is_written(change, error, words):
    arguments = {**call(), **change}
    before = arguments["state"].clone()
    with pytest.raises(error, match=words):
        gated_delta_rule_decode(**arguments)
    assert torch.equal(arguments["state"], before)
