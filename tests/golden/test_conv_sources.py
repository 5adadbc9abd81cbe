"""Every conv1d source, by its properties."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ssmgen import Arch, KernelConfig, Plan
from ssmgen.errors import ConfigError
from ssmgen.families import spec
from ssmgen.template import entry_name, render

ROOT = Path(__file__).parents[2]
PLAN = Plan(algorithm="simple", block_m=8, block_n=256, num_warps=1)
FORMS = (
    {}, {"many": True}, {"many": True, "seqlens_dtype": "int32"}, {"many": True, "prefill": True},
    {"many": True, "prefill": True, "seqlens_dtype": "int64"},
)  # fmt: skip
FEATURES = (
    {}, {"index_dtype": None}, {"accepted_dtype": "int32"}, {"counts_dtype": "int64"},
    {"depth": 8}, {"has_dst": True}, {"packed_channels": False}, {"aligned": False},
    {"pdl": True, "has_bias": True, "weight_dtype": "fp32"},
    {"activation": None, "state_dtype": "fp32"},
    {"accepted_dtype": "int32", "has_dst": True, "aligned": False, "packed_channels": False,
     "has_bias": True},
    {"counts_dtype": "int32", "index_dtype": None, "dtype": "fp32", "weight_dtype": "fp32"},
    {"history": "rows", "depth": 7}, {"history": "rows", "update_state": False,
                                      "index_dtype": None},
    {"history": None, "update_state": False, "index_dtype": None}, {"history": None},
    {"has_initial": True}, {"has_initial": True, "has_dst": True, "depth": 16},
    {"has_initial": True, "index_dtype": None, "state_dtype": "fp32"},
    {"has_initial": True, "accepted_dtype": "int64"},
    {"has_initial": True, "accepted_dtype": "int32", "index_dtype": None, "aligned": False},
)  # fmt: skip


@pytest.fixture(scope="module")
def sources():
    """(config, arch, plan, source) over a broad product."""
    found = []
    for features, form, width, arch in itertools.product(
        FEATURES, FORMS, (2, 3, 4, 6), ("sm_80", "sm_90")
    ):
        try:
            config = KernelConfig(family="conv1d", width=width, **features, **form)
        except ConfigError:
            continue
        plan = spec("conv1d").fit(config, PLAN, Arch.of(arch))
        found.append((config, arch, plan, render(config, plan, Arch.of(arch))))
    assert len(found) > 400
    return found


def test_formatter_and_linter_leave_every_source_as_it_is(sources, tmp_path):
    pytest.importorskip("ruff")
    for i, (*_, source) in enumerate(sources):
        (tmp_path / f"source_{i}.py").write_text(source)
    for command in (("format", "--diff"), ("check",)):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "--config",
             str(ROOT / "pyproject.toml"), str(tmp_path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[:2000] + done.stderr[-500:]


def test_every_source_has_the_arguments_of_its_config_and_uses_all_its_names(sources):
    for config, _, plan, source in sources:
        signature, body = source.split(f"def {entry_name(config, plan)}(\n")[1].split("\n):\n", 1)
        names = [line.strip().rstrip(",") for line in signature.splitlines()]
        assert names == [a.name for a in spec("conv1d").arguments(config)]
        for name in names:
            assert re.search(rf"\b{name}\b", body), f"{name} is not used in\n{source}"
        for name in re.findall(r"^ +(\w+) = ", body, flags=re.M):
            assert len(re.findall(rf"\b{name}\b", body)) > 1, (
                f"{name} is set for nothing:\n{source}"
            )


def test_what_a_config_does_not_have_is_not_in_its_source(sources):
    words = {
        "silu": lambda c: c.activation == "silu",
        "bias_": lambda c: c.has_bias,
        "slots": lambda c: c.index_dtype is not None,
        "pad_slot_id": lambda c: c.index_dtype is not None,
        "dst": lambda c: c.has_dst,
        "seqlens": lambda c: c.seqlens_dtype is not None,
        "accepted": lambda c: c.accepted_dtype is not None,
        "counts": lambda c: c.counts_dtype is not None,
        "has_initial": lambda c: c.has_initial,
        "initial": lambda c: c.history == "rows",
        "conv_state": lambda c: c.has_pool,
        "x_dim_stride": lambda c: not c.aligned,
        "state_dim_stride": lambda c: c.has_pool and not c.packed_channels,
        "sound": lambda c: c.refuses,
        "chunk": lambda c: c.prefill,
        "h0": lambda c: c.history is not None and (c.depth == c.width - 1),
        "debug_barrier": lambda c: not c.prefill or (c.history == "pool" and c.update_state),
    }
    for config, arch, _, source in sources:
        code = source.split('"""')[2]
        assert ("gdc_wait" in code) == (config.pdl and arch == "sm_90")
        for word, wanted in words.items():
            assert (re.search(rf"\b{word}", code) is not None) == wanted(config), f"{word}:\n{code}"


def test_the_interpreted_source_has_no_assembly_and_the_same_arguments(sources):
    for config, arch, plan, source in sources[::7]:
        for_cpu = render(config, plan, Arch.of(arch), interpret=True)
        assert "gdc_" not in for_cpu
        head = f"def {entry_name(config, plan)}("
        assert for_cpu.split(head)[1].split("):")[0] == source.split(head)[1].split("):")[0]
