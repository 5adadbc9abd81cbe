"""Time every plan of the single-token kernel, and write the dispatch table they earn.

python benchmarks/sweep.py --out benchmarks/results/sweep.json      measure (needs a GPU)
python benchmarks/sweep.py --table benchmarks/results/sweep.json    write cache/dispatch
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ssmgen.arch import Arch
from ssmgen.config import KernelConfig
from ssmgen.errors import ConfigError
from ssmgen.families import spec
from ssmgen.plan import Plan

# (state dtype, rounds of Philox or 0)
CELLS = [
    ("fp32", 0),
    *itertools.product(("fp16", "bf16"), (0, 5, 10)),
    *itertools.product(("int16", "int8", "fp8_e4m3fn"), (0, 10)),
]
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512)
# A plan stays over neighbouring sizes as long as it is within 0.6% of the best.
SLACK = 1.006
TABLE = Path(__file__).parent.parent / "cache" / "dispatch" / "ssu.json"


def candidates() -> list[Plan]:
    def plans(algorithm: str, *axes: tuple[int, ...]) -> list[Plan]:
        names = ("block_m", "block_n", "num_warps", "num_stages", "split")
        return [
            Plan(algorithm=algorithm, evict_first=evict, **dict(zip(names, values)))
            for evict in (False, True)
            for values in itertools.product(*axes)
        ]

    return [
        *plans("simple", (4, 8, 16, 32, 64), (128,), (1, 2, 4, 8)),
        *plans("vertical", (4, 8, 16), (128,), (1, 2), (1, 2, 3, 4), (1, 2, 4)),
        *plans("horizontal", (64,), (16, 32, 64), (2, 4, 8), (2, 3)),
    ]


def config_of(state: str, rounds: int) -> KernelConfig:
    rounding = "stochastic" if rounds else "nearest"
    return KernelConfig(state_dtype=state, rounding=rounding, philox_rounds=rounds)


def plans_of(config: KernelConfig, arch: Arch) -> list[Plan]:
    """The distinct legal plans of a config, without hopeless ones."""
    found: dict[Plan, None] = {}
    for wanted in candidates():
        try:
            plan = spec(config.family).fit(config, wanted, arch)
        except ConfigError:
            continue
        per_thread = plan.block_m * plan.block_n // (32 * plan.num_warps)
        if 8 <= per_thread <= 128:
            found[plan] = None
    return list(found)


def _key(state: str, rounds: int) -> str:
    """The key of the dispatch table; ten rounds are what stochastic rounding means unsaid."""
    rounding = "stochastic" if rounds else "nearest"
    return f"{state}.{rounding}" + (f".{rounds}" if rounds not in (0, 10) else "")


def _compile(job: tuple[str, dict[str, Any], str]) -> None:
    from ssmgen.kernel import build

    build(KernelConfig.from_json(job[0]), Plan(**job[1]), Arch.of(job[2]))


def measure(arguments: argparse.Namespace) -> None:
    from ssmgen.bench.measure import cold
    from ssmgen.bench.problem import make, planned
    from ssmgen.bench.session import environment
    from ssmgen.kernel import build
    from ssmgen.launcher import load
    from ssmgen.timing import copy_bandwidth, time_graph, warm_clocks

    begin = time.time()
    arch = Arch.detect()
    cells = [c for c in CELLS if not arguments.cells or _key(*c) in arguments.cells]
    jobs = [
        (config.to_json(), plan.fields(), str(arch))
        for config in (config_of(*cell) for cell in cells)
        for plan in plans_of(config, arch)
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_compile, jobs, chunksize=8))
    print(f"{len(jobs)} kernels in {time.time() - begin:.0f} s", flush=True)

    warm_clocks()
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)
    results: dict[str, Any] = {}
    for state, rounds in cells:
        config = config_of(state, rounds)
        loaded = [(plan, load(build(config, plan, arch), 0)) for plan in plans_of(config, arch)]
        for batch in BATCHES:
            if time.time() - begin > arguments.seconds:
                print("out of time")
                break
            problem = make(config, batch, 128)
            times = {}
            for plan, function in loaded:
                run = planned(problem, function, plan)
                if wrong := problem.verify(run, rows=2):
                    print(f"WRONG {state} {plan}: {wrong}", flush=True)
                    continue
                launches = cold(run, problem.sets)
                times[str(plan)] = time_graph(launches, replays=5, warm_up=3.0)
            floor = problem.bytes / bandwidth * 1e6
            best = sorted(times.items(), key=lambda item: item[1])
            simple = [(n, t) for n, t in best if n.startswith("simple")]
            results[f"{_key(state, rounds)}.{batch}"] = {
                "heads": batch * problem.nheads,
                "floor": round(floor, 3),
                "times": {n: round(t, 3) for n, t in best if t < 1.15 * best[0][1]},
                "simple": {n: round(t, 3) for n, t in simple if t < 1.15 * simple[0][1]},
            }
            head = "  ".join(f"{name} {t:.2f}" for name, t in best[:3])
            each = {}
            for name, t in best:
                each.setdefault(name.split()[0], f"{t:.2f}")
            print(f"{_key(state, rounds):20} {batch:4} floor {floor:.2f} "
                  f"{100 * floor / best[0][1]:.0f}% {head} | {each}", flush=True)  # fmt: skip
            del problem
    content = {"environment": environment(), "bandwidth": bandwidth, "cells": results}
    Path(arguments.out).write_text(json.dumps(content, indent=1) + "\n")


def table(path: str) -> None:
    """Winners by bucket. With PDL only simple plans load the state early, so they compete alone."""
    measured = json.loads(Path(path).read_text())
    parsed = {str(plan): plan for plan in _all_plans()}
    current = json.loads(TABLE.read_text())
    by_key: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for name, cell in measured["cells"].items():
        key = name.rpartition(".")[0]
        by_key.setdefault(key, []).append((cell["heads"], cell["times"]))
        by_key.setdefault(f"{key}.pdl", []).append((cell["heads"], cell["simple"]))
    rows = {}
    for key, cells in by_key.items():
        cells.sort(key=lambda cell: cell[0])
        chosen = _cover([times for _, times in cells], SLACK)
        buckets: list[dict[str, Any]] = []
        for (heads, _), plan in zip(cells, chosen):
            fields = parsed[plan].fields()
            entry = {
                k: v for k, v in fields.items() if k == "num_warps" or (v and v != 1) or v is True
            }
            if buckets and buckets[-1]["plan"] == entry:
                buckets[-1]["up_to_heads"] = heads
            else:
                buckets.append({"up_to_heads": heads, "plan": entry})
        # A limit lies half-way, in ratio, between two measured sizes.
        for bucket in buckets[:-1]:
            bucket["up_to_heads"] = int(bucket["up_to_heads"] * 2**0.5)
        del buckets[-1]["up_to_heads"]
        rows[key] = buckets
    current["auto"]["sm_90"] = rows
    current["measured"] = {"sm_90": measured["environment"]}
    TABLE.write_text(_compact(current) + "\n")


def _cover(cells: list[dict[str, float]], slack: float) -> list[str]:
    """One plan a cell: near the best everywhere, changing as seldom as that allows."""
    chosen: list[str] = []
    start = 0
    while start < len(cells):
        good = None
        end = start
        while end < len(cells):
            near = {p for p, t in cells[end].items() if t <= slack * min(cells[end].values())}
            joint = near if good is None else good & near
            if not joint:
                break
            good, end = joint, end + 1
        assert good
        pick = min(good, key=lambda p: sum(c[p] / min(c.values()) for c in cells[start:end]))
        chosen += [pick] * (end - start)
        start = end
    return chosen


def _all_plans() -> set[Plan]:
    arch = Arch.of("sm_90")
    return {plan for cell in CELLS for plan in plans_of(config_of(*cell), arch)}


def _compact(value: Any, indent: str = "") -> str:
    """JSON with one bucket a line."""
    inner = indent + "  "
    if isinstance(value, list):
        lines = ",\n".join(inner + json.dumps(item) for item in value)
        return f"[\n{lines}\n{indent}]"
    if isinstance(value, dict) and any(isinstance(v, (dict, list)) for v in value.values()):
        lines = ",\n".join(
            f"{inner}{json.dumps(k)}: {_compact(v, inner)}" for k, v in value.items()
        )
        return f"{{\n{lines}\n{indent}}}"
    return json.dumps(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/sweep.json")
    parser.add_argument("--table", metavar="RESULTS")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--cells", nargs="*")
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.table)
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
