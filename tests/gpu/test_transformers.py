"""A real client: transformers' Mamba2, Bamba and Nemotron-H decode through ssmgen.

Each model is built from a small configuration with real head shapes and taught, in fp32, to recite
three random texts, so that its greedy tokens have margins well above bf16 rounding. It is then cast
to bf16 and decoded on transformers' own path and with ssmgen in the place of `mamba_ssm`.

SSMGEN_TEST_DEVICE=cpu runs the same tests through ssmgen's CPU reference.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ssmgen

transformers = pytest.importorskip("transformers", minversion="5.17")
hub = pytest.importorskip("transformers.integrations.hub_kernels")

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("SSMGEN_TEST_DEVICE", "cuda")
BATCH, PROMPT, STEPS, VOCAB, ALPHABET, HIDDEN = 3, 20, 64, 512, 16, 256
BF16_ROUNDING = 2.0**-8
OP = "mamba2_selective_state_update"


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family, the shape of its mamba layers and the keyword its cache goes by."""

    module: str
    name: str
    cache: str
    layers: int
    heads: int
    dim: int
    groups: int
    dstate: int
    config: dict[str, Any]

    @property
    def modeling(self) -> types.ModuleType:
        return importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")

    def build(self) -> Any:
        config = getattr(transformers, f"{self.name}Config")(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            **self.config,
        )
        return getattr(self.modeling, f"{self.name}ForCausalLM")(config)


FAMILIES = (
    Family(
        *("mamba2", "Mamba2", "cache_params", 3, 8, 64, 2, 128),
        dict(num_hidden_layers=3, num_heads=8, head_dim=64, n_groups=2, state_size=128,
             chunk_size=32, initializer_range=0.02),
    ),
    Family(
        *("bamba", "Bamba", "past_key_values", 2, 8, 64, 4, 64),
        dict(num_hidden_layers=3, attn_layer_indices=[1], intermediate_size=512,
             num_attention_heads=4, num_key_value_heads=2, mamba_n_heads=8, mamba_d_head=64,
             mamba_n_groups=4, mamba_d_state=64, mamba_chunk_size=32),
    ),
    Family(
        *("nemotron_h", "NemotronH", "past_key_values", 2, 16, 80, 8, 128),
        dict(layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"],
             intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
             mamba_num_heads=16, mamba_head_dim=80, n_groups=8, ssm_state_size=128, chunk_size=32),
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Taught:
    """A bf16 model on DEVICE and the texts (BATCH, PROMPT + STEPS + 1) that it recites."""

    family: Family
    model: Any
    texts: torch.Tensor


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.module)
def taught(request: pytest.FixtureRequest) -> Taught:
    torch.manual_seed(0)
    model = request.param.build()
    with torch.no_grad():
        for mixer in (module for module in model.modules() if hasattr(module, "A_log")):
            mixer.A_log.uniform_(1, 16).log_()
            dt = torch.empty_like(mixer.dt_bias).uniform_(-6.9, -2.3).exp()
            mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            mixer.D.normal_(1, 0.2)
    texts = torch.randint(1, ALPHABET + 1, (BATCH, PROMPT + STEPS + 1)).to(DEVICE) * 31
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(600):
        logits = model(texts[:, :-1], use_cache=False).logits[:, PROMPT - 1 :].float()
        loss = F.cross_entropy(logits.flatten(0, 1), texts[:, PROMPT:].flatten())
        if loss < 2e-3:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 2e-3
    return Taught(request.param, model.eval().requires_grad_(False).bfloat16(), texts)
