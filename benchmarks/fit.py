"""Find the constants of the cost model in measured times of plans, and say how good they are.

    python benchmarks/fit.py                 prints the losses of the constants that ship
    python benchmarks/fit.py --seconds 300   searches for better ones and prints them

The loss of a cell is by how much the plan of least estimated cost was slower than the best plan
measured there. A chosen plan that the run left out because it was slow counts as 20% behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from ssmgen.arch import Arch
from ssmgen.config import KernelConfig
from ssmgen.cost import CONSTANTS, Constants, Work, estimate
from ssmgen.families import spec
from ssmgen.families.ssu.work import COUNTS, Counts, counted, facts
from ssmgen.plan import Plan, fitted

DATA = Path(__file__).parent / "results" / "plans-h200.json"
LEFT_OUT = 1.2
ARCH = Arch.of("sm_90")


class Measured:
    """The measurements of shortlisted plans, as arrays: one entry for a plan in a cell."""

    def __init__(self, data: dict[str, Any]) -> None:
        family = spec("ssu")
        plans = [Plan(**fields) for fields in data["plans"]]
        rows: list[dict[str, float]] = []
        self.cells: list[str] = []
        self.plans: list[Plan] = []
        cell, ratio, micro, heads = [], [], [], []
        for run in data["runs"]:
            complete = "few" not in run["plans"]
            for entry in run["cells"]:
                times = {plans[int(i)]: us for i, us in entry["us"].items()}
                for pdl in (False, True):
                    config = KernelConfig(**entry["config"], pdl=pdl)
                    if pdl and config.many:  # type: ignore[attr-defined]
                        continue
                    allowed = {p: t for p, t in times.items() if p.algorithm == "simple" or not pdl}
                    best = min(allowed.values())
                    fits = fitted(config, ARCH, family.shortlist(config, ARCH))
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
                        rows.append(facts(config, plan))  # type: ignore[arg-type]
                        self.plans.append(plan)
                    what = " ".join(map(str, entry["config"].values()))
                    suffix = " pdl" if pdl else ""
                    self.cells.append(f"{what} {entry['batch']}x{entry['nheads']}{suffix}")
        self.facts = {name: np.array([row[name] for row in rows], float) for name in rows[0]}
        self.cell, self.ratio = np.array(cell), np.array(ratio)
        self.us, self.heads = np.array(micro), np.array(heads, float)

    def estimates(self, constants: Constants, counts: Counts) -> np.ndarray:
        work = Work(**counted(self.facts, counts))
        return estimate(work, ARCH, constants)(self.heads)

    def losses(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The loss of each cell and the entry that was chosen there."""
        order = np.lexsort((times, self.cell))
        first = np.r_[True, self.cell[order][1:] != self.cell[order][:-1]]
        return self.ratio[order[first]] - 1, order[first]

    def score(self, constants: Constants, counts: Counts) -> float:
        with np.errstate(all="ignore"):
            times = self.estimates(constants, counts)
            if not np.all(np.isfinite(times) & (times > 0)):
                return np.inf
            losses, _ = self.losses(times)
            error = np.nanmean(np.abs(np.log(times / self.us)))
        over = np.maximum(losses - 0.03, 0)
        return 300 * np.mean(over**2) + losses.max() + losses.mean() + error


def search(measured: Measured, seconds: float, seed: int) -> tuple[Constants, Counts]:
    rng = np.random.default_rng(seed)
    names = [(Constants, f.name) for f in dataclasses.fields(Constants)]
    names += [(Counts, f.name) for f in dataclasses.fields(Counts)]

    def built(values: np.ndarray) -> tuple[Constants, Counts]:
        return tuple(  # type: ignore[return-value]
            kind(**{n: float(v) for (k, n), v in zip(names, values) if k is kind})
            for kind in (Constants, Counts)
        )

    best = np.array([getattr(CONSTANTS if k is Constants else COUNTS, n) for k, n in names])
    score = measured.score(*built(best))
    end = time.time() + seconds
    while time.time() < end:
        step = rng.normal(size=len(best)) * rng.choice([0.02, 0.1, 0.4, 0.8])
        new = best * np.exp(step * (rng.random(len(best)) < 0.2))
        if (found := measured.score(*built(new))) < score:
            best, score = new, found
    return built(np.array([float(f"{value:.3g}") for value in best]))


def report(measured: Measured, constants: Constants, counts: Counts, worst: int = 8) -> str:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(DATA), metavar="FILE")
    parser.add_argument("--seconds", type=float, default=0, help="search for so long")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    measured = Measured(json.loads(Path(arguments.data).read_text()))
    constants, counts = CONSTANTS, COUNTS
    if arguments.seconds:
        constants, counts = search(measured, arguments.seconds, arguments.seed)
        print(constants, counts, sep="\n")
    print(report(measured, constants, counts))


if __name__ == "__main__":
    main()
