"""Timing on one GPU: every launch inside one CUDA graph, warm clocks, the median replay."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["copy_bandwidth", "time_graph"]


def time_graph(
    launches: Sequence[Callable[[], Any]], replays: int = 11, warm_up: float = 30.0
) -> float:
    """Microseconds a launch: median over replays of one graph that holds them all.

    Before it is timed the graph is replayed for `warm_up` milliseconds, so that the clocks are up.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
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
    torch.cuda.current_stream().wait_stream(stream)
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
