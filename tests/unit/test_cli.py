"""`ssmgen demo` fails when anything is wrong; `ssmgen render` prints what is compiled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import ssmgen
from ssmgen import compiler, interpreter, template
from ssmgen.arch import Arch
from ssmgen.bench.problems.ssu import SsuProblem
from ssmgen.cli import app, demo
from ssmgen.cli.trial import interpret, judge, ulp
from ssmgen.config import KernelConfig
from ssmgen.families.ssu.config import SsuConfig
from ssmgen.plan import dispatch


def run(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=input)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, warm: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(warm))


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CASES", (("fp16", "stochastic"),))


def test_demo_compiles_for_four_generations_and_is_right() -> None:
    result = run("demo", "--json")
    report = json.loads(result.stdout)
    assert report["problems"] == []
    assert result.exit_code == 0
    assert report["ok"]
    entries = report["entries"]
    assert {e["arch"] for e in entries} == {"sm_80", "sm_90", "sm_100", "sm_120"}
    assert len({e["key"] for e in entries}) == len(entries)
    assert all(e["cubin"] > 0 and not e["spills"] for e in entries)
    assert len(report["runs"]) == len(demo.CASES)
    for case in report["runs"]:
        assert 0 < case["share"] <= 1
        assert case["state_max"] <= (0.51 if case["state"] == "int16" else 8)


@pytest.mark.usefixtures("one_case")
def test_second_demo_compiles_nothing() -> None:
    assert run("demo", "--arch", "sm_90").exit_code == 0
    result = run("demo", "--arch", "sm_90")
    assert result.exit_code == 0
    assert re.search(r"All right: (\d+) kernels \(\1 from the store\), 1 answers", result.output)
    assert "compile 1/" in result.output  # a line each, off a terminal


@pytest.mark.usefixtures("one_case")
@pytest.mark.parametrize(
    ("right", "wrong"), [("softplus(dt_)", "dt_"), ("x_ * D_", "D_")], ids=["state", "output"]
)
def test_demo_fails_when_a_kernel_is_wrong(
    right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> str:
        source = template.render(*arguments, **options)
        assert right in source
        return source.replace(right, wrong)

    monkeypatch.setattr(interpreter, "render", broken)
    result = run("demo", "--arch", "sm_90")
    assert result.exit_code == 1
    assert "WRONG  fp16 stochastic: the output is off by" in result.output
    result = run("demo", "--arch", "sm_90", "--json")
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["ok"]


@pytest.mark.usefixtures("one_case")
def test_demo_fails_on_a_spill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_resources", lambda cubin: {"registers": 255, "spills": 8})
    result = run("demo", "--arch", "sm_90")
    assert result.exit_code == 1
    assert "spills 8 bytes of registers" in result.output


@pytest.mark.usefixtures("one_case")
def test_demo_fails_when_a_kernel_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        compiler, "render", lambda *a: template.render(*a).replace("tl.exp(", "tl.nothing(")
    )
    result = run("demo", "--arch", "sm_90", "--json")
    assert result.exit_code == 1
    assert "does not compile" in json.loads(result.stdout)["problems"][0]


def test_a_process_compiles_after_it_has_interpreted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(tmp_path))
    problem = problem_of("int8", "stochastic")
    interpret(problem, Arch.of("sm_90"))
    assert ssmgen.get_kernel(problem.config, arch="sm_90").artifact.cubin


STATES = [
    ("fp32", "nearest"),
    ("bf16", "nearest"),
    ("fp16", "stochastic"),
    ("int16", "stochastic"),
    ("int8", "nearest"),
    ("fp8_e4m3fn", "nearest"),
    ("fp8_e4m3fn", "stochastic"),
]


def problem_of(state: str, rounding: str) -> SsuProblem:
    config = SsuConfig(state_dtype=state, rounding=rounding, dim=16, dstate=32)
    return SsuProblem(config, batch=3, nheads=2, device="cpu", pool_bytes=0)


def first_unit(problem: SsuProblem) -> torch.Tensor:
    """Where row 0's state starts, as the integers it is stored in."""
    assert problem.sources is not None
    stored = problem.pool.view(
        {4: torch.int32, 2: torch.int16, 1: torch.int8}[problem.pool.itemsize]
    )
    return stored[problem.sources[0, 0], 0]


def spoil_state(problem: SsuProblem) -> None:
    # By far more than fp32 arithmetic allows, by only a little of what 16 and 8 bits hold.
    first_unit(problem)[0, :8] += 200 if problem.pool.dtype == torch.float32 else 2


def spoil_output(problem: SsuProblem) -> None:
    problem.out.view(torch.int16)[0, 0, :2] += 1


def spoil_other_slot(problem: SsuProblem) -> None:
    problem.pool.view(torch.uint8)[0, 0, 0, 0] ^= 1


def forget_output(problem: SsuProblem) -> None:
    problem.out[1, 0, 0] = torch.nan


@pytest.mark.parametrize(("state", "rounding"), STATES)
def test_judge_accepts_the_reference(state: str, rounding: str) -> None:
    problem = problem_of(state, rounding)
    verdict = judge(problem, lambda: problem.launch(0))
    assert verdict.wrong == ()
    assert verdict.share <= 1


@pytest.mark.parametrize(("state", "rounding"), STATES)
@pytest.mark.parametrize("spoil", [spoil_state, spoil_output, spoil_other_slot, forget_output])
def test_judge_sees_what_is_wrong(
    state: str, rounding: str, spoil: Callable[[SsuProblem], None]
) -> None:
    problem = problem_of(state, rounding)

    def launch() -> None:
        problem.launch(0)
        spoil(problem)

    assert judge(problem, launch).wrong != ()


@pytest.mark.parametrize("state", ["int16", "int8", "fp8_e4m3fn"])
def test_judge_sees_a_scale_that_is_not_its_rows(state: str) -> None:
    problem = problem_of(state, "nearest")

    def launch() -> None:
        problem.launch(0)
        assert problem.sources is not None
        slot = problem.sources[0, 0]
        assert problem.scale is not None
        problem.scale[slot] *= 2
        codes = problem.pool[slot].float() / 2
        problem.pool[slot] = codes.to(problem.pool.dtype)

    assert "a scale is not that of its row's largest element" in judge(problem, launch).wrong


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
def test_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    signed = {4: torch.int32, 2: torch.int16, 1: torch.int8}[dtype.itemsize]
    largest = torch.tensor(torch.finfo(dtype).max).to(dtype).view(signed).item()
    codes = torch.arange(0, largest, max(1, int(largest) // 4096)).to(signed)
    here, there = codes.view(dtype).double(), (codes + 1).view(dtype).double()
    assert torch.equal(ulp(here, dtype), there - here)


CONFIG = '{"state_dtype": "fp16", "rounding": "stochastic", "has_z": true}'


@pytest.mark.parametrize("form", ["inline", "file", "stdin"])
def test_render_prints_what_is_compiled(form: str, tmp_path: Path) -> None:
    config = KernelConfig.from_json(CONFIG)
    argument, input = CONFIG, None
    if form == "file":
        argument = str(tmp_path / "config.json")
        Path(argument).write_text(config.to_json())
    elif form == "stdin":
        argument, input = "-", CONFIG
    result = run("render", argument, input=input)
    assert result.exit_code == 0
    assert result.stdout == ssmgen.get_kernel(config, arch="sm_90").source


@pytest.mark.parametrize("interpret", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_render_prints_the_template_for_any_arch_and_size(arch: str, interpret: bool) -> None:
    config, target = KernelConfig.from_json(CONFIG), Arch.of(arch)
    options = ["--interpret"] if interpret else []
    for choice in dispatch(config, target):
        wanted = ["--heads", str(choice.limit)] if choice.limit else []
        result = run("render", CONFIG, "--arch", arch, *wanted, *options)
        assert result.stdout == template.render(config, choice.plan, target, interpret=interpret)
    assert ("inline_asm" in result.stdout) == (arch == "sm_100" and not interpret)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (['{"dim": 81}'], "dim: 81"),
        (['{"colour": 1}'], "colour"),
        (["{"], "not JSON"),
        (["no-such-file.json"], "no-such-file.json"),
        (["[]"], "a JSON object"),
        ([""], "not JSON"),
        (['{"dim": 64, "dim": 80}'], "'dim' stands twice"),
        (["{}", "--output", "/none/kernel.py"], "output /none/kernel.py: No such"),
        (["{}", "--arch", "sm_1"], "sm_1"),
    ],
)
def test_render_names_what_is_wrong(arguments: list[str], named: str) -> None:
    result = run("render", *arguments)
    assert result.exit_code == 2
    assert named in " ".join(result.output.replace("│", " ").split())


def test_version_and_bare_command() -> None:
    assert run("--version").output == f"ssmgen {ssmgen.__version__}\n"
    assert "Usage" in run().output
