"""``ssmgen doctor``: what is here, what is wrong with it, what to do about it.

Probes run one after the other, and none stops the next: what one raises is a finding. Nothing is
written but a temporary store beside the user store, or in the temporary folder if that cannot be.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from . import probes
from .probes import Facts, Note, hidden, size_text
from .roundtrip import round_trip

__all__ = ["doctor", "examine"]


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Look at this installation and say what to do about what is found.

    1. Versions, GPUs and driver, settings (and variables that look like settings), policy.

    2. Every store in the order it is asked: owner, mode, kind of mount, entries, size, free space.

    3. A round trip: render, compile, publish to a temporary store beside the user store, read back,
    verify; with a GPU also load, launch and compare with fp64. The user store is not changed.

    A finding is ok, a note, or a problem. Exits with 1 if there is a problem.

        ssmgen doctor

        ssmgen doctor --json | jq .findings
    """
    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _show(report)
    if not report["ok"]:
        raise typer.Exit(1)


def examine() -> Facts:
    """All facts and findings. Whatever is broken, it returns."""
    facts: Facts = {}
    findings: list[dict[str, str]] = []

    def note(level: str, what: str, todo: str = "") -> None:
        finding = {"level": level, "what": hidden(what), "todo": todo}
        if finding not in findings:
            findings.append(finding)

    for name, probe in PROBES.items():
        facts[name] = None
        if name in NEED_SETTINGS and facts["settings"] is None:
            continue
        try:
            # That a variable is unknown is logged too; the probe says it better.
            with _overheard(note if name != "settings" else lambda *_: None):
                probe(facts, note)
        except Exception as error:
            kind = (
                "" if type(error).__module__.startswith("ssmgen") else f"{type(error).__name__}: "
            )
            note("problem", f"{name.replace('_', ' ')}: {kind}{error}", TODO.get(name, ""))
    ok = all(finding["level"] != "problem" for finding in findings)
    return {**facts, "findings": findings, "ok": ok}


@contextlib.contextmanager
def _overheard(note: Note) -> Iterator[None]:
    """What is logged or warned about meanwhile becomes a note."""
    log = logging.getLogger("ssmgen")

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note("note", record.getMessage())

    ear, propagate = Ear(logging.WARNING), log.propagate
    log.addHandler(ear)
    log.propagate = False
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    finally:
        log.removeHandler(ear)
        log.propagate = propagate
        for warning in warned:
            if not issubclass(warning.category, DeprecationWarning):
                note("note", str(warning.message))


PROBES: dict[str, Callable[[Facts, Note], None]] = {
    "versions": probes.versions,
    "gpus": probes.gpus,
    "settings": probes.settings,
    "policy": probes.policy,
    "roots": probes.roots,
    "remote": probes.remote,
    "round_trip": round_trip,
}
NEED_SETTINGS = ("policy", "roots", "remote", "round_trip")
TODO = {
    "gpus": "look at the installation of torch and the driver",
    "settings": "correct the variable, or unset it",
    "remote": "correct SSMGEN_CACHE_REMOTE, or unset it",
    "round_trip": "kernels that are in a store still serve; see the cause above",
}


# What people read


def _show(report: Facts) -> None:
    def head(title: str) -> None:
        typer.secho(f"\n{title}", bold=True)

    typer.secho("Versions", bold=True)
    versions = report["versions"] or {}
    typer.echo("  " + ", ".join(f"{name} {version or '-'}" for name, version in versions.items()))
    head("GPUs")
    for gpu in report["gpus"] or ():
        typer.echo(f"  {gpu['name']}, {gpu['arch'] or 'unknown'}, {size_text(gpu['memory'])}")
    typer.echo(f"  driver {report['driver']}" if report.get("driver") else "  no driver")
    head("Settings")
    for name, setting in (report["settings"] or {}).items():
        typer.echo(f"  {name}={setting['value']}{'' if setting['set'] else ' (default)'}")
    head("Stores, in the order they are asked")
    for root in report["roots"] or ():
        typer.echo(f"  {root['root']} ({root['origin']})")
        if "set_aside" in root:
            typer.echo(f"    {_described(root)}")
    if report["remote"]:
        typer.echo(f"  {report['remote']['url']} (remote)")
    head("Findings")
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in report["findings"]:
        level = typer.style(f"{finding['level']:<8}", fg=colours[finding["level"]], bold=True)
        typer.echo(f"  {level} {finding['what']}")
        if finding["todo"]:
            typer.echo(f"           {finding['todo']}")


def _described(root: Facts) -> str:
    used = "used" if root["refused"] is None else "refused"
    mount = root["mount"]
    return ", ".join(
        (
            used if root["exists"] else "absent (what follows is of its parent)",
            f"owner {root['owner']}",
            f"mode {root['mode']}",
            "writable" if root["writable"] else "not writable",
            f"{mount['kind']} ({','.join(mount['options'])})" if mount else "unknown mount",
            f"{root['entries']} entries",
            size_text(root["size"]),
            f"{size_text(root['free'])} free",
        )
    )
