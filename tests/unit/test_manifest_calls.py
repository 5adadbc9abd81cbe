"""Manifests of gated delta nets and of KDA hold what callers ask for, and nothing else.

The calls are made, on a CPU: by the adapters, by layers that read a `DecodeMetadata`, and by
transformers. What is compared is the config that each asks for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

import ssmgen
from ssmgen import KernelConfig
from ssmgen.adapters import fla, flashinfer, vllm
from ssmgen.adapters import transformers as adapter
from ssmgen.bench.grid import gdn_config
from ssmgen.manifest import Model, find, shipped
from ssmgen.ops import conv1d, gdn
from ssmgen.ops.gdn import split_qkv

MANIFESTS = [m for m in shipped() if "conv1d" in {c.family for c in m.configs}]
FP32, BF16 = torch.float32, torch.bfloat16
# State dtype, and whether it is rounded stochastically.
STATES = ((FP32, False), (BF16, False), (BF16, True))
ROWS, DRAFTS, WIDTH = 3, (1, 2, 3), 4
zeros = torch.zeros


@dataclass
class Layer:
    """The tensors of a layer on one of `size` ranks of a model."""

    model: Model
    size: int

    def __post_init__(self) -> None:
        facts = {**self.model.facts, **self.model.rank(self.size)}
        self.kda = "num_heads" in facts
        if self.kda:
            self.H = self.HV = facts["num_heads"]
            self.K = self.V = facts["head_dim"]
        else:
            self.H, self.HV = facts["num_k_heads"], facts["num_v_heads"]
            self.K, self.V = facts["head_k_dim"], facts["head_v_dim"]
        self.channels = 2 * self.H * self.K + self.HV * self.V
        # vLLM keeps those of KDA in fp32, and the weight of the convolution.
        self.dt_bias = FP32 if self.kda else BF16
        self.weights = (BF16, FP32) if self.kda else (BF16,)

    def weight(self, dtype: torch.dtype = BF16) -> torch.Tensor:
        return zeros(self.channels, WIDTH, dtype=dtype)

    def windows(self, drafts: int, packed: bool) -> torch.Tensor:
        """A pool of windows with the channels, or the columns, side by side."""
        length = WIDTH - 1 + drafts
        if packed:
            return zeros(8, length, self.channels, dtype=BF16).transpose(1, 2)
        return zeros(8, self.channels, length, dtype=BF16)

    def state(self, dtype: torch.dtype = FP32) -> torch.Tensor:
        return zeros(8, self.HV, self.V, self.K, dtype=dtype)

    def projected(self, *lead: int) -> torch.Tensor:
        """q | k | v beside z, which the layer splits off."""
        return zeros(*lead, self.channels + self.HV * self.V, dtype=BF16)[..., : self.channels]

    def qkv(self, *lead: int) -> dict[str, torch.Tensor]:
        packed = zeros(*lead, self.channels, dtype=BF16)
        return dict(zip("qkv", split_qkv(packed, self.H, self.HV, self.K, self.V)))

    def gates(self, *lead: int, dt_bias: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        own = (self.HV, self.K) if self.kda else (self.HV,)
        return {
            "A_log": zeros(self.HV),
            "a": zeros(*lead, *own, dtype=BF16),
            "dt_bias": zeros(own, dtype=dt_bias or self.dt_bias),
            "b": zeros(*lead, self.HV, dtype=BF16),
        }

    def in_groups(self, *lead: int) -> dict[str, torch.Tensor]:
        """The gates as views of a projection with b and a of each key head."""
        ratio = self.HV // self.H
        b, a = zeros(*lead, self.H, 2 * ratio, dtype=BF16).split(ratio, dim=-1)
        return {**self.gates(*lead), "a": a, "b": b}


def table(*shape: int) -> torch.Tensor:
    return zeros(*shape, dtype=torch.int32)


def seeded(stochastic: bool) -> dict[str, Any]:
    return {"rand_seed": torch.tensor([1])} if stochastic else {}


def partitions(layer: Layer, drafts: int, packed: bool, state: torch.dtype) -> Any:
    """A pool, and the rows of a step: one without drafts, one with, and a prompt that begins."""
    spec = ssmgen.LayerSpec(
        state=(layer.HV, layer.V, layer.K), state_dtype=state, conv_dtype=BF16,
        conv=(layer.channels, WIDTH - 1 + drafts), conv_transposed=packed,
    )  # fmt: skip
    pool = ssmgen.StatePool([spec], 16)
    meta = ssmgen.DecodeMetadata(pool, max_rows=4, max_tokens=16, drafts=drafts)
    tokens, chunk = [1, 1 + drafts, 5], [False, False, True]
    if not drafts:
        tokens, chunk = tokens[1:], chunk[1:]
    slots = [pool.alloc(1 + drafts) for _ in tokens]
    return pool, meta.build(slots, tokens, prefill=chunk, first=chunk)


def metadata(layer: Layer) -> None:
    """Layers that read a `DecodeMetadata`, as docs/speculative-state.md has them. What drafts has
    no states of KDA in fewer than 32 bits."""
    for (state, stochastic), drafts in itertools.product(STATES, (0, *DRAFTS)):
        pool, meta = partitions(layer, drafts, True, state)
        for part, pdl in ((meta.plain, False), (meta.plain, True), (meta.verify, False)):
            if not part or (pdl and stochastic) or (layer.kda and drafts and state != FP32):
                continue
            lead = (part.ntokens,)
            ssmgen.gated_delta_rule_decode(
                pool.state(0), **layer.qkv(*lead), **layer.gates(*lead), **part.recurrent,
                **seeded(stochastic), pdl=pdl,
            )  # fmt: skip
    for drafts, packed in itertools.product((0, *DRAFTS), (True, False)):
        pool, meta = partitions(layer, drafts, packed, FP32)
        given = {"weight": layer.weight(), "activation": "silu"}
        for part in filter(None, (meta.plain, meta.verify, meta.prefill)):
            x, conv = layer.projected(part.ntokens), {**given, **part.conv(pool.conv(0))}
            if part is meta.prefill:
                ssmgen.causal_conv1d_fn(x.T, **conv)
                continue
            ssmgen.causal_conv1d_update(x, **conv)
            if packed and part is meta.plain:
                ssmgen.causal_conv1d_update(x, **conv, pdl=True)


def plain_engines(layer: Layer) -> None:
    """vLLM and SGLang without drafts: the convolution, and what is ahead of prompts."""
    for weight, packed in itertools.product(layer.weights, (True, False)):
        given = (layer.weight(weight), None)
        for pdl in (False, True) if packed else (False,):
            ssmgen.causal_conv1d_update(
                layer.projected(ROWS), layer.windows(0, packed), *given, "silu", table(ROWS),
                pdl=pdl,
            )  # fmt: skip
        ssmgen.causal_conv1d_fn(
            layer.projected(9).T, *given, layer.windows(0, packed), table(ROWS + 1), table(ROWS),
            zeros(ROWS, dtype=torch.bool), "silu",
        )  # fmt: skip


def same_drafts(layer: Layer) -> None:
    """Rows that all have as many drafts, without a table of sequences."""
    for drafts, packed in itertools.product(DRAFTS, (True, False)):
        ssmgen.causal_conv1d_update(
            layer.projected(ROWS, 1 + drafts).transpose(1, 2), layer.windows(drafts, packed),
            layer.weight(), None, "silu", table(ROWS), table(ROWS), alignment="left",
        )  # fmt: skip
    for drafts in () if layer.kda else DRAFTS:
        lead = (ROWS, 1 + drafts)
        ssmgen.gated_delta_rule_decode(
            layer.state(), **layer.qkv(*lead), **layer.gates(*lead),
            state_batch_indices=table(*lead), dst_state_batch_indices=table(*lead),
            num_accepted_tokens=table(ROWS),
        )  # fmt: skip


def packed_decode(layer: Layer) -> None:
    """vLLM's function of one token."""
    gates = layer.gates(ROWS)
    out = zeros(ROWS, 1, layer.HV, layer.V, dtype=BF16)
    for state, pdl, drafts in itertools.product((FP32, BF16), (False, True), (False, True)):
        if pdl and drafts:
            continue
        vllm.fused_recurrent_gated_delta_rule_packed_decode(
            layer.projected(ROWS), gates["a"], gates["b"], gates["A_log"], gates["dt_bias"], 0.1,
            layer.state(state), out, table(ROWS, 4) if drafts else table(ROWS), True,
            num_accepted_tokens=table(ROWS) if drafts else None, pdl=pdl,
        )  # fmt: skip


def of_flashinfer(layer: Layer) -> None:
    """FlashInfer's functions as SGLang has them: one token, and drafts into a buffer."""
    one = {**layer.qkv(ROWS, 1), **layer.gates(ROWS, 1)}
    decode = functools.partial(
        flashinfer.gated_delta_rule_decode_pretranspose, state=None,
        initial_state_indices=table(ROWS),
    )  # fmt: skip
    for state in (FP32, BF16):
        decode(**one, initial_state=layer.state(state))
        decode(**one, initial_state=layer.state(state), output_state_indices=table(ROWS))
    decode(**{**one, **layer.gates(ROWS, 1, dt_bias=FP32)}, initial_state=layer.state())
    for drafts in DRAFTS:
        lead = (ROWS, 1 + drafts)
        flashinfer.gated_delta_rule_mtp(
            **layer.qkv(*lead), **layer.gates(*lead), initial_state=layer.state(),
            initial_state_indices=table(ROWS),
            intermediate_states_buffer=zeros(*lead, layer.HV, layer.V, layer.K),
        )  # fmt: skip


def stochastic_engines(layer: Layer) -> None:
    """Of one token a row, on a pool that is rounded stochastically: in place, and where others
    have drafts."""
    given = {**layer.qkv(ROWS), **layer.gates(ROWS), **seeded(True)}
    state = layer.state(BF16)
    ssmgen.gated_delta_rule_decode(state, **given, state_batch_indices=table(ROWS))
    if not layer.kda:
        ssmgen.gated_delta_rule_decode(
            state, **given, state_batch_indices=table(ROWS, 2), num_accepted_tokens=table(ROWS),
            dst_state_batch_indices=table(ROWS),
        )  # fmt: skip


def interleaved(layer: Layer) -> None:
    """Engines that hand on views of an interleaved projection."""
    if "qwen3-next" not in layer.model.name:
        return
    slots = {"state_batch_indices": table(ROWS)}
    width = 2 * layer.K + 2 * layer.HV // layer.H * layer.V
    packed = zeros(ROWS, layer.H * width, dtype=BF16)
    views = split_qkv(packed, layer.H, layer.HV, layer.K, layer.V, "interleaved")
    ssmgen.gated_delta_rule_decode(layer.state(), *views, **layer.gates(ROWS), **slots)
    for drafts in (0, *DRAFTS):
        pool, meta = partitions(layer, drafts, True, FP32)
        for part in filter(None, (meta.plain, meta.verify)):
            lead = (part.ntokens,)
            ssmgen.gated_delta_rule_decode(
                pool.state(0), **layer.qkv(*lead), **layer.in_groups(*lead), **part.recurrent
            )


def of_kda(layer: Layer) -> None:
    """KDA in vLLM, whose gates are ready; with a gate in the kernel, on slots in place."""
    ready = {"g": zeros(ROWS, layer.HV, layer.K), "beta": zeros(ROWS, layer.HV)}
    slots = {"state_batch_indices": table(ROWS)}
    decode = ssmgen.gated_delta_rule_decode
    qkv = layer.qkv(ROWS)
    decode(layer.state(), **qkv, **ready, **slots)
    decode(layer.state(), **qkv, **ready, **slots, dst_state_batch_indices=table(ROWS))
    for state, pdl in itertools.product((FP32, BF16), (False, True)):
        decode(layer.state(state), **qkv, **layer.gates(ROWS), **slots, pdl=pdl)
    decode(
        layer.state(), **qkv, **layer.gates(ROWS), state_batch_indices=table(ROWS, 2),
        num_accepted_tokens=table(ROWS), dst_state_batch_indices=table(ROWS),
    )  # fmt: skip


def of_transformers(layer: Layer) -> None:
    """A small model of the kind with the heads of this one, its functions replaced by ours; a
    prompt of a few tokens, which leaves x unaligned, and one of more."""
    name = next(n for n in NETWORKS if layer.model.name.startswith(n))
    kind, modeling = NETWORKS[name]
    fields: dict[str, Any] = {
        "linear_key_head_dim": layer.K, "linear_value_head_dim": layer.V,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2 * layer.HV // layer.H,
    }  # fmt: skip
    if layer.kda:
        fields = {"linear_head_dim": layer.K, "linear_num_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=None,
        layer_types=["linear_attention", "full_attention"], **fields, **DENSE[name],
    )  # fmt: skip
    network = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    network = network.eval().to(BF16)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(modeling, "recurrent_kimi_delta_attention", fla.fused_recurrent_kda,
                      raising=False)  # fmt: skip
        for function in ("causal_conv1d_update", "causal_conv1d_fn",
                         "torch_recurrent_gated_delta_rule"):  # fmt: skip
            patch.setattr(modeling, function, getattr(modeling, function, None), raising=False)
        adapter.use(modeling)
        for prompt in (2, 7):
            cache = network(zeros(2, prompt, dtype=torch.long), use_cache=True).past_key_values
            network(zeros(2, 1, dtype=torch.long), past_key_values=cache, use_cache=True)


NETWORKS = {
    "qwen3-next": ("Qwen3Next", modeling_qwen3_next),
    "qwen3.5": ("Qwen3_5Text", modeling_qwen3_5),
    "kimi-linear": ("KimiLinear", modeling_kimi_linear),
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
DENSE: dict[str, dict[str, Any]] = {
    "qwen3-next": {"head_dim": 16, "mlp_only_layers": [0, 1], "num_experts": 4, **EXPERTS},
    "qwen3.5": {"head_dim": 16},
    "kimi-linear": {"mlp_layer_types": ["dense", "dense"]},
}
CALLERS: tuple[Callable[[Layer], None], ...] = (
    metadata, plain_engines, same_drafts, stochastic_engines, interleaved, of_transformers,
)  # fmt: skip
OF_DELTA_NETS = (packed_decode, of_flashinfer)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[KernelConfig]:
    """The configs that ops are asked for; the ops compute nothing."""
    found: set[KernelConfig] = set()

    def watched(layout: Any, **arguments: Any) -> Any:
        described = layout(**arguments)
        found.add(described.config)
        return described

    for operation in (gdn.operation, conv1d.update, conv1d.prefill):
        monkeypatch.setattr(operation, "layout", functools.partial(watched, operation.layout))
        monkeypatch.setattr(operation, "reference", lambda arguments, described: None)
    return found


def shown(configs: set[KernelConfig]) -> list[dict[str, Any]]:
    """Each config by what it has other than its defaults."""
    rows = []
    for config in configs:
        usual = type(config)().fields()
        rows.append({n: v for n, v in config.fields().items() if v != usual[n] or n == "family"})
    return rows


@pytest.mark.parametrize("m", MANIFESTS, ids=lambda m: Path(m.origin).stem)
def test_a_manifest_holds_what_callers_ask_for_and_nothing_else(m, asked) -> None:
    for model, size in itertools.product(m.models, (1, 8)):
        layer = Layer(model, size)
        for caller in (*CALLERS, *((of_kda,) if layer.kda else OF_DELTA_NETS)):
            before = set(asked)
            caller(layer)
            missing = set(asked) - before - set(m.configs)
            assert not missing, (model.name, caller.__name__, shown(missing))
    assert not shown(set(m.configs) - set(asked))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen3-next-80b-a3b", "Qwen3Next"),
        ("qwen3.5-9b", "Qwen3_5Text"),
        ("qwen3.5-35b-a3b", "Qwen3_5MoeText"),
        ("kimi-linear-48b-a3b", "KimiLinear"),
    ],
)
def test_the_facts_are_those_of_transformers(name: str, kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")()
    (model,) = (x for x in find(name).models if x.name == name)
    theirs = {"layers": "num_hidden_layers", "conv_width": "linear_conv_kernel_dim",
              "num_k_heads": "linear_num_key_heads", "num_v_heads": "linear_num_value_heads",
              "head_k_dim": "linear_key_head_dim", "head_v_dim": "linear_value_head_dim",
              "num_heads": "linear_num_heads", "head_dim": "linear_head_dim"}  # fmt: skip
    wanted = {fact: getattr(config, theirs[fact]) for fact in model.facts.keys() & theirs.keys()}
    if "linear_layers" in model.facts:
        wanted["linear_layers"] = config.layer_types.count("linear_attention")
    assert model.facts == wanted


def test_a_step_that_is_benched_is_among_the_configs() -> None:
    for name in ("qwen3-next-80b-a3b", "qwen3.5-27b"):
        for tokens in (1, 2, 3, 4):
            config = gdn_config("fp32", tokens, index_dtype="int32", dt_bias_dtype="bf16")
            assert config in find(name).configs


def test_a_manifest_is_no_more_than_160_kernels_on_an_architecture() -> None:
    from ssmgen import Arch
    from ssmgen.prewarm import expand

    for m in MANIFESTS:
        for arch in ("sm_80", "sm_90", "sm_100", "sm_120"):
            assert len(list(expand([(c, Arch.of(arch)) for c in m.configs]))) <= 160
