"""Dispatch: which plans serve a config, and that every plan covers it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ssu_configs import SCALED, SIZES, STATES, configs

from ssmgen import Arch, KernelConfig, Plan, plan
from ssmgen.arch import KNOWN
from ssmgen.errors import ConfigError
from ssmgen.families import spec
from ssmgen.families.ssu.config import ITEMSIZE
from ssmgen.plan import dispatch

ROOT = Path(__file__).parents[2]
SSU = spec("ssu")
ALGORITHMS = ("simple", "vertical", "horizontal")
SM_90 = Arch.of("sm_90")

archs = st.sampled_from(KNOWN).map(Arch.of)


def tile(algorithm, **fields):
    return {"algorithm": algorithm, "block_m": 16, "block_n": 128, "num_warps": 2, **fields}


@pytest.fixture
def table(monkeypatch):
    """A dispatch table of the test's own: `table(rows)` for 16-bit nearest states."""

    def use(rows, **more):
        default = {name: tile(name) for name in ALGORITHMS}
        content = {"default": default, "auto": {"default": {"16bit.nearest": rows}, **more}}
        monkeypatch.setattr(plan, "_table", lambda family: content)

    return use


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
    choices = dispatch(KernelConfig(state_dtype="fp16"), SM_90)
    assert [c.limit for c in choices] == [64, 1024, None]
    assert [c.plan.algorithm for c in choices] == ["simple", "vertical", "simple"]
    assert [c.plan.block_m for c in choices] == [4, 16, 32]


@pytest.mark.parametrize("dim", SIZES[::9])
def test_limits_count_work_not_heads(table, dim):
    table(THREE)
    config = KernelConfig(state_dtype="fp16", dim=dim, dstate=64)
    limits = [c.limit for c in dispatch(config, SM_90)]
    assert limits == [64 * 64 * 128 // (dim * 64), 1024 * 64 * 128 // (dim * 64), None]


def test_buckets_that_fit_to_one_plan_are_one(table):
    table([{"up_to_heads": 8, "plan": tile("simple", block_m=32)}, *THREE[2:]])
    (choice,) = dispatch(KernelConfig(state_dtype="fp16"), SM_90)
    assert choice.limit is None


def test_a_forced_algorithm_takes_its_rows_of_the_table(table):
    table(THREE)
    simple = dispatch(KernelConfig(state_dtype="fp16", algorithm="simple"), SM_90)
    assert [(c.limit, c.plan.block_m) for c in simple] == [(64, 4), (None, 32)]
    (vertical,) = dispatch(KernelConfig(state_dtype="fp16", algorithm="vertical"), SM_90)
    assert (vertical.limit, vertical.plan.num_stages) == (None, 2)
    assert "forced" in vertical.why


def test_a_forced_algorithm_without_rows_takes_the_default(table):
    table(THREE)
    (choice,) = dispatch(KernelConfig(state_dtype="fp16", algorithm="horizontal"), SM_90)
    assert choice.plan.algorithm == "horizontal"
    assert "default" in choice.why


def test_the_most_specific_row_wins_arch_then_generation_then_default(table):
    rows = {name: [{"plan": tile("simple", block_m=m)}] for m, name in ((1, "a"), (2, "b"))}
    table(
        THREE[2:],
        sm_80={"16bit.nearest": rows["a"]},
        sm_86={"16bit.nearest": rows["b"], "fp16.nearest": rows["a"]},
    )
    fp16, bf16 = KernelConfig(state_dtype="fp16"), KernelConfig(state_dtype="bf16")
    found = {
        (config.state_dtype, arch): dispatch(config, Arch.of(arch))[-1].plan.block_m
        for config in (fp16, bf16)
        for arch in ("sm_80", "sm_86", "sm_89", "sm_90")
    }
    assert found == {
        ("fp16", "sm_80"): 1, ("fp16", "sm_86"): 1, ("fp16", "sm_89"): 1, ("fp16", "sm_90"): 32,
        ("bf16", "sm_80"): 1, ("bf16", "sm_86"): 2, ("bf16", "sm_89"): 1, ("bf16", "sm_90"): 32,
    }  # fmt: skip


def test_the_table_may_differ_with_pdl(table):
    table(THREE[2:], sm_90={"fp16.nearest.pdl": THREE[:1]})
    plain = KernelConfig(state_dtype="fp16")
    assert dispatch(plain, SM_90)[-1].plan.block_m == 32
    assert dispatch(plain.replace(pdl=True), SM_90)[-1].plan.block_m == 4


@pytest.mark.parametrize("by", ["field", "variable"])
def test_batch_invariant_is_exactly_one_plan(table, monkeypatch, by):
    table(THREE)
    if by == "variable":
        monkeypatch.setenv("SSMGEN_BATCH_INVARIANT", "1")
    for algorithm in ("auto", *ALGORITHMS):
        config = KernelConfig(state_dtype="fp16", algorithm=algorithm)
        if by == "field":
            config = config.replace(batch_invariant=True)
        (choice,) = dispatch(config, SM_90)
        assert choice.limit is None
        assert "batch-invariant" in choice.why


# The table that ships


def _shipped():
    return json.loads((ROOT / "cache" / "dispatch" / "ssu.json").read_text())


def _shipped_rows():
    for arch, keys in _shipped()["auto"].items():
        for key, rows in keys.items():
            yield pytest.param(arch, key, rows, id=f"{arch}-{key}")


def _configs_of(key):
    """The configs of the reference shape that a key of the table is for."""
    width, rounding, *more = key.split(".")
    ntokens = 4 if more[-1:] == ["many"] else 1
    if more[:1] == ["many"] and len(more) == 2:
        ntokens = int(more.pop())
    more = [part for part in more if part != "many"]
    pdl = more[-1:] == ["pdl"]
    rounds = [int(r) for r in (more[:-1] if pdl else more)]
    states = [s for s in STATES if width in (s, f"{8 * ITEMSIZE[s]}bit")]
    found = [
        KernelConfig(
            state_dtype=state,
            rounding=rounding,
            philox_rounds=rounds[0] if rounds else None,
            pdl=pdl,
            ntokens=ntokens,
        )
        for state in states
        if (state, rounding) != ("fp32", "stochastic")
    ]
    assert found, f"{key} names no state dtype"
    assert all(key in SSU.dispatch_keys(config) for config in found), f"{key} is never looked up"
    return found


@pytest.mark.parametrize(("arch", "key", "rows"), _shipped_rows())
def test_every_entry_of_the_shipped_table_is_legal(arch, key, rows):
    assert arch == "default" or arch in KNOWN
    limits = [row.get("up_to_heads") for row in rows]
    assert limits[-1] is None
    assert all(low < high for low, high in itertools.pairwise(limits[:-1]))
    for row, config in itertools.product(rows, _configs_of(key)):
        wanted = Plan(**row["plan"])
        for name in KNOWN if arch == "default" else (arch,):
            assert_covers(config, Arch.of(name), SSU.fit(config, wanted, Arch.of(name)))


def test_a_plan_measured_on_an_arch_is_used_there_as_it_was_measured():
    for arch, keys in _shipped()["auto"].items():
        for key, rows in keys.items() if arch != "default" else ():
            for row, config in itertools.product(rows, _configs_of(key)):
                wanted = Plan(**row["plan"])
                assert SSU.fit(config, wanted, Arch.of(arch)) == wanted, f"{arch} {key}"


def test_the_shipped_table_serves_every_config_and_never_a_rejected_pair():
    for state, name, rounding, pdl in itertools.product(
        STATES, KNOWN, ("nearest", "stochastic"), (False, True)
    ):
        if (state, rounding) == ("fp32", "stochastic"):
            continue
        many = KernelConfig(state_dtype=state, rounding=rounding, pdl=pdl, ntokens=3)
        form = "simple"
        if name == "sm_90" and rounding == "nearest" and not pdl and state not in SCALED:
            form = "matrix"
        assert {c.plan.algorithm for c in dispatch(many, Arch.of(name))} == {form}
        config = KernelConfig(state_dtype=state, rounding=rounding, pdl=pdl)
        for choice in dispatch(config, Arch.of(name)):
            assert not (choice.plan.algorithm == "horizontal" and state in SCALED)


def test_the_shipped_defaults_are_one_plan_an_algorithm():
    defaults = _shipped()["default"]
    assert set(defaults) == {*ALGORITHMS, "matrix"}
    assert all(Plan(**fields).algorithm == name for name, fields in defaults.items())


def test_a_table_without_an_entry_says_what_was_looked_for(table):
    table(THREE)
    with pytest.raises(ConfigError, match=r"no entry for .*int8\.nearest or 8bit\.nearest"):
        dispatch(KernelConfig(state_dtype="int8"), SM_90)


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
