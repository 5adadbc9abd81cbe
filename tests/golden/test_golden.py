"""The rendered source itself: checked in, so that a change of a template shows as a diff.

``make golden`` (``pytest tests/golden --update-golden``) writes the files anew.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ssmgen import Arch, KernelConfig, Plan
from ssmgen.families import spec
from ssmgen.template import digest, entry_name, key, render

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

SIMPLE = Plan(algorithm="simple", block_m=16, block_n=128, num_warps=2)
VERTICAL = Plan(algorithm="vertical", block_m=16, block_n=128, num_warps=2, num_stages=3)
HORIZONTAL = Plan(algorithm="horizontal", block_m=64, block_n=32, num_warps=4, num_stages=2)
MATRIX = Plan(algorithm="matrix", block_m=32, block_n=128, num_warps=2)
GDN = Plan(algorithm="simple", block_m=16, block_n=128, num_warps=1)
PLANS = {plan.algorithm: plan for plan in (SIMPLE, VERTICAL, HORIZONTAL)}

GOLDEN = {
    "conv1d_step_bias_sm_90": (
        Plan(algorithm="simple", block_m=1, block_n=1024, num_warps=4),
        "sm_90",
        {"family": "conv1d", "has_bias": True, "pdl": True},
    ),
    "conv1d_rows_accepted_sm_90": (
        Plan(algorithm="simple", block_m=4, block_n=256, num_warps=1),
        "sm_90",
        {"family": "conv1d", "many": True, "seqlens_dtype": "int32", "accepted_dtype": "int32"},
    ),
    "conv1d_rows_circular_sm_90": (
        Plan(algorithm="simple", block_m=4, block_n=256, num_warps=1),
        "sm_90",
        {"family": "conv1d", "many": True, "counts_dtype": "int32", "index_dtype": None},
    ),
    "conv1d_prefill_right_strided_sm_80": (
        Plan(algorithm="simple", block_m=16, block_n=256, num_warps=4),
        "sm_80",
        {
            "family": "conv1d", "dtype": "fp16", "weight_dtype": "fp32", "many": True,
            "prefill": True, "seqlens_dtype": "int32", "has_initial": True, "depth": 4,
            "packed_channels": False, "activation": None,
        },
    ),
    "ssu_simple_fp32_sm_90": (SIMPLE, "sm_90", {"has_z": True}),
    "ssu_simple_fp16_stochastic_sm_90": (
        SIMPLE,
        "sm_90",
        {"state_dtype": "fp16", "rounding": "stochastic", "pdl": True},
    ),
    "ssu_simple_fp16_stochastic_sm_100": (
        SIMPLE,
        "sm_100",
        {"state_dtype": "fp16", "rounding": "stochastic"},
    ),
    "ssu_simple_prefetch_bf16_sm_90": (
        dataclasses.replace(SIMPLE, num_warps=1, prefetch=2048),
        "sm_90",
        {"state_dtype": "bf16", "has_dst": True},
    ),
    "ssu_simple_fp8_sm_80": (SIMPLE, "sm_80", {"state_dtype": "fp8_e4m3fn"}),
    "ssu_simple_mamba1_sm_120": (
        SIMPLE,
        "sm_120",
        {"dstate": 16, "tie_hdim": False, "aligned": False, "has_z": True, "index_dtype": "int32"},
    ),
    "ssu_vertical_int8_stochastic_sm_90": (
        dataclasses.replace(VERTICAL, split=2),
        "sm_90",
        {"state_dtype": "int8", "rounding": "stochastic", "philox_rounds": 5, "has_dst": True},
    ),
    "ssu_vertical_ahead_fp8_sm_90": (
        dataclasses.replace(VERTICAL, num_stages=1),
        "sm_90",
        {"state_dtype": "fp8_e4m3fn", "rounding": "stochastic", "has_z": True},
    ),
    "ssu_simple_crowded_bf16_sm_90": (
        dataclasses.replace(SIMPLE, block_m=32, num_warps=1),
        "sm_90",
        {"state_dtype": "bf16", "has_dst": True},
    ),
    "ssu_vertical_bf16_dim_80_sm_80": (VERTICAL, "sm_80", {"state_dtype": "bf16", "dim": 80}),
    "ssu_horizontal_bf16_dim_80_sm_90": (
        HORIZONTAL,
        "sm_90",
        {"state_dtype": "bf16", "dim": 80, "dstate": 256, "index_dtype": None},
    ),
    "ssu_simple_tokens_bf16_sm_90": (
        SIMPLE,
        "sm_90",
        {"state_dtype": "bf16", "ntokens": 6, "has_intermediate": True, "has_z": True},
    ),
    "ssu_simple_tokens_placed_bf16_sm_90": (
        dataclasses.replace(SIMPLE, placed=True),
        "sm_90",
        {"state_dtype": "bf16", "ntokens": 6, "has_intermediate": True, "has_z": True},
    ),
    "ssu_simple_sequences_tree_int8_stochastic_sm_90": (
        SIMPLE,
        "sm_90",
        {
            "state_dtype": "int8", "rounding": "stochastic", "ntokens": 6, "has_dst": True,
            "dst_tokens": True, "seqlens_dtype": "int32", "accepted_dtype": "int32",
            "parents_dtype": "int32", "pdl": True,
        },
    ),
    "ssu_matrix_fp16_sm_90": (
        MATRIX, "sm_90", {"state_dtype": "fp16", "ntokens": 6, "has_z": True, "has_dst": True},
    ),
    "ssu_matrix_fp32_sm_90": (
        dataclasses.replace(MATRIX, block_m=64, num_warps=4, maxnreg=168), "sm_90",
        {"ntokens": 11, "index_dtype": None},
    ),
    "gdn_simple_fp32_sm_90": (GDN, "sm_90", {"family": "gdn", "pdl": True}),
    "gdn_simple_prefetch_late_sm_120": (
        dataclasses.replace(GDN, early=False, prefetch=512),
        "sm_120",
        {"family": "gdn", "state_dtype": "fp16", "pdl": True, "index_dtype": None},
    ),
    "gdn_simple_interleaved_tokens_bf16_sm_90": (
        GDN,
        "sm_90",
        {
            "family": "gdn", "state_dtype": "bf16", "ntokens": 4, "grouped": True,
            "accepted_dtype": "int32", "has_dst": True, "dst_tokens": True, "head_v_dim": 64,
            "has_intermediate": True,
        },
    ),
    "gdn_simple_kda_sequences_fp16_stochastic_kv_sm_80": (
        GDN,
        "sm_80",
        {
            "family": "gdn", "state_dtype": "fp16", "rounding": "stochastic", "kda": True,
            "gate": "bounded", "state_layout": "KV", "head_k_dim": 96, "ntokens": 4,
            "seqlens_dtype": "int32", "aligned": False, "philox_rounds": 7,
        },
    ),
}  # fmt: skip


def rendered(config, plan, arch):
    """The source of `config` by `plan`, fitted; the key, which is another with every template."""
    arch = Arch.of(arch)
    source = render(config, spec(config.family).fit(config, plan, arch), arch)
    return re.sub(r"^key     [0-9a-f]{64}$", "key     ...", source, flags=re.MULTILINE)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_source_is_the_one_checked_in(name, request):
    plan, arch, fields = GOLDEN[name]
    found = rendered(KernelConfig(**fields), plan, arch)
    path = HERE / f"{name}.py"
    if request.config.getoption("--update-golden"):
        path.write_text(found)
    assert found == path.read_text(), "`make golden` writes tests/golden anew"


def test_every_file_here_is_of_a_test():
    assert {p.stem for p in HERE.glob("*.py") if p.stem[:5] != "test_"} == {*GOLDEN}


# Every source, by its properties

FEATURES = [
    {},
    {"has_z": True, "has_d": False, "pdl": True},
    {"has_dt_bias": False, "dt_softplus": False, "dtype": "fp32", "aligned": False},
    {"index_dtype": None, "update_state": False, "dtype": "fp16"},
    {"has_dst": True, "index_dtype": "int32", "dim": 80, "dstate": 96},
    {"tie_hdim": False, "dstate": 16, "has_z": True},
    {"tie_hdim": False, "aligned": False, "dim": 24, "dstate": 40, "has_d": False, "pdl": True},
    {"dim": 192, "dstate": 512, "weight_dtype": "bf16", "a_dtype": "bf16"},
    {"dim": 8, "dstate": 8, "has_z": True, "has_dst": True, "tie_hdim": False},
    {"ntokens": 4, "has_z": True},
    {"ntokens": 2, "has_dst": True, "tie_hdim": False, "aligned": False, "dstate": 96},
    {"ntokens": 1, "has_intermediate": True, "index_dtype": None},
    {"ntokens": 6, "has_intermediate": True, "entry_dtype": "int32", "update_state": False,
     "parents_dtype": "int64", "tie_hdim": False, "dtype": "fp32"},
    {"ntokens": 6, "seqlens_dtype": "int64", "accepted_dtype": "int32", "has_dst": True,
     "dst_tokens": True, "parents_dtype": "int32", "has_intermediate": True, "has_z": True,
     "pdl": True},
    {"ntokens": 17, "seqlens_dtype": "int32", "has_d": False, "has_dt_bias": False, "pdl": True},
]  # fmt: skip
MATRIX_FEATURES = [
    {},
    {"has_z": True, "has_dst": True, "index_dtype": "int32"},
    {"has_d": False, "has_dt_bias": False, "dt_softplus": False, "index_dtype": None},
    {"update_state": False, "dim": 80, "dstate": 256, "weight_dtype": "bf16"},
]
STATES = ("fp32", "bf16", "fp16", "int16", "int8", "fp8_e4m3fn")


def every_source():
    """(config, plan, arch, source) over a broad product."""
    for state, rounding, fields, plan, arch in itertools.product(
        STATES, ("nearest", "stochastic"), FEATURES, PLANS.values(), ("sm_80", "sm_90", "sm_100")
    ):
        config_fields = {"state_dtype": state, "rounding": rounding, **fields}
        scaled = state in STATES[3:]
        stores = fields.get("update_state", True) or fields.get("has_intermediate")
        if rounding == "stochastic" and (state == "fp32" or not stores):
            continue
        if plan.algorithm != "simple" and "ntokens" in fields:
            continue
        if plan.algorithm == "horizontal" and scaled:
            continue
        config = KernelConfig(**config_fields)
        for variant in (plan, dataclasses.replace(plan, num_stages=1, block_m=8, split=2)):
            if variant.algorithm != "vertical" and variant is not plan:
                continue
            fitted = spec("ssu").fit(config, variant, Arch.of(arch))
            yield config, fitted, arch, render(config, fitted, Arch.of(arch))
    for state, fields, rows, tokens, arch in itertools.product(
        STATES[:3], MATRIX_FEATURES, (16, 32, 64), (2, 8, 9), ("sm_80", "sm_90")
    ):
        config = KernelConfig(state_dtype=state, ntokens=tokens, **fields)
        variant = dataclasses.replace(MATRIX, block_m=rows, num_warps=max(1, rows // 32))
        fitted = spec("ssu").fit(config, variant, Arch.of(arch))
        yield config, fitted, arch, render(config, fitted, Arch.of(arch))


GDN_FEATURES = [
    {},
    {"pdl": True, "has_dt_bias": False, "use_qk_l2norm": False, "dtype": "fp32"},
    {"index_dtype": None, "update_state": False, "dtype": "fp16", "aligned": False},
    {"has_dst": True, "index_dtype": "int32", "head_k_dim": 96, "head_v_dim": 8},
    {"gate": "given", "a_dtype": "fp32", "grouped": True},
    {"gate": "given", "kda": True, "head_k_dim": 8, "head_v_dim": 24},
    {"kda": True, "head_k_dim": 40, "ntokens": 9, "seqlens_dtype": "int32", "accepted_dtype":
     "int64", "has_intermediate": True},
    {"gate": "bounded", "kda": True, "grouped": True, "a_log_dtype": "bf16"},
    {"accepted_dtype": "int64", "has_intermediate": True, "entry_dtype": "int32"},
    {"ntokens": 3, "kda": True, "head_k_dim": 256, "head_v_dim": 64, "pdl": True},
    {"ntokens": 2, "index_dtype": None, "has_intermediate": True, "update_state": False},
    {"ntokens": 2, "head_k_dim": 200, "head_v_dim": 8},
    {"ntokens": 6, "seqlens_dtype": "int64", "accepted_dtype": "int32", "has_dst": True,
     "dst_tokens": True, "has_intermediate": True, "entry_dtype": "int64", "grouped": True},
    {"ntokens": 1, "seqlens_dtype": "int32", "index_dtype": None},
]  # fmt: skip


def every_gdn_source():
    """The same of the gated delta rule."""
    for state, rounding, fields, order, arch in itertools.product(
        STATES[:3], ("nearest", "stochastic"), GDN_FEATURES, ("VK", "KV"),
        ("sm_80", "sm_90", "sm_100"),
    ):  # fmt: skip
        stores = fields.get("update_state", True) or fields.get("has_intermediate")
        if rounding == "stochastic" and (state == "fp32" or not stores):
            continue
        config = KernelConfig(
            family="gdn", state_dtype=state, rounding=rounding, state_layout=order, **fields
        )
        fitted = spec("gdn").fit(config, GDN, Arch.of(arch))
        yield config, fitted, arch, render(config, fitted, Arch.of(arch))


@pytest.fixture(scope="module")
def sources():
    return [*every_source(), *every_gdn_source()]


def _ruff(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "ruff", *arguments], capture_output=True, text=True, check=False
    )


def test_formatter_and_linter_leave_every_source_as_it_is(sources, tmp_path):
    pytest.importorskip("ruff")
    for i, (_, _, _, source) in enumerate(sources):
        (tmp_path / f"source_{i}.py").write_text(source)
    options = ("--no-cache", "--config", str(ROOT / "pyproject.toml"))
    formatted = _ruff("format", "--diff", *options, str(tmp_path))
    assert formatted.returncode == 0, formatted.stdout[:2000] + formatted.stderr[-500:]
    checked = _ruff("check", *options, str(tmp_path))
    assert checked.returncode == 0, checked.stdout[:2000]


def test_every_source_says_what_it_is_of(sources):
    for config, plan, arch, source in sources:
        head = source.split('"""')[1]
        assert f"\narch    {arch}\n" in head
        assert f"\nplan    {plan}\n" in head
        assert f"\nkey     {key(config, plan, Arch.of(arch))}\n" in head
        said = re.search(r"\nconfig  (.*?)\nkey ", head, re.DOTALL).group(1).split()
        assert said == [f"{name}={value}" for name, value in config.key_fields().items()]


def test_every_source_has_only_the_arguments_of_its_config(sources):
    for config, plan, _, source in sources:
        signature, body = source.split(f"def {entry_name(config, plan)}(\n")[1].split("\n):\n", 1)
        names = [line.strip().rstrip(",") for line in signature.splitlines()]
        assert names == [a.name for a in spec(config.family).arguments(config)]
        for name in names:
            assert re.search(rf"\b{name}\b", body), f"{name} is not used"


# A word of the source, and which configs have it.
WORDS = {
    "slots": lambda c: c.index_dtype is not None,
    "pad_slot_id": lambda c: c.index_dtype is not None or c.entry_dtype is not None,
    "buffer": lambda c: c.has_intermediate,
    "entries": lambda c: c.entry_dtype is not None,
    "seqlens": lambda c: c.seqlens_dtype is not None,
    "accepted": lambda c: c.accepted_dtype is not None,
    "dst": lambda c: c.has_dst,
    "seed": lambda c: c.rounding == "stochastic",
    "random_words": lambda c: c.rounding == "stochastic",
}
FAMILY_WORDS = {
    "ssu": {
        "silu": lambda c: c.has_z,
        "softplus": lambda c: c.dt_softplus,
        "dt_bias": lambda c: c.has_dt_bias,
        "D_": lambda c: c.has_d,
        "x_token_stride": lambda c: c.many,
        "parents": lambda c: c.parents_dtype is not None,
        "broken": lambda c: bool(c.seqlens_dtype or c.accepted_dtype or c.parents_dtype),
        "state_scale": lambda c: c.state_scale_t is not None,
        "A_dim_stride": lambda c: not c.tie_hdim,
        "row_scale": lambda c: c.state_scale_t is not None and c.stores,
    },
    "gdn": {
        "softplus": lambda c: c.gate == "softplus",
        "sigmoid": lambda c: c.gate != "given",
        "lower_bound": lambda c: c.gate == "bounded",
        "A_log": lambda c: c.gate != "given",
        "beta_head": lambda c: c.gate == "given",
        "dt_bias": lambda c: c.has_dt_bias,
        "rsqrt": lambda c: c.use_qk_l2norm,
        "[ag]_channel_stride": lambda c: c.kda,
        "v_group_step": lambda c: c.grouped,
        "q_token_stride": lambda c: c.many,
        "for token": lambda c: c.many,
        "q_row_stride": lambda c: not c.seqlens_dtype,
        "broken": lambda c: bool(c.seqlens_dtype or c.accepted_dtype),
        "live": lambda c: bool(c.index_dtype or c.seqlens_dtype),
        "V: tl.constexpr": lambda c: c.state_layout == "KV",
        "round_stochastic": lambda c: c.rounding == "stochastic",
    },
}


def test_what_a_config_does_not_have_is_not_in_its_source(sources):
    for config, _, _, source in sources:
        code = source.split('"""', 2)[2]
        for word, wanted in {**WORDS, **FAMILY_WORDS[config.family]}.items():
            found = re.search(rf"\b{word}", code) is not None
            assert found == wanted(config), f"{word} in\n{source}"


def test_what_an_arch_lacks_is_not_in_its_source(sources):
    for config, _, arch, source in sources:
        assert ("gdc_wait" in source) == (config.pdl and arch != "sm_80")
        halves = config.state_dtype in ("fp16", "bf16")
        hardware = config.rounding == "stochastic" and halves and config.aligned
        assert ("cvt.rs" in source) == (hardware and arch == "sm_100")
        assert ("decode_fp8" in source) == (config.state_dtype == "fp8_e4m3fn" and arch == "sm_80")


def test_no_source_has_a_constant_branch_or_a_template_left_over(sources):
    for _, _, _, source in sources:
        assert not re.search(
            r"\bif (True|False|\d)|{{|{%|{#|\bNone\b(?!\]| *,)", source.split('"""')[2]
        )


def test_the_interpreted_source_has_no_inline_assembly_and_the_same_arguments(sources):
    for config, plan, arch, source in sources:
        for_cpu = render(config, plan, Arch.of(arch), interpret=True)
        assert "asm" not in for_cpu
        assert "gdc_" not in for_cpu
        head = f"def {entry_name(config, plan)}("
        assert for_cpu.split(head)[1].split("):")[0] == source.split(head)[1].split("):")[0]


def test_rendering_twice_gives_the_same_text():
    config = KernelConfig(state_dtype="int8", rounding="stochastic")
    assert len({render(config, SIMPLE, Arch.of("sm_90")) for _ in range(3)}) == 1


# The key


def test_a_changed_template_changes_the_key(monkeypatch, tmp_path):
    from ssmgen import resources, template

    config, arch = KernelConfig(), Arch.of("sm_90")
    before = key(config, SIMPLE, arch)
    for folder in ("common", "ssu"):
        for path in (ROOT / "templates" / folder).glob("*.j2"):
            copy = tmp_path / "templates" / folder / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(resources, "root", lambda: tmp_path)
    template.digest.cache_clear()
    try:
        assert key(config, SIMPLE, arch) == before
        for path in sorted((tmp_path / "templates").rglob("*.j2")):
            was = path.read_bytes()
            path.write_bytes(was + b" ")
            template.digest.cache_clear()
            assert key(config, SIMPLE, arch) != before, path.name
            path.write_bytes(was)
    finally:
        monkeypatch.undo()
        template.digest.cache_clear()
    assert digest("ssu") == digest("ssu")


def test_every_factor_changes_the_key():
    config, arch = KernelConfig(), Arch.of("sm_90")
    keys = {
        key(config, SIMPLE, arch),
        key(config, VERTICAL, arch),
        key(config, dataclasses.replace(SIMPLE, num_warps=4), arch),
        key(config.replace(has_z=True), SIMPLE, arch),
        key(config, SIMPLE, Arch.of("sm_100")),
    }
    assert len(keys) == 5
