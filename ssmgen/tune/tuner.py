"""The tuner: cells to measure, kernels to compile, races under a budget of time."""

from __future__ import annotations

import datetime
import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import template
from ..arch import Arch
from ..config import KernelConfig, canonical_json
from ..families import spec
from ..plan import Plan, dispatch, modelled
from ..prewarm import Event, Job, compile_jobs
from .journal import Journal
from .race import Outcome, race
from .rig import Rig
from .space import entrants, fill, prune
from .table import reference, write_tables

__all__ = [
    "Cell",
    "Progress",
    "Report",
    "cells_of",
    "compile_all",
    "measurable",
    "measure_cell",
    "spaces",
    "tune",
]

# Seconds that a race has at least, once its plans are loaded.
LEAST = 0.05


@dataclass(frozen=True)
class Cell:
    """One size of one key: what is raced. `present` is the plan in use there; the one that the cost
    model would take races too, if it is named."""

    config: KernelConfig
    key: str
    batch: int
    nheads: int
    present: Plan
    modelled: Plan | None = None

    @property
    def heads(self) -> int:
        return self.batch * self.nheads

    def __str__(self) -> str:
        return f"{self.config.family} {self.key} {self.batch}x{self.nheads}"


@dataclass(frozen=True)
class Progress:
    """How far it is: ``stage`` is compile or race, ``left`` the seconds that remain, if known."""

    stage: str
    done: int
    total: int
    what: str
    left: float | None = None


@dataclass
class Report:
    """What became of each cell: plain data, as in the journal. ``seconds`` is of this run, which
    measured ``measured`` of the ``cells``; ``missing`` names those that nobody has measured yet,
    and ``tables`` the files that were written, those of keys of which nothing is missing."""

    gpu: str
    arch: str
    cells: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    measured: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    def losses(self) -> list[float]:
        """By how much the plan that the cost model would take was slower than the first, in rising
        order, of each cell where it was measured (0.02 is 2%)."""
        found = []
        for cell in self.cells:
            times = {canonical_json(s["plan"]): s["ratio"] for s in cell["standings"]}
            if (ratio := times.get(canonical_json(cell.get("modelled")))) is not None:
                found.append(ratio / min(times.values()) - 1)
        return sorted(found)


# Compiles jobs; the manifest's resources, or what went wrong, by key.
Compile = Callable[[list[Job], Callable[[int, int], None]], dict[str, dict[str, Any]]]
Note = Callable[[Progress], None]


def cells_of(
    configs: Iterable[KernelConfig],
    arch: Arch,
    gpu: str | None,
    sizes: Sequence[int] | None = None,
) -> list[Cell]:
    """The cells of `configs`: of those that share a key the first stands for all. Of a key those of
    a power of two come first: what races between them is told by those.

    `sizes` are batch x heads of the family's reference shape; None: those the family names.
    """
    keys: dict[tuple[str, str], KernelConfig] = {}
    for config in configs:
        # What is measured is one plan a size; a forced algorithm is one of the candidates.
        config = config.replace(algorithm="auto", batch_invariant=False)
        keys.setdefault((config.family, spec(config.family).dispatch_keys(config)[0]), config)
    cells = []
    for (name, key), config in keys.items():
        choices, guesses = dispatch(config, arch, gpu), modelled(config, arch)
        family = spec(name)
        ordered = sorted(sizes or family.tuned_at(config), key=lambda n: (n.bit_count() > 1, n))
        # A table tells sizes apart by heads of the reference shape.
        shapes: dict[int, tuple[int, int]] = {}
        for size in ordered:
            batch, nheads = _shape(_own(family.limit, config, size), family.heads)
            shapes.setdefault(reference(config, batch * nheads), (batch, nheads))
        for batch, nheads in shapes.values():
            work = batch * nheads
            plan = next(c.plan for c in choices if c.limit is None or work <= c.limit)
            guess = next(p for limit, p in guesses if limit is None or work <= limit)
            cells.append(Cell(config, key, batch, nheads, plan, guess))
    return cells


def _own(limit: Callable[[KernelConfig, int], int], config: KernelConfig, size: int) -> int:
    """About as much of `config` as `size` heads of the reference shape, as a batch has heads: of a
    power of two the nearest one, and of what is between two of them as far between."""
    power = 1 << size.bit_length() - 1
    own = 1 << round(math.log2(limit(config, power)))
    return max(1, own * size // power)


def _shape(heads: int, usual: Sequence[int]) -> tuple[int, int]:
    """Batch and heads of a size, with heads as models have them: the most that divide it, else one
    row of all; of channels whole 64."""
    heads -= heads % max(1, usual[-1] // 16)
    nheads = next((n for n in usual if heads % n == 0), heads)
    return heads // nheads, nheads


def spaces(cells: Iterable[Cell], arch: Arch) -> dict[KernelConfig, dict[Plan, Plan]]:
    """The plans to compile for each config of `cells`, with the form a table holds of each."""
    found: dict[KernelConfig, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.config, []).append(cell)
    return {
        config: entrants(config, arch, [c.heads for c in own], _wanted(own))
        for config, own in found.items()
    }


def _wanted(cells: Iterable[Cell]) -> list[Plan]:
    """The plans that race whatever an estimate says."""
    return [plan for cell in cells for plan in (cell.present, cell.modelled) if plan is not None]


def measurable(configs: Iterable[KernelConfig], rig: Rig, report: Report) -> list[KernelConfig]:
    """Those of `configs` that `rig` can make inputs for; the others' families go to `report`."""
    found = list(configs)
    for name in dict.fromkeys(config.family for config in found):
        if not rig.measures(name):
            report.failed.append(
                {"kernel": name, "error": "there are no inputs to measure it with"}
            )
            found = [config for config in found if config.family != name]
    return found


def tune(
    configs: Iterable[KernelConfig],
    rig: Rig,
    out: Path,
    *,
    budget: float = 570.0,
    sizes: Sequence[int] | None = None,
    compile: Compile | None = None,
    note: Note = lambda progress: None,
) -> Report:
    """Find the fastest plans on the GPU of `rig` and write tables of them under `out`.

    `budget` is in seconds, compiling included; what is not reached is missing, and the next run
    goes on from the journal in `out`. Ctrl-C ends it early with all that was measured. A table is
    written for each key all of whose sizes are measured.
    """
    start = rig.clock()
    report = Report(rig.gpu, str(rig.arch))
    able = measurable(configs, rig, report)
    cells = cells_of(able, rig.arch, rig.gpu, sizes)
    plans = spaces(cells, rig.arch)
    kernels = {
        config: {plan: template.key(config, plan, rig.arch) for plan in own}
        for config, own in plans.items()
    }
    journal = Journal(out / f"{rig.arch}.journal", rig.identity)
    try:
        _measure(
            rig, cells, plans, kernels, journal, report, start + budget,
            compile or compile_all, note,
        )  # fmt: skip
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        journal.close()
    for cell in cells:
        record = journal.cells.get(str(cell))
        if record is None or record["kernels"] != _digest(cell, kernels[cell.config]):
            report.missing.append(str(cell))
        else:
            report.cells.append(record)
    identity = {"date": datetime.date.today().isoformat(), **rig.identity}
    report.tables = write_tables(cells, report, rig.arch, rig.gpu, identity, out)
    report.seconds = round(rig.clock() - start, 1)
    return report


def _measure(
    rig: Rig,
    cells: list[Cell],
    plans: dict[KernelConfig, dict[Plan, Plan]],
    kernels: dict[KernelConfig, dict[Plan, str]],
    journal: Journal,
    report: Report,
    end: float,
    compile: Compile,
    note: Note,
) -> None:
    todo = [
        cell for cell in cells
        if journal.cells.get(str(cell), {}).get("kernels") != _digest(cell, kernels[cell.config])
    ]  # fmt: skip
    jobs = {
        key: Job(config, plan, rig.arch, key)
        for config in dict.fromkeys(cell.config for cell in todo)
        for plan, key in kernels[config].items()
    }
    built = compile(
        list(jobs.values()), lambda done, total: note(Progress("compile", done, total, ""))
    )
    for key, job in jobs.items():
        if "error" in built[key]:
            report.failed.append({"kernel": str(job), "error": built[key]["error"]})
    measured: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    waiting = set(todo)
    for cell in cells:
        others = measured.setdefault((cell.config.family, cell.key), {})
        if cell not in waiting:
            others[cell.heads] = journal.cells[str(cell)]
    # What it took to load and judge the kernels of a config, besides a race: time is kept for those
    # that are yet to come. The first is no measure: it begins everything.
    loading: list[float] = []
    configs = {cell.config for cell in todo}
    for done, cell in enumerate(todo):
        left = end - rig.clock()
        if left <= 0:
            return
        note(Progress("race", done, len(todo), str(cell), left))
        first = cell.config in configs
        configs.discard(cell.config)
        each = statistics.median(loading[1:] or [0.0])
        share = max(0.0, left - each * (first + len(configs))) / (len(todo) - done) + each * first
        ready = {
            plan: built[key]
            for plan, key in kernels[cell.config].items()
            if "error" not in built[key]
        }
        record = None
        if cell.present in ready:
            around = _around(cell.heads, measured[cell.config.family, cell.key])
            record = measure_cell(rig, cell, ready, share, around)
        if record is None:
            report.failed.append({"kernel": str(cell), "error": "the plan in use failed"})
            continue
        measured[cell.config.family, cell.key][cell.heads] = record
        if first:
            loading.append(record["loading"])
        record["kernels"] = _digest(cell, kernels[cell.config])
        for standing in record["standings"]:
            wanted = plans[cell.config][Plan(**standing["plan"])]
            standing["table"] = wanted.fields()
        journal.add(record)
        report.measured += 1


def _around(heads: int, measured: Mapping[int, dict[str, Any]]) -> list[Plan]:
    """The plans that raced at the sizes next to one, from the best place at either; none for a
    power of two, or if these are more than an octave apart."""
    if heads.bit_count() == 1:
        return []
    below = max((size for size in measured if size < heads), default=0)
    above = min((size for size in measured if size > heads), default=0)
    if not 0 < above <= 2 * below:
        return []
    best: dict[Plan, float] = {}
    for record in (measured[below], measured[above]):
        first = min(standing["ratio"] for standing in record["standings"])
        for standing in record["standings"]:
            plan, behind = Plan(**standing["plan"]), standing["ratio"] / first
            best[plan] = min(best.get(plan, behind), behind)
    return sorted(best, key=best.__getitem__)


def measure_cell(
    rig: Rig,
    cell: Cell,
    built: dict[Plan, dict[str, Any]],
    seconds: float,
    around: Sequence[Plan] = (),
) -> dict[str, Any] | None:
    """Race the plans of one cell, of which `around` were the fastest next to it, if that is known,
    for `seconds` with what it takes to load them: a record of plain data; None if the plan in use
    is wrong."""
    start = rig.clock()
    wanted = _wanted([cell])
    chosen, out = prune(cell.config, rig.arch, cell.heads, built, *wanted, around=around)
    with rig.open(cell.config, cell.batch, cell.nheads, chosen) as bench:
        if cell.present in bench.wrong:
            return None
        chosen = [plan for plan in chosen if plan not in bench.wrong]
        loading = rig.clock() - start
        left = max(LEAST, seconds - loading)
        outcome = race(chosen, cell.present, bench.round, seconds=left, clock=rig.clock)
    why = {plan: f"wrong: {text}" for plan, text in bench.wrong.items()} | out
    fills = {plan: fill(cell.config, plan, rig.multiprocessors) for plan in chosen}
    return {
        "cell": str(cell),
        "family": cell.config.family,
        "key": cell.key,
        "config": cell.config.to_json(),
        "batch": cell.batch,
        "nheads": cell.nheads,
        "seconds": round(rig.clock() - start, 3),
        "loading": round(loading, 3),
        **_plain(outcome, fills),
        "modelled": cell.modelled and cell.modelled.fields(),
        "left_out": [{"plan": plan.fields(), "why": text} for plan, text in why.items()],
    }


def _plain(outcome: Outcome[Plan], fills: Mapping[Plan, float]) -> dict[str, Any]:
    return {
        "winner": outcome.winner.fields(),
        "present": outcome.present.fields(),
        "margin": round(outcome.margin, 5),
        "noise": round(outcome.noise, 5),
        "rounds": outcome.rounds,
        "standings": [
            {
                "plan": s.entrant.fields(),
                "us": round(s.microseconds, 3),
                "spread": round(s.spread, 5),
                "rounds": s.rounds,
                "ratio": round(s.ratio, 5),
                "error": round(s.error, 5),
                "fill": round(fills[s.entrant], 3),
            }
            for s in outcome.standings
        ],
    }


def _digest(cell: Cell, kernels: Mapping[Plan, str]) -> str:
    """Of the kernels of a cell: changes with a template, the space, or the plan in use."""
    text = canonical_json([sorted(kernels.values()), cell.present.fields()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compile_all(
    jobs: list[Job], note: Callable[[int, int], None], workers: int | None = None
) -> dict[str, dict[str, Any]]:
    """Compile into the user store what is not there, in parallel."""
    done = 0

    def hear(event: Event) -> None:
        nonlocal done
        if event.row is not None:
            done += 1
            note(done, event.total)

    found = compile_jobs(jobs, workers=workers, progress=hear)
    return {row["key"]: row for row in (*found.built, *found.present, *found.failed)}
