"""Find the constants of the cost model in measured times of plans, and say how good they are.

    python benchmarks/fit.py                             prints the losses of those that ship
    python benchmarks/fit.py --family gdn --seconds 300  searches for better ones and prints them
    python benchmarks/fit.py --add report.json           adds what `ssmgen tune --report` measured

The loss of a cell is by how much the plan of least estimated cost was slower than the best plan
measured there. A chosen plan that the run left out because it was slow counts as 20% behind. One
token of ssu counts twice, with `pdl` by the same times of its simple plans: what was timed in a
chain is not added. What belongs to the GPU (`ssmgen.cost.CONSTANTS`) is found with the counts of
ssu; the other families take it as it is. With ``--only`` all but the named constants stay as they
are.
"""

from __future__ import annotations

import argparse
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
from ssmgen.families import spec
from ssmgen.plan import Plan, fitted

DATA = Path(__file__).parent / "results" / "plans-h200.json"
LEFT_OUT = 1.2
ARCH = Arch.of("sm_90")
FAMILIES = ("ssu", "gdn", "conv1d")


def config_of(entry: dict[str, Any], **more: Any) -> KernelConfig:
    return KernelConfig(**{"family": "ssu", **entry["config"], **more})


class Measured:
    """The measurements of one family's shortlisted plans, as arrays: an entry for a plan in a
    cell."""

    def __init__(self, data: dict[str, Any], family: str) -> None:
        self.counts = importlib.import_module(f"ssmgen.families.{family}.work")
        shortlist = spec(family).shortlist
        # The model knows nothing of who holds what: a placed plan is its like.
        plans = [dataclasses.replace(Plan(**fields), placed=False) for fields in data["plans"]]
        rows: list[dict[str, float]] = []
        self.cells: list[str] = []
        self.plans: list[Plan] = []
        cell, ratio, micro, heads = [], [], [], []
        for run in data["runs"]:
            complete = "few" not in run["plans"]
            for entry in run["cells"]:
                if config_of(entry).family != family:
                    continue
                times: dict[Plan, float] = {}
                for i, us in entry["us"].items():
                    times[plans[int(i)]] = min(us, times.get(plans[int(i)], np.inf))
                one = config_of(entry).family == "ssu" and not config_of(entry).many  # type: ignore[attr-defined]
                for pdl in (False, True) if one else (False,):
                    config = config_of(entry, pdl=pdl)
                    allowed = {p: t for p, t in times.items() if p.algorithm == "simple" or not pdl}
                    if not allowed:
                        continue
                    best = min(allowed.values())
                    fits = fitted(config, ARCH, shortlist(config, ARCH))
                    if (
                        min((allowed.get(p, np.inf) for p in fits), default=np.inf)
                        > LEFT_OUT * best
                    ):
                        continue  # of a few plans, none that is listed and near the best
                    for plan in fits:
                        us = allowed.get(plan, LEFT_OUT * best if complete else None)
                        if us is None:
                            continue
                        cell.append(len(self.cells))
                        ratio.append(us / best)
                        micro.append(us if plan in allowed else np.nan)
                        heads.append(entry["batch"] * entry["nheads"])
                        rows.append(self.counts.facts(config, plan))
                        self.plans.append(plan)
                    what = " ".join(map(str, entry["config"].values()))
                    suffix = " pdl" if pdl else ""
                    self.cells.append(f"{what} {entry['batch']}x{entry['nheads']}{suffix}")
        self.facts = {name: np.array([row[name] for row in rows], float) for name in rows[0]}
        self.cell, self.ratio = np.array(cell), np.array(ratio)
        self.us, self.heads = np.array(micro), np.array(heads, float)

    def estimates(self, constants: Constants, counts: Any) -> np.ndarray:
        work = Work(**self.counts.counted(self.facts, counts))
        return estimate(work, ARCH, constants)(self.heads)

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
    lines = [
        f"{len(losses)} cells: worst loss {losses.max():.1%}, median {np.median(losses):.1%}, "
        f"{np.sum(losses > 0.1)} above 10%; median error of an estimate {error:.1%}"
    ]
    for i in np.argsort(-losses)[:worst]:
        lines.append(f"  {losses[i]:6.1%}  {measured.cells[i]:32} {measured.plans[chosen[i]]}")
    return "\n".join(lines)


def added(data: dict[str, Any], tuned: dict[str, Any]) -> dict[str, Any]:
    """`data` with a run more: the cells of a report of `ssmgen tune`."""
    plans = [Plan(**fields) for fields in data["plans"]]
    index = {plan: i for i, plan in enumerate(plans)}
    cells = []
    for record in tuned["cells"]:
        config = KernelConfig.from_json(record["config"])
        if getattr(config, "pdl", False):
            continue  # timed in a chain
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
    known = Plan.__dataclass_fields__
    shown = [
        {n: v for n, v in plan.fields().items() if n in list(known)[:4] or v != known[n].default}
        for plan in plans
    ]
    return {"plans": shown, "runs": [*data["runs"], run]}


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
    parser.add_argument("--data", default=str(DATA), metavar="FILE")
    parser.add_argument("--family", choices=FAMILIES, help="left out: all")
    parser.add_argument("--seconds", type=float, default=0, help="search for so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAME,NAME", help="the constants to search for")
    parser.add_argument("--add", metavar="REPORT", help="add to the data, and leave")
    arguments = parser.parse_args()
    data = json.loads(Path(arguments.data).read_text())
    if arguments.add:
        data = added(data, json.loads(Path(arguments.add).read_text()))
        Path(arguments.data).write_text(text_of(data))
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
