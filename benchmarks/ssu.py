"""The single-token table: ssmgen beside every importable peer, each checked before it is timed.

    python benchmarks/ssu.py                      writes benchmarks/results/ssu-<gpu>.json
    python benchmarks/ssu.py --table FILE         prints the Markdown tables of a result file
    python benchmarks/ssu.py --plot FILE PNG      draws one

Time is that of one launch inside a CUDA graph which rotates over slot sets of at least 512 MB
together; the floor is the bytes that must move over the bandwidth of an in-place pass measured in
the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

BATCHES = (1, 4, 16, 64, 256, 1024)
STATES = (
    ("fp32", False, 0),
    ("bf16", False, 0),
    ("fp16", False, 0),
    ("fp16", True, 10),
    ("fp16", True, 5),
    ("bf16", True, 10),
    ("int16", False, 0),
    ("int16", True, 10),
    ("int8", False, 0),
    ("int8", True, 10),
    ("fp8_e4m3fn", False, 0),
    ("fp8_e4m3fn", True, 10),
)
GRIDS: dict[str, dict[str, int]] = {
    "128 heads": {"nheads": 128, "ngroups": 8},
    "16 heads": {"nheads": 16, "ngroups": 1},
    "dim 80": {"nheads": 128, "ngroups": 8, "dim": 80},
}


def label(state: str, stochastic: bool, rounds: int) -> str:
    return f"{state} + SR {rounds}" if stochastic else state


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from contestants import contest, line
    from harness import environment, warm_clocks
    from problem import Problem

    from ssmgen.timing import copy_bandwidth

    warm_clocks()
    bandwidth = copy_bandwidth()
    print(f"in-place pass: {bandwidth / 1e12:.3f} TB/s", flush=True)
    cells = []
    for grid, (state, stochastic, rounds) in itertools.product(arguments.grids, STATES):
        for batch in arguments.batches:
            p = Problem(batch, state, stochastic, rounds or 10, **GRIDS[grid])
            key = {"grid": grid, "state": label(state, stochastic, rounds), "batch": batch}
            cells.append(key | contest(p, bandwidth))
            head = f"{grid:10} {key['state']:18} {batch:5}"
            print(f"{head} {line(cells[-1])}", flush=True)
            del p
            torch.cuda.empty_cache()
    return {
        "environment": environment(),
        "bandwidth": bandwidth,
        "cells": cells,
        "host": host(),
    }


def host() -> dict[str, float]:
    """Host microseconds of a call, and milliseconds of a warm get_kernel in fresh processes."""
    import subprocess
    import sys
    import time

    import torch
    from contestants import CONTESTANTS
    from problem import Problem

    import ssmgen
    from ssmgen.families import spec

    p = Problem(1, "fp32", pool_bytes=2**23)
    found: dict[str, float] = {}

    def micro(call: Any) -> float:
        for _ in range(200):
            call()
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call()
            times.append((time.perf_counter() - start) * 1e4)
        torch.cuda.synchronize()
        return statistics.median(times)

    for name, make in CONTESTANTS.items():
        launch = make(p)
        if launch is not None:
            found[f"{name} op call"] = micro(lambda launch=launch: launch(0))
    arguments = {
        "state": p.pool, **p.inputs, "out": p.out, "state_batch_indices": p.indices[0],
    }  # fmt: skip
    config = spec("ssu").layout(**arguments, dt_softplus=True).config
    found["ssmgen bound launch"] = micro(ssmgen.get_kernel(config).bind(**arguments))

    script = (
        "import sys, time, torch; torch.cuda.init(); torch.cuda.current_stream();"
        "import ssmgen; from ssmgen.config import KernelConfig;"
        f"c = KernelConfig.from_json({config.to_json()!r});"
        "d = c.replace(dtype='fp16');"
        "import ssmgen.kernel, cuda.bindings.driver;"
        "t0 = time.perf_counter(); ssmgen.get_kernel(c); t1 = time.perf_counter();"
        "ssmgen.get_kernel(d); t2 = time.perf_counter(); ssmgen.get_kernel(d);"
        "t3 = time.perf_counter();"
        "print((t1 - t0) * 1e3, (t2 - t1) * 1e3, (t3 - t2) * 1e6, 'triton' in sys.modules)"
    )
    ssmgen.get_kernel(config.replace(dtype="fp16"))
    rows = []
    for _ in range(5):
        text = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        first, second, again, triton = text.stdout.split()
        rows.append((float(first), float(second), float(again)))
        assert triton == "False", "a warm get_kernel imported Triton"
    names = ("first get_kernel from disk, ms", "next get_kernel from disk, ms",
             "get_kernel again, us")  # fmt: skip
    for name, column in zip(names, zip(*rows)):
        found[name] = statistics.median(column)
    for name, value in found.items():
        print(f"{name:36} {value:.2f}", flush=True)
    return found


def tables(data: dict[str, Any], grids: list[str], states: list[str] | None = None) -> str:
    """Markdown tables of a result: microseconds and share of the floor."""
    env = data["environment"]
    lines = [
        f"{env['gpu']}, driver {env['driver']}, torch {env['torch']}, Triton {env['triton']}, "
        f"{env['date']}; in-place pass {data['bandwidth'] / 1e12:.2f} TB/s. Microseconds, and in "
        "brackets the share of the floor: the bytes that must move over that bandwidth.",
    ]
    for grid in grids:
        cells = [
            c
            for c in data["cells"]
            if c["grid"] == grid and (states is None or c["state"] in states)
        ]
        names = [n for n in ("ssmgen", "flashinfer", "vllm") if any(n in c["us"] for c in cells)]
        lines += ["", f"**{grid}**", "", "| state | batch | floor | " + " | ".join(names) + " |",
                  "|---|---|---|" + "---|" * len(names)]  # fmt: skip
        for c in cells:
            row = [
                f"{c['us'][n]:.2f} ({100 * c['floor_us'] / c['us'][n]:.0f}%)"
                if n in c["us"]
                else ("wrong" if n in c["wrong"] else "–")
                for n in names
            ]
            lines.append(f"| {c['state']} | {c['batch']} | {c['floor_us']:.2f} | " +
                         " | ".join(row) + " |")  # fmt: skip
        for peer in names[1:]:
            both = [c for c in cells if peer in c["us"] and "ssmgen" in c["us"]]
            for title, chosen in (
                ("nearest", [c for c in both if "SR" not in c["state"]]),
                ("stochastic", [c for c in both if "SR" in c["state"]]),
            ):
                if chosen:
                    ratios = [c["us"][peer] / c["us"]["ssmgen"] for c in chosen]
                    mean = statistics.geometric_mean(ratios)
                    lines += ["", f"{peer} / ssmgen, {title}: geometric mean {mean:.2f}, "
                              f"least {min(ratios):.2f}, of {len(ratios)} cells."]  # fmt: skip
    return "\n".join(lines) + "\n"


def host_table(data: dict[str, Any]) -> str:
    """What a call costs on the host."""
    rows = [f"| {name.removesuffix(', ms').removesuffix(', us')} | {value:.2f} "
            f"{'ms' if name.endswith('ms') else 'us'} |"
            for name, value in data["host"].items()]  # fmt: skip
    return "\n".join(["| host | time |", "|---|---|", *rows]) + "\n"


def plot(data: dict[str, Any], path: str) -> None:
    """Share of the floor over batch, a panel for each state dtype of the first grid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [c for c in data["cells"] if c["grid"] == "128 heads"]
    states = list(dict.fromkeys(c["state"] for c in cells))
    figure, axes = plt.subplots(3, 4, figsize=(14, 9), sharex=True, sharey=True)
    for axis, state in zip(axes.flat, states):
        for name in ("ssmgen", "flashinfer", "vllm"):
            found = [(c["batch"], 100 * c["floor_us"] / c["us"][name]) for c in cells
                     if c["state"] == state and name in c["us"]]  # fmt: skip
            if found:
                axis.plot(*zip(*found), marker="o", label=name)
        axis.set_title(state)
        axis.set_xscale("log", base=4)
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    figure.supxlabel("batch")
    figure.supylabel("share of the floor, %")
    figure.suptitle(f"selective_state_update, 128 heads, {data['environment']['gpu']}")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="result file (default: benchmarks/results/ssu-<gpu>.json)")
    parser.add_argument("--grids", nargs="*", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES)
    parser.add_argument("--states", nargs="*", help="of --table: the states to show")
    parser.add_argument("--table", metavar="FILE", help="print the tables of a result file")
    parser.add_argument("--plot", nargs=2, metavar=("FILE", "PNG"), help="draw a result file")
    arguments = parser.parse_args()
    if arguments.table:
        data = json.loads(Path(arguments.table).read_text())
        print(tables(data, arguments.grids, arguments.states))
        print(host_table(data), end="")
        return
    if arguments.plot:
        plot(json.loads(Path(arguments.plot[0]).read_text()), arguments.plot[1])
        return
    from harness import result, save

    content = run(arguments)
    save(arguments.out or result("ssu", content), content)


if __name__ == "__main__":
    main()
