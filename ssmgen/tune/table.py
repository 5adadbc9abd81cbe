"""From measured cells to dispatch tables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import tables
from ..arch import Arch
from ..buckets import between, cover
from ..config import KernelConfig, canonical_json
from ..families import spec
from ..plan import Plan

if TYPE_CHECKING:
    from .tuner import Cell, Report

__all__ = ["reference", "rows_of", "table_text", "write_tables"]

# What neighbouring sizes may lose by sharing a plan, however noisy they were.
SLACK = 0.005
# Beyond so many programs for each part of a multiprocessor one more is no step.
FILLS = 8


def write_tables(
    cells: Sequence[Cell],
    report: Report,
    arch: Arch,
    gpu: str,
    identity: dict[str, Any],
    out: Path,
) -> list[str]:
    """Write the table of each key none of whose `cells` is missing; the paths."""
    records: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in report.cells:
        records.setdefault((record["family"], record["key"]), []).append(record)
    written = []
    for (family, key), found in records.items():
        if len(found) < sum((c.config.family, c.key) == (family, key) for c in cells):
            continue
        path = out / family / str(arch) / tables.slug(gpu) / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        measured = {
            **identity,
            "seconds": round(sum(r["seconds"] for r in found), 2),
            "noise": max(r["noise"] for r in found),
            "config": _unusual(KernelConfig.from_json(found[0]["config"])),
        }
        head = {"schema": tables.SCHEMA, "family": family, "key": key, "gpu": gpu,
                "arch": str(arch), "measured": measured}  # fmt: skip
        text = table_text(head, rows_of(found))
        tables.read(text, str(path))
        # A reader sees the old table or the new one.
        part = path.with_name(f".{key}.{os.getpid()}.part")
        part.write_text(text)
        part.replace(path)
        written.append(str(path))
    return written


def rows_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The buckets of one key's records: neighbouring sizes share the plan that won at one of them
    if it is within the noise of the best at the others; a limit lies between measured sizes."""
    records = sorted(records, key=lambda r: r["batch"] * r["nheads"])
    winners = [next(s for s in r["standings"] if s["plan"] == r["winner"]) for r in records]
    eligible = {canonical_json(winner["table"]) for winner in winners}
    cells: list[dict[str, float]] = []
    for record, winner in zip(records, winners):
        times = {canonical_json(s["table"]): s["ratio"] for s in record["standings"]}
        times = {plan: ratio for plan, ratio in times.items() if plan in eligible}
        # The plan in use is kept where none was faster by more than the noise.
        best = min(times.values())
        cells.append({**times, canonical_json(winner["table"]): best})
    chosen = cover(cells, [min(SLACK, record["noise"]) for record in records])
    rows: list[dict[str, Any]] = []
    for i, (plan, record) in enumerate(zip(chosen, records)):
        standing = _of(record, plan)
        at = str(_reference(record))
        if i and chosen[i - 1] == plan:
            rows[-1]["us"][at] = standing["us"]
        else:
            if rows:
                rows[-1] = {"up_to_heads": _limit(records[i - 1], chosen[i - 1], record)} | rows[-1]
            rows.append({"plan": _short(plan), "us": {at: standing["us"]}})
    return rows


def _heads(record: dict[str, Any]) -> int:
    return record["batch"] * record["nheads"]


def _of(record: dict[str, Any], plan: str) -> dict[str, Any]:
    """The standing of a plan of the table."""
    return next(s for s in record["standings"] if canonical_json(s["table"]) == plan)


def _limit(record: dict[str, Any], plan: str, following: dict[str, Any]) -> int:
    """Up to which size a plan serves that was chosen at one, and another at the next: to where its
    programs fill the GPU evenly, if that lies between them and they are no more than an octave
    apart, else half-way. With a program more one part of the GPU has more to do than the others."""
    low, high = _heads(record), _heads(following)
    fill = _of(record, plan)["fill"]
    # Rounded as `fill` is, which need not be a whole number.
    end = int(round(math.ceil(round(low / fill, 3)) * fill, 3))
    least = _reference(record)
    if end < high <= 2 * low <= 2 * FILLS * fill:
        config = KernelConfig.from_json(record["config"])
        return max(least, reference(config, end + 1) - 1)
    return between(least, _reference(following))


def _reference(record: dict[str, Any]) -> int:
    return reference(KernelConfig.from_json(record["config"]), _heads(record))


def reference(config: KernelConfig, heads: int) -> int:
    """So many heads of a config in heads of its family's reference shape: the least size whose
    limit is not below."""
    family = spec(config.family)
    low, high = 1, 1
    while family.limit(config, high) < heads:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if family.limit(config, middle) >= heads else (middle + 1, high)
    return low


def _unusual(config: KernelConfig) -> dict[str, Any]:
    """The fields of a config that differ from its family's defaults."""
    usual = type(config)(family=config.family).fields()
    return {name: value for name, value in config.fields().items() if value != usual[name]}


def _short(plan: str) -> dict[str, Any]:
    """A plan's fields without those that have their default."""
    fields = json.loads(plan)
    known = Plan.__dataclass_fields__
    return {name: fields[name] for name in known if fields[name] != known[name].default}


def table_text(head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The JSON of a table, a row a line."""
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n'
