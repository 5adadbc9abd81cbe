"""A client: transformers decodes with our convolution and gated delta rule in place of its own."""

from __future__ import annotations

import types

import pytest
import torch
from qwen3_next import LINEAR_LAYERS, TOKENS, agree, decoded, model, replaced

from ssmgen.adapters import transformers as adapter
from ssmgen.errors import UnsupportedError


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-6), ("bfloat16", 2**-7)])
def test_qwen3_next_decodes_the_same_tokens(dtype, close):
    """Logits within fp32 rounding; or within two units of bf16, at their size below 1."""
    network = model(getattr(torch, dtype))
    tokens, logits = decoded(network)
    with replaced() as calls:
        ours, our_logits = decoded(network, forced=tokens)
    steps = LINEAR_LAYERS * (TOKENS - 1)
    assert calls == {
        "causal_conv1d_update": steps,
        "causal_conv1d_fn": LINEAR_LAYERS,
        "torch_recurrent_gated_delta_rule": steps,
    }
    assert logits.abs().max() < 1
    agree(tokens, logits, ours, our_logits, close)
    if dtype == "float32":
        assert torch.equal(ours, tokens)


def test_the_state_of_the_cache_is_updated_in_place():
    state = torch.zeros(2, 4, 16, 24)
    q, k, v = (torch.randn(2, 1, 4, n) for n in (16, 16, 24))
    _, after = adapter.torch_recurrent_gated_delta_rule(
        q, k, v, g=torch.zeros(2, 1, 4), beta=torch.ones(2, 1, 4), initial_state=state,
        output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    assert after is state
    assert state.any()


def test_a_module_that_calls_none_of_them_is_refused():
    with pytest.raises(UnsupportedError, match="empty: has none of causal_conv1d_update"):
        adapter.use(types.ModuleType("empty"))


def test_packed_sequences_are_refused():
    with pytest.raises(UnsupportedError, match="seq_idx: given"):
        adapter.causal_conv1d_fn(torch.zeros(1, 8, 3), torch.zeros(8, 4), seq_idx=torch.zeros(1, 3))
