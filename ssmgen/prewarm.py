"""Prewarm: compile many kernels ahead of time, on all cores or on a cluster.

The parent finds out what is missing, hands out one kernel at a time, verifies what comes back and
publishes it. A worker returns the bytes of an entry and needs no store, so any executor will do,
with or without a shared disk, and a worker that dies leaves nothing half-written.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import compiler, template
from .arch import Arch
from .artifact import Artifact
from .config import KernelConfig
from .errors import CompileError, SsmgenError, StoreError
from .plan import Plan, variants
from .store import Store, user_store

__all__ = ["Event", "Job", "Report", "compile_jobs", "cores", "expand", "prewarm"]

log = logging.getLogger("ssmgen")


@dataclass(frozen=True)
class Job:
    """One kernel to compile."""

    config: KernelConfig
    plan: Plan
    arch: Arch
    key: str

    def __str__(self) -> str:
        return f"{self.arch} {_what(self.config)}, {self.plan}"


@functools.lru_cache(4096)
def _what(config: KernelConfig) -> str:
    """Family, and the fields that differ from its defaults."""
    usual = type(config)()
    given = (f"{n}={v}" for n, v in config.key_fields().items() if v != getattr(usual, n))
    return " ".join((config.family, *given))


def expand(pairs: Iterable[tuple[KernelConfig, Arch]], gpu: str | None = None) -> list[Job]:
    """The distinct kernels that dispatch may ask for, for each config and architecture: on the GPU
    of that name, else on any GPU of the architecture."""
    jobs: dict[str, Job] = {}
    for config, arch in pairs:
        for plan in variants(config, arch, gpu):
            key = template.key(config, plan, arch)
            jobs.setdefault(key, Job(config, plan, arch, key))
    return list(jobs.values())


@dataclass(frozen=True)
class Event:
    """What happened to a job: ``present``, ``submitted``, ``publish``, ``built``, ``failed``.

    `row` is its line of the report, if it is done; `total` counts all jobs.
    """

    job: Job
    stage: str
    total: int
    row: dict[str, Any] | None = None


@dataclass
class Report:
    """What became of each kernel: plain data.

    Each row has key, arch, config, plan and the seconds of its compilation; those in ``built`` and
    ``present`` also registers, spills, shared and size (bytes of the cubin); those in ``failed``
    also error. ``rate`` is kernels built a second.
    """

    store: str
    toolchain: str | None
    built: list[dict[str, Any]] = field(default_factory=list)
    present: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    rate: float = 0.0

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def prewarm(
    jobs: Iterable[tuple[KernelConfig, Arch]],
    *,
    gpu: str | None = None,
    executor: Executor | None = None,
    workers: int | None = None,
    progress: Callable[[Event], None] | None = None,
) -> Report:
    """Compile what the user store does not have yet, and publish it there.

    `jobs` are pairs of config and architecture. With `gpu`, a device's name, only what that one
    needs; else what any GPU of the architecture may. Without `executor` a pool of `workers`
    processes is used, one a core by default. A kernel that fails is in the report and stops no
    other. It compiles under ``SSMGEN_JIT=deny`` too: to call it is to ask for it. A script must
    call it under ``if __name__ == "__main__"``. Raises `StoreError` if no store can be written.
    """
    return compile_jobs(expand(jobs, gpu), executor=executor, workers=workers, progress=progress)


def compile_jobs(
    jobs: list[Job],
    *,
    executor: Executor | None = None,
    workers: int | None = None,
    progress: Callable[[Event], None] | None = None,
) -> Report:
    """`prewarm` for kernels whose plans are chosen already."""
    store = user_store()
    if store is None:
        raise StoreError(
            "prewarm: there is no user store to publish to; name one in SSMGEN_CACHE_DIR"
        )
    if executor is None and compiler.toolchain() is None:
        raise StoreError("prewarm: there is no Triton here to compile with; install triton")
    run = _Run(store, jobs, progress or (lambda event: None))
    start = time.perf_counter()
    todo = run.missing()
    if todo:
        store.require_writable()
    if todo and executor is None:
        _in_pools(run, todo, workers or cores())
    elif todo and executor is not None:
        _on(executor, run, todo, workers)
    seconds = time.perf_counter() - start
    run.report.seconds = round(seconds, 3)
    run.report.rate = round(len(run.report.built) / seconds, 3)
    return run.report


class _Run:
    """The parent's side: what is wanted, what came of it."""

    def __init__(self, store: Store, jobs: list[Job], progress: Callable[[Event], None]) -> None:
        self.store = store
        self.jobs = jobs
        self.progress = progress
        self.toolchain = compiler.toolchain()
        self.report = Report(str(store.root), self.toolchain)

    def missing(self) -> deque[Job]:
        """Jobs whose kernels the store does not have, verified."""
        todo = deque[Job]()
        for job in self.jobs:
            found = self.store.get(job.key, self.toolchain)
            if found is None:
                todo.append(job)
            else:
                self.done(job, "present", found, 0.0)
        return todo

    def drain(self, todo: deque[Job], executor: Executor, width: int) -> list[Job]:
        """Run `todo`, at most `width` at a time.

        If the executor breaks, returns the jobs that were lost with it; the rest stay in `todo`.
        """
        flying: dict[Future[Any], Job] = {}
        lost: list[Job] = []
        broken = False
        try:
            while flying or (todo and not broken):
                while todo and len(flying) < width and not broken:
                    try:
                        flying[executor.submit(compile_task, self.task(todo[0]))] = todo[0]
                        self.tell(todo.popleft(), "submitted")
                    except BrokenExecutor:
                        broken = True
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    job = flying.pop(future)
                    try:
                        self.settle(job, future.result())
                    except BrokenExecutor:
                        lost.append(job)
                        broken = True
                    except Exception as error:
                        self.fail(job, f"{type(error).__name__}: {error}")
        finally:
            for future in flying:
                future.cancel()
        return lost

    def task(self, job: Job) -> dict[str, Any]:
        """All a worker needs, as plain data."""
        return {
            "config": job.config.to_json(),
            "plan": job.plan.fields(),
            "arch": str(job.arch),
            "key": job.key,
            "toolchain": self.toolchain,
            "store": str(self.store.root),
        }

    def settle(self, job: Job, result: dict[str, Any]) -> None:
        """Verify and publish what a worker returned."""
        seconds = result["seconds"]
        if "error" in result:
            return self.fail(job, result["error"], seconds)
        self.tell(job, "publish")
        try:
            artifact = Artifact.verify(
                job.key, result["toolchain"], result["contents"], template.ABI_VERSION
            )
            self.store.put(artifact)
        except StoreError as error:
            return self.fail(job, str(error), seconds)
        self.done(job, "present" if result["found"] else "built", artifact, seconds)

    def done(self, job: Job, stage: str, artifact: Artifact, seconds: float) -> None:
        manifest = artifact.manifest
        row = {
            **self.row(job, seconds),
            **{name: manifest[name] for name in ("registers", "spills", "shared")},
            "size": len(artifact.cubin),
        }
        (self.report.built if stage == "built" else self.report.present).append(row)
        self.tell(job, stage, row)

    def fail(self, job: Job, error: str, seconds: float = 0.0) -> None:
        row = {**self.row(job, seconds), "error": error}
        self.report.failed.append(row)
        self.tell(job, "failed", row)

    def row(self, job: Job, seconds: float) -> dict[str, Any]:
        return {
            "key": job.key,
            "arch": str(job.arch),
            "config": job.config.fields(),
            "plan": job.plan.fields(),
            "seconds": round(seconds, 4),
        }

    def tell(self, job: Job, stage: str, row: dict[str, Any] | None = None) -> None:
        self.progress(Event(job, stage, len(self.jobs), row))


def _in_pools(run: _Run, todo: deque[Job], workers: int) -> None:
    """Process pools of our own; one that lost a worker is replaced."""
    suspects = deque[Job]()
    while todo:
        with _pool(min(workers, len(todo))) as pool:
            suspects.extend(run.drain(todo, pool, 2 * workers))
        if suspects and not _alive():
            for job in (*suspects, *todo):
                run.fail(job, "worker processes die at their start; they say why on stderr. A "
                         "script must call prewarm under if __name__ == '__main__'")  # fmt: skip
            return
    # One of them killed the worker: once more, each alone, so that no other is blamed.
    while suspects:
        with _pool(1) as pool:
            for job in run.drain(suspects, pool, 1):
                run.fail(job, "its worker process died, twice (killed, out of memory, or a crash "
                         "of the compiler)")  # fmt: skip


def _on(executor: Executor, run: _Run, todo: deque[Job], workers: int | None) -> None:
    """Somebody else's executor: it cannot be replaced."""
    width = 2 * (workers or getattr(executor, "_max_workers", None) or cores())
    again = deque(run.drain(todo, executor, width))
    lost = run.drain(again, executor, width)
    for job in (*lost, *again, *todo):
        run.fail(job, f"{type(executor).__name__} broke: its workers died")


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    with tempfile.TemporaryDirectory(prefix="ssmgen-", ignore_cleanup_errors=True) as folder:
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _begin_worker, (folder,)
        )
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _alive() -> bool:
    """Whether a worker process comes up at all."""
    with _pool(1) as pool:
        try:
            return pool.submit(os.getpid).result() > 0
        except BrokenExecutor:
            return False


def _begin_worker(folder: str) -> None:
    """In each process of a pool: load the compiler once, and never outlive the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tempfile.tempdir = folder  # the parent removes it, however this process ends
    import jinja2  # noqa: F401
    import triton.compiler  # noqa: F401

    # What is loaded stays: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def compile_task(task: dict[str, Any]) -> dict[str, Any]:
    """In a worker: the contents of one store entry, or what went wrong. Plain data both ways."""
    start = time.perf_counter()
    result: dict[str, Any] = {}
    try:
        # Another process may have published it by now; where the store is not in reach, a miss.
        found = Store(Path(task["store"]), writable=False).get(task["key"], task["toolchain"])
        artifact = found or _compile(task)
        result = {
            "contents": artifact.contents(),
            "toolchain": artifact.manifest["toolchain"],
            "found": found is not None,
        }
    except SsmgenError as error:
        result = {"error": str(error)}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": time.perf_counter() - start}


def _compile(task: dict[str, Any]) -> Artifact:
    here = compiler.toolchain()
    if here is None or task["toolchain"] not in (None, here):
        raise CompileError(
            f"the worker has {here or 'no Triton'}, {task['toolchain']} is wanted: install the "
            "same version on all"
        )
    config = KernelConfig.from_json(task["config"])
    plan, arch = Plan(**task["plan"]), Arch.of(task["arch"])
    if template.key(config, plan, arch) != task["key"]:
        raise CompileError("the worker has another ssmgen: install the same version on all")
    artifact = compiler.compile(config, plan, arch)
    with compiler.triton_lock:  # no other thread is in Triton, which leaves its files behind
        for left in Path(compiler._scratch()).iterdir():
            shutil.rmtree(left, ignore_errors=True)
    return artifact
