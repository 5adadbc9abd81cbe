"""A small Qwen3-Next with random weights, decoding greedily."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as modeling

from ssmgen.adapters import transformers as adapter

__all__ = ["agree", "decoded", "model", "replaced"]

LINEAR_LAYERS = 3
TOKENS = 64


def model(dtype: torch.dtype, device: str = "cpu") -> Qwen3NextForCausalLM:
    """Three gated delta nets and an attention layer; two value heads a key head, K other than V."""
    torch.manual_seed(5)
    config = Qwen3NextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=LINEAR_LAYERS + 1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, linear_conv_kernel_dim=4,
        linear_key_head_dim=16, linear_value_head_dim=24, linear_num_key_heads=2,
        linear_num_value_heads=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, mlp_only_layers=list(range(LINEAR_LAYERS + 1)),
    )  # fmt: skip
    return Qwen3NextForCausalLM(config).eval().to(device, dtype)


def decoded(
    model: Qwen3NextForCausalLM, forced: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, logits) of `TOKENS` steps after a prompt of 7, for two prompts: what is likeliest
    at each step, which is also the next input unless other tokens are `forced`."""
    prompt = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(1))
    given, cache, tokens, logits = prompt.to(model.device), None, [], []
    with torch.no_grad():
        for step in range(TOKENS):
            found = model(given, past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            logits.append(found.logits[:, -1].float())
            tokens.append(logits[-1].argmax(-1))
            given = (tokens[-1] if forced is None else forced[:, step])[:, None]
    return torch.stack(tokens, 1), torch.stack(logits, 1)


def agree(
    tokens: torch.Tensor, logits: torch.Tensor, other: torch.Tensor, other_logits: torch.Tensor,
    close: float,
) -> None:  # fmt: skip
    """Assert logits within `close`, and the same tokens wherever that leaves no doubt."""
    assert (other_logits - logits).abs().max() <= close
    best = logits.topk(2, dim=-1).values
    clear = best[..., 0] - best[..., 1] > 2 * close
    assert clear.double().mean() > 0.4
    assert torch.equal(other[clear], tokens[clear])


@contextlib.contextmanager
def replaced() -> Iterator[dict[str, int]]:
    """transformers' functions are ours inside; yields how often each was called."""
    calls: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("causal_conv1d_update", "causal_conv1d_fn",
                     "torch_recurrent_gated_delta_rule"):  # fmt: skip
            patch.setattr(modeling, name, getattr(modeling, name))
        for name in adapter.use(modeling):
            ours = getattr(modeling, name)
            calls[name] = 0

            def counted(*args, _name=name, _ours=ours, **kwargs):  # type: ignore[no-untyped-def]
                calls[_name] += 1
                return _ours(*args, **kwargs)

            patch.setattr(modeling, name, counted)
        yield calls
