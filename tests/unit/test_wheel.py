"""What is shipped: the wheel and the sdist are whole, and the wheel works without the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import ssmgen

pytest.importorskip("build")
pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[2]
DATA = [
    *(path.relative_to(ROOT) for path in (ROOT / "templates").rglob("*.j2")),
    *(path.relative_to(ROOT) for path in (ROOT / "cache" / "dispatch").rglob("*.json")),
    *(path.relative_to(ROOT) for path in (ROOT / "cache" / "manifests").glob("*.json")),
    *(path.relative_to(ROOT) for path in (ROOT / "cache" / "shortlists").glob("*.json")),
]


def _run(*command, **options):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, made from the sdist, made from this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """`bin` of a new environment with the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    _run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(places)) + "\n")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "-q")
    _run(python, "-m", "pip", "install", *options, built[0])
    return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path):
    """Options for a process that sees neither the checkout nor the user's files."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    home = {"HOME": str(tmp_path), "SSMGEN_CACHE_DIR": str(tmp_path / "store")}
    return {"cwd": tmp_path, "env": {**env, **home}}


def test_the_wheel_has_every_module_template_and_table_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ssmgen").rglob("*.py")}
    data = {f"ssmgen/{path.as_posix()}" for path in DATA}
    assert len(data) > 5
    info = f"ssmgen-{ssmgen.__version__}.dist-info/"
    assert {n for n in names if not n.startswith(info)} == code | data | {"ssmgen/py.typed"}
    assert {f"{info}METADATA", f"{info}entry_points.txt", f"{info}licenses/LICENSE"} <= names


def test_the_sdist_can_build_and_test_itself(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py")}
    assert {path.as_posix() for path in DATA} | tests <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt"} <= names
    kept_out = ("cache/store", ".venv", ".git/", ".ci", "benchmarks/__pycache__")
    assert not [name for name in names if name.startswith(kept_out) or name.endswith(".pyc")]


def test_the_metadata_names_the_extras_and_the_oldest_python(built):
    archive = zipfile.ZipFile(built[0])
    (name,) = [n for n in archive.namelist() if n.endswith("METADATA")]
    lines = archive.read(name).decode().splitlines()
    extras = {line.split(": ")[1] for line in lines if line.startswith("Provides-Extra: ")}
    assert {"cuda", "bench", "test", "docs"} <= extras
    assert "Requires-Python: >=3.10" in lines
    assert f"Version: {ssmgen.__version__}" in lines


def test_the_wheel_runs_from_its_own_files(installed, elsewhere):
    code = (
        "import json, ssmgen; from ssmgen import *; from ssmgen import resources;"
        "from ssmgen.template import digest;"
        "print(json.dumps([ssmgen.__file__, str(resources.root()), digest('ssu')]))"
    )
    module, root, digest = json.loads(_run(installed / "python", "-c", code, **elsewhere))
    assert Path(module).is_relative_to(installed.parent)
    assert Path(root) == Path(module).parent
    from ssmgen.template import digest as here

    assert digest == here("ssu")


def test_the_installed_demo_succeeds(installed, elsewhere, tmp_path):
    version = _run(installed / "ssmgen", "--version", **elsewhere)
    assert version.split() == ["ssmgen", ssmgen.__version__]
    _run(installed / "ssmgen", "demo", **elsewhere)
    assert list((tmp_path / "store").glob("v1/??/*/*/kernel.cubin"))
