"""Is there a cliff between the grid's points? The dispatched plan beside the best at odd sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .. import template
from ..bench.grid import ODD_BATCHES, ODD_HEADS, ODD_SHAPES
from ..config import KernelConfig
from ..errors import ConfigError
from ..families import spec
from ..plan import dispatch
from ..prewarm import Job
from .rig import Rig
from .tuner import Cell, Compile, Note, Progress, Report, compile_all, measure_cell, spaces

__all__ = ["LIMIT", "check", "odd_cells"]

# How far a dispatched plan may be behind the best one.
LIMIT = 0.05


def odd_cells(
    configs: Iterable[KernelConfig],
    rig: Rig,
    batches: Sequence[int] = ODD_BATCHES,
    heads: Sequence[int] = ODD_HEADS,
) -> list[Cell]:
    """Cells that no table was measured at: every config in its own shape and, where it has such
    fields, in odd ones, at odd batches and heads."""
    found: dict[Cell, None] = {}
    for config in dict.fromkeys(configs):
        if not rig.measures(config.family):
            continue
        for shape in ODD_SHAPES:
            try:
                odd = config.replace(**shape)
            except (ConfigError, TypeError):
                continue
            key = spec(odd.family).dispatch_keys(odd)[0]
            choices = dispatch(odd, rig.arch, rig.gpu)
            for batch in batches:
                for nheads in heads:
                    work = batch * nheads
                    plan = next(c.plan for c in choices if c.limit is None or work <= c.limit)
                    found[Cell(odd, key, batch, nheads, plan)] = None
    return list(found)


def check(
    cells: Sequence[Cell],
    rig: Rig,
    *,
    budget: float = 570.0,
    compile: Compile | None = None,
    note: Note = lambda progress: None,
) -> Report:
    """Race every cell's candidates against the plan that dispatch chooses there.

    The ``margin`` of a record is by how much that plan was slower than the best (0.02 is 2%), 0 if
    the difference is within the noise. Cells that `budget` seconds did not reach are ``missing``.
    """
    start = rig.clock()
    report = Report(rig.gpu, str(rig.arch))
    plans = spaces(cells, rig.arch)
    jobs = {
        key: Job(config, plan, rig.arch, key)
        for config in plans
        for plan in plans[config]
        for key in [template.key(config, plan, rig.arch)]
    }
    built = (compile or compile_all)(
        list(jobs.values()), lambda done, total: note(Progress("compile", done, total, ""))
    )
    try:
        for done, cell in enumerate(cells):
            left = start + budget - rig.clock()
            if left <= 0:
                report.missing = [str(cell) for cell in cells[done:]]
                break
            note(Progress("race", done, len(cells), str(cell), left))
            rows = {p: built[template.key(cell.config, p, rig.arch)] for p in plans[cell.config]}
            ready = {plan: row for plan, row in rows.items() if "error" not in row}
            record = None
            if cell.present in ready:
                record = measure_cell(rig, cell, ready, left / (len(cells) - done))
            if record is None:
                report.failed.append({"kernel": str(cell), "error": "the plan in use failed"})
                continue
            report.cells.append(record)
            report.measured += 1
    except KeyboardInterrupt:
        report.interrupted = True
        report.missing = [str(cell) for cell in cells[len(report.cells) + len(report.failed) :]]
    report.seconds = round(rig.clock() - start, 1)
    return report
