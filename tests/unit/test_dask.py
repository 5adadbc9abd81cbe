"""Prewarm on a dask cluster: a real scheduler and real workers on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ssmgen import Arch, KernelConfig, compiler, prewarm
from ssmgen.cli.prewarm import prewarm as command
from ssmgen.cluster import DaskExecutor
from ssmgen.store import Store, user_store

pytest.importorskip("distributed")

CONFIGS = [KernelConfig(dim=dim, dstate=16) for dim in range(8, 8 * 13, 8)]
JOBS = [(config, Arch.of("sm_80")) for config in CONFIGS]

# In each worker: note who compiles what. The workers have no store in reach.
PRELOAD = """
import os
from ssmgen import compiler, template

if compiler.compile.__module__ == "ssmgen.compiler":  # dask loads this twice
    real = compiler.compile

def compile(config, plan, arch):
    with open({log!r}, "a") as file:
        file.write(f"{{os.getpid()}} {{template.key(config, plan, arch)}}\\n")
    return real(config, plan, arch)

compiler.compile = compile
"""


class Cluster:
    """A scheduler and two workers of one thread, each a process."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.log.touch()
        (folder / "preload.py").write_text(PRELOAD.format(log=str(self.log)))
        file = folder / "scheduler.json"
        self.processes = [
            self.start("scheduler", "--host", "127.0.0.1", "--port", "0",
                       "--scheduler-file", str(file), "--no-dashboard")
        ]  # fmt: skip
        self.processes += [
            self.start("worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-nanny",
                       "--no-dashboard", "--host", "127.0.0.1", "--name", f"worker-{i}",
                       "--local-directory", str(folder / f"worker-{i}"),
                       "--preload", str(folder / "preload.py"))
            for i in range(2)
        ]  # fmt: skip
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text().endswith("}"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.address = json.loads(file.read_text())["address"]
        self.executor = DaskExecutor(self.address)
        self.executor.client.wait_for_workers(2, timeout=60)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        code = f"from distributed.cli.dask_{arguments[0]} import main; main()"
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, *arguments[1:]],
            env={**os.environ, "SSMGEN_CACHE_DIR": "/none"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def compiled(self) -> list[tuple[int, str]]:
        """Process and key of each compilation begun."""
        lines = self.log.read_text().splitlines()
        return [(int(pid), key) for pid, key in map(str.split, lines)]

    def close(self) -> None:
        self.executor.shutdown()
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


@pytest.fixture(autouse=True)
def _elsewhere(store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers do not see the store of the parent."""
    real = prewarm._Run.task
    monkeypatch.setattr(prewarm._Run, "task", lambda run, job: {**real(run, job), "store": "/none"})


def test_a_worker_killed_half_way_loses_nothing(cluster: Cluster) -> None:
    victim: list[int] = []

    def kill(event: prewarm.Event) -> None:
        built = {pid for pid, _ in cluster.compiled()}
        if event.stage == "built" and not victim and len(built) == 2 and len(in_store()) >= 8:
            victim.append(cluster.compiled()[-1][0])  # at work on something now
            os.kill(victim[0], signal.SIGKILL)

    report = prewarm.prewarm(JOBS, executor=cluster.executor, progress=kill)
    assert victim
    assert victim[0] in [process.pid for process in cluster.processes]
    assert report.failed == []
    wanted = {job.key for job in prewarm.expand(JOBS)}
    assert {row["key"] for row in report.built} == in_store() == wanted
    times = Counter(key for _, key in cluster.compiled())
    assert set(times) == wanted
    # At most what was in flight, two kernels a worker, was compiled again.
    assert sum(times.values()) <= len(wanted) + 4
    # Nothing is left to do, and nobody is asked.
    assert len(prewarm.prewarm(JOBS, executor=cluster.executor).present) == len(wanted)
    assert sum(times.values()) == len(cluster.compiled())


def test_one_kernel_asked_for_by_two_is_compiled_once(cluster: Cluster) -> None:
    store = user_store()
    assert store is not None
    (job,) = prewarm.expand(JOBS[:1])
    task = prewarm._Run(store, [job], lambda event: None).task(job)
    other = DaskExecutor(cluster.address)
    try:
        futures = [x.submit(prewarm.compile_task, task) for x in (cluster.executor, other)]
        first, second = (future.result(60) for future in futures)
    finally:
        other.shutdown()
    assert first["contents"] == second["contents"]
    assert [key for _, key in cluster.compiled()] == [job.key]


def test_the_command_compiles_on_the_cluster(cluster: Cluster) -> None:
    app = typer.Typer()
    app.command()(command)
    url = cluster.address.replace("tcp://", "dask://")
    texts = [part for config in CONFIGS[:2] for part in ("--config", config.to_json())]
    result = CliRunner().invoke(app, [*texts, "--arch", "sm_80", "--executor", url])
    assert result.exit_code == 0, result.output
    assert "2 built, 0 present, 0 failed" in result.output
    assert len(cluster.compiled()) == 2


def in_store() -> set[str]:
    store: Any = user_store()
    assert isinstance(store, Store)
    keys = {path.parent.parent.name for path in store.base.glob("??/*/*/manifest.json")}
    return {key for key in keys if store.get(key, compiler.toolchain())}
