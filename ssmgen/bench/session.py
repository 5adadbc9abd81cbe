"""One run of a section: the contestants of every cell checked, then timed against each other."""

from __future__ import annotations

import contextlib
import datetime
import gc
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .._version import __version__
from ..arch import Arch
from ..errors import DeviceError, SsmgenError
from ..template import key as key_of
from . import contestants, measure
from .contestants import COPY, NAMES, OURS, Calls, Missing, adapter, forgiven
from .grid import GRIDS, Cell, Wanted
from .problem import POOL_BYTES, Problem, make, plan_of
from .report import SCHEMA, line

__all__ = ["Session", "admitted", "contest", "environment", "noting", "run"]


@dataclass
class Session:
    """What the sections of one run share. `note` hears (done, total, what is next), `tell` what
    a cell came to, on one line."""

    wanted: Wanted = field(default_factory=Wanted)
    names: Sequence[str] = NAMES
    rounds: int = 7
    arch: Arch | None = None
    device: str = "cuda"
    pool_bytes: int = POOL_BYTES
    bandwidth: float | None = None
    record: measure.Record = measure.graph
    note: Callable[[int, int, str], None] = lambda done, total, text: None
    tell: Callable[[str], None] = lambda text: None


def run(section: str, session: Session) -> dict[str, Any]:
    """Measure one section of `SECTIONS`: the content of its result file.

    After Ctrl-C, or an error such as a lost GPU, it holds what was measured until then, and
    ``interrupted``, or ``failed`` with the reason.
    """
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "section": section,
        "environment": environment(),
        "bandwidth": session.bandwidth,
    }
    try:
        if section in GRIDS:
            _run_grid(section, session, result)
        elif section == "chain":
            from .chain import chain

            chain(session, result)
        elif section == "host":
            from .host import host

            host(session, result)
        else:
            from .jit import jit

            jit(session, result)
    except KeyboardInterrupt:
        result["interrupted"] = True
    except SsmgenError as error:
        result["failed"] = str(error)
    return result


def _run_grid(section: str, session: Session, result: dict[str, Any]) -> None:
    cells = GRIDS[section].cells(session.wanted)
    result |= {"cells": [], "noise": None}
    compile_all(cells, session)
    pairs = []
    for done, cell in enumerate(cells):
        session.note(done, len(cells), cell.name)
        result["cells"].append(found := _measured(cell, session))
        if "again" in found:
            pairs.append((found["us"][OURS], found["again"]))
            result["noise"] = measure.noise(pairs)
        session.tell(line(found))


def compile_all(cells: Sequence[Cell], session: Session) -> None:
    """Have what ssmgen will launch in the store, on all cores, before the first cell wants it."""
    from ..prewarm import prewarm
    from ..store import user_store

    if session.arch is None or OURS not in session.names or user_store() is None:
        return
    session.note(0, len(cells), "compiling")
    prewarm([(config, session.arch) for config in dict.fromkeys(c.config for c in cells)])


def _measured(cell: Cell, session: Session) -> dict[str, Any]:
    found: dict[str, Any] = dict(cell.key)
    try:
        problem = make(
            cell.config,
            cell.batch,
            cell.nheads,
            device=session.device,
            pool_bytes=session.pool_bytes,
            **dict(cell.shape),
        )
    except torch.OutOfMemoryError:
        reason = "the problem does not fit into the memory of this GPU"
        return found | {"us": {}, "wrong": {}, "missing": dict.fromkeys(session.names, reason)}
    if session.bandwidth:
        found["floor_us"] = problem.bytes / session.bandwidth * 1e6
    found |= contest(problem, session.names, rounds=session.rounds, record=session.record)
    if session.arch is not None and OURS in found["us"]:
        plan = plan_of(problem, session.arch)
        found["kernel"] = {"key": key_of(problem.config, plan, session.arch), "plan": str(plan)}
    # The memory of this cell, before that of the next one.
    del problem
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def contest(
    problem: Problem,
    names: Sequence[str],
    *,
    rounds: int = 7,
    record: measure.Record = measure.graph,
) -> dict[str, Any]:
    """Check every contestant of a problem against fp64, then time those that are right.

    Returns:
        By contestant, us: microseconds a launch, the median of ``rounds``; wrong: what is wrong
        with one that has no time; missing: why one is not there. And again: a second measurement
        of ssmgen's.
    """
    found: dict[str, Any] = {"us": {}, "rounds": {}, "wrong": {}, "missing": {}}
    recorded: dict[str, measure.Recorded] = {}
    for name in names:
        with noting(name, found):
            recorded[name] = record(admitted(name, problem))
    if OURS in recorded:
        recorded["again"] = record(adapter(OURS, problem.config.family)(problem))
    times = measure.in_turn(recorded, rounds=rounds)
    if "again" in times:
        found["again"] = times.pop("again").median
    for name, each in times.items():
        found["us"][name], found["rounds"][name] = each.median, list(each.rounds)
    return found


class Wrong(Exception):
    """A contestant whose result was not right."""


def admitted(name: str, problem: Problem) -> Calls:
    """The calls of a contestant, if it is here and right; else `Missing` or `Wrong`."""
    calls = adapter(name, problem.config.family)(problem)
    if name != COPY:  # which has nothing to be wrong
        allowance = forgiven(name, problem)
        if fault := problem.verify(lambda which: calls[which](), forgiven=allowance):
            raise Wrong(fault)
    return calls


@contextlib.contextmanager
def noting(name: str, found: dict[str, Any]) -> Iterator[None]:
    """What keeps a contestant out goes into ``wrong`` or ``missing`` of `found`."""
    try:
        yield
    except Missing as reason:
        found["missing"][name] = _without_folders(str(reason))
    except torch.OutOfMemoryError:
        found["missing"][name] = "out of memory"
    except Wrong as fault:
        found["wrong"][name] = str(fault)
    except Exception as error:
        _still_there(name, error)
        found["wrong"][name] = f"{type(error).__name__}: {_without_folders(str(error))[:200]}"


def _without_folders(text: str) -> str:
    """`text` with files by their names alone: a result is for others to read. Not so an address."""
    folders = r"(?:/[^\s/:'\"]+)+/"
    found = rf"(\w+://\S+)|(?<![\w.~]){folders}|~{folders}|(?<=-[IL]){folders}"
    return re.sub(found, lambda match: match[1] or "", text)


def _still_there(name: str, error: Exception) -> None:
    """Raise `DeviceError` if what a contestant did has taken the GPU with it."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except Exception:
        raise DeviceError(
            f"bench: the GPU context was lost while {name} ran ({error}); leave it out with "
            "--contestants"
        ) from error


def environment() -> dict[str, Any]:
    """What the numbers were measured with."""
    found: dict[str, Any] = {"date": datetime.date.today().isoformat()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "driver": _driver()}
    return {
        **found,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
        "ssmgen": __version__,
        **contestants.versions(),
    }


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0].strip()
