"""Manifests: lists expand, mistakes are named, and those that ship serve the calls engines make."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmgen import KernelConfig, manifest
from ssmgen.errors import ConfigError, ConfigTypeError
from ssmgen.families.ssu.contract import layout
from ssmgen.manifest import Model, find, parse, read, shipped


def expand(**fields: Any) -> tuple[KernelConfig, ...]:
    return parse(json.dumps({"schema": 1, "configs": [], **fields}), "m.json").configs


def test_lists_expand_to_their_product_in_the_order_written() -> None:
    configs = expand(configs=[{"state_dtype": ["fp16", "fp32"], "pdl": [False, True], "dim": 80}])
    assert configs == tuple(
        KernelConfig(state_dtype=state, pdl=pdl, dim=80)
        for state, pdl in itertools.product(("fp16", "fp32"), (False, True))
    )


def test_configs_are_distinct_and_common_fields_give_way_to_the_entrys() -> None:
    entries = [{"dim": 64, "note": "why"}, {"dtype": ["bf16", "bfloat16"]}, {"dim": [64, 80]}]
    configs = expand(common={"dim": 80, "has_z": True}, configs=entries)
    assert configs == (KernelConfig(dim=64, has_z=True), KernelConfig(dim=80, has_z=True))


FACTS = {"layers": 2, "conv_width": 4, "d_state": 128, "nheads": 24, "head_dim": 64, "n_groups": 1}
MODEL = {"name": "m", "repositories": [], "facts": FACTS}
DELTA = {"layers": 2, "conv_width": 4, "num_k_heads": 16, "num_v_heads": 32,
         "head_k_dim": 128, "head_v_dim": 128}  # fmt: skip
KDA = {**MODEL, "facts": {"layers": 2, "conv_width": 4, "num_heads": 32, "head_dim": 128}}
GDN, CONV = {"family": "gdn"}, {"family": "conv1d"}


def delta(**changes: int | None) -> dict[str, Any]:
    """A model of gated delta nets, with other facts; None: without."""
    facts = {name: value for name, value in {**DELTA, **changes}.items() if value is not None}
    return {**MODEL, "facts": facts}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"configs": [{}, {"dim": 81}]}, "m.json: configs[1]: dim: 81 is not allowed; allowed: 8 "),
        ({"configs": [{"colour": 1}]}, "m.json: configs[0]: colour: not a field of this config"),
        ({"configs": [{"pdl": "yes"}]}, "configs[0]: pdl: 'yes' is not a bool"),
        ({"configs": [{"dim": []}]}, "configs[0]: dim: [] is empty"),
        ({"configs": [{"dim": [[64]]}]}, "configs[0]: dim: [64] is not an int"),
        ({"configs": [{"family": "ssm"}]}, "configs[0]: family: 'ssm' is not known; allowed: "),
        ({"configs": [{"note": 1}]}, "configs[0]: note: 1 is not allowed; allowed: a string"),
        ({"configs": ["x"]}, "m.json: configs[0]: 'x' is not allowed; allowed: an object"),
        ({"configs": []}, "m.json: configs: empty"),
        ({"configs": {}}, "m.json: configs: {} is not allowed; allowed: a list"),
        ({"common": [], "configs": [{}]}, "m.json: common: [] is not allowed"),
        ({"schema": 2}, "m.json: schema: 2 is not known; allowed: 1"),
        ({"schema": True}, "m.json: schema: True is not known; allowed: 1"),
        ({"archs": []}, "m.json: archs: not a field; allowed: schema, source"),
        ({"tensor_parallel": [0], "configs": [{}]}, "tensor_parallel[0]: 0 is not allowed"),
        ({"models": [{"name": "m"}], "configs": [{}]}, "models[0]: repositories: missing"),
        (
            {"models": [{**MODEL, "facts": {**FACTS, "nheads": "24"}}], "configs": [{}]},
            "models[0]: facts: nheads: '24' is not allowed; allowed: a positive integer",
        ),
        (
            {"models": [{**MODEL, "facts": {**FACTS, "dim": 64}}], "configs": [{}]},
            "models[0]: facts: dim: not a field; allowed: layers, conv_width, d_state, nheads",
        ),
        (
            {"models": [MODEL], "configs": [{"dim": 80}]},
            "m.json: m over 1 rank needs family=ssu, dim=64, dstate=128, tie_hdim=True; no config "
            "has these",
        ),
        (
            {"models": [MODEL], "tensor_parallel": [1, 16], "configs": [{}]},
            "m.json: m: 16 ranks do not divide 24 nheads",
        ),
        (
            {"models": [delta(num_v_heads=None)], "configs": [GDN, CONV]},
            "models[0]: facts: num_v_heads: missing; required: layers, conv_width, num_k_heads",
        ),
        (
            {"models": [delta(head_k_dim=64)], "configs": [GDN, CONV]},
            "m over 1 rank needs family=gdn, head_k_dim=64, head_v_dim=128, kda=False; no config",
        ),
        (
            {"models": [delta()], "configs": [{**GDN, "kda": True}, CONV]},
            "m over 1 rank needs family=gdn, head_k_dim=128, head_v_dim=128, kda=False; no config",
        ),
        (
            {"models": [KDA], "configs": [GDN, CONV]},
            "m over 1 rank needs family=gdn, head_k_dim=128, head_v_dim=128, kda=True; no config",
        ),
        (
            {"models": [delta()], "configs": [GDN, {**CONV, "width": 3}]},
            "m.json: m over 1 rank needs family=conv1d, width=4; no config has these",
        ),
        (
            {"models": [delta(num_v_heads=40)], "configs": [GDN, CONV]},
            "m.json: m: 16 num_k_heads do not divide 40 num_v_heads",
        ),
        (
            {"models": [delta()], "tensor_parallel": [32], "configs": [GDN, CONV]},
            "m.json: m: 32 ranks do not divide 16 num_k_heads",
        ),
        (
            {"models": [delta(num_v_heads=48)], "tensor_parallel": [3], "configs": [GDN, CONV]},
            "m.json: m: 3 ranks do not divide 16 num_k_heads",
        ),
        (
            {"models": [delta()], "tensor_parallel": [], "configs": [GDN, CONV]},
            "m.json: tensor_parallel: [] is empty; allowed: a size or several",
        ),
        (
            {"models": [delta(), delta()], "configs": [GDN, CONV]},
            "m.json: models: 'm' stands there 2 times",
        ),
        (
            {"models": [delta(layers=4, linear_layers=99)], "configs": [GDN, CONV]},
            "models[0]: facts: linear_layers: 99 of 4 layers",
        ),
        (
            {"models": [KDA], "tensor_parallel": [64], "configs": [{**GDN, "kda": True}, CONV]},
            "m.json: m: 64 ranks do not divide 32 num_heads",
        ),
    ],
)
def test_a_mistake_is_named_with_file_entry_field_value_and_what_is_allowed(
    fields: dict[str, Any], named: str
) -> None:
    with pytest.raises((ConfigError, ConfigTypeError)) as raised:
        expand(**fields)
    assert named in str(raised.value)


def test_an_impossible_combination_says_which_and_what_to_do() -> None:
    with pytest.raises(ConfigError) as raised:
        expand(configs=[{"state_dtype": ["fp16", "fp32"], "rounding": "stochastic"}])
    text = str(raised.value)
    assert "m.json: configs[0]: rounding: 'stochastic' is not allowed; allowed: nearest" in text
    assert "state_dtype='fp32'" in text
    assert "entries of its own" in text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "m.json: not JSON"),
        ('{"schema": 1, "configs": [{"dim": 64, "dim": 80}]}', "'dim' stands twice"),
        ("[]", "m.json: [] is not allowed; allowed: an object"),
        ('{"configs": [{}]}', "m.json: schema: missing"),
        ("[" * 100_000, "m.json: not JSON"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, named: str) -> None:
    with pytest.raises((ConfigError, ConfigTypeError)) as raised:
        parse(text, "m.json")
    assert named in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: No such file"):
        read(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.json: not UTF-8"):
        read(tmp_path / "binary.json")


@pytest.mark.parametrize(
    ("groups", "per_rank"), [(1, [1, 1, 1, 1]), (2, [2, 1, 1, 1]), (8, [8, 4, 2, 1])]
)
def test_groups_are_dealt_out_and_replicated_where_they_do_not_divide(
    groups: int, per_rank: list[int]
) -> None:
    model = Model("m", (), {**FACTS, "n_groups": groups})
    ranks = [model.rank(size) for size in (1, 2, 4, 8)]
    assert [rank["n_groups"] for rank in ranks] == per_rank
    assert [rank["nheads"] for rank in ranks] == [24, 12, 6, 3]


@pytest.mark.parametrize(("key", "value"), [(16, 16), (16, 32), (16, 48), (8, 64)])
def test_key_heads_are_dealt_out_with_the_value_heads_that_they_serve(key: int, value: int) -> None:
    model = Model("m", (), {**DELTA, "num_k_heads": key, "num_v_heads": value})
    for size in (1, 2, 4, 8):
        assert model.rank(size) == {"num_k_heads": key // size, "num_v_heads": value // size}
        assert model.needs(size) == model.needs(1)


# ---- what ships -----------------------------------------------------------------------------


MODELS = [(m, model) for m in shipped() for model in m.models]
REAL = {
    *("mamba2-130m", "mamba2-370m", "mamba2-780m", "mamba2-1.3b", "mamba2-2.7b"),
    *("codestral-mamba-7b", "granite-4.0-h-tiny", "granite-4.0-h-small", "bamba-9b"),
    *("nemotron-h-8b", "nemotron-h-47b", "nemotron-h-56b", "nemotron-3-nano", "nemotron-3-super"),
    *("nemotron-nano-9b-v2", "nemotron-nano-12b-v2", "falcon-h1-0.5b", "falcon-h1-34b"),
    *("falcon-mamba-7b", "jamba-mini"),
    *("qwen3-next-80b-a3b", "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b", "qwen3.5-397b-a17b"),
    "kimi-linear-48b-a3b",
}
MAMBA = [(m, model) for m, model in MODELS if "d_state" in model.facts]
OF_MAMBA = [m for m in shipped() if any("d_state" in model.facts for model in m.models)]


def test_every_model_is_found_by_its_name_and_its_repository_in_any_case() -> None:
    for m, model in MODELS:
        for name in (model.name, model.name.upper(), *model.repositories):
            assert find(name) is m
            assert find(name.rpartition("/")[2]) is m
    assert {model.name for _, model in MODELS} >= REAL


def test_an_unknown_model_lists_those_that_are_known_and_close() -> None:
    with pytest.raises(ConfigError) as raised:
        find("Nemotron-H-9B")
    text = str(raised.value)
    assert "close: nemotron-h-8b" in text
    assert all(model.name in text for _, model in MODELS)


@pytest.mark.parametrize("m", shipped(), ids=lambda m: Path(m.origin).stem)
def test_a_shipped_manifest_cites_its_source_and_serves_up_to_eight_ranks(m) -> None:
    assert len(m.source) > 40
    assert m.models
    assert m.tensor_parallel == (1, 2, 4, 8)


@pytest.mark.parametrize("m", OF_MAMBA, ids=lambda m: Path(m.origin).stem)
def test_a_manifest_of_mamba_has_every_state(m) -> None:
    states = {(c.state_dtype, c.rounding) for c in m.configs}
    assert len(states) == 11
    for pdl, dst in itertools.product((False, True), repeat=2):
        some = {(c.state_dtype, c.rounding) for c in m.configs if (c.pdl, c.has_dst) == (pdl, dst)}
        assert some == states
    assert all(config.weight_dtype != "fp16" for config in m.configs)


STATES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int16": torch.int16,
    "int8": torch.int8,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
BATCH = 3


def stored(state: str, *shape: int) -> dict[str, torch.Tensor]:
    """A pool of slots in `state`, with scales if it has them, between the slots of a conv state."""
    width = STATES[state].itemsize
    pitch = int(torch.tensor(shape[1:]).prod()) * width + 4096
    memory = torch.zeros(shape[0] * pitch, dtype=torch.uint8).view(STATES[state])
    inner = torch.empty(shape[1:]).stride()
    found = {"state": memory.as_strided(shape, (pitch // width, *inner))}
    if state in ("int16", "int8", "fp8_e4m3fn"):
        found["state_scale"] = torch.ones(shape[:-1])
    return found


def mamba2_call(model: Model, size: int, state: str, weights: torch.dtype) -> dict[str, Any]:
    """What vLLM's and SGLang's Mamba2 mixer pass: views of one projection, values expanded."""
    facts, part = model.facts, model.rank(size)
    heads, groups = part["nheads"], part["n_groups"]
    dim, dstate = facts["head_dim"], facts["d_state"]
    bf16 = torch.bfloat16
    sizes = [heads * dim, groups * dstate, groups * dstate]
    x, b, c = torch.zeros(BATCH, sum(sizes), dtype=bf16).split(sizes, dim=-1)
    out = torch.empty(BATCH, heads * dim, dtype=bf16)
    return {
        **stored(state, 8, heads, dim, dstate),
        "x": x.view(BATCH, heads, dim),
        "dt": torch.zeros(BATCH, heads, dtype=bf16)[:, :, None].expand(-1, -1, dim),
        "A": torch.zeros(heads)[:, None, None].expand(-1, dim, dstate),
        "B": b.view(BATCH, groups, dstate),
        "C": c.view(BATCH, groups, dstate),
        "D": torch.zeros(heads, dtype=weights)[:, None].expand(-1, dim),
        "dt_bias": torch.zeros(heads, dtype=weights)[:, None].expand(-1, dim),
        "out": out.view(BATCH, heads, dim),
        "dt_softplus": True,
    }


def mamba1_call(model: Model, size: int, state: str, weights: torch.dtype) -> dict[str, Any]:
    """What vLLM's Mamba1 mixer passes: headless, gated, B and C out of one projection with dt."""
    dim, dstate, rank = model.rank(size)["dim"], model.facts["d_state"], 256
    bf16 = torch.bfloat16
    _, b, c = torch.zeros(BATCH, rank + 2 * dstate, dtype=bf16).split([rank, dstate, dstate], -1)
    return {
        **stored(state, 8, dim, dstate),
        "x": torch.zeros(BATCH, dim, dtype=bf16),
        "dt": torch.zeros(BATCH, dim, dtype=bf16),
        "A": torch.zeros(dim, dstate),
        "B": b,
        "C": c,
        "D": torch.zeros(dim, dtype=weights),
        "z": torch.zeros(BATCH, 2 * dim, dtype=bf16)[:, dim:],
        "dt_bias": torch.zeros(dim, dtype=weights),
        "out": torch.empty(BATCH, dim, dtype=bf16),
        "dt_softplus": True,
    }


@pytest.mark.parametrize(("m", "model"), MAMBA, ids=lambda value: getattr(value, "name", ""))
@pytest.mark.parametrize("size", [1, 8])
def test_the_calls_of_engines_find_their_configs(m: manifest.Manifest, model: Model, size) -> None:
    configs = set(m.configs)
    call = mamba2_call if "nheads" in model.facts else mamba1_call
    slots = torch.arange(BATCH, dtype=torch.int32)
    seed = torch.tensor([1])
    for state in STATES:
        for weights in (torch.bfloat16, torch.float32):
            arguments = call(model, size, state, weights)
            sglang = {**arguments, "state_batch_indices": slots}
            vllm = {**sglang, "dst_state_batch_indices": slots}
            calls = [sglang, vllm]
            if weights == torch.bfloat16 or call is mamba1_call:
                calls += [{**sglang, "pdl": weights == torch.float32 or call is mamba2_call}]
            if state in ("fp32", "bf16") and weights == torch.bfloat16:
                calls.append(arguments)  # transformers
            if state != "fp32":
                calls += [{**some, "rand_seed": seed} for some in (sglang, vllm)]
            for some in calls:
                assert layout(**some).config in configs, some.keys()


def test_falcon_h1_of_transformers_passes_its_gate() -> None:
    m = find("falcon-h1-7b")
    arguments = mamba2_call(m.models[1], 1, "bf16", torch.bfloat16)
    assert layout(**arguments, z=torch.zeros_like(arguments["x"])).config in m.configs


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_tensor_parallelism_changes_no_config(size: int) -> None:
    for name, call in (("nemotron-h-8b", mamba2_call), ("falcon-mamba-7b", mamba1_call)):
        model = next(x for _, x in MODELS if x.name == name)
        found = layout(**call(model, size, "fp32", torch.float32)).config
        assert found == layout(**call(model, 1, "fp32", torch.float32)).config
        (wanted,) = model.needs(size)
        assert (found.dim, found.dstate) == (wanted["dim"], wanted["dstate"])


@pytest.mark.parametrize("dim", [8, 24, 64, 96, 1000, 8192])
def test_a_headless_state_is_cut_as_the_contract_cuts_it(dim: int) -> None:
    model = Model("m", (), {"layers": 1, "conv_width": 4, "d_state": 16, "dim": dim})
    config = layout(**mamba1_call(model, 1, "fp32", torch.float32)).config
    (wanted,) = model.needs(1)
    assert wanted.items() <= config.fields().items()
