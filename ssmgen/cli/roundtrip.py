"""One kernel from its template to a temporary store and back, and on a GPU to its result."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .mounts import nearest
from .probes import Facts, Note

if TYPE_CHECKING:
    from ..arch import Arch
    from ..artifact import Artifact
    from ..bench.problems.ssu import SsuProblem
    from ..plan import Plan

__all__ = ["round_trip"]


def round_trip(facts: Facts, note: Note) -> None:
    from ..arch import Arch

    may_compile = facts["policy"]["may_compile"]
    if not may_compile or facts["versions"]["triton"] is None:
        entries = sum(
            root.get("entries", 0) for root in facts["roots"] or () if not root["refused"]
        )
        cause = "SSMGEN_JIT=deny" if not may_compile else "there is no Triton"
        if entries or facts["remote"]:
            note("note", f"no round trip was tried: {cause}")
        else:
            note(
                "problem",
                f"{cause}, and no store has a kernel: none can be had",
                "fill a store with ssmgen prewarm and name it in SSMGEN_CACHE_PATH",
            )
        return
    gpu = next((gpu for gpu in facts["gpus"] or () if gpu["arch"]), None)
    steps: Facts = {"arch": gpu["arch"] if gpu else "sm_90", "milliseconds": {}}
    facts["round_trip"] = steps
    with _temporary(facts["roots"] or [], note) as folder:
        _travel(Arch.of(steps["arch"]), gpu is not None, Path(folder), steps)
    done = ", ".join(f"{name} {ms:.1f} ms" for name, ms in steps["milliseconds"].items())
    note("ok", f"round trip for {steps['arch']}: {done}")


def _temporary(roots: list[Facts], note: Note) -> tempfile.TemporaryDirectory[str]:
    """A folder on the filesystem of the user store, outside it, or else where such folders go."""
    make = functools.partial(
        tempfile.TemporaryDirectory, prefix=".ssmgen-doctor-", ignore_cleanup_errors=True
    )
    if not roots or roots[0]["origin"] != "user":
        return make()
    root = Path(roots[0]["root"])
    beside = nearest(root.parent)
    if beside.stat().st_dev == nearest(root).stat().st_dev:
        with contextlib.suppress(OSError):
            return make(dir=beside)
    note(
        "note",
        f"the round trip was made in {tempfile.gettempdir()}: nothing can be written beside {root} "
        "on the same filesystem, and nothing is written into it",
    )
    return make()


def _travel(arch: Arch, gpu: bool, folder: Path, steps: Facts) -> None:
    from .. import compiler
    from ..families.ssu import SsuConfig
    from ..plan import dispatch
    from ..store import Store
    from ..template import key, render

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        steps["milliseconds"][name] = round((time.perf_counter() - start) * 1e3, 1)

    config = SsuConfig(state_dtype="fp16", rounding="stochastic")
    problem = None
    if gpu:
        from ..bench.problems.ssu import SsuProblem

        problem = SsuProblem(config, batch=8, nheads=8, pool_bytes=0)
    plan = dispatch(config, arch)[-1].plan
    with timed("render"):
        render(config, plan, arch)
    with timed("compile"):
        artifact = compiler.compile(config, plan, arch)
    wanted, toolchain = key(config, plan, arch), artifact.manifest["toolchain"]
    with timed("publish"):
        Store(folder / "store").put(artifact)
    with timed("read back"):
        found = Store(folder / "store", writable=False).get(wanted, toolchain)
    if found is None or found.contents() != artifact.contents():
        raise RuntimeError(f"what was published in {folder} does not read back as it was")
    if problem is not None:
        with timed("launch"):
            _launch(found, plan, problem, steps)


def _launch(artifact: Artifact, plan: Plan, problem: SsuProblem, steps: Facts) -> None:
    import torch

    from ..bench.problem import planned
    from ..launcher import load
    from .trial import judge

    function = load(artifact, torch.cuda.current_device())
    launch = planned(problem, function, plan)
    verdict = judge(problem, lambda: launch(0))
    steps["share_of_allowed_error"] = round(verdict.share, 3)
    if verdict.wrong:
        raise RuntimeError(f"the kernel ran and is wrong: {'; '.join(verdict.wrong)}")
