"""Importing ssmgen does nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ssmgen

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "triton", "jinja2", "numpy", "filelock", "cuda", "typer", "rich")


def modules_after(code, cwd, **env):
    """Names of the top-level modules that `code` leaves imported in a fresh process."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json\nprint(json.dumps(list(sys.modules)))"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not run.stderr
    return {name.partition(".")[0] for name in json.loads(run.stdout)}


def test_import_loads_nothing_heavy_and_creates_no_file(tmp_path):
    home, store, cwd = tmp_path / "home", tmp_path / "store", tmp_path / "cwd"
    home.mkdir()
    cwd.mkdir()
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "SSMGEN_CACHE_DIR": str(store)}
    assert not modules_after("import ssmgen", cwd, **env) & set(HEAVY)
    assert {path.name for path in tmp_path.rglob("*")} == {"home", "cwd"}


@pytest.mark.parametrize(
    "code",
    [
        "from ssmgen import KernelConfig, Arch, Plan, Kernel, get_kernel",
        "import ssmgen; ssmgen.KernelConfig(state_dtype='int8', dim=80).to_json()",
        "import ssmgen.store, ssmgen.settings, ssmgen.template, ssmgen.compiler",
        "from ssmgen import KernelConfig, Arch, plan; plan.dispatch(KernelConfig(), Arch.of(90))",
    ],
)
def test_the_road_up_to_a_plan_needs_no_torch_triton_or_jinja(code, tmp_path):
    assert not modules_after(code, tmp_path) & set(HEAVY)


def test_every_public_name_is_there_and_no_other():
    assert all(getattr(ssmgen, name) is not None for name in ssmgen.__all__)
    assert sorted(ssmgen.__all__, key=str.lower) == sorted(set(ssmgen.__all__), key=str.lower)
    with pytest.raises(AttributeError, match="no attribute 'selective_scan'"):
        _ = ssmgen.selective_scan


def test_the_version_is_a_release_number():
    assert all(part.isdecimal() for part in ssmgen.__version__.split("."))
