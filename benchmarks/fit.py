"""Find what the cost model goes by in measured times of plans, and say how good it is.

    python benchmarks/fit.py                             prints the losses of what ships
    python benchmarks/fit.py --family gdn --seconds 300  searches for better constants, prints them
    python benchmarks/fit.py --lists                     writes the lists of plans anew
    python benchmarks/fit.py --data FILE --add report.json
                                                         adds what `ssmgen tune --report` measured

The loss of a cell is by how much the plan of least estimated cost was slower than the best plan
measured there. A plan that did not race counts as 20% behind, and is told apart in what is
printed. Times with `pdl` are those in a chain. What belongs to the GPU (`ssmgen.cost.CONSTANTS`) is
found with the counts of ssu; the other families take it as it is. With ``--only`` all but the named
constants stay as they are.

A list has the plans among which the estimate chooses for one state dtype and form, each with a
factor on its estimate: what the compiler makes of it. They are found at random, from one seed:
those whose choice loses least.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from ssmgen.arch import Arch
from ssmgen.config import KernelConfig
from ssmgen.cost import CONSTANTS, Constants, Work, estimate
from ssmgen.errors import ConfigError
from ssmgen.families import spec
from ssmgen.plan import Plan, fitted

RESULTS = Path(__file__).parent / "results"
# What the shipped tables were made from, and `ssmgen tune --check` at sizes and shapes between.
DATA = ("plans-shipped-h200.json", "plans-odd-h200.json")
LISTS = Path(__file__).parents[1] / "cache" / "shortlists"
LEFT_OUT = 1.2
ARCH = Arch.of("sm_90")
FAMILIES = ("ssu", "gdn", "conv1d")
# The most plans of a list, the steps of a search for one, the searches; factors.
LONGEST, STEPS, STARTS = 8, 8000, 6
FACTORS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3)


def config_of(entry: dict[str, Any]) -> KernelConfig:
    return KernelConfig(**{"family": "ssu", **entry["config"]})


class Measured:
    """The measurements of one family's shortlisted plans, as arrays: an entry for a plan in a
    cell."""

    def __init__(self, data: dict[str, Any], family: str) -> None:
        self.counts = importlib.import_module(f"ssmgen.families.{family}.work")
        shortlist = spec(family).shortlist
        plans = [Plan(**fields) for fields in data["plans"]]
        rows: list[dict[str, float]] = []
        self.cells: list[str] = []
        self.plans: list[Plan] = []
        cell, ratio, micro, heads, factor = [], [], [], [], []
        for run in data["runs"]:
            complete = "few" not in run["plans"]
            for entry in run["cells"]:
                config = config_of(entry)
                if config.family != family:
                    continue
                times = {plans[int(i)]: us for i, us in entry["us"].items()}
                best = min(times.values())
                factors = shortlist(config, ARCH)
                fits = fitted(config, ARCH, factors)
                nearest = min((times.get(p, np.inf) for p in fits), default=np.inf)
                if not complete and nearest > LEFT_OUT * best:
                    continue  # of a few plans, none that is listed and near the best
                for plan, wanted in fits.items():
                    us = times.get(plan, LEFT_OUT * best if complete else None)
                    if us is None:
                        continue
                    cell.append(len(self.cells))
                    ratio.append(us / best)
                    micro.append(us if plan in times else np.nan)
                    heads.append(entry["batch"] * entry["nheads"])
                    factor.append(factors[wanted])
                    rows.append(self.counts.facts(config, plan))
                    self.plans.append(plan)
                what = " ".join(map(str, entry["config"].values()))
                self.cells.append(f"{what} {entry['batch']}x{entry['nheads']}")
        self.facts = {name: np.array([row[name] for row in rows], float) for name in rows[0]}
        self.cell, self.ratio = np.array(cell), np.array(ratio)
        self.us, self.heads = np.array(micro), np.array(heads, float)
        self.factor = np.array(factor)

    def estimates(self, constants: Constants, counts: Any) -> np.ndarray:
        work = Work(**self.counts.counted(self.facts, counts))
        return self.factor * estimate(work, ARCH, constants)(self.heads)

    def losses(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The loss of each cell and the entry that was chosen there."""
        order = np.lexsort((times, self.cell))
        first = np.r_[True, self.cell[order][1:] != self.cell[order][:-1]]
        return self.ratio[order[first]] - 1, order[first]

    def score(self, constants: Constants, counts: Any) -> float:
        with np.errstate(all="ignore"):
            times = self.estimates(constants, counts)
            if not np.all(np.isfinite(times) & (times > 0)):
                return np.inf
            losses, _ = self.losses(times)
            error = np.nanmean(np.abs(np.log(times / self.us)))
        over = np.maximum(losses - 0.03, 0)
        return 300 * np.mean(over**2) + losses.max() + losses.mean() + error


def search(
    measured: Measured, seconds: float, seed: int, only: list[str] | None
) -> tuple[Constants, Any]:
    rng = np.random.default_rng(seed)
    start = measured.counts.COUNTS
    gpu = (Constants,) if type(start).__module__.endswith(".ssu.work") else ()
    kinds = (*gpu, type(start))
    names = [(kind, field.name) for kind in kinds for field in dataclasses.fields(kind)]

    def built(values: np.ndarray) -> tuple[Constants, Any]:
        constants, counts = (
            kind(**{n: float(v) for (k, n), v in zip(names, values) if k is kind})
            if kind in kinds
            else CONSTANTS
            for kind in (Constants, type(start))
        )
        return constants, counts

    best = np.array([getattr(CONSTANTS if k is Constants else start, n) for k, n in names])
    free = np.array([only is None or n in only for _, n in names])
    score = measured.score(*built(best))
    end = time.time() + seconds
    while time.time() < end:
        step = rng.normal(size=len(best)) * rng.choice([0.02, 0.1, 0.4, 0.8])
        new = best * np.exp(step * free * (rng.random(len(best)) < max(0.2, 1 / free.sum())))
        if (found := measured.score(*built(new))) < score:
            best, score = new, found
    return built(np.array([float(f"{value:.3g}") for value in best]))


def report(measured: Measured, constants: Constants, counts: Any, worst: int = 8) -> str:
    times = measured.estimates(constants, counts)
    losses, chosen = measured.losses(times)
    error = np.nanmedian(np.abs(times / measured.us - 1))
    raced = np.isfinite(measured.us[chosen])
    lines = [
        f"{len(losses)} cells: worst loss {losses.max():.1%}, median {np.median(losses):.1%}, "
        f"{np.sum(raced & (losses > 0.1))} above 10%, {np.sum(~raced)} of a plan that did not "
        f"race; median error of an estimate {error:.1%}"
    ]
    for i in np.argsort(-losses)[:worst]:
        lines.append(f"  {losses[i]:6.1%}  {measured.cells[i]:32} {measured.plans[chosen[i]]}")
    return "\n".join(lines)


class Race:
    """The cells that one list serves: what each plan lost in them, and its estimates."""

    def __init__(self, cells: list[tuple[KernelConfig, int, dict[Plan, float]]]) -> None:
        family = spec(cells[0][0].family)
        # As plans stand in a list: the first that becomes what raced, in any cell.
        raced: dict[Plan, None] = {}
        for config, _, times in cells:
            named = (*family.candidates(config, ARCH), *family.staples(config, ARCH))
            wanted = fitted(config, ARCH, named)
            raced |= dict.fromkeys(wanted[plan] for plan in times if plan in wanted)
        self.plans = sorted(raced, key=str)
        shape = len(cells), len(self.plans)
        self.loss, self.cost = np.full(shape, LEFT_OUT - 1), np.full(shape, np.inf)
        for i, (config, heads, times) in enumerate(cells):
            best = min(times.values())
            for j, wanted in enumerate(self.plans):
                try:
                    plan = family.fit(config, wanted, ARCH)
                except ConfigError:
                    continue
                self.cost[i, j] = estimate(family.work(config, plan), ARCH)(heads)
                if plan in times:
                    self.loss[i, j] = times[plan] / best - 1

    def score(self, chosen: list[int], factors: np.ndarray) -> float:
        """Of a list; a plan more, or a factor, has to be worth something."""
        first = np.argmin(self.cost[:, chosen] * factors[chosen], axis=1)
        losses = self.loss[np.arange(len(self.loss)), np.array(chosen)[first]]
        price = 0.002 * len(chosen) + 0.001 * float(np.sum(factors[chosen] != 1))
        over = np.maximum(losses - 0.03, 0)
        return float(300 * np.mean(over**2) + losses.mean()) + price

    def search(self, rng: np.random.Generator, starts: int) -> list[tuple[Plan, float]]:
        """Simulated annealing from the one plan that is best alone, several times."""
        count = len(self.plans)
        alone = min(range(count), key=lambda j: self.score([j], np.ones(count)))
        best = ([alone], np.ones(count), self.score([alone], np.ones(count)))
        for _ in range(starts):
            chosen, factors, score = [alone], np.ones(count), self.score([alone], np.ones(count))
            for step in range(STEPS):
                new, weights = list(chosen), factors.copy()
                what, j = rng.random(), int(rng.integers(count))
                at = int(rng.integers(len(new)))
                if what < 0.4:
                    weights[new[at]] = rng.choice(FACTORS)
                elif j not in new and (what < 0.65 or len(new) == LONGEST):
                    new[at] = j
                elif j not in new and what < 0.9:
                    new.append(j)
                elif len(new) > 1:
                    new.pop(at)
                found = self.score(new, weights)
                warmth = 0.02 * (1 - step / STEPS) + 1e-9
                if found < score or rng.random() < np.exp((score - found) / warmth):
                    chosen, factors, score = new, weights, found
                    if score < best[2]:
                        best = chosen, factors, score
        return [(self.plans[j], float(best[1][j])) for j in best[0]]


def by_list(data: dict[str, Any], family: str) -> dict[str, list[Any]]:
    """The cells of each list of a family: config, batch x heads, times."""
    plans = [Plan(**fields) for fields in data["plans"]]
    found = collections.defaultdict(list)
    for entry in (entry for run in data["runs"] for entry in run["cells"]):
        config = config_of(entry)
        if config.family == family:
            times = {plans[int(i)]: us for i, us in entry["us"].items()}
            for name in spec(family).listings(config)[:1]:
                found[name].append((config, entry["batch"] * entry["nheads"], times))
    return found


def lists(data: dict[str, Any], family: str, seed: int) -> dict[str, list[tuple[Plan, float]]]:
    """The lists of a family, by their names."""
    found = by_list(data, family)
    names = sorted(found)
    with concurrent.futures.ProcessPoolExecutor() as pool:
        cells, seeds = (found[name] for name in names), (seed for _ in names)
        return dict(zip(names, pool.map(_searched, cells, seeds)))


def _searched(cells: list[Any], seed: int) -> list[tuple[Plan, float]]:
    return Race(cells).search(np.random.default_rng(seed), STARTS)


def left_out(data: dict[str, Any], shape: tuple[int, ...], seed: int) -> str:
    """How good lists are, of one token of ssu, on a shape that had no part in them. Two searches
    tell that nearly as well as those of a list that ships."""
    family, losses, unknown = spec("ssu"), [], 0
    for cells in by_list(data, "ssu").values():
        if cells[0][0].many:
            continue
        others = [cell for cell in cells if (cell[0].dim, cell[0].dstate) != shape]
        if len(others) == len(cells):
            continue
        listed = Race(others).search(np.random.default_rng(seed), 2)
        for config, heads, times in (cell for cell in cells if cell not in others):
            fits = {family.fit(config, plan, ARCH): factor for plan, factor in reversed(listed)}
            costs = {p: f * estimate(family.work(config, p), ARCH)(heads) for p, f in fits.items()}
            plan = min(costs, key=costs.__getitem__)
            unknown += plan not in times
            if plan in times:
                losses.append(times[plan] / min(times.values()) - 1)
    return (
        f"{len(losses) + unknown} cells: median {np.median(losses):.1%}, worst {max(losses):.1%}, "
        f"{sum(loss > 0.1 for loss in losses)} above 10%, {unknown} of a plan that did not race"
    )


def text_of_lists(found: dict[str, list[tuple[Plan, float]]], family: str, source: str) -> str:
    """JSON, a plan a line."""
    texts = []
    for name, entries in found.items():
        lines = (json.dumps({"plan": short(p), "factor": f}) for p, f in entries)
        texts.append(f'  "{name}": [\n    ' + ",\n    ".join(lines) + "\n  ]")
    head = f' "family": "{family}",\n "measured": "{source}",\n "lists": {{\n'
    return "{\n" + head + ",\n".join(texts) + "\n }\n}\n"


def short(plan: Plan) -> dict[str, Any]:
    """A plan's fields, without those that are as usual."""
    known = Plan.__dataclass_fields__
    return {n: v for n, v in plan.fields().items() if n in list(known)[:4] or v != known[n].default}


def added(data: dict[str, Any], tuned: dict[str, Any]) -> dict[str, Any]:
    """`data` with a run more: the cells of a report of `ssmgen tune`."""
    plans = [Plan(**fields) for fields in data["plans"]]
    index = {plan: i for i, plan in enumerate(plans)}
    cells = []
    for record in tuned["cells"]:
        config = KernelConfig.from_json(record["config"])
        usual = type(config)(family=config.family).fields()
        fields = {k: v for k, v in config.fields().items() if v != usual[k]}
        if config.family != "ssu":
            fields = {"family": config.family, **fields}
        # A plan left behind early was timed in other rounds: what counts is by how much.
        first = min(record["standings"], key=lambda s: s["ratio"])
        us = {}
        for standing in record["standings"]:
            plan = Plan(**standing["plan"])
            if plan not in index:
                index[plan] = len(plans)
                plans.append(plan)
            us[str(index[plan])] = round(first["us"] * standing["ratio"] / first["ratio"], 3)
        cells.append({"config": fields, "batch": record["batch"], "nheads": record["nheads"],
                      "us": us})  # fmt: skip
    run = {"gpu": tuned["gpu"], "plans": "the entrants of `ssmgen tune`", "cells": cells}
    shown = [short(plan) for plan in plans]
    return {"plans": shown, "runs": [*data["runs"], run]}


def read(files: list[Path]) -> dict[str, Any]:
    """Measurements of several files as of one."""
    plans: list[dict[str, Any]] = []
    runs = []
    for data in (json.loads(file.read_text()) for file in files):
        at = len(plans)
        plans += data["plans"]
        runs += [
            {**run, "cells": [
                {**cell, "us": {str(int(i) + at): us for i, us in cell["us"].items()}}
                for cell in run["cells"]
            ]}
            for run in data["runs"]
        ]  # fmt: skip
    return {"plans": plans, "runs": runs}


def text_of(data: dict[str, Any]) -> str:
    """JSON, a plan and a cell a line."""
    plans = ",\n".join(map(json.dumps, data["plans"]))
    runs = []
    for run in data["runs"]:
        head = json.dumps({name: value for name, value in run.items() if name != "cells"})
        cells = ",\n".join(map(json.dumps, run["cells"]))
        runs.append(f'{head[:-1]}, "cells": [\n{cells}\n]}}')
    joined = ",\n".join(runs)
    return f'{{\n"plans": [\n{plans}\n],\n"runs": [\n{joined}\n]\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", type=Path, metavar="FILE", help="repeat it for "
                        "more; left out: all that the lists are found with")  # fmt: skip
    parser.add_argument("--family", choices=FAMILIES, help="left out: all")
    parser.add_argument("--seconds", type=float, default=0, help="search for so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAME,NAME", help="the constants to search for")
    parser.add_argument("--leave-out", metavar="DIMxDSTATE", help="judge lists of one token of ssu "
                        "that were found without this shape on this shape")  # fmt: skip
    parser.add_argument("--lists", action="store_true", help="write the lists, and leave")
    parser.add_argument("--add", metavar="REPORT", help="add to the data, and leave")
    arguments = parser.parse_args()
    files = arguments.data or [RESULTS / name for name in DATA]
    data = read(files)
    if arguments.add:
        if len(files) > 1:
            parser.error("--add needs the one --data it adds to")
        data = added(data, json.loads(Path(arguments.add).read_text()))
        files[0].write_text(text_of(data))
        return
    if arguments.lists:
        for family in [arguments.family] if arguments.family else FAMILIES:
            if named := lists(data, family, arguments.seed):
                text = text_of_lists(named, family, " and ".join(file.name for file in files))
                (LISTS / f"{family}.json").write_text(text)
        return
    if arguments.leave_out:
        shape = tuple(map(int, arguments.leave_out.split("x")))
        print(arguments.leave_out, left_out(data, shape, arguments.seed))
        return
    found = {config_of(entry).family for run in data["runs"] for entry in run["cells"]}
    for family in [arguments.family] if arguments.family else filter(found.__contains__, FAMILIES):
        measured = Measured(data, family)
        constants, counts = CONSTANTS, measured.counts.COUNTS
        if arguments.seconds:
            only = arguments.only and arguments.only.split(",")
            constants, counts = search(measured, arguments.seconds, arguments.seed, only)
            print(constants, counts, sep="\n")
        print(family, report(measured, constants, counts))


if __name__ == "__main__":
    main()
