"""Dispatch tables: which plan was fastest, measured on one GPU, for one key of a family.

A table is one JSON file, ``<root>/<family>/<arch>/<gpu>/<key>.json``. The folders of
``SSMGEN_TUNED_PATH`` come before the tables that ship. ``ssmgen tune`` writes them; docs/tuning.md
says what is in one.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import resources
from .errors import ConfigError
from .settings import settings

if TYPE_CHECKING:
    from .arch import Arch
    from .plan import Plan

__all__ = ["ANY", "SCHEMA", "Row", "Table", "by_hand", "find", "gpus", "read", "roots", "shortlist",
           "slug"]  # fmt: skip

SCHEMA = 2

# The architecture and GPU of a table that nobody measured: plans by rule of thumb, for a family
# that knows better than the cost model.
ANY = "any"

_FIELDS = ("schema", "family", "key", "gpu", "arch", "measured", "rows")
_ROW = ("up_to_heads", "plan", "us")


@dataclass(frozen=True)
class Row:
    """One bucket: `plan` serves up to `limit` (batch x heads, counted in heads of the family's
    reference shape); None is no limit. Both are as measured, not yet fitted to a config."""

    limit: int | None
    plan: Plan


@dataclass(frozen=True)
class Table:
    """The rows of one key, by rising limit; the last has none. ``name`` is the path of a user's
    file, and of one that ships what tells it from the others."""

    name: str
    gpu: str
    rows: tuple[Row, ...]


def slug(gpu: str) -> str:
    """The name of a GPU as the name of a folder: ``NVIDIA H200`` is ``nvidia-h200``."""
    # No regular expression: to compile one takes as long as all the rest of a look-up.
    spaced = "".join(c if c.isascii() and c.isalnum() else " " for c in gpu.lower())
    return "-".join(spaced.split()) or "unknown"


def roots() -> tuple[Path, ...]:
    """Folders of tables, the user's first."""
    return (*settings().tuned_path, resources.root() / "cache" / "dispatch")


def gpus(family: str, arch: Arch) -> tuple[str, ...]:
    """The GPUs of `arch` that any table is for, as folder names."""
    return tuple(sorted({gpu for root in roots() for gpu in _folders(root, family, str(arch))}))


def find(family: str, keys: Sequence[str], arch: Arch, gpu: str | None) -> Table | None:
    """The table for the first of `keys` that has one: of this very GPU, else of any of its arch,
    else one written by hand for all (`ANY`).

    For one key those of the user come before those that ship; of several other GPUs of an arch the
    first by name is taken. Raises `ConfigError` if that table is malformed.
    """
    wanted = None if gpu is None else slug(gpu)
    here = roots()
    if wanted is not None:
        for key in keys:
            for root in here:
                if table := _table(root, family, str(arch), wanted, key):
                    return table
    others = [(root, name) for root in here for name in _folders(root, family, str(arch))]
    for key in keys:
        for root, name in others:
            if name != wanted and (table := _table(root, family, str(arch), name, key)):
                return table
    for key in keys:
        for root in here:
            if table := _table(root, family, ANY, ANY, key):
                return table
    return None


@functools.cache
def shortlist(family: str, name: str) -> dict[Plan, float]:
    """The plans of a family's list of that name, among which the cost model chooses where there is
    no table, each with a factor on its estimate; none if there is no such list.

    ``cache/shortlists/<family>.json`` ships; ``benchmarks/fit.py --lists`` wrote it.
    """
    from .plan import Plan

    entries = _lists(family).get(name, ())
    return {Plan(**entry["plan"]): entry["factor"] for entry in entries}


@functools.cache
def _lists(family: str) -> dict[str, Any]:
    path = resources.root() / "cache" / "shortlists" / f"{family}.json"
    return json.loads(path.read_text())["lists"] if path.is_file() else {}


def by_hand(family: str, keys: Sequence[str]) -> bool:
    """Whether any of `keys` has a table for all GPUs (`ANY`)."""
    return any(_table(root, family, ANY, ANY, key) for root in roots() for key in keys)


@functools.cache
def _folders(root: Path, family: str, arch: str) -> tuple[str, ...]:
    try:
        return tuple(sorted(entry.name for entry in os.scandir(root / family / arch)
                            if entry.is_dir()))  # fmt: skip
    except OSError:
        return ()


@functools.cache
def _table(root: Path, family: str, arch: str, gpu: str, key: str) -> Table | None:
    path = f"{root}/{family}/{arch}/{gpu}/{key}.json"
    try:
        with open(path, "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    found = read(text, path)
    for name, value, wanted in (
        ("family", found["family"], family),
        ("arch", found["arch"], arch),
        ("gpu", slug(found["gpu"]), gpu),
        ("key", found["key"], key),
    ):
        if value != wanted:
            raise ConfigError(f"{path}: {name}: {found[name]!r} is not where the file lies; "
                              f"allowed: {wanted}")  # fmt: skip
    rows = tuple(Row(row.get("up_to_heads"), row["plan"]) for row in found["rows"])
    ours = root == resources.root() / "cache" / "dispatch"
    return Table(f"{arch}/{gpu}/{key}" if ours else path, found["gpu"], rows)


def read(text: str | bytes, origin: str) -> dict[str, Any]:
    """The content of a table, checked, its plans built. Raises `ConfigError` that names `origin`,
    the row, the field, what was found and what is allowed."""
    from .plan import Plan

    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not JSON: {error}") from None
    _fields(data, origin, _FIELDS, _FIELDS)
    if data["schema"] is True or data["schema"] != SCHEMA:
        raise ConfigError(f"{origin}: schema: {data['schema']!r} is not known; allowed: {SCHEMA}")
    for name in ("family", "key", "gpu", "arch"):
        if not isinstance(data[name], str):
            raise ConfigError(f"{origin}: {name}: {data[name]!r} is not a string")
    if not isinstance(data["measured"], dict):
        raise ConfigError(f"{origin}: measured: {data['measured']!r} is not an object")
    rows = data["rows"]
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{origin}: rows: {rows!r} is not a list of at least one")
    known = tuple(Plan.__dataclass_fields__)
    built = []
    last = 0
    for i, row in enumerate(rows):
        where = f"{origin}: rows[{i}]"
        _fields(row, where, _ROW, ("plan",))
        limit = row.get("up_to_heads")
        if i + 1 == len(rows):
            if limit is not None:
                raise ConfigError(f"{where}: up_to_heads: {limit!r} found; the last row has none")
        elif type(limit) is not int or limit <= last:
            raise ConfigError(f"{where}: up_to_heads: {limit!r} is not an int above {last}")
        else:
            last = limit
        _fields(row["plan"], f"{where}: plan", known, known[:4])
        try:
            built.append({**row, "plan": Plan(**row["plan"])})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return {**data, "rows": built}


def _fields(value: Any, where: str, allowed: Sequence[str], required: Sequence[str]) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {value!r} is not an object")
    for name in value:
        if name not in allowed:
            raise ConfigError(f"{where}: {name}: not a field; allowed: {', '.join(allowed)}")
    for name in required:
        if name not in value:
            raise ConfigError(f"{where}: {name}: missing; required: {', '.join(required)}")
