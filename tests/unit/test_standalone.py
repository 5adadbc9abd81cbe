"""`ssmgen render --standalone` writes a file that runs, and checks itself, without ssmgen."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from standalone_files import FEATURES, GLUON, made, run_alone
from typer.testing import CliRunner

from ssmgen import Arch, KernelConfig, Plan
from ssmgen.cli import app
from ssmgen.errors import UnsupportedError
from ssmgen.families import spec
from ssmgen.plan import dispatch
from ssmgen.standalone import standalone
from ssmgen.template import digest, render

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", FEATURES)
def test_the_file_runs_alone_in_the_interpreter_and_finds_itself_right(name, tmp_path):
    source = made(KernelConfig(**FEATURES[name]), interpret=True)
    result = run_alone(source, tmp_path, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    said = re.findall(r"^(\w+): off by (\S+) of the largest, allowed (\S+)$", result.stdout, re.M)
    assert [what for what, _, _ in said] == ["out", "state"]
    assert all(float(off) <= float(allowed) < 0.2 for _, off, allowed in said)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("x_ * dt_", "x_"), ("y += x_ * D_", "y += D_"), ("decay)[:, None]", "1.0)[:, None]")],
)
def test_the_file_fails_when_its_kernel_is_wrong(right, wrong, tmp_path):
    config = KernelConfig(state_dtype="int8", algorithm="vertical", dim=64, dstate=16)
    source = made(config, interpret=True)
    assert right in source
    result = run_alone(source.replace(right, wrong), tmp_path, TRITON_INTERPRET="1")
    assert result.returncode == 1
    assert "wrong" in result.stderr


def everything():
    for fields, arch, interpret in itertools.product(
        FEATURES.values(), ("sm_80", "sm_100"), (False, True)
    ):
        config = KernelConfig(**{"pdl": True, **fields})
        yield config, arch, interpret, made(config, arch, interpret=interpret)
    for fields in GLUON.values():
        config = KernelConfig(**fields)
        yield config, "sm_90", False, made(config, "sm_90", interpret=False)


def test_ruff_leaves_every_file_as_it_is(tmp_path):
    pytest.importorskip("ruff")
    for i, (_, _, _, source) in enumerate(everything()):
        (tmp_path / f"file_{i}.py").write_text(source)
    options = ("--no-cache", "--config", str(ROOT / "pyproject.toml"), str(tmp_path))
    for command in (("format", "--diff"), ("check",)):
        found = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *options],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert found.returncode == 0, found.stdout[:2000] + found.stderr[-500:]


def test_the_kernel_in_the_file_is_the_one_that_is_compiled():
    for config, arch, interpret, source in everything():
        if interpret:
            continue
        target = Arch.of(arch)
        plan = dispatch(config, target)[-1].plan
        head, body = render(config, plan, target).split('\n"""\n\n')
        assert source.startswith(head)
        assert body in source
        assert f"num_warps={plan.num_warps}," in source
        assert ("launch_pdl=True" in source) == (target.pdl and config.pdl)
        assert (f"maxnreg={plan.maxnreg}," in source) == (plan.maxnreg is not None)
        for argument in spec("ssu").arguments(config):
            assert f"        {argument.name}=" in source


def test_no_file_names_what_its_config_lacks_or_the_package():
    for config, _, interpret, source in everything():
        main = source.split("\nBATCH, NHEADS", 1)[1]
        assert ("dst_slots" in main) == config.has_dst
        assert ("seed" in main.replace("manual_seed", "")) == (config.rounding == "stochastic")
        assert ("silu" in main) == config.has_z
        assert ("dt_bias" in main) == config.has_dt_bias
        assert ("state_scale" in main) == (config.state_scale_t is not None)
        assert not re.search(r"import ssmgen|from ssmgen", source)
        assert not re.search(r"{{|{%|{#", main)
        assert ('"cuda" if' in main) == interpret


def test_the_template_of_the_file_is_no_part_of_a_kernels_key(monkeypatch, tmp_path):
    from ssmgen import resources

    before = digest("ssu")
    for path in (ROOT / "templates").rglob("*.j2"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        more = b"changed" if path.parent.name == "standalone" else b""
        copy.write_bytes(path.read_bytes() + more)
    monkeypatch.setattr(resources, "root", lambda: tmp_path)
    digest.cache_clear()
    try:
        assert digest("ssu") == before
    finally:
        monkeypatch.undo()
        digest.cache_clear()


def test_a_family_without_such_a_template_says_so():
    class Other:
        family = "other"

    plan = Plan(algorithm="simple", block_m=16, block_n=128, num_warps=2)
    with pytest.raises(UnsupportedError, match="family other: has no standalone form"):
        standalone(Other(), plan, Arch.of("sm_90"))


@pytest.mark.parametrize(
    ("fields", "interpret", "what"),
    [
        ({"ntokens": 4, "parents_dtype": "int32"}, False, "tables of several tokens"),
        ({"ntokens": 4, "has_intermediate": True}, True, "tables of several tokens"),
        (GLUON["matrix"], True, "Gluon kernels .algorithm matrix. in the interpreter"),
    ],
)
def test_what_no_file_serves_is_refused_by_name(fields, interpret, what):
    with pytest.raises(UnsupportedError, match=f"standalone: {what}"):
        made(KernelConfig(**fields), interpret=interpret)


# The command


def command(*arguments: str):
    return CliRunner().invoke(app, ["render", *arguments])


def test_the_command_prints_the_file_or_writes_it(tmp_path):
    config = KernelConfig(state_dtype="int8", dim=80)
    printed = command(config.to_json(), "--standalone", "--arch", "sm_100")
    assert printed.stdout == made(config, "sm_100", interpret=False)
    path = tmp_path / "kernel.py"
    written = command(config.to_json(), "--standalone", "--interpret", "--output", str(path))
    assert (written.exit_code, written.stdout) == (0, "")
    assert path.read_text() == made(config, interpret=True)


def test_the_source_alone_may_be_written_to_a_file_too(tmp_path):
    config, arch = KernelConfig(), Arch.of("sm_90")
    command("{}", "--output", str(tmp_path / "source.py"))
    source = render(config, dispatch(config, arch)[-1].plan, arch)
    assert (tmp_path / "source.py").read_text() == source


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    result = command("{}", "--output", str(tmp_path / "no" / "such" / "folder.py"))
    assert result.exit_code == 2
    assert "folder.py" in re.sub(r"[│\s]", "", result.output)
