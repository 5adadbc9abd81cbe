"""Results as tables: for a terminal, for Markdown, and the files they are kept in.

Every table is made of a result file's content alone, so what was published can be printed again.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ArgumentValueError
from .contestants import COPY, NAMES, OURS
from .grid import GRIDS, Grid, Wanted

__all__ = [
    "Table",
    "Timed",
    "dump",
    "fit",
    "intro",
    "line",
    "load",
    "markdown",
    "names_in",
    "tables",
]

Result = dict[str, Any]
Cell = dict[str, Any]
EVERYTHING = Wanted()
SCHEMA = 1


@dataclass(frozen=True)
class Timed:
    """A time, its share of the floor in percent, and the ratio to ssmgen's, if the noise is known.

    `alike`: the ratio differs from 1 by no more than the noise.
    """

    us: float
    share: float
    ratio: float | None = None
    alike: bool = False

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f", {'≈' * self.alike}{self.ratio:.2f}x"
        return f"{self.us:.2f} ({self.share:.0f}%{ratio})"


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[Any]]
    notes: list[str] = field(default_factory=list)


def dump(result: Result) -> str:
    """A result as JSON, a cell on a line."""
    lines = []
    for name, value in result.items():
        if name in ("cells", "rows"):
            inner = ",\n".join(f"  {json.dumps(item)}" for item in value)
            text = f"[\n{inner}\n ]" if value else "[]"
        else:
            text = json.dumps(value)
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load(path: str | Path) -> Result:
    """A result file. Raises `ArgumentValueError` if it is none, or of another schema."""
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ArgumentValueError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ArgumentValueError(f"{path}: not JSON") from None
    if not isinstance(found, dict) or "section" not in found:
        raise ArgumentValueError(f"{path}: not a result of ssmgen bench")
    if found.get("schema") != SCHEMA:
        raise ArgumentValueError(
            f"{path}: schema {found.get('schema')!r} found; allowed: {SCHEMA}"
        )  # fmt: skip
    return found


def intro(result: Result) -> str:
    """What a result was measured on, and what its numbers are."""
    env = result["environment"]
    known = [
        env.get("gpu") or env.get("processor"),
        f"driver {env['driver']}" if env.get("driver") else None,
        f"{env['cores']} cores" if not env.get("gpu") and env.get("cores") else None,
        f"torch {env['torch']}" if env.get("torch") else None,
        f"Triton {env['triton']}" if env.get("triton") else None,
        env["date"],
    ]
    text = ", ".join(filter(None, known))
    if result["section"] in GRIDS and result.get("bandwidth"):
        return (
            f"{text}; in-place pass {result['bandwidth'] / 1e12:.2f} TB/s. Microseconds, and in "
            "brackets the share of the floor: the bytes that must move over that bandwidth."
        )
    return f"{text}. Microseconds." if result["section"] == "chain" else f"{text}."


def names_in(cells: Iterable[Cell]) -> list[str]:
    """The contestants that any cell has a time of, ssmgen first and the copy last."""
    there = {name for cell in cells for name in cell["us"]}
    return [name for name in NAMES if name in there]


def tables(result: Result, wanted: Wanted = EVERYTHING) -> list[Table]:
    """The tables of a result, of the cells that are wanted."""
    section = result["section"]
    if section in GRIDS:
        return _grid_tables(result, wanted)
    if section == "chain":
        return _chain_tables(result, wanted)
    rows = [[row["name"], f"{row['value']:.2f} {row['unit']}"] for row in result.get("rows", ())]
    rows += [[f"prewarm: {name.replace('_', ' ')}", _plain(value)]
             for name, value in (result.get("prewarm") or {}).items()]  # fmt: skip
    return [Table("", [section, "time" if section == "host" else "value"], rows, _faults([result]))]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _grid_tables(result: Result, wanted: Wanted) -> list[Table]:
    grid = GRIDS[result["section"]]
    cells = [cell for cell in result["cells"] if wanted.takes(cell)]
    noise = result.get("noise")
    found = []
    by_group: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        by_group.setdefault(tuple(cell[name] for name in grid.group), []).append(cell)
    for key, chosen in by_group.items():
        named = dict(zip(grid.group, key))
        names = names_in(chosen)
        rows = [
            [*(cell[name] for name in grid.columns), f"{cell['floor_us']:.2f}",
             *(_entry(cell, name, noise) for name in names)]
            for cell in chosen
        ]  # fmt: skip
        heading = [named["axis"] if name == "value" else name for name in grid.columns]
        table = Table(_title(named), [*heading, "floor", *names], rows)
        if "axis" in named:
            table.notes = [_fitted(named["axis"], chosen, name) for name in names]
        else:
            table.notes = _means(grid, chosen, names)
        found.append(table)
    if found:
        found[-1].notes += [*_noise_note(cells, noise), *_faults(cells)]
    return found


def line(cell: Cell) -> str:
    """What a cell came to, on one line."""
    parts = [f"floor {cell['floor_us']:.2f}"] if "floor_us" in cell else []
    for name, us in cell["us"].items():
        share = f" ({100 * cell['floor_us'] / us:.0f}%)" if "floor_us" in cell else ""
        parts.append(f"{name} {us:.2f}{share}")
    parts += [f"WRONG {name}: {what}" for name, what in cell["wrong"].items()]
    return ", ".join(parts)


def _title(named: dict[str, Any]) -> str:
    if "axis" in named:
        return f"{named['axis']}, {named['state']} state"
    if "heads" not in named:
        return f"{named['dim']} channels"
    title = f"{named['heads']} heads"
    if "k_heads" in named:
        return f"{named['k_heads']} key heads, {named['heads']} value heads"
    if named.get("dim", 64) != 64:
        title += f", dim {named['dim']}"
    if named.get("dstate", 128) != 128:
        title += f", dstate {named['dstate']}"
    return title + (f", {named['writes']}" if "writes" in named else "")


def _entry(cell: Cell, name: str, noise: float | None) -> Any:
    if name not in cell["us"]:
        return "wrong" if name in cell["wrong"] else "–"
    us = cell["us"][name]
    share = 100 * cell["floor_us"] / us
    if noise is None or name in (OURS, COPY) or OURS not in cell["us"]:
        return Timed(us, share)
    ratio = us / cell["us"][OURS]
    return Timed(us, share, ratio, max(ratio, 1 / ratio) - 1 <= noise)


def _means(grid: Grid, cells: Sequence[Cell], names: Sequence[str]) -> list[str]:
    """Geometric means of the ratios of each peer."""
    found = []
    for peer, (title, belongs) in itertools.product(names, grid.means):
        if peer in (OURS, COPY):
            continue
        ratios = [
            cell["us"][peer] / cell["us"][OURS]
            for cell in cells
            if belongs(cell) and peer in cell["us"] and OURS in cell["us"]
        ]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            found.append(f"{peer} / {OURS}{title}: geometric mean {mean:.2f}, least "
                         f"{min(ratios):.2f}, of {len(ratios)} cells.")  # fmt: skip
    return found


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Intercept and slope of the least squares line, and its worst relative error."""
    xs, ys = zip(*points)
    slope, intercept = statistics.linear_regression(xs, ys)
    return intercept, slope, max(abs(intercept + slope * x - y) / y for x, y in points)


def _fitted(axis: str, cells: Sequence[Cell], name: str) -> str:
    points = [(c["value"], c["us"][name]) for c in cells if name in c["us"]]
    if len({x for x, _ in points}) < 2:
        return f"{name}: too few points for a line."
    intercept, slope, worst = fit(points)
    _, floor, _ = fit([(c["value"], c["floor_us"]) for c in cells if name in c["us"]])
    what = {"heads": "head", "tokens": "token", "batch": "row"}.get(axis, f"unit of {axis}")
    return (
        f"{name}: {intercept:.2f} us + {slope:.4f} us a {what} (the floor grows at "
        f"{100 * floor / slope:.0f}% of that); the line is off by {100 * worst:.0f}% at most."
    )


def _noise_note(cells: Sequence[Cell], noise: float | None) -> list[str]:
    if noise is None:
        return []
    count = sum("again" in cell for cell in cells)
    return [
        "Noise: two measurements of the same kernel in one cell differ by up to "
        f"{100 * noise:.1f}% (95th percentile of {count} cells). x is the time over {OURS}'s; ≈ "
        "marks those that differ from it by no more than the noise."
    ]


def _faults(cells: Iterable[Cell]) -> list[str]:
    """Who was wrong, and who was not there, and why."""
    wrong: dict[str, list[str]] = {}
    missing: dict[str, int] = {}
    for cell in cells:
        for name, what in cell.get("wrong", {}).items():
            at = ", ".join(str(v) for k, v in cell.items() if isinstance(v, (int, str)))
            wrong.setdefault(name, []).append(f"{what} ({at})" if cell.get("us") else what)
        for reason in cell.get("missing", {}).values():
            missing[reason] = missing.get(reason, 0) + 1
    found = [f"WRONG: {name}, not timed in {len(where)}: {where[0]}"
             for name, where in wrong.items()]  # fmt: skip
    if missing:
        found.append("Not measured: " + "; ".join(missing) + ".")
    return found


def _chain_tables(result: Result, wanted: Wanted) -> list[Table]:
    cells = [cell for cell in result["cells"] if wanted.takes(cell)]
    found = []
    for op in dict.fromkeys(cell["op"] for cell in cells):
        chosen = [cell for cell in cells if cell["op"] == op]
        names = list(dict.fromkeys(name for cell in chosen for name in cell["us"]))
        rows = [
            [cell["heads"], cell["batch"],
             *(f"{cell['us'][n]:.2f}" if n in cell["us"] else "wrong" for n in names)]
            for cell in chosen
        ]  # fmt: skip
        columns = ["heads", "batch", *names]
        found.append(Table(f"conv and {op}", columns, rows, _faults(chosen)))
    return found


def markdown(results: Sequence[Result], wanted: Wanted = EVERYTHING) -> str:
    """Results as Markdown. What they were measured on is said once for neighbours alike."""
    blocks: list[str] = []
    previous: tuple[Any, ...] | None = None
    for result in results:
        where = (result["environment"], result.get("bandwidth"))
        if previous is None or previous[0] != where[0] or where[1] not in (None, previous[1]):
            blocks.append(intro(result))
        previous = where if where[1] is not None or previous is None else (where[0], previous[1])
        for table in tables(result, wanted):
            if table.title:
                blocks.append(f"**{table.title}**")
            lines = [table.columns, ["---"] * len(table.columns), *table.rows]
            text = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
            text[1] = "|" + "---|" * len(table.columns)
            blocks += ["\n".join(text), *table.notes]
    return "\n\n".join(blocks) + "\n"
