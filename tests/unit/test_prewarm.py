"""Prewarm: all that is wanted is in the store or named as failed, whatever dies on the way."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import typer
from artifacts import compiled
from dispatch_tables import put
from typer.testing import CliRunner, Result

import ssmgen
from ssmgen import Arch, KernelConfig, compiler, prewarm, template
from ssmgen.cli.prewarm import prewarm as command
from ssmgen.cluster import DaskExecutor
from ssmgen.errors import CompileError, ConfigError, StoreError
from ssmgen.plan import Plan
from ssmgen.store import Store, user_store

SM_80, SM_90 = Arch.of("sm_80"), Arch.of("sm_90")
# One plan each.
CONFIGS = [KernelConfig(dim=dim, dstate=16, batch_invariant=True) for dim in range(8, 8 * 13, 8)]
JOBS = [(config, SM_80) for config in CONFIGS]
POISON = CONFIGS[4]


def fake(config: KernelConfig, plan: Plan, arch: Arch) -> Any:
    """In the place of `compiler.compile`: quick."""
    return compiled(config, plan, arch, toolchain=compiler.toolchain())


def log(key: str) -> None:
    with open(os.environ["TEST_LOG"], "a") as file:
        file.write(f"{os.getpid()} {key}\n")


def logged() -> list[str]:
    """The keys whose compilation began, in order."""
    path = Path(os.environ["TEST_LOG"])
    return [line.split()[1] for line in path.read_text().splitlines()] if path.exists() else []


def pids() -> set[int]:
    return {int(line.split()[0]) for line in Path(os.environ["TEST_LOG"]).read_text().splitlines()}


def task_fake(task: dict[str, Any]) -> dict[str, Any]:
    """In the place of `compile_task` in a process of a pool."""
    log(task["key"])
    compiler.compile = fake
    return prewarm_task(task)


def task_that_kills(task: dict[str, Any]) -> dict[str, Any]:
    if KernelConfig.from_json(task["config"]) == POISON:
        log(task["key"])
        os.kill(os.getpid(), signal.SIGKILL)
    return task_fake(task)


def task_that_kills_once(task: dict[str, Any]) -> dict[str, Any]:
    if task["key"] in logged():
        return task_fake(task)
    return task_that_kills(task)


def slow_task(task: dict[str, Any]) -> dict[str, Any]:
    time.sleep(0.4)
    return task_fake(task)


prewarm_task = prewarm.compile_task


@pytest.fixture(autouse=True)
def _log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_dir: Path) -> None:
    monkeypatch.setenv("TEST_LOG", str(tmp_path / "log"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[KernelConfig]:
    """Compilations in this process are quick; the list has the configs of each."""
    asked: list[KernelConfig] = []

    def counted(config: KernelConfig, plan: Plan, arch: Arch) -> Any:
        asked.append(config)
        return fake(config, plan, arch)

    monkeypatch.setattr(compiler, "compile", counted)
    return asked


def run(jobs: Any = JOBS, **options: Any) -> prewarm.Report:
    if "executor" not in options and "workers" not in options:
        with ThreadPoolExecutor(2) as executor:
            return prewarm.prewarm(jobs, executor=executor, **options)
    return prewarm.prewarm(jobs, **options)


def in_store() -> set[str]:
    """Keys of the entries that verify; there must be no others."""
    store = user_store()
    assert store is not None
    keys = {path.name for path in store.base.glob("??/*")}
    assert all(store.get(key, compiler.toolchain()) for key in keys)
    assert not list((store.base / "stage").glob("*"))
    return keys


def wanted(jobs: Any = JOBS) -> set[str]:
    return {job.key for job in prewarm.expand(jobs)}


def keys(rows: list[dict[str, Any]]) -> set[str]:
    return {row["key"] for row in rows}


# ---- real compilations ----------------------------------------------------------------------


def test_a_pool_compiles_what_get_kernel_then_finds_even_where_it_may_not_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSMGEN_JIT", "deny")
    config = KernelConfig(state_dtype="fp16", rounding="stochastic", dim=16, dstate=32)
    report = run([(config, SM_90), (config, SM_80), (config, SM_90)], workers=2)
    assert not report.failed
    assert keys(report.built) == wanted([(config, SM_90), (config, SM_80)]) == in_store()
    for arch in (SM_90, SM_80):
        for variant in ssmgen.get_kernel(config, arch).variants:
            (row,) = (r for r in report.built if r["key"] == variant.artifact.manifest["key"])
            assert row["registers"] == variant.artifact.manifest["registers"] > 0
            assert row["spills"] == 0
            assert row["size"] == len(variant.artifact.cubin)
            assert row["seconds"] > 0
            assert KernelConfig(**row["config"]) == config
            assert Plan(**row["plan"]) == variant.plan
    again = run([(config, SM_90)], workers=2)
    assert keys(again.present) == wanted([(config, SM_90)])
    assert not again.built


def test_a_worker_leaves_no_files_of_triton_behind() -> None:
    (job,) = prewarm.expand(JOBS[:1])
    task = {"config": job.config.to_json(), "plan": job.plan.fields(), "arch": str(job.arch),
            "key": job.key, "toolchain": compiler.toolchain(), "store": "/none"}  # fmt: skip
    assert prewarm.compile_task(task)["contents"]["kernel.cubin"].startswith(b"\x7fELF")
    assert not list(Path(compiler._scratch()).iterdir())


# ---- what is compiled and what is not -------------------------------------------------------


def test_only_what_the_store_lacks_or_cannot_verify_is_compiled(here: list[KernelConfig]) -> None:
    assert not run().failed
    store = user_store()
    assert store is not None
    damaged, gone = (store.entry(job.key, compiler.toolchain()) for job in prewarm.expand(JOBS[:2]))
    (damaged / "kernel.cubin").write_bytes(b"")
    for path in gone.iterdir():
        path.unlink()
    gone.rmdir()
    here.clear()
    events: list[prewarm.Event] = []
    report = run(progress=events.append)
    assert sorted(here, key=CONFIGS.index) == CONFIGS[:2]
    asked = [event.job.config for event in events if event.stage == "submitted"]
    assert asked == CONFIGS[:2]
    assert (len(report.built), len(report.present)) == (2, len(JOBS) - 2)
    assert in_store() == wanted()


def test_a_kernel_that_another_process_published_meanwhile_is_not_compiled(
    here: list[KernelConfig],
) -> None:
    published = {job.key: threading.Event() for job in prewarm.expand(JOBS[:4])}

    def other(event: prewarm.Event) -> None:
        store = user_store()
        if event.stage == "submitted" and store is not None:
            store.put(fake(event.job.config, event.job.plan, event.job.arch))
            published[event.job.key].set()

    class Later(ThreadPoolExecutor):
        """Runs a task only once the other process has published."""

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            return super().submit(lambda: (published[args[0]["key"]].wait(), fn(*args))[1])

    with Later(2) as executor:
        report = run(JOBS[:4], executor=executor, progress=other)
    assert not here
    assert keys(report.present) == wanted(JOBS[:4])


def test_at_most_two_kernels_a_worker_are_in_flight(here: list[KernelConfig]) -> None:
    class Counting(ThreadPoolExecutor):
        flying = most = 0

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.flying += 1
            self.most = max(self.most, self.flying)
            future = super().submit(lambda: (time.sleep(0.01), fn(*args))[1])
            future.add_done_callback(self.landed)
            return future

        def landed(self, future: Any) -> None:
            self.flying -= 1

    with Counting(1) as executor:
        assert len(run(executor=executor, workers=3).built) == len(JOBS)
    assert 2 <= executor.most <= 6


def test_events_and_report_agree_and_are_plain_data(here: list[KernelConfig]) -> None:
    events: list[prewarm.Event] = []
    report = run(progress=events.append)
    rows = [event.row for event in events if event.row]
    assert rows == report.built
    assert {event.total for event in events} == {len(JOBS)}
    for job in prewarm.expand(JOBS):
        stages = [event.stage for event in events if event.job == job]
        assert stages == ["submitted", "publish", "built"]
    assert json.loads(report.to_json()) == dataclasses.asdict(report)
    assert report.rate == pytest.approx(len(JOBS) / report.seconds, rel=0.2)
    assert report.store == str(user_store().root)  # type: ignore[union-attr]


# ---- what goes wrong ------------------------------------------------------------------------


def breaks(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def compile(config: KernelConfig, plan: Plan, arch: Arch) -> Any:
        if config == POISON:
            raise error
        return fake(config, plan, arch)

    monkeypatch.setattr(compiler, "compile", compile)


@pytest.mark.parametrize("error", [CompileError("ptxas says no"), RuntimeError("ptxas says no")])
def test_a_failure_is_named_and_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    breaks(monkeypatch, error)
    report = run()
    (row,) = report.failed
    assert KernelConfig(**row["config"]) == POISON
    assert row["arch"] == "sm_80"
    assert row["plan"]["algorithm"] in ("simple", "vertical")
    assert "ptxas says no" in row["error"]
    assert keys(report.built) == wanted() - {row["key"]} == in_store()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda contents: {**contents, "kernel.cubin": b"\x7fELF"}, "manifest says"),
        (lambda contents: {k: v for k, v in contents.items() if k != "source.py"}, "malformed"),
    ],
)
def test_what_comes_back_is_verified_before_it_is_published(
    monkeypatch: pytest.MonkeyPatch,
    here: list[KernelConfig],
    spoil: Callable[[dict[str, bytes]], dict[str, bytes]],
    named: str,
) -> None:
    def spoiled(task: dict[str, Any]) -> dict[str, Any]:
        result = prewarm_task(task)
        return {**result, "contents": spoil(result["contents"])}

    monkeypatch.setattr(prewarm, "compile_task", spoiled)
    report = run(JOBS[:2])
    assert all(named in row["error"] for row in report.failed)
    assert len(report.failed) == 2
    assert not in_store()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"toolchain": "triton-2.0.0"}, f"the worker has {compiler.toolchain()}, triton-2.0.0 is"),
        ({"key": "0" * 64}, "the worker has another ssmgen"),
    ],
)
def test_a_worker_with_other_versions_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str], named: str
) -> None:
    monkeypatch.setattr(prewarm, "compile_task", lambda task: prewarm_task({**task, **change}))
    report = run(JOBS[:1])
    assert named in report.failed[0]["error"]


def test_without_a_user_store_or_a_compiler_nothing_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "toolchain", lambda: None)
        with pytest.raises(StoreError, match="no Triton here"):
            prewarm.prewarm(JOBS)
    monkeypatch.setattr(prewarm, "user_store", lambda: None)
    with pytest.raises(StoreError, match="SSMGEN_CACHE_DIR"):
        prewarm.prewarm(JOBS)


def test_a_store_that_cannot_be_made_is_found_out_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SSMGEN_CACHE_DIR", f"{tmp_path}/file")
    with pytest.raises(StoreError, match=r"cannot publish to .*/file: it is not a folder; make"):
        run(JOBS[:1])


def test_a_store_that_refuses_fails_each_kernel_by_name(
    monkeypatch: pytest.MonkeyPatch, here: list[KernelConfig]
) -> None:
    def full(store: Store, artifact: Any) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(Store, "put", full)
    report = run(JOBS[:3])
    assert [row["error"] for row in report.failed] == ["no space left"] * 3


# ---- real processes that die ----------------------------------------------------------------


def test_a_kernel_that_kills_its_worker_is_tried_once_more_then_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prewarm, "compile_task", task_that_kills)
    report = run(workers=2)
    (row,) = report.failed
    assert KernelConfig(**row["config"]) == POISON
    assert "its worker process died, twice" in row["error"]
    assert keys(report.built) == wanted() - {row["key"]} == in_store()
    assert logged().count(row["key"]) == 2
    # Besides the poison only what was in flight with it, at most 2 x workers, ran again.
    assert len(logged()) <= len(JOBS) + 4


def test_a_worker_that_dies_once_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prewarm, "compile_task", task_that_kills_once)
    report = run(workers=2)
    assert not report.failed
    assert in_store() == wanted()


def test_workers_that_cannot_start_are_given_up_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prewarm, "_begin_worker", os.kill)  # with a folder: a TypeError
    report = run(workers=2)
    assert len(report.failed) == len(JOBS)
    assert all("__main__" in row["error"] for row in report.failed)


def test_an_executor_of_the_caller_that_breaks_is_reported_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import multiprocessing

    monkeypatch.setattr(prewarm, "compile_task", task_that_kills)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        report = run(executor=executor)
    assert len(report.failed) + len(report.built) == len(JOBS)
    assert keys(report.built) == in_store()
    assert all("ProcessPoolExecutor broke" in row["error"] for row in report.failed)


SCRIPT = """
import sys
sys.path[:0] = {path!r}
import test_prewarm, typer
from ssmgen import prewarm
from ssmgen.cli.prewarm import prewarm as command
if __name__ == "__main__":
    prewarm.compile_task = test_prewarm.slow_task
    app = typer.Typer()
    app.command()(command)
    app()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_no_process_and_a_store_that_goes_on(
    how: signal.Signals, tmp_path: Path, here: list[KernelConfig]
) -> None:
    script = tmp_path / "script.py"
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script.write_text(SCRIPT.format(path=path))
    texts = [part for config in CONFIGS for part in ("--config", config.to_json())]
    process = subprocess.Popen(
        [sys.executable, str(script), "--jobs", "2", "--arch", "sm_80", *texts],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    store = user_store()
    assert store is not None
    deadline = time.monotonic() + 60
    while len(list(store.base.glob("??/*/*/manifest.json"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    # Ctrl-C reaches the whole group; kill -9 hits the parent alone.
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
    output, _ = process.communicate(timeout=30)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "Interrupted" in output
        assert "Traceback" not in output
    while any(Path(f"/proc/{pid}").exists() for pid in pids()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for stage in (store.base / "stage").glob("*"):  # a killed publish may leave one
        assert how == signal.SIGKILL
        for file in stage.iterdir():
            file.unlink()
        stage.rmdir()
    there = in_store()
    assert 3 <= len(there) < len(JOBS)
    report = run()
    assert keys(report.present) == there
    assert len(here) == len(JOBS) - len(there)
    assert in_store() == wanted()


# ---- the command ----------------------------------------------------------------------------


def call(*arguments: str, input: str | None = None) -> Result:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    return CliRunner().invoke(app, arguments, input=input, env={"COLUMNS": "1000"})


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch, here: list[KernelConfig]) -> list[KernelConfig]:
    """The command's pool is of threads of this process."""
    real = prewarm.prewarm

    def quick(jobs: Any, *, gpu: Any, executor: Any, workers: Any, progress: Any) -> Any:
        with ThreadPoolExecutor(workers) as pool:
            return real(jobs, gpu=gpu, executor=pool, progress=progress)

    monkeypatch.setattr(prewarm, "prewarm", quick)
    return here


@pytest.mark.usefixtures("threads")
def test_command_takes_manifests_models_and_configs(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    one = {"batch_invariant": True}  # one plan each
    configs = [{"dim": [16, 24], "has_z": True, **one}]
    path.write_text(json.dumps({"schema": 1, "configs": configs}))
    result = call(str(path), "--config", json.dumps({"dim": 8, **one}), "--config", "-", "--arch",
                  "sm_80", "--arch", "sm_120",
                  input=json.dumps({"dim": 16, "has_z": True, **one}))  # fmt: skip
    assert result.exit_code == 0
    # Threads finish in any order.
    assert re.search(r"^\[1/6\] built    sm_\d+ ssu dim=", result.output, re.M)
    assert "6 built, 0 present, 0 failed" in result.output
    shapes = ((16, True), (24, True), (8, False))
    pairs = [(KernelConfig(dim=d, has_z=z, **one), a) for d, z in shapes
             for a in (SM_80, Arch.of("sm_120"))]  # fmt: skip
    assert in_store() == wanted(pairs)
    # Equal shapes need equal kernels: what one model built, the other finds.
    assert call("--model", "Mamba2-130m", "--arch", "sm_80", "--jobs", "4").exit_code == 0
    again = call("--model", "bamba-9b", "--arch", "sm_80", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["built"] == []


@pytest.mark.usefixtures("threads")
def test_command_compiles_for_one_gpu_or_for_any_of_an_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSMGEN_TUNED_PATH", str(tmp_path))
    tile = {"algorithm": "simple", "block_n": 128, "num_warps": 1}
    for gpu, rows in (("NVIDIA A", 4), ("NVIDIA B", 8)):
        put(tmp_path, [{"plan": {**tile, "block_m": rows}}], gpu=gpu, arch="sm_80")
    asked = ("--config", '{"state_dtype": "fp16"}', "--arch", "sm_80", "--json")
    only = json.loads(call(*asked, "--gpu", "NVIDIA B").stdout)
    assert [row["plan"]["block_m"] for row in only["built"]] == [8]
    every = json.loads(call(*asked).stdout)
    assert [row["plan"]["block_m"] for row in every["present"]] == [8]
    assert [row["plan"]["block_m"] for row in every["built"]] == [4]


@pytest.mark.usefixtures("threads")
def test_command_reports_failures_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch, CompileError("ptxas says no"))
    path = tmp_path / "report.json"
    texts = [part for config in CONFIGS for part in ("--config", config.to_json())]
    result = call(*texts, "--arch", "sm_80", "--report", str(path), "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report == json.loads(path.read_text())
    assert len(report["built"]) == len(JOBS) - 1
    (row,) = report["failed"]
    assert "ptxas says no" in row["error"]
    assert f"FAILED sm_80 {row['key'][:12]}" in result.stderr
    assert f"{len(JOBS) - 1} built, 0 present, 1 failed" in result.stderr


def test_a_gpu_that_no_table_is_for_is_warned_of() -> None:
    asked = ("--config", "{}", "--arch", "sm_90", "--dry-run")
    assert "no table is for NVIDIA H2O0; there are tables for nvidia-h200" in (
        call(*asked, "--gpu", "NVIDIA H2O0").stderr
    )
    assert "no table" not in call(*asked, "--gpu", "NVIDIA H200").stderr


def test_dry_run_names_what_is_missing_and_compiles_nothing(here: list[KernelConfig]) -> None:
    run(JOBS[:1])
    here.clear()
    texts = [part for config in CONFIGS for part in ("--config", config.to_json())]
    result = call(*texts, "--arch", "sm_80", "--dry-run")
    assert result.exit_code == 0
    assert result.output.endswith(f"{len(JOBS)} kernels: 1 present, {len(JOBS) - 1} to compile\n")
    found = json.loads(call(*texts, "--arch", "sm_80", "--dry-run", "--json").stdout)
    assert found["present"] == 1
    assert keys(found["missing"]) == wanted() - in_store()
    assert not here


def test_list_names_every_shipped_model_and_the_share_of_a_rank() -> None:
    text = call("--list").output
    models = {m["name"]: m for m in json.loads(call("--list", "--json").stdout)}
    assert all(name in text for name in models)
    assert models["nemotron-h-8b"]["ranks"]["8"] == {"nheads": 16, "n_groups": 1}
    assert models["falcon-mamba-7b"]["ranks"]["8"] == {"dim": 1024}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "nothing to do; give a MANIFEST, --model or --config"),
        (("--config", "{}"), "name an architecture, e.g. --arch sm_90"),
        (("--config", "{}", "--arch", "sm_1"), "'sm_1' is not known"),
        (("--config", '{"dim": 7}', "--arch", "sm_90"), "dim: 7 is not allowed"),
        (("--model", "gpt-2", "--arch", "sm_90"), "'gpt-2' has no manifest"),
        (("none.json", "--arch", "sm_90"), "none.json: No such file"),
        (("--config", "{}", "--arch", "sm_90", "--jobs", "0"), "--jobs"),
        (("--config", "{}", "--arch", "sm_90", "--executor", "ray://x:1"), "dask://HOST:PORT"),
        (("--config", "{}", "--arch", "sm_90", "--executor", "dask://x"), "dask://HOST:PORT"),
        (("--config", "{}", "--arch", "sm_90", "--report", "/none/x"), "report /none/x: No such"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_allowed(
    arguments: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call(*arguments)
    assert result.exit_code == 2
    assert named in " ".join(result.output.replace("│", " ").split())


def test_live_display_shows_stage_rate_time_left_and_failures() -> None:
    from rich.console import Console

    from ssmgen.cli.prewarm import _View

    first, second, third = prewarm.expand(JOBS[:3])
    view = _View()
    for event in (
        prewarm.Event(first, "submitted", 3),
        prewarm.Event(second, "submitted", 3),
        prewarm.Event(third, "submitted", 3),
        prewarm.Event(second, "built", 3, {"seconds": 0.3}),
        prewarm.Event(third, "failed", 3, {"error": "ptxas says no\nand more"}),
    ):
        view(event)
    console = Console(width=200, force_terminal=True, file=io.StringIO(), color_system=None)
    console.print(view)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(rf"submitted \d+\.\d s {re.escape(str(first))}", text)
    assert str(second) not in text
    assert f"FAILED   {third}: ptxas says no" in text
    assert "and more" not in text
    assert "2/3" in text
    assert "/s" in text
    assert " s left" in text
    assert "1 built" in text


def test_dask_that_is_not_installed_or_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"pip install 'ssmgen\[dask\]'"):
        DaskExecutor("tcp://127.0.0.1:9")
    result = call("--config", "{}", "--arch", "sm_90", "--executor", "dask://127.0.0.1:9")
    assert result.exit_code == 2
    assert "ssmgen[dask]" in result.output


def test_the_digest_of_a_job_is_that_of_its_kernel() -> None:
    for job in prewarm.expand([*JOBS, *JOBS]):
        assert job.key == template.key(job.config, job.plan, job.arch)
    assert len(prewarm.expand([*JOBS, *JOBS])) == len(JOBS)
