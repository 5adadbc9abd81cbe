"""Dispatch: which plans serve a config, and that every plan covers it."""

from __future__ import annotations

import functools
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from dispatch_tables import GPU, put
from hypothesis import given, settings
from hypothesis import strategies as st
from ssu_configs import SCALED, SIZES, STATES, configs

from ssmgen import Arch, KernelConfig, Plan, tables
from ssmgen.arch import KNOWN
from ssmgen.errors import ConfigError
from ssmgen.families import spec
from ssmgen.families.ssu.config import ITEMSIZE
from ssmgen.plan import dispatch, variants
from ssmgen.template import render

ROOT = Path(__file__).parents[2]
SSU = spec("ssu")
ALGORITHMS = ("simple", "vertical", "horizontal")
SM_90 = Arch.of("sm_90")

archs = st.sampled_from(KNOWN).map(Arch.of)


def tile(algorithm, **fields):
    return {"algorithm": algorithm, "block_m": 16, "block_n": 128, "num_warps": 2, **fields}


@pytest.fixture
def table(monkeypatch, tmp_path):
    """`table(rows, ...)` writes a table of the test's own, for fp16 states rounded to nearest on
    sm_90 unless it says otherwise."""
    monkeypatch.setenv("SSMGEN_TUNED_PATH", str(tmp_path))
    return functools.partial(put, tmp_path)


THREE = [
    {"up_to_heads": 64, "plan": tile("simple", block_m=4)},
    {"up_to_heads": 1024, "plan": tile("vertical", num_stages=2)},
    {"plan": tile("simple", block_m=32)},
]


# What a plan must cover


def assert_covers(config, arch, found):
    """The plan's programs touch every element of a head once, and the arch can run them."""
    dim, dstate = config.dim, config.dstate
    programs, batch, one = SSU.grid(config, found, 5, 3)
    assert (batch, one) == (5, 1)
    if found.algorithm == "horizontal":
        assert programs == 3
        assert found.block_m >= dim
        assert dstate % found.block_n == 0
        assert found.split == 1
    else:
        assert found.block_n >= dstate
        per_program = dim * 3 // programs
        assert programs * per_program == dim * 3
        assert per_program % found.block_m == 0
        if found.algorithm in ("simple", "matrix"):
            assert per_program == found.block_m
            assert found.num_stages == found.split == 1
        else:
            assert programs == 3 * found.split
    # Random bits come in octets of a row.
    assert found.block_n % 8 == 0
    assert 1 <= found.num_warps <= 32
    in_flight = found.num_stages * found.block_m * found.block_n * ITEMSIZE[config.state_dtype]
    assert found.num_stages == 1 or in_flight <= arch.shared_memory
    context = SSU.context(config, found, arch)
    assert context["mask_rows"] or dim % found.block_m == 0
    assert context["mask_cols"] or dstate % found.block_n == 0


@settings(max_examples=400)
@given(configs(), archs)
def test_every_plan_of_every_config_covers_it(config, arch):
    choices = dispatch(config, arch)
    limits = [choice.limit for choice in choices]
    assert limits[-1] is None
    assert all(low < high for low, high in itertools.pairwise(limits[:-1]))
    for choice in choices:
        assert_covers(config, arch, choice.plan)
        assert config.algorithm in ("auto", choice.plan.algorithm)


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 160, 192, 504, 512])
@pytest.mark.parametrize("dstate", [16, 64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_fits_odd_sizes_wherever_it_is_legal(dim, dstate, algorithm):
    for state in STATES:
        if algorithm == "horizontal" and state in SCALED:
            continue
        config = KernelConfig(state_dtype=state, dim=dim, dstate=dstate, algorithm=algorithm)
        for name in KNOWN:
            (choice, *_) = dispatch(config, Arch.of(name))
            assert_covers(config, Arch.of(name), choice.plan)


powers = st.sampled_from([1, 2, 4, 8, 16])


@given(
    config=configs(),
    arch=archs,
    algorithm=st.sampled_from(ALGORITHMS),
    block_m=powers,
    num_warps=powers,
    num_stages=st.integers(1, 6),
    split=powers,
)
def test_fit_makes_any_plan_cover_any_config(config, arch, algorithm, **fields):
    wanted = Plan(algorithm=algorithm, block_n=128, **fields)
    scaled = algorithm == "horizontal" and config.state_dtype in SCALED
    if scaled or (config.many and algorithm != "simple"):
        with pytest.raises(ConfigError, match=algorithm):
            SSU.fit(config, wanted, arch)
        return
    found = SSU.fit(config, wanted, arch)
    assert_covers(config, arch, found)
    assert SSU.fit(config, found, arch).algorithm == algorithm


# Buckets


def test_buckets_rise_and_the_last_has_no_limit(table):
    table(THREE)
    choices = dispatch(KernelConfig(state_dtype="fp16"), SM_90, GPU)
    assert [c.limit for c in choices] == [64, 1024, None]
    assert [c.plan.algorithm for c in choices] == ["simple", "vertical", "simple"]
    assert [c.plan.block_m for c in choices] == [4, 16, 32]


@pytest.mark.parametrize("dim", SIZES[::9])
def test_limits_count_work_not_heads(table, dim):
    table(THREE)
    config = KernelConfig(state_dtype="fp16", dim=dim, dstate=64)
    limits = [c.limit for c in dispatch(config, SM_90, GPU)]
    assert limits == [64 * 64 * 128 // (dim * 64), 1024 * 64 * 128 // (dim * 64), None]


def test_buckets_that_fit_to_one_plan_are_one(table):
    table([{"up_to_heads": 8, "plan": tile("simple", block_m=32)}, *THREE[2:]])
    (choice,) = dispatch(KernelConfig(state_dtype="fp16"), SM_90, GPU)
    assert choice.limit is None


def test_a_forced_algorithm_takes_its_rows_of_the_table(table):
    table(THREE)
    simple = dispatch(KernelConfig(state_dtype="fp16", algorithm="simple"), SM_90, GPU)
    assert [(c.limit, c.plan.block_m) for c in simple] == [(64, 4), (None, 32)]
    (vertical,) = dispatch(KernelConfig(state_dtype="fp16", algorithm="vertical"), SM_90, GPU)
    assert (vertical.limit, vertical.plan.num_stages) == (None, 2)
    assert "forced" in vertical.why


def test_a_forced_algorithm_without_rows_takes_the_cost_model(table):
    table(THREE)
    config = KernelConfig(state_dtype="fp16", algorithm="horizontal")
    choices = dispatch(config, SM_90, GPU)
    assert {c.plan.algorithm for c in choices} == {"horizontal"}
    assert choices[0].why == "forced, tile from cost model"


def test_the_table_may_differ_with_pdl(table):
    table(THREE[2:])
    table([{"plan": tile("simple", block_m=4)}], key="fp16.nearest.pdl")
    plain = KernelConfig(state_dtype="fp16")
    assert dispatch(plain, SM_90, GPU)[-1].plan.block_m == 32
    assert dispatch(plain.replace(pdl=True), SM_90, GPU)[-1].plan.block_m == 4


@pytest.mark.parametrize("by", ["field", "variable"])
@pytest.mark.parametrize("gpu", [GPU, None])
def test_batch_invariant_is_exactly_one_plan(table, monkeypatch, by, gpu):
    table(THREE)
    if by == "variable":
        monkeypatch.setenv("SSMGEN_BATCH_INVARIANT", "1")
    for algorithm, arch in itertools.product(("auto", *ALGORITHMS), ("sm_80", "sm_90")):
        config = KernelConfig(state_dtype="fp16", algorithm=algorithm)
        if by == "field":
            config = config.replace(batch_invariant=True)
        (choice,) = dispatch(config, Arch.of(arch), gpu)
        assert choice.limit is None
        assert "batch-invariant" in choice.why


def test_batch_invariant_is_the_plan_of_the_largest_sizes(table):
    table(THREE)
    for arch in ("sm_80", "sm_90"):
        config = KernelConfig(state_dtype="fp16")
        usual = dispatch(config, Arch.of(arch), GPU)
        (only,) = dispatch(config.replace(batch_invariant=True), Arch.of(arch), GPU)
        assert only.plan == usual[-1].plan


# Where a table is looked for


def rows_of(block_m):
    return [{"plan": tile("simple", block_m=block_m)}]


def chosen(gpu=None, arch="sm_90", **fields):
    return dispatch(KernelConfig(state_dtype="fp16", **fields), Arch.of(arch), gpu)[-1]


def test_this_very_gpu_then_the_arch_then_the_cost_model(table):
    table(rows_of(1), gpu="NVIDIA A", arch="sm_80")
    table(rows_of(2), gpu="NVIDIA B", arch="sm_80")
    assert chosen("NVIDIA A", "sm_80").plan.block_m == 1
    assert chosen("NVIDIA B", "sm_80").plan.block_m == 2
    for stranger in (None, "NVIDIA C"):
        assert chosen(stranger, "sm_80").plan.block_m == 1  # the first by name
    assert chosen("NVIDIA A", "sm_86").why == "cost model"


def test_a_gpu_is_found_however_its_name_is_spelled(table):
    table(rows_of(1), gpu="NVIDIA H100 80GB HBM3")
    assert chosen("nvidia h100-80gb HBM3").plan.block_m == 1
    assert tables.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_users_table_comes_before_the_one_that_ships(table):
    shipped = chosen("NVIDIA H200", dim=128)
    assert shipped.why == "table sm_90/nvidia-h200/fp16.nearest"
    path = table(rows_of(1), gpu="NVIDIA H200", key="128x128.fp16.nearest")
    tables._table.cache_clear()  # tables are read once a process
    assert chosen("NVIDIA H200", dim=128).why == f"table {path}"
    table(rows_of(1), gpu="NVIDIA H200", key="fp16.nearest")
    tables._table.cache_clear()
    assert chosen("NVIDIA H200").plan.block_m == 1
    assert chosen(None).plan.block_m == 1
    # It was measured without PDL, and the one that ships with it.
    assert chosen("NVIDIA H200", pdl=True).why == "table sm_90/nvidia-h200/fp16.nearest.pdl"


def test_a_users_table_of_another_gpu_yields_to_one_that_ships_for_this(table):
    table(rows_of(1), gpu="NVIDIA A")
    assert "nvidia-h200" in chosen("NVIDIA H200").why
    assert "nvidia-a/" in chosen("NVIDIA Unheard-of").why


def test_the_first_of_several_folders_wins(monkeypatch, tmp_path):
    for name, block_m in (("one", 1), ("two", 2)):
        put(tmp_path / name, rows_of(block_m))
    monkeypatch.setenv(
        "SSMGEN_TUNED_PATH", f"{tmp_path / 'none'}:{tmp_path / 'two'}:{tmp_path / 'one'}"
    )
    assert chosen(GPU).plan.block_m == 2


def test_a_more_specific_key_wins(table):
    table(rows_of(2), key="fp16.nearest")
    table(rows_of(1), key="80x128.fp16.nearest")
    assert chosen(GPU, dim=80).plan.block_m == 1
    assert chosen(GPU, dim=96).plan.block_m == 2


def test_a_table_for_all_comes_before_the_cost_model_and_after_the_arch(table):
    table(rows_of(1), arch=tables.ANY, gpu=tables.ANY)
    assert chosen(GPU, "sm_80").plan.block_m == 1
    assert chosen(None, "sm_80").plan.block_m == 1
    table(rows_of(2), arch="sm_89")
    assert chosen(GPU, "sm_89").plan.block_m == chosen(None, "sm_89").plan.block_m == 2


def test_variants_are_those_of_every_gpu_of_an_arch(table):
    table(rows_of(1), gpu="NVIDIA A")
    table(rows_of(2), gpu="NVIDIA B")
    config = KernelConfig(state_dtype="fp16")
    every = {plan.block_m for plan in variants(config, SM_90)}
    assert every >= {1, 2}
    assert every > {1, 2}  # the one that ships
    assert [plan.block_m for plan in variants(config, SM_90, "NVIDIA B")] == [2]
    for gpu in (None, "NVIDIA A", "NVIDIA H200", "NVIDIA Unheard-of"):
        assert {c.plan for c in dispatch(config, SM_90, gpu)} <= set(variants(config, SM_90))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, r"schema: 1 is not known; allowed: 2"),
        ({"arch": "sm_80"}, r"arch: 'sm_80' is not where the file lies; allowed: sm_90"),
        ({"gpu": "NVIDIA B"}, r"gpu: 'NVIDIA B' is not where the file lies"),
        ({"gpu": None}, r"gpu: None is not a string"),
        ({"family": "gdn"}, r"family: 'gdn' is not where the file lies; allowed: ssu"),
        ({"key": "bf16.nearest"}, r"key: 'bf16.nearest' is not where the file lies"),
        ({"measured": 3}, r"measured: 3 is not an object"),
        ({"note": "hello"}, r"note: not a field"),
        ({"rows": []}, r"rows: \[\] is not a list of at least one"),
        ({"rows": [3]}, r"rows\[0\]: 3 is not an object"),
        ({"rows": [{}]}, r"rows\[0\]: plan: missing"),
        ({"rows": THREE[:1]}, r"rows\[0\]: up_to_heads: 64 found; the last row has none"),
        ({"rows": THREE[2:] * 2}, r"rows\[0\]: up_to_heads: None is not an int above 0"),
        ({"rows": [THREE[1], THREE[0], THREE[2]]}, r"rows\[1\]: up_to_heads: 64 is not an int"),
        ({"rows": [{"plan": tile("simple", block_m=3)}]}, r"rows\[0\]: plan.block_m: 3"),
        ({"rows": [{"plan": {"algorithm": "simple"}}]}, r"rows\[0\]: plan: block_m: missing"),
        ({"rows": [{"plan": tile("simple", size=3)}]}, r"rows\[0\]: plan: size: not a field"),
        ({"rows": [{"plan": tile("simple"), "up_to": 3}]}, r"rows\[0\]: up_to: not a field"),
    ],
)
def test_a_malformed_table_is_an_error_that_says_where_and_what(table, change, message):
    path = table(THREE)
    data = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message) as raised:
        chosen(GPU)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_table_that_is_no_json_object_is_an_error(table, text):
    path = table(THREE)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"fp16\.nearest\.json: "):
        chosen(GPU)


def test_a_table_that_is_not_asked_for_is_not_read(table):
    table(THREE, key="bf16.nearest").write_text("{")
    assert chosen(GPU).why


# The cost model


def test_without_a_table_the_cost_model_chooses_and_every_plan_is_legal():
    for name, state, rounding in itertools.product(
        ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120"), STATES, ("nearest", "stochastic")
    ):
        if (state, rounding) == ("fp32", "stochastic"):
            continue
        config = KernelConfig(state_dtype=state, rounding=rounding)
        choices = dispatch(config, Arch.of(name))
        assert choices[0].why == "cost model"
        assert 1 <= len(choices) <= 7
        for choice in choices:
            assert_covers(config, Arch.of(name), choice.plan)


def test_the_cost_model_knows_small_sizes_from_large_ones():
    choices = dispatch(KernelConfig(state_dtype="fp16", rounding="stochastic"), Arch.of("sm_80"))
    assert len(choices) > 1
    programs = [SSU.grid(KernelConfig(), c.plan, 1, 1)[0] * c.plan.num_warps for c in choices]
    assert programs[0] > programs[-1]  # few heads: spread them wide


# The tables that ship


def _shipped_rows():
    folder = ROOT / "cache" / "dispatch"
    for path in sorted(folder.rglob("*.json")):
        data = json.loads(path.read_text())
        yield pytest.param(path.relative_to(folder), data, id=f"{data['gpu']}-{data['key']}")


def _config_of(data):
    """The config that a table was measured with: as it says, or the reference shape of its key."""
    family, key = data["family"], data["key"]
    if "config" in data["measured"]:
        found = KernelConfig(family=family, **data["measured"]["config"])
        assert spec(family).dispatch_keys(found)[0] == key
        return found
    state, rounding, *more = key.split(".")
    fields = {"pdl": "pdl" in more}
    more = [part for part in more if part != "pdl"]
    if more and more[0].isdigit():
        fields["philox_rounds"] = int(more.pop(0))
    if more:
        form, tokens = more
        fields["ntokens"] = int(tokens)
        fields["has_intermediate"] = form == "each"
    found = KernelConfig(state_dtype=state, rounding=rounding, **fields)
    assert SSU.dispatch_keys(found)[0] == key, f"{key} is never looked up"
    return found


def _measured_rows():
    return [p for p in _shipped_rows() if p.values[1]["arch"] != tables.ANY]


@pytest.mark.parametrize(("path", "data"), _shipped_rows())
def test_every_table_that_ships_is_well_formed_and_where_it_says(path, data):
    family, arch, gpu, name = path.parts
    tables.read((ROOT / "cache" / "dispatch" / path).read_text(), str(path))
    assert (family, arch, gpu) == (data["family"], data["arch"], tables.slug(data["gpu"]))
    assert name == f"{data['key']}.json"
    assert (arch == tables.ANY) == (data["measured"] == {})


@pytest.mark.parametrize(("path", "data"), _measured_rows())
def test_every_table_that_was_measured_is_used_as_it_was_measured(path, data):
    arch = data["arch"]
    assert {"date", "gpu", "driver", "torch", "triton"} <= set(data["measured"])
    config = _config_of(data)
    family = spec(config.family)
    for row in data["rows"]:
        wanted = Plan(**row["plan"])
        plan = family.fit(config, wanted, Arch.of(arch))
        # Tables are written for the reference shape, whatever shape was measured.
        if config.family != "ssu" or (config.dim, config.dstate) == (64, 128):
            assert plan == wanted
        if config.family == "ssu":
            assert_covers(config, Arch.of(arch), plan)
    assert "cost model" not in dispatch(config, Arch.of(arch), data["gpu"])[0].why


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("gpu", [None, "NVIDIA H200"])
def test_states_of_k_by_v_have_one_plan_for_any_batch_and_any_tokens(name, gpu):
    for state, rounding in (("fp32", "nearest"), ("bf16", "nearest"), ("fp16", "stochastic")):
        fields = {"family": "gdn", "state_layout": "KV", "state_dtype": state, "rounding": rounding}
        for more in ({}, {"ntokens": 4}, {"pdl": True}, {"head_k_dim": 256, "head_v_dim": 64}):
            one = KernelConfig(**fields, **more)
            choices = dispatch(one, Arch.of(name), gpu)
            assert len(choices) == 1, (state, more)
            assert choices[0].why.startswith("table any/any/")
        assert (
            dispatch(KernelConfig(**fields), Arch.of(name), gpu)[0].plan
            == dispatch(KernelConfig(**fields, ntokens=4), Arch.of(name), gpu)[0].plan
        )


def test_every_config_is_served_and_never_by_a_rejected_pair():
    for state, name, rounding, pdl in itertools.product(
        STATES, KNOWN, ("nearest", "stochastic"), (False, True)
    ):
        if (state, rounding) == ("fp32", "stochastic"):
            continue
        many = KernelConfig(state_dtype=state, rounding=rounding, pdl=pdl, ntokens=3)
        forms = {"simple"}
        if rounding == "nearest" and not pdl and state not in SCALED:
            forms = {"simple", "matrix"}
        assert {c.plan.algorithm for c in dispatch(many, Arch.of(name))} <= forms
        config = KernelConfig(state_dtype=state, rounding=rounding, pdl=pdl)
        for choice in dispatch(config, Arch.of(name)):
            assert not (choice.plan.algorithm == "horizontal" and state in SCALED)


# Plan


@pytest.mark.parametrize("field", ["block_m", "block_n", "num_warps", "num_stages", "split"])
@pytest.mark.parametrize("value", [0, -2, 3, 1.0, "4", None])
def test_a_tile_is_of_powers_of_two_and_every_count_positive(field, value):
    fields = {**tile("vertical"), field: value}
    if field in ("num_stages", "split") and value == 3:
        assert getattr(Plan(**fields), field) == 3
        return
    with pytest.raises(ConfigError, match=rf"plan\.{field}: {value!r}"):
        Plan(**fields)


def test_a_plan_reads_back_from_its_fields_and_shows_in_its_text():
    wanted = Plan(**tile("vertical", num_stages=3, split=2))
    assert Plan(**wanted.fields()) == wanted
    assert "vertical 16x128" in str(wanted)
    texts = {str(wanted), str(Plan(**tile("vertical", num_stages=2, split=2)))}
    assert len(texts | {str(Plan(**tile("vertical", num_stages=3)))}) == 3


# Dependent launch

LATE = Plan(algorithm="simple", block_m=8, block_n=128, num_warps=1, early=False)
DEPENDENT = {
    "ssu": {"family": "ssu"},
    "drafts": {"family": "ssu", "ntokens": 3},
    "gdn": {"family": "gdn"},
    "conv1d": {"family": "conv1d"},
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_plan_is_late_only_where_a_kernel_waits(name):
    config = KernelConfig(**DEPENDENT[name], pdl=True)
    family = spec(config.family)
    late = family.fit(config, LATE, SM_90)
    assert not late.early
    assert str(late).endswith(" late")
    assert family.fit(config, LATE, Arch.of("sm_80")).early
    assert family.fit(config.replace(pdl=False), LATE, SM_90).early
    listed = family.candidates(config, SM_90)
    assert {plan.early for plan in listed} == {True, False}
    # An estimate cannot tell them apart.
    assert all(plan.early for plan in family.general(config, SM_90))
    assert all(plan.early for plan in family.candidates(config.replace(pdl=False), SM_90))


def test_forms_that_load_nothing_early_have_no_late_plans():
    for algorithm in ("vertical", "horizontal"):
        plan = Plan(algorithm=algorithm, block_m=16, block_n=32, num_warps=2, early=False)
        assert SSU.fit(KernelConfig(pdl=True), plan, SM_90).early
    prefill = KernelConfig(
        family="conv1d", many=True, prefill=True, seqlens_dtype="int32", pdl=True
    )
    assert spec("conv1d").fit(prefill, LATE, SM_90).early
    assert all(plan.early for plan in spec("conv1d").candidates(prefill, SM_90))


@pytest.mark.parametrize("name", ["ssu", "gdn", "conv1d"])
def test_tables_with_dependent_launch_come_first_and_those_without_after(name):
    config = KernelConfig(**DEPENDENT[name])
    family = spec(config.family)
    without = family.dispatch_keys(config)
    assert family.dispatch_keys(config.replace(pdl=True)) == (
        *(f"{key}.pdl" for key in without), *without,
    )  # fmt: skip


def test_a_cap_on_registers_stays_where_it_was_found():
    capped = Plan(**tile("vertical", num_warps=1, num_stages=4, maxnreg=96))
    for state in STATES:
        config = KernelConfig(state_dtype=state)
        kept = SSU.fit(config, capped, SM_90).maxnreg
        assert kept == (96 if state in ("int8", "fp8_e4m3fn") else None)
        listed = [p for p in SSU.candidates(config, SM_90) if p.maxnreg]
        assert bool(listed) == (kept is not None)
        simple = Plan(**{**capped.fields(), "algorithm": "simple"})
        assert SSU.fit(config, simple, SM_90).maxnreg is None


# Placed elements


@pytest.mark.parametrize(
    ("fields", "served"),
    [
        ({}, True),
        ({"ntokens": 6, "has_intermediate": True}, True),
        ({"state_dtype": "int8"}, False),
        ({"state_dtype": "fp16", "rounding": "stochastic"}, False),
        ({"aligned": False}, False),
        ({"pdl": True}, False),
        ({"ntokens": 3, "parents_dtype": "int32"}, False),
        ({"family": "gdn"}, False),
    ],
)
def test_a_plan_is_placed_only_where_16_bytes_a_lane_are_all_there_is(fields, served):
    config = KernelConfig(**fields)
    family = spec(config.family)
    wanted = Plan(algorithm="simple", block_m=16, block_n=128, num_warps=2, placed=True)
    assert family.fit(config, wanted, SM_90).placed == served
    simple = [p for p in family.candidates(config, SM_90) if p.algorithm == "simple"]
    assert all(p.placed == (served and p.num_warps > 1) for p in simple)
    assert not any(p.placed for p in family.general(config, SM_90))


# What later programs load


@pytest.mark.parametrize(
    ("fields", "arch", "asks"),
    [
        ({"state_dtype": "bf16"}, "sm_90", True),
        ({"state_dtype": "int16", "rounding": "stochastic"}, "sm_120", True),
        ({"state_dtype": "int8", "index_dtype": None, "dim": 8, "dstate": 16}, "sm_90", True),
        ({"family": "gdn", "pdl": True}, "sm_100", True),
        ({"state_dtype": "bf16"}, "sm_89", False),  # has no such instruction
        ({"state_dtype": "bf16", "aligned": False}, "sm_90", False),
        ({"family": "gdn", "aligned": False}, "sm_90", False),
        ({"state_dtype": "bf16", "ntokens": 4}, "sm_90", False),
        ({"family": "gdn", "ntokens": 4}, "sm_90", False),
        ({"family": "gdn", "accepted_dtype": "int32", "has_dst": True}, "sm_90", False),
        ({"family": "gdn", "state_layout": "KV"}, "sm_90", False),  # a tile lies in pieces
    ],
)
def test_a_plan_prefetches_only_what_lies_side_by_side(fields, arch, asks):
    config, arch = KernelConfig(**fields), Arch.of(arch)
    wanted = Plan(algorithm="simple", block_m=16, block_n=128, num_warps=1, prefetch=512)
    plan = spec(config.family).fit(config, wanted, arch)
    assert plan.prefetch == (512 if asks else 0)
    assert ("cp.async.bulk.prefetch.L2.global" in render(config, plan, arch)) == asks
    assert "prefetch(" not in render(config, plan, arch, interpret=True)


@pytest.mark.parametrize("algorithm", ["vertical", "horizontal"])
def test_programs_that_walk_prefetch_nothing(algorithm):
    wanted = Plan(algorithm=algorithm, block_m=16, block_n=64, num_warps=2, prefetch=512)
    assert SSU.fit(KernelConfig(state_dtype="bf16"), wanted, SM_90).prefetch == 0
    placed = Plan(algorithm="simple", block_m=16, block_n=128, num_warps=2, placed=True, prefetch=8)
    assert SSU.fit(KernelConfig(state_dtype="bf16"), placed, SM_90).prefetch == 0


@pytest.mark.parametrize("ahead", [-1, 2**20 + 1, True, 1.0, "8", None])
def test_a_distance_is_a_count_of_programs(ahead):
    with pytest.raises(ConfigError, match=r"plan\.prefetch"):
        Plan(algorithm="simple", block_m=16, block_n=128, num_warps=1, prefetch=ahead)


@pytest.mark.parametrize("index_dtype", ["int64", None])
@pytest.mark.parametrize("family", ["ssu", "gdn"])
def test_what_is_asked_for_is_what_a_later_row_loads(family, index_dtype):
    config = KernelConfig(family=family, state_dtype="bf16", index_dtype=index_dtype)
    wanted = Plan(algorithm="simple", block_m=16, block_n=128, num_warps=1, prefetch=512)
    source = render(config, spec(family).fit(config, wanted, SM_90), SM_90)
    lines = {line.split(" = ")[0].strip(): line for line in source.splitlines() if " = " in line}
    # The same address as that of the own tile, of another slot.
    own = lines["tile"] if family == "gdn" else source[source.index("    tile = ") :]
    within = (
        lines["later_state"].split(" = ")[1] + re.search(r"later_state( .*), wanted", source)[1]
    )
    head = "state_head_stride" if family == "gdn" else "(DIM * DSTATE)"
    row = "K" if family == "gdn" else "DSTATE"
    assert within == f"state + later_slot * state_slot_stride + head * {head} + first * {row}"
    assert f"head * {head} + first * {row}" in own
    # Nothing but what is there: a row of the batch, on a slot that is none of padding.
    assert "(rows_ahead > 0) & (later < tl.num_programs(1))" in source
    if index_dtype:
        assert "slots + later * slots_stride, mask=wanted, other=-1" in lines["later_slot"]
        assert lines["wanted"].endswith("(later_slot >= 0) & (later_slot != pad_slot_id)")
    else:
        assert lines["later_slot"].endswith("= later.to(tl.int64)")


def test_a_whole_number_of_rows_is_not_one_less():
    # As the GPU divides: a reciprocal that is rounded, times the distance.
    for programs in range(1, 5000):
        for rows in (1, 2, 3, 8):
            quotient = np.float32(rows * programs + 0.5) * (1 / np.float32(programs))
            assert int(quotient) == rows


def test_the_tuner_races_plans_that_prefetch():
    for fields in ({"state_dtype": "bf16"}, {"family": "gdn"}):
        config = KernelConfig(**fields)
        asking = [p for p in spec(config.family).staples(config, SM_90) if p.prefetch]
        assert asking
        assert f"prefetch={asking[0].prefetch}" in str(asking[0])
        # To the estimate they are what they would be without, and take no places of others.
        assert not any(p.prefetch for p in spec(config.family).candidates(config, SM_90))
