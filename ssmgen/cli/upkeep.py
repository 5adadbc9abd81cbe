"""The ``cache`` commands that check the stores, and keep the user store small."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..settings import parse_size, settings
from ..store import Store, evict
from ..store.evict import Usage
from ..store.layers import named
from ..store.peek import fault
from .entries import date, fail, own_store, print_json, print_table, say, size_text
from .inputs import KEY_OR_CONFIG, ArchOf, Json, Yes
from .selection import keys_of

__all__ = ["clear", "gc", "pin", "verify"]


def verify(
    repair: Annotated[
        bool, typer.Option("--repair", help="Set bad entries of the user store aside.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every byte of every entry of every layer on this machine.

    A bad entry is never used: it counts as a miss. Exits with 1 if one is bad. With --repair, those
    of the user store are moved to its folder `bad`, and only what cannot be is counted.

        ssmgen cache verify

        ssmgen cache verify --repair --json
    """
    if repair:
        own_store()
    checked, bad = 0, []
    for store in named():
        for key, toolchain in store.names():
            checked += 1
            if wrong := fault(store, key, toolchain):
                repaired = False
                if repair:
                    store.get(key, toolchain)  # sets it aside, in the user store
                    repaired = not os.path.lexists(store.entry(key, toolchain))
                bad.append({"path": str(store.entry(key, toolchain)), "fault": wrong,
                            "repaired": repaired})  # fmt: skip
    if as_json:
        print_json({"checked": checked, "bad": bad})
    else:
        for row in bad:
            say(f"{'set aside' if row['repaired'] else 'bad'}: {row['path']}: {row['fault']}")
        say(f"{checked} checked, {len(bad)} bad")
    if not all(row["repaired"] for row in bad):
        raise typer.Exit(1)


def gc(
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="The cap, like 2GiB; left out: SSMGEN_CACHE_SIZE."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go, and let it stay.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring the user store down to its cap, the least recently used first.

    Pinned entries stay, and so do those that a process on this machine has loaded. What killed
    processes left behind goes too, and what was set aside as bad, once it is a day old. Exits
    with 1 if the store is still too large.

        ssmgen cache gc --size 500MB --dry-run
    """
    try:
        cap = settings().cache_size if size is None else parse_size("--size", size)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    own = own_store()
    everything = evict.usage(own)
    going = evict.surplus(everything, cap)
    try:
        leftovers = [(path, _bytes(path)) for path in evict.sweep(own)]
    except OSError as error:
        fail(f"cannot look for leftovers in {own.root}: {error.strerror}")
    gone, problems = (going, []) if dry_run else _remove(own, going)
    for path, _ in () if dry_run else leftovers:
        try:
            _delete(path)
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    kept = [entry for entry in everything if entry not in gone]
    total = sum(entry.size for entry in kept)
    report = {
        "store": str(own.root),
        "cap": cap,
        "dry_run": dry_run,
        "before": sum(entry.size for entry in everything),
        "after": total,
        "removed": [_used(entry, "least recently used") for entry in gone],
        "leftovers": [{"path": str(path), "size": size} for path, size in leftovers],
        "kept": [_used(entry, entry.stays or "fits") for entry in kept],
        "problems": problems,
    }
    if as_json:
        print_json(report)
    else:
        _show_gc(report)
    if problems or (cap is not None and total > cap):
        raise typer.Exit(1)


def pin(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY|CONFIG]...", help=KEY_OR_CONFIG)
    ] = None,
    arch: ArchOf = None,
    remove: Annotated[bool, typer.Option("--remove", help="Unpin instead.")] = False,
    as_json: Json = False,
) -> None:
    """Keep kernels of the user store from eviction; alone, list what is pinned.

    A pin holds for every toolchain's kernel of a key. Exits with 1 if there is no such kernel.

        ssmgen cache pin '{"state_dtype": "fp16"}' --arch sm_90

        ssmgen cache pin --remove 3f9c

        ssmgen cache pin
    """
    if remove and not what:
        raise typer.BadParameter("--remove needs a KEY or CONFIG")
    own = own_store()
    here = sorted(evict.pinned(own)) if remove else [key for key, _ in own.names()]
    where = "what is pinned" if remove else str(own.root)
    keys = [key for text in what or () for key in keys_of(text, arch, here, where)]
    try:
        for key in keys:
            if remove:
                evict.unpin(own, key)
            else:
                evict.pin(own, key)
    except OSError as error:
        fail(f"{own.root}: {error.strerror}")
    pinned = sorted(evict.pinned(own))
    if as_json:
        print_json([{"key": key, "toolchains": own.toolchains(key)} for key in pinned])
    elif what:
        for key in keys:
            say(f"{'unpinned' if remove else 'pinned'} {key}")
    else:
        for key in pinned:
            say(f"{key}  {', '.join(own.toolchains(key)) or 'not in the store'}")


def clear(
    all_: Annotated[
        bool, typer.Option("--all", help="Also what is pinned or in use, and the pins.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove the entries of the user store.

    Pinned entries and those that a process has loaded stay, unless --all is given; a process keeps
    what it has loaded in any case. Read-only stores are never touched.

        ssmgen cache clear --yes
    """
    if as_json and not yes:
        raise typer.BadParameter("--json asks nothing; give --yes too")
    own = own_store()
    everything = evict.usage(own)
    going = everything if all_ else [entry for entry in everything if entry.stays is None]
    if going and not yes:
        size = size_text(sum(entry.size for entry in going))
        typer.confirm(f"Remove {len(going)} kernels ({size}) from {own.root}?", abort=True)
    gone, problems = _remove(own, going)
    if all_:
        for key in evict.pinned(own):
            evict.unpin(own, key)
    kept = [entry for entry in everything if entry not in gone]
    if as_json:
        print_json(
            {
                "store": str(own.root),
                "removed": [_used(entry, "cleared") for entry in gone],
                "kept": [_used(entry, entry.stays or "cannot be removed") for entry in kept],
                "problems": problems,
            }
        )
    else:
        for problem in problems:
            say(problem, err=True)
        say(f"{own.root}: {len(gone)} removed, {len(kept)} stay")
    if problems:
        raise typer.Exit(1)


def _remove(own: Store, going: Iterable[Usage]) -> tuple[list[Usage], list[str]]:
    gone, problems = [], []
    for entry in going:
        try:
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                evict.remove(own, entry.key, entry.toolchain)
            gone.append(entry)
        except OSError as error:
            problems.append(f"{own.entry(entry.key, entry.toolchain)}: {error.strerror}")
    return gone, problems


def _used(entry: Usage, why: str) -> dict[str, Any]:
    return {"key": entry.key, "toolchain": entry.toolchain, "size": entry.size,
            "last_use": entry.used, "why": why}  # fmt: skip


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else (path,)
    return sum(file.lstat().st_size for file in files)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _show_gc(report: dict[str, Any]) -> None:
    verb = "would go" if report["dry_run"] else "removed"
    rows = [(verb, row) for row in report["removed"]]
    rows += [("stays", row) for row in report["kept"] if row["why"] != "fits"]
    if rows:
        print_table(
            ("", "key", "toolchain", "size", "last use", "why"),
            [
                (what, r["key"][:12], r["toolchain"], size_text(r["size"]), date(r["last_use"]),
                 r["why"])
                for what, r in rows
            ],
            right=("size",),
        )  # fmt: skip
    for row in report["leftovers"]:
        say(f"{verb}: {row['path']} ({size_text(row['size'])}), left behind")
    for problem in report["problems"]:
        say(f"cannot remove {problem}", err=True)
    cap = "no cap" if report["cap"] is None else f"cap {size_text(report['cap'])}"
    say(f"{report['store']}: {size_text(report['before'])} -> {size_text(report['after'])}, {cap}")
    if report["cap"] is not None and report["after"] > report["cap"]:
        say("Still too large: what stays is pinned, in use, or cannot be removed.")
