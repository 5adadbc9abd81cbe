"""What a kernel costs before its first launch: compiled, read from disk, prewarmed. Needs no GPU;
without one nothing is loaded.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arch import Arch
from ..config import KernelConfig
from ..errors import CompileError
from .grid import config_of

if TYPE_CHECKING:
    from ..prewarm import Event
    from .session import Session

__all__ = ["ARCHS", "MODEL", "jit"]

MODEL = "nemotron-h-8b"
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")

# In a process of its own: the first kernel, a second one, the first again.
SCRIPT = """
import json, sys, time
{ready}
import ssmgen, ssmgen.kernel
from ssmgen.config import KernelConfig
one, two = (KernelConfig.from_json(text) for text in {configs!r})
at = [time.perf_counter()]
for config in (one, two, one):
    ssmgen.get_kernel(config, arch={arch!r})
    at.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip(at, at[1:])] + ["triton" in sys.modules]))
"""
ON_GPU = "import torch, cuda.bindings.driver; torch.cuda.init(); torch.cuda.current_stream()"


def jit(session: Session, result: dict[str, Any]) -> None:
    """Rows of `name`, `value`, `unit`; and what a prewarm of one model did."""
    from ..manifest import find

    quick = session.wanted.quick
    arch = session.arch or Arch.of("sm_90")
    on_gpu = session.device == "cuda" and session.arch is not None
    configs = [config_of("fp32").to_json(), config_of("fp16").to_json()]
    ready = ON_GPU if on_gpu else ""
    script = SCRIPT.format(ready=ready, configs=configs, arch=None if on_gpu else str(arch))
    result["environment"] |= machine() | {"arch": str(arch), "loaded": on_gpu}
    result["rows"] = rows = []
    steps = 1 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = [], []
        for step in range(steps):
            session.note(step, steps + 1, "get_kernel in fresh processes")
            store = Path(folder) / str(step)
            cold.append(_fresh(script, store))
            warm.append(_fresh(script, store))
            if warm[-1][3]:
                raise CompileError("a get_kernel that was on disk imported Triton")
    for values, how in ((cold, "compiled"), (warm, "from disk")):
        for column, name in enumerate(("first get_kernel", "next get_kernel")):
            median = statistics.median(times[column] for times in values)
            rows.append({"name": f"{name} {how}", "value": median * 1e3, "unit": "ms"})
    again = statistics.median(times[2] for times in warm)
    rows.append({"name": "get_kernel again, first time", "value": again * 1e6, "unit": "us"})
    session.note(steps, steps + 1, f"prewarm of {MODEL}")
    shipped = find(MODEL).configs
    if quick:
        result["prewarm"] = prewarm_rate(shipped[:4], [str(arch)])
    else:
        result["prewarm"] = prewarm_rate(shipped, ARCHS)
    result["prewarm"]["model"] = MODEL


def _fresh(script: str, store: Path) -> list[float]:
    env = {**os.environ, "SSMGEN_CACHE_DIR": str(store), "SSMGEN_JIT": "allow"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    if done.returncode:
        raise CompileError(f"a fresh process failed:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def prewarm_rate(
    configs: Sequence[KernelConfig], archs: Sequence[str], workers: int | None = None
) -> dict[str, Any]:
    """Prewarm configs for architectures into an empty store, then into the full one."""
    from ..prewarm import cores, prewarm

    workers = workers or cores()
    pairs = [(config, Arch.of(arch)) for arch in archs for config in configs]
    finished: list[float] = []

    def note(event: Event) -> None:
        if event.stage == "built":
            finished.append(time.perf_counter())

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder, _store(folder):
        report = prewarm(pairs, workers=workers, progress=note)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        again = prewarm(pairs, workers=workers)
    if report.failed:
        raise CompileError(f"prewarm: {report.failed[0]}")
    if again.built:
        raise CompileError(f"prewarm: {len(again.built)} kernels were built twice")
    rate = (len(finished) - 1) / max(finished[-1] - finished[0], 1e-9)
    seconds = [row["seconds"] for row in report.built]
    spent = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {
        "configs": len(configs),
        "architectures": list(archs),
        "kernels": len(report.built),
        "kernels_per_arch": dict(collections.Counter(row["arch"] for row in report.built)),
        "workers": workers,
        "seconds": round(report.seconds, 1),
        "kernels_per_second_after_first": round(rate, 2),
        "kernels_per_second_per_core_after_first": round(rate / workers, 2),
        # What others do on the machine slows the clock, not this: starts of workers included.
        "kernels_per_cpu_second": round(len(finished) / max(spent, 1e-9), 2),
        "seconds_per_kernel_median": round(statistics.median(seconds), 3),
        "seconds_per_kernel_longest": round(max(seconds), 3),
        "spilling": sum(bool(row["spills"]) for row in report.built),
        "megabytes": round(sum(row["size"] for row in report.built) / 1e6, 1),
        "seconds_when_all_is_there": round(again.seconds, 2),
    }


@contextlib.contextmanager
def _store(folder: str) -> Iterator[None]:
    """The user store is in `folder`, for this process and its children."""
    previous = os.environ.get("SSMGEN_CACHE_DIR")
    os.environ["SSMGEN_CACHE_DIR"] = folder
    try:
        yield
    finally:
        if previous is None:
            del os.environ["SSMGEN_CACHE_DIR"]
        else:
            os.environ["SSMGEN_CACHE_DIR"] = previous


def machine() -> dict[str, Any]:
    """The host that compiles."""
    from ..prewarm import cores

    return {
        "cores": cores(),
        "load_before": round(os.getloadavg()[0], 1),
        "processor": _processor(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
