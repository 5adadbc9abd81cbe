"""Timing on one GPU: every launch inside one CUDA graph, warm clocks, the median replay."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["Graph", "copy_bandwidth", "time_graph", "warm_clocks"]


class Graph:
    """Launches recorded as one CUDA graph, on a stream of their own."""

    def __init__(self, launches: Sequence[Callable[[], Any]]) -> None:
        # Kept, with the tensors they hold: the graph knows these by their addresses alone.
        self._launches = tuple(launches)
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for launch in launches[:3]:  # what is compiled or allocated on first use is so here
                launch()
            self._stream.synchronize()
            with torch.cuda.graph(self._graph, stream=self._stream):
                for launch in launches:
                    launch()

    def replay(self) -> float:
        """Replay once and wait for it: microseconds a launch."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            start.record()
            self._graph.replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / len(self._launches)

    def warm_up(self, milliseconds: float) -> None:
        """Replay for so long, at least once, so that the clocks are up; and wait for the end."""
        each = self.replay() * len(self._launches) / 1000
        with torch.cuda.stream(self._stream):
            for _ in range(int(milliseconds / each)):
                self._graph.replay()
        self._stream.synchronize()


def time_graph(
    launches: Sequence[Callable[[], Any]], replays: int = 11, warm_up: float = 30.0
) -> float:
    """Microseconds a launch: median over replays of one graph that holds them all.

    Before it is timed the graph is replayed for `warm_up` milliseconds, so that the clocks are up.
    """
    graph = Graph(launches)
    graph.warm_up(warm_up)
    return statistics.median(graph.replay() for _ in range(replays))


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
