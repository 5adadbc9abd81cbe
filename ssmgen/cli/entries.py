"""Entries of the stores as the ``cache`` commands show them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import typer

from ..artifact import Artifact
from ..errors import ConfigError, StoreError
from ..plan import Plan
from ..store import Store, evict
from ..store.layers import named, refusal
from ..store.peek import peek

__all__ = [
    "Entry",
    "date",
    "entries",
    "fail",
    "only",
    "own_store",
    "plan_text",
    "print_json",
    "print_table",
    "say",
    "size_text",
    "text",
]


@dataclass(frozen=True)
class Entry:
    """One entry of one store; `artifact` is None if it is bad, and `fault` says why."""

    store: Store
    key: str
    toolchain: str
    artifact: Artifact | None
    fault: str | None
    usage: evict.Usage | None

    @classmethod
    def at(cls, store: Store, key: str, toolchain: str, usage: evict.Usage | None = None) -> Entry:
        """Look at one entry."""
        try:
            return cls(store, key, toolchain, peek(store, key, toolchain), None, usage)
        except StoreError as error:
            return cls(store, key, toolchain, None, str(error), usage)

    @property
    def path(self) -> Path:
        return self.store.entry(self.key, self.toolchain)

    @property
    def manifest(self) -> dict[str, Any]:
        return self.artifact.manifest if self.artifact else {}

    @property
    def factors(self) -> dict[str, Any]:
        return self.manifest.get("factors", {})

    @property
    def config(self) -> dict[str, Any]:
        found = self.factors.get("config")
        return found if isinstance(found, dict) else {}

    @property
    def family(self) -> str | None:
        return self.config.get("family")

    @property
    def arch(self) -> str | None:
        return self.factors.get("arch")

    def facts(self) -> dict[str, Any]:
        """What `ls` says about it, as JSON."""
        return {
            "key": self.key,
            "toolchain": self.toolchain,
            "store": str(self.store.root),
            "origin": self.store.origin,
            "arch": self.arch,
            "family": self.family,
            "plan": self.factors.get("plan"),
            "state_dtype": self.config.get("state_dtype"),
            "registers": self.manifest.get("registers"),
            "spills": self.manifest.get("spills"),
            "size": self.usage.size if self.usage else None,
            "last_use": self.usage.used if self.usage else None,
            "stays": self.usage.stays if self.usage else None,
            "fault": self.fault,
        }


def entries(stores: Iterable[Store]) -> list[Entry]:
    """Every entry of the stores, in their order, alike ones together."""
    found = []
    for store in stores:
        used = {(u.key, u.toolchain): u for u in evict.usage(store)}
        here = [Entry.at(store, *name, used.get(name)) for name in store.names()]
        found += sorted(here, key=_alike)
    return found


def _alike(entry: Entry) -> tuple[Any, ...]:
    facts = entry.facts()
    return *(str(facts[k]) for k in ("family", "arch", "state_dtype", "plan")), entry.key


def own_store() -> Store:
    """The user store; says why and exits if there is none that may be written."""
    own = next((store for store in named() if store.writable), None)
    if own is None:
        fail("there is no user store; name one in SSMGEN_CACHE_DIR")
    if why := refusal(own):
        fail(f"store {own.root} is not used: {why}")
    return own


def only(prefix: str, keys: Iterable[str], where: str) -> str:
    """The one key that begins with `prefix`; exits if there is none or more."""
    found = sorted({key for key in keys if key.startswith(prefix)})
    if not found:
        fail(f"no key in {where} begins with {prefix}")
    if len(found) > 1:
        some = ", ".join(key[:16] for key in found[:4]) + (", …" if len(found) > 4 else "")
        raise typer.BadParameter(f"{prefix} begins {len(found)} keys: {some}; give more digits")
    return found[0]


def say(text: str, *, err: bool = False) -> None:
    """One line. What a manifest says may come from anyone: no control character gets through."""
    typer.echo(_plain(text), err=err)


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fail(text: str) -> NoReturn:
    """End the command: something is wrong, or nothing matched."""
    say(f"error: {text}", err=True)
    raise typer.Exit(1)


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    typer.echo(json.dumps(value, indent=1))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()
) -> None:
    """A table: as wide as it needs to be for a pipe, fitted and coloured on a terminal."""
    from rich.console import Console

    rows = [[_plain(cell) for cell in row] for row in rows]
    console = Console(highlight=False)
    if console.is_terminal:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for name in columns:
            table.add_column(name, justify="right" if name in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    for row in (columns, *rows):
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(columns, row, widths)
        ]
        typer.echo("  ".join(cells).rstrip())


def text(value: Any) -> str:
    """A value that may be missing."""
    return "?" if value is None else str(value)


def plan_text(fields: Any) -> str:
    """A plan in one line, of this version or another."""
    try:
        return str(Plan(**fields))
    except (TypeError, ConfigError):
        return "?" if fields is None else json.dumps(fields)


def size_text(size: int | None) -> str:
    """Bytes for people."""
    if size is None:
        return "?"
    value, units = float(size), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 1000 and (larger := next(units, None)):
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def date(seconds: float | None) -> str:
    """Local time, to the minute."""
    return "?" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
