"""``ssmgen tune``: what it says, what it writes, how it ends; on a GPU that there is not."""

from __future__ import annotations

import json

import pytest
from rigs import FakeCompiler, FakeRig
from typer.testing import CliRunner

from ssmgen import Arch, Plan
from ssmgen.cli import app
from ssmgen.cli import tune as command
from ssmgen.cost import estimate
from ssmgen.families import spec
from ssmgen.tune import tuner

SM_90 = Arch.of("sm_90")
CONFIG = '{"state_dtype": "fp16"}'


def usual(config, plan, heads):
    return estimate(spec(config.family).work(config, plan), SM_90)(heads)


def one_is_fast(config, plan, heads):
    return 0.7 * usual(config, plan, heads) if (plan.block_m, plan.num_warps) == (8, 1) else usual(
        config, plan, heads
    )  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(cost, ...)` is the GPU here; compiling costs nothing."""

    def use(cost=one_is_fast, **more):
        rig = FakeRig(cost, **more)
        monkeypatch.setattr(command, "_rig", lambda: rig)
        return rig

    compiler = FakeCompiler()
    monkeypatch.setattr(tuner, "compile_all", lambda jobs, note, workers=None: compiler(jobs, note))
    use()
    return use


def call(*arguments, exit=0, input=None):
    result = CliRunner().invoke(app, ["tune", *map(str, arguments)], input=input)
    assert result.exit_code == exit, result.output
    return result


def test_tables_are_written_and_the_report_says_how_sure_it_is(gpu, tmp_path):
    report = tmp_path / "report.json"
    result = call("--config", CONFIG, "--out", tmp_path / "tuned", "--size", 512, "--size", 8192,
                  "--report", report)  # fmt: skip
    path = tmp_path / "tuned" / "ssu" / "sm_90" / "nvidia-pretend-9000" / "fp16.nearest.json"
    assert path.is_file()
    assert str(path) in result.output.replace("\n", "")
    assert "2 cells, 2 of them now" in result.output
    assert "2 have a faster plan; 1 tables written" in result.output
    data = json.loads(report.read_text())
    for cell in data["cells"]:
        assert cell["winner"]["block_m"] == 8
        assert f"{cell['margin']:.1%}" in result.output
        assert {"us", "spread", "rounds", "ratio", "error"} <= set(cell["standings"][0])
    again = call("--config", CONFIG, "--out", tmp_path / "tuned", "--size", 512, "--size", 8192)
    assert "2 cells, 0 of them now" in again.output


def test_json_is_one_object_and_nothing_else_on_standard_output(gpu, tmp_path):
    result = call("--config", "-", "--out", tmp_path, "--size", 512, "--json", input=CONFIG)
    data = json.loads(result.stdout)
    assert data["gpu"] == FakeRig.gpu
    assert len(data["cells"]) == len(data["tables"]) == 1


def test_a_budget_that_is_spent_exits_with_1_and_the_same_command_goes_on(gpu, tmp_path):
    gpu(launches=200_000)
    arguments = ("--config", CONFIG, "--out", tmp_path, "--budget", 40)
    first = call(*arguments, exit=1)
    assert "missing" in first.output
    assert "0 tables written" in first.output
    for _ in range(60):
        result = CliRunner().invoke(app, ["tune", *map(str, arguments)])
        if result.exit_code == 0:
            break
    assert "1 tables written" in result.output


def test_ctrl_c_exits_with_130_and_keeps_what_is_measured(gpu, tmp_path):
    gpu(stop=400)
    result = call("--config", CONFIG, "--out", tmp_path, exit=130)
    assert "Interrupted. What was measured is kept" in result.output
    assert len((tmp_path / "sm_90.journal").read_text().splitlines()) > 1


def test_check_writes_nothing_and_exits_with_1_if_a_plan_is_behind(gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from ssmgen.tune import check

    for name, function in (("odd_cells", check.odd_cells),):
        short = lambda configs, rig: function(configs, rig, (3, 37), (24,))  # noqa: E731, B023
        monkeypatch.setattr(check, name, short)
    result = call("--config", CONFIG, "--check", exit=1)
    assert "more than 5% behind" in result.output
    assert not list(tmp_path.iterdir())
    gpu(lambda *_: 10.0, noise=0.002)
    assert "0 more than 5% behind" in call("--config", CONFIG, "--check").output


def test_manifests_models_and_all_that_ships(gpu, tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"schema": 1, "configs": [{"state_dtype": ["bf16", "fp16"]}]}))
    call(path, "--out", tmp_path / "a", "--size", 1024)
    names = {p.name for p in (tmp_path / "a").rglob("*.nearest.json")}
    assert names == {"bf16.nearest.json", "fp16.nearest.json"}
    call("--model", "mamba2-130m", "--out", tmp_path / "b", "--size", 1024)
    assert len(list((tmp_path / "b").rglob("*.json"))) > 10


def test_the_shipped_grid_is_within_its_budget():
    """By what 16 cores and an H200 took: 28 kernels a second, half a second to load and check those
    of a config, and for a cell 0.09 s, or 0.06 where those race that were fastest around it."""
    from ssmgen.cli.prewarm import configs_of
    from ssmgen.tune.shipped import grid

    cells = tuner.cells_of(grid(configs_of([], [], [], True)), SM_90, "NVIDIA H200")
    keys = {(cell.config.family, cell.key) for cell in cells}
    assert {("gdn", "32bit.nearest.VK"), ("conv1d", "16bit.many"), ("ssu", "fp16.nearest.each.8"),
            ("ssu", "int8.stochastic.each.2"), ("ssu", "bf16.nearest.many.4")} <= keys  # fmt: skip
    # What stands for a key is plain, and prefill is not raced.
    assert not any(cell.config.kda for cell in cells if cell.config.family == "gdn")
    assert not any(cell.config.prefill for cell in cells if cell.config.family == "conv1d")
    kernels = sum(map(len, tuner.spaces(cells, SM_90).values()))
    configs = {cell.config for cell in cells}
    fine = sum(cell.heads.bit_count() > 1 for cell in cells)
    seconds = kernels / 28 + 0.5 * len(configs) + 0.06 * fine + 0.09 * (len(cells) - fine)
    # The default budget; what is left of ten minutes is for the process to start and end.
    assert seconds < 570


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "nothing to do; give a MANIFEST, --model or --config"),
        (("--config", '{"dim": 7}'), "dim: 7 is not allowed"),
        (("--config", "{}", "--budget", "0"), "--budget"),
        (("--model", "nobodys"), "has no manifest"),
        (("--config", "{}", "--report", "/nowhere/at/all"), "No such file"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_allowed(gpu, arguments, named):
    result = call(*arguments, exit=2)
    assert named in " ".join(result.output.replace("│", " ").split())


def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch):
    from ssmgen.errors import DeviceError

    def none(*_):
        raise DeviceError("arch: no CUDA device is visible")

    monkeypatch.setattr(Arch, "detect", none)
    result = call("--config", "{}", exit=2)
    assert "there is no GPU here to measure on" in " ".join(result.output.split())


def test_candidates_are_compiled_for_real(store_dir):
    """A few of them, in the process pool of prewarm; what the compiler made of them prunes."""
    from ssmgen import KernelConfig
    from ssmgen.prewarm import Job
    from ssmgen.template import key
    from ssmgen.tune.space import prune

    config = KernelConfig(state_dtype="fp16", dim=16, dstate=32, has_d=False, has_dt_bias=False)
    cells = tuner.cells_of([config], SM_90, None, [1024])
    plans = [*tuner.spaces(cells, SM_90)[config]][:3]
    jobs = [Job(config, plan, SM_90, key(config, plan, SM_90)) for plan in plans]
    heard = []
    built = tuner.compile_all(jobs, lambda done, total: heard.append((done, total)), 1)
    assert heard[-1] == (3, 3)
    assert set(built) == {job.key for job in jobs}
    manifests = {job.plan: built[job.key] for job in jobs}
    assert all(m["registers"] > 8 and m["spills"] == 0 for m in manifests.values())
    chosen, _ = prune(config, SM_90, 1024, manifests, plans[0])
    assert chosen[0] == plans[0] == Plan(**manifests[plans[0]]["plan"])
