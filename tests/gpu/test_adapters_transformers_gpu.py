"""transformers on a GPU with our kernels in place of its own functions."""

from __future__ import annotations

import pytest
import torch
from qwen3_next import LINEAR_LAYERS, TOKENS, agree, decoded, model, replaced

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 2**-6)])
def test_qwen3_next_decodes_the_same_tokens(dtype, close):
    network = model(getattr(torch, dtype), "cuda")
    tokens, logits = decoded(network)
    with replaced() as calls:
        ours, our_logits = decoded(network, forced=tokens)
    assert calls["torch_recurrent_gated_delta_rule"] == LINEAR_LAYERS * (TOKENS - 1)
    agree(tokens, logits, ours, our_logits, close)
