"""``ssmgen cache``: look into the stores, and keep them in order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from . import bundles, upkeep, why
from .entries import (
    Entry,
    date,
    entries,
    fail,
    plan_text,
    print_json,
    print_table,
    say,
    size_text,
    text,
)
from .inputs import KEY_OR_CONFIG, ArchOf, Archs, Families, Json
from .selection import chosen, entries_of

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def _cache() -> None:
    """Look into the stores of compiled kernels, and keep them in order.

    Stores are asked in the order that **ssmgen cache path** shows: the user store, those of
    SSMGEN_CACHE_PATH, those inside installed wheels, the remote. Only the user store is ever
    written to.

    Every command takes **--json**, and exits with 0 if all is well, 1 if something is wrong or
    nothing matched, 2 if it was called wrongly.
    """


@app.command()
def path(as_json: Json = False) -> None:
    """Show every layer of the store, in the order they are asked.

    For each: where it was named, whether it is there, trusted and writable, and its number of
    entries. Exits with 1 if a layer is refused, and says why.

        ssmgen cache path

        ssmgen cache path --json | jq -r '.[0].root'
    """
    from ..settings import settings
    from ..store.layers import named, refusal

    rows: list[dict[str, Any]] = [
        {
            "origin": store.origin,
            "root": str(store.root),
            "exists": store.root.is_dir(),
            "refused": refusal(store),
            "writable": store.writable and _may_write(store.root),
            "entries": sum(1 for _ in store.names()),
        }
        for store in named()
    ]
    if url := settings().cache_remote:
        rows.append({"origin": "remote", "root": url, "exists": None, "refused": None,
                     "writable": False, "entries": None})  # fmt: skip
    if as_json:
        print_json(rows)
    else:
        print_table(
            ("", "origin", "root", "exists", "trusted", "writable", "entries"),
            [
                (str(i), r["origin"], r["root"], _word(r["exists"]), _word(not r["refused"]),
                 _word(r["writable"]), "?" if r["entries"] is None else str(r["entries"]))
                for i, r in enumerate(rows, 1)
            ],
            right=("", "entries"),
        )  # fmt: skip
        for row in rows:
            if row["refused"]:
                say(f"{row['root']} is not used: {row['refused']}")
    if any(row["refused"] for row in rows):
        raise typer.Exit(1)


@app.command()
def ls(
    arch: Archs = None,
    family: Families = None,
    toolchain: Annotated[
        list[str] | None,
        typer.Option(help="Only of this toolchain, like triton-3.6.0; repeat it for more."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the kernels in the trusted stores on this machine.

    One line an entry; note says what keeps it from eviction, or what is wrong with it. Exits with
    1 if filters are given and match nothing.

        ssmgen cache ls --arch sm_90 --toolchain triton-3.6.0

        ssmgen cache ls --json | jq -r '.[] | select(.spills > 0) | .key'
    """
    from ..store import stores

    found = chosen(entries(stores()), arch, family, toolchain)
    rows = [entry.facts() for entry in found]
    if as_json:
        print_json(rows)
    elif rows:
        several = len({row["store"] for row in rows}) > 1
        columns = ("key", "arch", "family", "plan", "state", "regs", "spill", "size", "last use",
                   "toolchain", "note", *(("store",) if several else ()))  # fmt: skip
        print_table(
            columns,
            [
                (
                    r["key"][:12],
                    *(text(r[name]) for name in ("arch", "family")),
                    plan_text(r["plan"]),
                    *(text(r[name]) for name in ("state_dtype", "registers", "spills")),
                    size_text(r["size"]),
                    date(r["last_use"]),
                    r["toolchain"],
                    f"bad: {r['fault']}" if r["fault"] else r["stays"] or "",
                    *((r["store"],) if several else ()),
                )
                for r in rows
            ],
            right=("regs", "spill", "size"),
        )
    if not rows and (arch or family or toolchain):
        fail("no kernel in the stores matches")


@app.command()
def show(
    what: Annotated[str, typer.Argument(metavar="KEY|CONFIG", help=KEY_OR_CONFIG)],
    arch: ArchOf = None,
    source: Annotated[
        bool, typer.Option("--source", help="The generated source, not the manifest.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the manifest or the source of an entry, wherever it is.

    A key is shown once for each store and toolchain that has it; a config, for each of its plans.
    Exits with 1 if there is none, or one of them is bad.

        ssmgen cache show 3f9c

        ssmgen cache show '{"state_dtype": "fp16"}' --arch sm_90 --json

        ssmgen cache show 3f9c --source > kernel.py
    """
    found = entries_of(what, arch)
    if as_json:
        print_json(
            [
                {"path": str(e.path), **e.facts(), "manifest": e.manifest or None}
                | ({"source": e.artifact.source if e.artifact else None} if source else {})
                for e in found
            ]
        )
    elif source:
        # Stores and toolchains share the source of a key.
        for source_text in dict.fromkeys(e.artifact.source for e in found if e.artifact):
            typer.echo(source_text, nl=False)
    else:
        for entry in found:
            _show(entry)
    bad = [entry for entry in found if entry.fault]
    for entry in bad:
        say(f"bad entry {entry.path}: {entry.fault}", err=True)
    if bad:
        raise typer.Exit(1)


app.command()(why.why)
app.command()(upkeep.verify)
app.command()(upkeep.gc)
app.command()(upkeep.pin)
app.command(name="export")(bundles.export)
app.command(name="import")(bundles.import_)
app.command()(upkeep.clear)


def _show(entry: Entry) -> None:
    manifest, usage = entry.manifest, entry.usage
    say(entry.key)
    say(f"  in        {entry.path}")
    if usage:
        stays = f", {usage.stays}" if usage.stays else ""
        say(f"  use       {size_text(usage.size)}, last {date(usage.used)}{stays}")
    if entry.artifact is None:
        return
    say(f"  entry     {text(manifest.get('entry'))}")
    say(f"  arch      {text(entry.arch)}")
    say(f"  plan      {plan_text(entry.factors.get('plan'))}")
    say(f"  config    {' '.join(f'{name}={value}' for name, value in entry.config.items())}")
    names = ("registers", "spills", "shared", "num_warps", "scratch_pointers")
    say(f"  needs     {', '.join(f'{name} {manifest.get(name)}' for name in names)}")
    for argument in manifest.get("arguments") or ():
        say(f"  argument  {' '.join(map(str, argument))}")
    for name, file in manifest["files"].items():
        say(f"  file      {name}: {file['size']} bytes, sha256 {file['sha256']}")


def _word(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "no"


def _may_write(root: Path) -> bool:
    """Whether this process may write to a root, or make it."""
    there = next((p for p in (root, *root.parents) if os.path.lexists(p)), root)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
