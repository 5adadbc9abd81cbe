"""A real client: transformers' Mamba2, Bamba and Nemotron-H decode through ssmgen.

Each model is built from a small configuration with real head shapes and taught, in fp32, to recite
three random texts, so that its greedy tokens have margins far above bf16 rounding. It is then cast
to bf16 and decoded on transformers' own path and with ssmgen in the place of `mamba_ssm`.

SSMGEN_TEST_DEVICE=cpu runs the same tests through ssmgen's CPU reference.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ssmgen

pytest.importorskip("transformers", minversion="5.17")

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("SSMGEN_TEST_DEVICE", "cuda")
BATCH, PROMPT, STEPS, VOCAB, ALPHABET, HIDDEN = 3, 20, 64, 512, 16, 256
BF16_ULP = 2.0**-7


@dataclasses.dataclass(frozen=True)
class Client:
    """A model class, the keyword its cache goes by, and the shape of its mamba layers."""

    module: str
    name: str
    cache: str
    mamba_layers: int
    heads: int
    groups: int
    dstate: int
    config: dict[str, Any]

    @property
    def modeling(self) -> types.ModuleType:
        return importlib.import_module(f"transformers.models.{self.module}")

    def build(self) -> torch.nn.Module:
        common = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "pad_token_id": 0,
                  "bos_token_id": None, "eos_token_id": None}
        config = getattr(importlib.import_module("transformers"), f"{self.name}Config")
        return getattr(self.modeling, f"{self.name}ForCausalLM")(config(**common, **self.config))
