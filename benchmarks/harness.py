"""Timing on one GPU: every launch inside one CUDA graph, slots rotated out of the L2, median."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def time_graph(
    launches: list[Callable[[], Any]], replays: int = 11, warm_up: float = 30.0
) -> float:
    """Microseconds a launch: median over replays of one graph that holds them all.

    Before it is timed the graph is replayed for `warm_up` milliseconds, so that the clocks are up.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches[:3]:
            launch()
        graph = torch.cuda.CUDAGraph()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for launch in launches:
                launch()
        times = [_replay(graph)]
        for _ in range(int(warm_up / times[0]) + 1):
            graph.replay()
        times = [_replay(graph) for _ in range(replays)]
    return statistics.median(times) * 1000 / len(launches)


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth(gigabytes: float = 4.0) -> float:
    """Bytes a second, read plus written, of an in-place elementwise pass over fp32."""
    data = torch.randn(int(gigabytes * 2**28), device="cuda")
    micro = time_graph([lambda: data.mul_(0.999)] * 4)
    return 2 * data.numel() * 4 / (micro * 1e-6)


def warm_clocks(seconds: float = 0.5) -> None:
    """Work until the clocks are up."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    while True:
        for _ in range(50):
            a @ a
        end.record()
        end.synchronize()
        if start.elapsed_time(end) > seconds * 1000:
            return


def environment() -> dict[str, Any]:
    """What the numbers were measured with."""
    import triton

    import ssmgen

    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "ssmgen": ssmgen.__version__,
    }


def _driver() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write a result file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path.name}")
