"""`ssmgen bench`: what it refuses, prints, writes, and exits with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import Clock
from typer.testing import CliRunner, Result

from ssmgen import timing
from ssmgen.arch import Arch
from ssmgen.bench import contestants, measure, session
from ssmgen.bench.grid import GRIDS, SECTIONS
from ssmgen.cli import app
from ssmgen.cli import bench as command

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SSU = str(RESULTS / "ssu-h200.json")
CELLS = ("--heads", "2", "--dims", "16", "--states", "fp16", "--batches", "1,2")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    """A GPU whose launches take 4 us, ours a second time 4.2; everything runs on the CPU."""
    clock = Clock(4.0, 8.0, 4.2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T 9")
    monkeypatch.setattr(Arch, "detect", classmethod(lambda cls, device=0: Arch.of("sm_90")))
    monkeypatch.setattr(timing, "warm_clocks", lambda: None)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 2e9)
    monkeypatch.setattr(session, "compile_all", lambda cells, made: None)
    made = session.Session

    def on_cpu(**options: Any) -> Any:
        return made(**options, device="cpu", pool_bytes=0, record=clock)

    monkeypatch.setattr(session, "Session", on_cpu)
    monkeypatch.chdir(tmp_path)
    return clock


def test_without_a_gpu_it_says_so_and_exits_with_3():
    for arguments in ((), ("tokens", "--quick"), ("all",)):
        result = run(*arguments)
        assert result.exit_code == command.NO_GPU == 3
        assert "no CUDA device is visible" in result.output
        assert "ssmgen bench jit" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mamba"], "section mamba is not known"),
        (["all", "ssu"], "all alone"),
        (["--states", "fp12"], "'fp12'"),
        (["--heads", "0"], "not positive integers"),
        (["--batches", "1,x"], "not positive integers"),
        (["--tokens", "4"], "--tokens means nothing to ssu"),
        (["--writes", "every"], "--writes means nothing to ssu"),
        (["tokens", "--writes", "each"], "'each' is not known; allowed: last, every"),
        (["jit", "--rounds", "3"], "--rounds means nothing to jit"),
        (["--contestants", "vlm"], "'vlm' is not known"),
        (["--dims", "13"], "dim: 13"),
        (["ssu", "tokens", "--out", "x.json"], "one file for 2 sections"),
        (["--table", SSU, "ssu"], "files and a choice of cells alone"),
        (["--table", SSU, "--plot", SSU], "files and a choice of cells alone"),
        (["--table", SSU, "--rounds", "3"], "files and a choice of cells alone"),
        (["--table", SSU, "--out", "x"], "direct it into a file"),
        (["--table", "none.json"], "none.json: No such file"),
        (["--plot", str(RESULTS / "chain-h200.json")], "a result of chain"),
    ],
)
def test_wrong_usage_names_what_is_wrong_and_exits_with_2(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert said in text


def test_a_run_prints_a_table_and_writes_its_result(gpu, tmp_path):
    result = run("ssu", *CELLS, "--contestants", "ssmgen,copy", "--out", "new/folder")
    assert result.exit_code == 0
    assert "1/2 heads 2, dim 16, fp16, batch 1\n    floor " in result.stdout
    (path,) = tmp_path.rglob("*.json")
    assert path == tmp_path / "new" / "folder" / "ssu-t-9.json"
    written = json.loads(path.read_text())
    assert [cell["us"] for cell in written["cells"]] == [{"ssmgen": 4.0, "copy": 8.0}] * 2
    assert written["environment"]["gpu"] == "NVIDIA T 9"
    share = 100 * written["cells"][0]["floor_us"] / 4.0
    assert f"4.00 ({share:.0f}%)" in result.stdout
    assert "differ by up to 5.0%" in result.stdout
    again = run("--table", str(path))
    assert f"4.00 ({share:.0f}%)" in again.stdout
    assert again.stdout.startswith("NVIDIA T 9")


def test_a_terminal_gets_a_bar(gpu, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = run("ssu", *CELLS, "--contestants", "copy")
    assert result.exit_code == 0
    assert "1/2 heads 2" not in result.stdout
    assert "━" in result.stdout


def test_json_is_all_that_is_printed(gpu):
    result = run("ssu", *CELLS, "--contestants", "ssmgen", "--json", "--out", "x.json")
    assert result.exit_code == 0
    (printed,) = json.loads(result.stdout)
    assert printed == json.loads(Path("x.json").read_text())
    assert "wrote x.json" in result.stderr


def test_rounds_and_quick_are_heeded(gpu):
    for options, rounds in ((("--rounds", "2"), 2), (("--quick",), 3), ((), 7)):
        result = run("ssu", *CELLS, "--contestants", "copy", "--json", *options)
        (printed,) = json.loads(result.stdout)
        assert [len(cell["rounds"]["copy"]) for cell in printed["cells"]] == [rounds] * 2


def test_a_wrong_ssmgen_exits_with_1(gpu, monkeypatch):
    def off(problem: Any) -> Any:
        def call(which: int) -> None:
            problem.launch(which)
            problem.out.view(-1)[0] += 1

        return measure.cold(call, problem.sets)

    monkeypatch.setattr(contestants, "ours", off)
    result = run("ssu", *CELLS, "--contestants", "ssmgen,copy")
    assert result.exit_code == 1
    assert "WRONG: ssmgen" in result.stdout
    written = json.loads(Path("ssu-t-9.json").read_text())
    assert all("ssmgen" not in cell["us"] for cell in written["cells"])


def test_a_wrong_peer_is_named_and_is_no_failure_of_ours(gpu, monkeypatch):
    def broken(problem: Any) -> Any:
        return [lambda: None] * problem.sets

    monkeypatch.setitem(contestants.PEERS, "ssu", {"vllm": broken})
    result = run("ssu", *CELLS, "--contestants", "ssmgen,vllm")
    assert result.exit_code == 0
    assert "WRONG: vllm" in result.stdout


def test_ctrl_c_writes_what_there_is_and_exits_with_130(gpu, monkeypatch):
    measured = session._measured

    def interrupted(cell: Any, made: Any) -> Any:
        if cell.batch == 2:
            raise KeyboardInterrupt
        return measured(cell, made)

    monkeypatch.setattr(session, "_measured", interrupted)
    result = run("ssu", "tokens", *CELLS, "--contestants", "ssmgen")
    assert result.exit_code == 130
    assert not Path("tokens-t-9.json").exists()
    assert [c["batch"] for c in json.loads(Path("ssu-t-9.json").read_text())["cells"]] == [1]


def test_a_result_that_cannot_be_written_is_printed(gpu, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("ssu", *CELLS, "--contestants", "copy", "--out", "file/below")
    assert result.exit_code == 1
    assert '"section": "ssu"' in result.stderr


def test_jit_runs_without_a_gpu(monkeypatch, tmp_path):
    from ssmgen.bench import jit

    def measured(made: Any, result: Any) -> None:
        result["rows"] = [{"name": "first", "value": 2.0, "unit": "ms"}]

    monkeypatch.setattr(jit, "jit", measured)
    result = run("jit", "--out", str(tmp_path))
    assert result.exit_code == 0
    assert "2.00 ms" in result.stdout
    assert (tmp_path / "jit-cpu.json").exists()


def test_plot_draws_what_is_chosen(tmp_path):
    pytest.importorskip("matplotlib")
    result = run("--plot", SSU, "--heads", "16", "--states", "int8", "--out", str(tmp_path))
    assert result.exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ssu-h200-16-heads-int8.png"]


def test_a_table_of_no_cells_is_an_error():
    found = run("--table", SSU, "--heads", "3")
    assert found.exit_code == 2
    assert "no cell of these files" in found.output
    assert found.stdout == ""


def test_table_prints_markdown_of_what_is_chosen():
    result = run("--table", SSU, "--heads", "16", "--states", "int8+sr", "--batches", "64")
    rows = [line for line in result.stdout.splitlines() if line.startswith("| int8")]
    assert rows == ["| int8 + SR 10 | 64 | 4.17 | 11.39 (37%) | 6.45 (65%) |"]


def test_every_section_is_a_grid_or_says_what_it_heeds():
    assert sorted(SECTIONS) == sorted([*GRIDS, *command.HEEDS])
