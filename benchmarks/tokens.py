"""The multi-token table: ssmgen beside FlashInfer, each checked before it is timed.

    python benchmarks/tokens.py                      writes benchmarks/results/tokens-<gpu>.json
    python benchmarks/tokens.py --table FILE         prints the Markdown tables of a result file
    python benchmarks/tokens.py --plot FILE PNG      draws one

"last only" writes a row's state once, after its last token; "every token" writes the state after
each token to a buffer of intermediate states and leaves the slot alone, as a verifier of drafts
does. Time and floor are those of benchmarks/ssu.py; the buffer, too, is rotated over at least
512 MB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

TOKENS = (2, 4, 6, 8)
BATCHES = (1, 4, 16, 64, 256, 1024)
STATES = ("fp32", "fp16", "bf16")
WRITES = ("last only", "every token")
GROUPS = {128: 8, 16: 1}
CONTESTANTS = ("ssmgen", "flashinfer")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from contestants import contest, line
    from harness import environment, warm_clocks
    from problem import Problem

    from ssmgen.timing import copy_bandwidth

    compile_all(arguments)
    begin = time.time()
    warm_clocks()
    bandwidth = copy_bandwidth()
    print(f"in-place pass: {bandwidth / 1e12:.3f} TB/s", flush=True)
    cells = []
    for heads, writes, state, tokens, batch in itertools.product(
        arguments.heads, arguments.writes, arguments.states, arguments.tokens, arguments.batches
    ):
        key = {"heads": heads, "writes": writes, "state": state, "tokens": tokens, "batch": batch}
        p = Problem(
            batch, state, nheads=heads, ngroups=GROUPS[heads], tokens=tokens,
            every=writes == "every token",
        )  # fmt: skip
        cells.append(key | contest(p, bandwidth, CONTESTANTS))
        head = f"{heads:4} heads  {writes:11}  {state}  T={tokens}  {batch:5}"
        missing = "".join(f"  {name} missing" for name in cells[-1]["missing"])
        print(f"{head}  {line(cells[-1])}{missing}", flush=True)
        del p
        torch.cuda.empty_cache()
    print(f"{len(cells)} cells in {time.time() - begin:.0f} s", flush=True)
    return {"environment": environment(), "bandwidth": bandwidth, "cells": cells}


def compile_all(arguments: argparse.Namespace) -> None:
    """Compile what ssmgen will run, on all cores, before the first cell wants it."""
    from problem import Problem

    from ssmgen.arch import Arch
    from ssmgen.families import spec

    begin = time.time()
    configs = set()
    for heads, writes, state, tokens in itertools.product(
        arguments.heads, arguments.writes, arguments.states, arguments.tokens
    ):
        p = Problem(
            1, state, nheads=heads, ngroups=GROUPS[heads], tokens=tokens,
            every=writes == "every token", pool_bytes=0, device="cpu",
        )  # fmt: skip
        described = spec("ssu").layout(
            state=p.pool, **p.inputs, out=p.out, dt_softplus=True, **p.tables(0)
        )
        configs.add(described.config.to_json())
    jobs = [(config, str(Arch.detect())) for config in sorted(configs)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_compile, jobs))
    print(f"{len(jobs)} configs compiled in {time.time() - begin:.0f} s", flush=True)


def _compile(job: tuple[str, str]) -> None:
    import ssmgen

    ssmgen.get_kernel(ssmgen.KernelConfig.from_json(job[0]), arch=job[1])


def tables(data: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Markdown tables of a result: microseconds, share of the floor, ratio."""
    env = data["environment"]
    lines = [
        f"{env['gpu']}, driver {env['driver']}, torch {env['torch']}, Triton {env['triton']}, "
        f"{env['date']}; in-place pass {data['bandwidth'] / 1e12:.2f} TB/s. Microseconds, and in "
        "brackets the share of the floor: the bytes that must move over that bandwidth.",
    ]

    def shown(cell: dict[str, Any], name: str) -> str:
        if name in cell["us"]:
            return f"{cell['us'][name]:.2f} ({100 * cell['floor_us'] / cell['us'][name]:.0f}%)"
        return "wrong" if name in cell["wrong"] else "–"

    for heads, writes in itertools.product(arguments.heads, arguments.writes):
        cells = [
            c
            for c in data["cells"]
            if (c["heads"], c["writes"]) == (heads, writes)
            and c["state"] in arguments.states
            and c["tokens"] in arguments.tokens
            and c["batch"] in arguments.batches
        ]
        if not cells:
            continue
        lines += ["", f"**{heads} heads, {writes}**", "",
                  "| state | tokens | batch | floor | ssmgen | flashinfer | ratio |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        for c in cells:
            ratio = f"{_ratio(c):.2f}" if len(c["us"]) == 2 else "–"
            lines.append(
                f"| {c['state']} | {c['tokens']} | {c['batch']} | {c['floor_us']:.2f} | "
                f"{shown(c, 'ssmgen')} | {shown(c, 'flashinfer')} | {ratio} |"
            )
        for title, chosen in (
            ("", cells),
            (" from batch 16 up", [c for c in cells if c["batch"] >= 16]),
        ):
            chosen = sorted((c for c in chosen if len(c["us"]) == 2), key=_ratio)
            if chosen:
                mean = statistics.geometric_mean(map(_ratio, chosen))
                least = chosen[0]
                lines += ["", f"flashinfer / ssmgen{title}: geometric mean {mean:.2f} of "
                          f"{len(chosen)} cells, least {_ratio(least):.2f} ({least['state']}, "
                          f"{least['tokens']} tokens, batch {least['batch']})."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _ratio(cell: dict[str, Any]) -> float:
    return cell["us"]["flashinfer"] / cell["us"]["ssmgen"]


def plot(data: dict[str, Any], path: str) -> None:
    """Share of the floor over batch with an fp16 state: a panel for each number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [c for c in data["cells"] if (c["heads"], c["state"]) == (128, "fp16")]
    figure, axes = plt.subplots(
        len(WRITES), len(TOKENS), figsize=(14, 6.5), sharex=True, sharey=True
    )
    for (writes, tokens), axis in zip(itertools.product(WRITES, TOKENS), axes.flat):
        for name in CONTESTANTS:
            found = [
                (c["batch"], 100 * c["floor_us"] / c["us"][name])
                for c in cells
                if (c["writes"], c["tokens"]) == (writes, tokens) and name in c["us"]
            ]
            if found:
                axis.plot(*zip(*found), marker="o", label=name)
                axis.legend(loc="lower right")
        axis.set_title(f"{tokens} tokens, {writes}")
        axis.set_xscale("log", base=4)
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
    figure.supxlabel("batch")
    figure.supylabel("share of the floor, %")
    gpu = data["environment"]["gpu"]
    figure.suptitle(f"selective_state_update of several tokens, 128 heads, fp16 state, {gpu}")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="result file (default: benchmarks/results/tokens-<gpu>.json)")
    parser.add_argument("--heads", nargs="*", type=int, default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--writes", nargs="*", default=WRITES, choices=WRITES)
    parser.add_argument("--states", nargs="*", default=STATES, choices=STATES)
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES)
    parser.add_argument("--table", metavar="FILE", help="print the tables of a result file")
    parser.add_argument("--plot", nargs=2, metavar=("FILE", "PNG"), help="draw a result file")
    arguments = parser.parse_args()
    if arguments.table:
        print(tables(json.loads(Path(arguments.table).read_text()), arguments), end="")
        return
    if arguments.plot:
        plot(json.loads(Path(arguments.plot[0]).read_text()), arguments.plot[1])
        return
    from harness import result, save

    content = run(arguments)
    save(arguments.out or result("tokens", content), content)


if __name__ == "__main__":
    main()
