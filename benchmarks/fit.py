"""Find what the cost model goes by in measured times of plans, and say how good it is.

    python benchmarks/fit.py                             prints the losses of what ships
    python benchmarks/fit.py --family gdn --seconds 300  searches for better constants, prints them
    python benchmarks/fit.py --lists                     writes the lists of plans anew
    python benchmarks/fit.py --data FILE --add report.json
                                                         adds what `ssmgen tune --report` measured

The loss of a cell is by how much the plan that the estimate and its list choose was slower than the
best plan measured there; cells whose choice did not race are counted apart, and in a search for
lists they lose 20%. Times with `pdl` are those in a chain. What belongs to the GPU
(`ssmgen.cost.CONSTANTS`) is found with the counts of ssu; the other families take it as it is. With
``--only`` all but the named constants stay as they are. New constants want new lists: what is
printed after a search has the factors that were found for the old ones.

A list has the plans among which the estimate chooses for one state dtype, rounding and form, each
with a factor on its estimate: what the compiler makes of it. They are found at random, from one
seed: those whose choice loses least. A shape in which that is not good enough has its own.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib
import json
import re
import time
from collections.abc import Iterator
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
# What was slower than the best by so much tells nothing of the plans that matter.
NEAR = 1.5
# The name of a list that is for one shape.
SHAPED = re.compile(r"\d+x\d+\.")
# The most plans of a list, the steps of a search for one, the searches; factors.
LONGEST, STEPS, STARTS = 8, 8000, 6
FACTORS = tuple(n / 50 for n in range(35, 71))
# A shape has a list of its own if the list of all loses more than this in some of its cells.
FAR = 0.08
# Plans and their factors.
Listed = list[tuple[Plan, float]]


def config_of(entry: dict[str, Any]) -> KernelConfig:
    return KernelConfig(**{"family": "ssu", **entry["config"]})


class Measured:
    """The measurements of one family's plans, as arrays: an entry for a plan in a cell, of those
    that raced and were not far behind."""

    def __init__(self, data: dict[str, Any], family: str) -> None:
        self.counts = importlib.import_module(f"ssmgen.families.{family}.work")
        forms: dict[KernelConfig, dict[Plan, Plan]] = {}
        groups: dict[tuple[str, Plan], int] = {}
        rows: list[dict[str, float]] = []
        group, micro, heads, weight = [], [], [], []
        for config, size, times in measurements(data, family):
            if config not in forms:
                forms[config] = fitted(config, ARCH, _named(config))
            name = general_of(config)
            best = min(times.values())
            for plan, us in times.items():
                if us <= NEAR * best and (wanted := forms[config].get(plan)):
                    group.append(groups.setdefault((name, wanted), len(groups)))
                    rows.append(self.counts.facts(config, plan))
                    micro.append(us)
                    heads.append(size)
                    weight.append((best / us) ** 4)
        self.facts = {name: np.array([row[name] for row in rows], float) for name in rows[0]}
        self.group, self.weight = np.array(group), np.array(weight)
        self.us, self.heads = np.array(micro), np.array(heads, float)
        self.whole = np.bincount(self.group, self.weight)
        self.listed = any(name for name, _ in groups)

    def estimates(self, constants: Constants, counts: Any) -> np.ndarray:
        work = Work(**self.counts.counted(self.facts, counts))
        return estimate(work, ARCH, constants)(self.heads)

    def score(self, constants: Constants, counts: Any) -> float:
        """How far the logarithms of estimates are off from what is usual for the plan in its list,
        which a factor can mend, and, at a tenth of the weight, how far that is off; of a family
        without lists how far they are off.
        """
        with np.errstate(all="ignore"):
            times = self.estimates(constants, counts)
            if not np.all(np.isfinite(times) & (times > 0)):
                return np.inf
        off = np.log(times / self.us)
        usual = self.listed * np.bincount(self.group, self.weight * off) / self.whole
        both = np.minimum((off - usual[self.group]) ** 2, 0.25) + 0.1 * np.minimum(off**2, 0.25)
        return float(np.sqrt(np.average(both, weights=self.weight)))


def measurements(
    data: dict[str, Any], family: str
) -> Iterator[tuple[KernelConfig, int, dict[Plan, float]]]:
    """The cells of a family: config, batch x heads, times."""
    plans = [Plan(**fields) for fields in data["plans"]]
    for entry in (entry for run in data["runs"] for entry in run["cells"]):
        config = config_of(entry)
        if config.family == family:
            times = {plans[int(i)]: us for i, us in entry["us"].items()}
            yield config, entry["batch"] * entry["nheads"], times


def _named(config: KernelConfig) -> list[Plan]:
    family = spec(config.family)
    return [*family.candidates(config, ARCH), *family.staples(config, ARCH)]


def general_of(config: KernelConfig) -> str:
    """The list of a config that is not of its shape alone; a family may have none."""
    names = spec(config.family).listings(config)
    return next((name for name in names if not SHAPED.match(name)), "")


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


def report(
    data: dict[str, Any], family: str, constants: Constants, counts: Any, worst: int = 8
) -> str:
    module = importlib.import_module(f"ssmgen.families.{family}.work")
    costs: dict[KernelConfig, dict[Plan, Any]] = {}
    losses, errors, unknown = [], [], 0
    for config, heads, times in measurements(data, family):
        if config not in costs:
            factors = spec(family).shortlist(config, ARCH)
            costs[config] = {
                plan: (factors[wanted], estimate(Work(**module.counted(facts, counts)),
                                                 ARCH, constants))
                for plan, wanted in fitted(config, ARCH, factors).items()
                for facts in [module.facts(config, plan)]
            }  # fmt: skip
        us = {plan: factor * cost(heads) for plan, (factor, cost) in costs[config].items()}
        plan = min(us, key=us.__getitem__)
        errors += [abs(us[p] / times[p] - 1) for p in us if p in times]
        unknown += plan not in times
        if plan in times:
            losses.append((times[plan] / min(times.values()) - 1, config, heads, plan))
    losses.sort(key=lambda loss: -loss[0])
    behind = [loss for loss, *_ in losses]
    lines = [
        f"{len(losses) + unknown} cells: worst loss {max(behind, default=0):.1%}, median "
        f"{np.median(behind or [0]):.1%}, {sum(loss > 0.1 for loss in behind)} above 10%, "
        f"{unknown} of a plan that did not race; median error of an estimate "
        f"{np.median(errors or [0]):.1%}"
    ]
    for loss, config, heads, plan in losses[:worst]:
        usual = type(config)(family=family).fields()
        fields = (f"{k}={v}" for k, v in config.fields().items() if v != usual[k])
        lines.append(f"  {loss:6.1%}  {' '.join(fields)} at {heads}: {plan}")
    return "\n".join(lines)


def choice(config: KernelConfig, heads: int, listed: Listed) -> Plan:
    """The plan of a list that has the least estimated cost."""
    factors, work = dict(listed), spec(config.family).work
    costs = {
        plan: factors[wanted] * estimate(work(config, plan), ARCH)(heads)
        for plan, wanted in fitted(config, ARCH, factors).items()
    }
    return min(costs, key=costs.__getitem__)


class Race:
    """The cells that one list serves: what each plan lost in them, and its estimates."""

    def __init__(self, cells: list[tuple[KernelConfig, int, dict[Plan, float]]]) -> None:
        self.cells = cells
        family = spec(cells[0][0].family)
        # As plans stand in a list: the first that becomes what raced, in any cell.
        raced: dict[Plan, None] = {}
        for config, _, times in cells:
            wanted = fitted(config, ARCH, _named(config))
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

    def losses(self, chosen: list[int], factors: np.ndarray) -> np.ndarray:
        first = np.argmin(self.cost[:, chosen] * factors[chosen], axis=1)
        return self.loss[np.arange(len(self.loss)), np.array(chosen)[first]]

    def score(self, chosen: list[int], factors: np.ndarray) -> float:
        """Of a list; a plan more, or a factor, has to be worth something."""
        losses = self.losses(chosen, factors)
        price = 0.002 * len(chosen) + 0.001 * float(np.sum(factors[chosen] != 1))
        over = np.maximum(losses - 0.03, 0)
        far = np.mean(losses > FAR)
        return float(300 * np.mean(over**2) + losses.mean() + far) + price

    def far(self, listed: Listed) -> int:
        """Cells in which the choice of any list loses more than `FAR`, or did not race."""
        found = 0
        for config, heads, times in self.cells:
            plan = choice(config, heads, listed)
            found += times.get(plan, np.inf) > (1 + FAR) * min(times.values())
        return found

    def search(self, rng: np.random.Generator, starts: int, steps: int = STEPS) -> Listed:
        """Simulated annealing from the one plan that is best alone, several times."""
        count = len(self.plans)
        alone = min(range(count), key=lambda j: self.score([j], np.ones(count)))
        best = ([alone], np.ones(count), self.score([alone], np.ones(count)))
        for _ in range(starts):
            chosen, factors, score = [alone], np.ones(count), self.score([alone], np.ones(count))
            for step in range(steps):
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
                warmth = 0.02 * (1 - step / steps) + 1e-9
                if found < score or rng.random() < np.exp((score - found) / warmth):
                    chosen, factors, score = new, weights, found
                    if score < best[2]:
                        best = chosen, factors, score
        return [(self.plans[j], float(best[1][j])) for j in best[0]]


def by_list(data: dict[str, Any], family: str) -> dict[str, list[Any]]:
    """The cells of each list of a family that is for all shapes: config, batch x heads, times."""
    found = collections.defaultdict(list)
    for cell in measurements(data, family):
        if name := general_of(cell[0]):
            found[name].append(cell)
    return found


def lists(data: dict[str, Any], family: str, seed: int) -> dict[str, Listed]:
    """The lists of a family, by their names: those for all shapes, each followed by those of single
    shapes."""
    found = by_list(data, family)
    names = sorted(found)
    with concurrent.futures.ProcessPoolExecutor() as pool:
        cells, seeds = (found[name] for name in names), (seed for _ in names)
        every = pool.map(_searched, names, cells, seeds)
        return {name: listed for several in every for name, listed in several.items()}


def _searched(name: str, cells: list[Any], seed: int) -> dict[str, Listed]:
    """The list of `name`, and where its choice is far behind in cells of a shape one of that shape,
    if that is better."""
    rng = np.random.default_rng(seed)
    found = {name: Race(cells).search(rng, STARTS)}
    shapes = collections.defaultdict(list)
    for cell in cells:
        if SHAPED.match(own := spec(cell[0].family).listings(cell[0])[0]):
            shapes[own].append(cell)
    for own, those in shapes.items():
        race = Race(those)
        if behind := race.far(found[name]):
            listed = race.search(rng, STARTS, 3 * STEPS)
            if race.far(listed) < behind:
                found[own] = listed
    return found


def left_out(data: dict[str, Any], shape: tuple[int, ...], seed: int) -> str:
    """How good lists are, of one token of ssu, on a shape that had no part in them. Two searches
    tell that nearly as well as those of a list that ships."""
    losses, unknown = [], 0
    for cells in by_list(data, "ssu").values():
        if cells[0][0].many:
            continue
        others = [cell for cell in cells if (cell[0].dim, cell[0].dstate) != shape]
        if len(others) == len(cells):
            continue
        listed = Race(others).search(np.random.default_rng(seed), 2)
        for config, heads, times in (cell for cell in cells if cell not in others):
            plan = choice(config, heads, listed)
            unknown += plan not in times
            if plan in times:
                losses.append(times[plan] / min(times.values()) - 1)
    return (
        f"{len(losses) + unknown} cells: median {np.median(losses):.1%}, worst {max(losses):.1%}, "
        f"{sum(loss > 0.1 for loss in losses)} above 10%, {unknown} of a plan that did not race"
    )


def text_of_lists(found: dict[str, Listed], family: str, source: str) -> str:
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
        constants = CONSTANTS
        counts = importlib.import_module(f"ssmgen.families.{family}.work").COUNTS
        if arguments.seconds:
            measured = Measured(data, family)
            only = arguments.only and arguments.only.split(",")
            constants, counts = search(measured, arguments.seconds, arguments.seed, only)
            print(constants, counts, sep="\n")
        print(family, report(data, family, constants, counts))


if __name__ == "__main__":
    main()
