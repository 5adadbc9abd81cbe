"""How fast kernels are compiled ahead of time on this machine.

Prewarms one shipped model for four architectures into an empty store, on every core, and again
into the full one. Writes benchmarks/results/prewarm.json.

    python benchmarks/prewarm.py --model nemotron-h-8b
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib.metadata
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ssmgen
from ssmgen.arch import Arch
from ssmgen.manifest import find
from ssmgen.prewarm import Event, cores, prewarm

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")


def measure(model: str, workers: int) -> dict[str, Any]:
    """Prewarm `model` into an empty store, then into the full one."""
    pairs = [(config, Arch.of(arch)) for arch in ARCHS for config in find(model).configs]
    finished: list[float] = []

    def note(event: Event) -> None:
        if event.stage == "built":
            finished.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        os.environ["SSMGEN_CACHE_DIR"] = folder
        report = prewarm(pairs, workers=workers, progress=note)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        again = prewarm(pairs, workers=workers)
    if report.failed or again.built:
        raise SystemExit(f"failed: {report.failed}; built twice: {len(again.built)}")
    rate = (len(finished) - 1) / (finished[-1] - finished[0])
    seconds = [row["seconds"] for row in report.built]
    return {
        "model": model,
        "configs": len(find(model).configs),
        "architectures": list(ARCHS),
        "states": sorted({f"{c.state_dtype} {c.rounding}" for c, _ in pairs}),
        "kernels": len(report.built),
        "kernels_per_arch": dict(collections.Counter(row["arch"] for row in report.built)),
        "workers": workers,
        "seconds": round(report.seconds, 1),
        "kernels_per_second_after_first": round(rate, 2),
        "kernels_per_second_per_core_after_first": round(rate / workers, 2),
        # What others do on the machine slows the clock, not this: starts of workers included.
        "kernels_per_cpu_second": round(len(finished) / (used.ru_utime + used.ru_stime), 2),
        "seconds_per_kernel_median": round(statistics.median(seconds), 3),
        "seconds_per_kernel_longest": round(max(seconds), 3),
        "spilling": sum(bool(row["spills"]) for row in report.built),
        "megabytes": round(sum(row["size"] for row in report.built) / 1e6, 1),
        "seconds_when_all_is_there": round(again.seconds, 2),
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    return {
        "date": datetime.date.today().isoformat(),
        "cores": cores(),
        "load_before": round(os.getloadavg()[0], 1),
        "processor": _processor(),
        "python": platform.python_version(),
        "triton": importlib.metadata.version("triton"),
        "ssmgen": ssmgen.__version__,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="nemotron-h-8b")
    parser.add_argument("--jobs", type=int, default=cores())
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "prewarm.json"))
    options = parser.parse_args()
    from harness import save  # here, so that worker processes do not import torch

    result = {**machine(), **measure(options.model, options.jobs)}
    for name, value in result.items():
        print(f"{name}: {value}")
    save(options.out, result)


if __name__ == "__main__":
    main()
