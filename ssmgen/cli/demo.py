"""``ssmgen demo``: the whole road, from a config to a judged answer, on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..arch import Arch
    from ..families.ssu.config import SsuConfig
    from ..plan import Plan

__all__ = ["demo"]

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
CASES = (
    ("fp32", "nearest"),
    ("fp16", "stochastic"),
    ("int16", "nearest"),
    ("fp8_e4m3fn", "stochastic"),
)
# The architecture whose source the interpreter runs, if it is among those compiled.
INTERPRETED = "sm_90"


def demo(
    arch: Annotated[
        list[str], typer.Option(help="Compile for this architecture; repeat it for more.")
    ] = list(ARCHS),  # noqa: B006
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Compile kernels for four GPU generations, then run them and check the answers.

    1. Renders and compiles *selective_state_update* for several state dtypes and architectures,
    or finds the kernels in the store: those for large batches, and all that the GPU here may be
    served by. No GPU is needed for this.

    2. Shows the store's entries: plan, registers, spills, shared memory, size, key.

    3. Runs the kernels on inputs with the shapes and distributions of a Mamba2 layer, on the GPU
    if there is one, otherwise in Triton's interpreter on the CPU, and gives the error against
    fp64 in units in the last place. On a GPU also the time, and its share of the copy bandwidth.

    Exits with 1 if a kernel does not compile, spills registers, or is off by more than
    arithmetic allows.
    """
    from rich.console import Console

    from ..arch import Arch
    from ..errors import ConfigError

    try:
        archs = [Arch.of(name) for name in dict.fromkeys(arch)]
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    console = Console(stderr=as_json, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=as_json, highlight=False, width=120)
    start = time.perf_counter()
    gpu = _gpu()
    here = Arch.detect() if gpu is not None else None
    if here is not None and here not in archs:
        archs.append(here)
    report: dict[str, Any] = {**_versions(), "gpu": gpu, "problems": []}
    if not as_json:
        _headline(console, report)
    quiet = as_json and not console.is_terminal
    report["entries"] = _compile_all(console, quiet, archs, here, report["problems"])
    if not as_json:
        _show_entries(console, report["entries"])
    interpreted = INTERPRETED if INTERPRETED in map(str, archs) else str(archs[0])
    report.update(_run_all(console, quiet, gpu, interpreted, report["problems"]))
    report["seconds"] = round(time.perf_counter() - start, 1)
    report["ok"] = not report["problems"]
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _show_runs(console, report)
        _conclude(console, report)
    if not report["ok"]:
        raise typer.Exit(1)


def _versions() -> dict[str, Any]:
    import torch

    from .._version import __version__
    from ..compiler import toolchain
    from ..store import user_store

    own = user_store()
    return {
        "ssmgen": __version__,
        "toolchain": toolchain(),
        "torch": torch.__version__,
        "store": str(own.root) if own else None,
    }


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _config(state: str, rounding: str) -> SsuConfig:
    from ..families.ssu.config import SsuConfig

    return SsuConfig(dtype="bf16", state_dtype=state, rounding=rounding)


def _steps(
    console: Console, quiet: bool, title: str, jobs: Iterable[tuple[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """Yield the jobs behind a progress bar; off a terminal a line each."""
    everything = list(jobs)
    if quiet:
        yield from everything
    elif not console.is_terminal:
        for i, job in enumerate(everything, 1):
            console.print(f"{title} {i}/{len(everything)}: {job[0]}", markup=False)
            yield job
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

        columns = (
            "[bold]{task.fields[title]}", BarColumn(30), MofNCompleteColumn(),
            TimeElapsedColumn(), "{task.description}",
        )  # fmt: skip
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(everything), title=title)
            for job in everything:
                progress.update(task, description=job[0])
                yield job
                progress.advance(task)
            progress.update(task, description="")


def _compile_all(
    console: Console, quiet: bool, archs: list[Arch], here: Arch | None, problems: list[str]
) -> list[dict[str, Any]]:
    """What the GPU here may be served by; for other architectures what serves large batches."""
    from ..plan import dispatch

    jobs = []
    for arch in archs:
        for state, rounding in CASES:
            config = _config(state, rounding)
            serves: dict[Plan, list[int | None]] = {}
            choices = dispatch(config, arch)
            for choice in choices if arch == here else choices[-1:]:
                serves.setdefault(choice.plan, []).append(choice.limit)
            for plan, limits in serves.items():
                jobs.append((f"{arch} {state} {rounding}, {plan}", (limits, config, plan, arch)))
    entries = []
    for name, (limits, *job) in _steps(console, quiet, "compile", jobs):
        try:
            entry = _compile(*job)
        except Exception as error:
            problems.append(f"{name}: does not compile: {error}")
            continue
        entries.append({**entry, "batch_x_heads_up_to": limits})
        if entry["spills"]:
            problems.append(f"{name}: spills {entry['spills']} bytes of registers")
    return entries


def _compile(config: SsuConfig, plan: Plan, arch: Arch) -> dict[str, Any]:
    from ..compiler import toolchain
    from ..kernel import build
    from ..store import find
    from ..template import key

    start = time.perf_counter()
    wanted = key(config, plan, arch)
    found = find(wanted, toolchain())
    artifact = found or build(config, plan, arch)
    manifest = artifact.manifest
    return {
        "arch": str(arch),
        "state": config.state_dtype,
        "rounding": config.rounding,
        "plan": plan.fields(),
        "registers": manifest["registers"],
        "spills": manifest["spills"],
        "shared": manifest["shared"],
        "cubin": len(artifact.cubin),
        "key": manifest["key"],
        "hit": found is not None,
        "seconds": round(time.perf_counter() - start, 4),
    }


def _run_all(
    console: Console, quiet: bool, gpu: str | None, interpreted: str, problems: list[str]
) -> dict[str, Any]:
    from .. import timing

    # A GPU gets a layer of a 128-head model; the interpreter a few of the same heads.
    shape: dict[str, Any] = {"batch": 64, "nheads": 128, "ngroups": 8}
    if gpu is None:
        shape = {"batch": 2, "nheads": 4, "ngroups": 2}
    bandwidth = timing.copy_bandwidth() if gpu else None
    runs = []
    jobs = [(f"{state} {rounding}", (state, rounding)) for state, rounding in CASES]
    for name, (state, rounding) in _steps(console, quiet, "run", jobs):
        config = _config(state, rounding)
        try:
            if bandwidth:
                found, wrong = _on_gpu(config, shape, bandwidth)
            else:
                found, wrong = _interpreted(config, shape, interpreted)
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
            continue
        runs.append({"state": state, "rounding": rounding, **found})
        problems.extend(f"{name}: {what}" for what in wrong)
    return {
        "where": f"on {gpu}" if gpu else f"{interpreted} source in Triton's interpreter",
        "problem": {**shape, "dim": config.dim, "dstate": config.dstate},
        "copy_bandwidth": bandwidth,
        "runs": runs,
    }


def _interpreted(
    config: SsuConfig, shape: dict[str, Any], arch: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    from ..arch import Arch
    from ..bench.problem import plan_of
    from ..bench.problems.ssu import SsuProblem
    from .trial import interpret, judge

    problem = SsuProblem(config, **shape, device="cpu", pool_bytes=0)
    target = Arch.of(arch)
    verdict = judge(problem, lambda: interpret(problem, target))
    return {"plan": plan_of(problem, target).fields(), **verdict.errors()}, verdict.wrong


def _on_gpu(
    config: SsuConfig, shape: dict[str, Any], bandwidth: float
) -> tuple[dict[str, Any], tuple[str, ...]]:
    from ..arch import Arch
    from ..bench.measure import cold
    from ..bench.problem import plan_of
    from ..bench.problems.ssu import SsuProblem
    from ..timing import time_graph
    from .trial import judge

    problem = SsuProblem(config, **shape)
    verdict = judge(problem, lambda: problem.launch(0))
    seconds = time_graph(cold(problem.launch, problem.sets)) * 1e-6
    found = {
        "plan": plan_of(problem, Arch.detect()).fields(),
        **verdict.errors(),
        "microseconds": round(seconds * 1e6, 2),
        "share_of_bandwidth": round(problem.bytes / seconds / bandwidth, 4),
    }
    return found, verdict.wrong


def _table(*columns: str, left: tuple[str, ...]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


def _name(row: dict[str, Any]) -> str:
    stochastic = " SR" if row["rounding"] == "stochastic" else ""
    return row["state"].partition("_")[0] + stochastic


def _plan(row: dict[str, Any]) -> str:
    plan = row["plan"]
    return f"{plan['algorithm']} {plan['block_m']}x{plan['block_n']} w{plan['num_warps']}"


def _headline(console: Console, report: dict[str, Any]) -> None:
    console.print(
        f"ssmgen {report['ssmgen']}, {report['toolchain'] or 'no compiler'}, torch "
        f"{report['torch']}; GPU: {report['gpu'] or 'none'}; store: {report['store'] or 'none'}",
        markup=False,
        soft_wrap=True,
    )


def _show_entries(console: Console, entries: list[dict[str, Any]]) -> None:
    left = ("arch", "state", "algorithm, tile", "key")
    table = _table("arch", "state", "heads", "algorithm, tile", "regs", "spill", "smem", "cubin",
                   "key", "built", left=left)  # fmt: skip
    previous = entries[0]["arch"] if entries else None
    for e in entries:
        if e["arch"] != previous:
            table.add_section()
            previous = e["arch"]
        heads = ",".join("any" if n is None else str(n) for n in e["batch_x_heads_up_to"])
        resources = ["?" if e[k] is None else str(e[k]) for k in ("registers", "spills", "shared")]
        table.add_row(
            e["arch"], _name(e), heads, _plan(e), *resources, str(e["cubin"]), e["key"][:6],
            "hit" if e["hit"] else f"{e['seconds']:.2f} s",
        )  # fmt: skip
    console.print("\n[bold]Entries of the store[/]")
    console.print(table)
    console.print(
        "heads: the largest batch x heads that a kernel serves. w: warps. SR: stochastic rounding. "
        "spill, smem, cubin: bytes. built: hit, or how long it took to compile.",
        soft_wrap=not console.is_terminal,
    )
    hits = [e["seconds"] for e in entries if e["hit"]]
    if hits:
        console.print(f"A hit took {sorted(hits)[len(hits) // 2] * 1e3:.1f} ms (median).")


def _show_runs(console: Console, report: dict[str, Any]) -> None:
    shape = report["problem"]
    title = (
        f"Against fp64, {report['where']}: batch {shape['batch']}, {shape['nheads']} "
        f"heads of {shape['dim']} x {shape['dstate']}, {shape['ngroups']} groups"
    )
    gpu = report["gpu"] is not None
    columns = ["state", "algorithm, tile", "out\nmax", "\nmean", "state\nmax", "\nmean",
               "of\nallowed"]  # fmt: skip
    columns += ["\ntime", "of copy\nspeed"] if gpu else []
    table = _table(*columns, left=("state", "algorithm, tile"))
    for r in report["runs"]:
        cells = [_name(r), _plan(r)]
        cells += [f"{r[k]:.2f}" for k in ("out_max", "out_mean", "state_max", "state_mean")]
        cells.append(f"{100 * r['share']:.0f}%")
        if gpu:
            cells += [f"{r['microseconds']:.1f} us", f"{100 * r['share_of_bandwidth']:.1f}%"]
        table.add_row(*cells)
    console.print(f"\n[bold]{title}[/]")
    console.print(table)
    console.print(
        "Errors are in units in the last place: of bf16 for out, of the storage dtype for the "
        "state (quantisation steps for int16 and fp8), and never finer than fp32 can resolve in "
        "the sum. Allowed: half a unit, one if stochastic, and what fp32 arithmetic adds.",
        soft_wrap=not console.is_terminal,
    )
    if gpu:
        console.print(
            f"Copy speed here: {report['copy_bandwidth'] / 1e12:.2f} TB/s, read plus written. "
            "Times are inside one CUDA graph; slots rotate through more than 512 MB.",
            soft_wrap=not console.is_terminal,
        )


def _conclude(console: Console, report: dict[str, Any]) -> None:
    for problem in report["problems"]:
        console.print(f"WRONG  {problem}", style="bold red", markup=False, soft_wrap=True)
    if report["ok"]:
        hits = sum(e["hit"] for e in report["entries"])
        console.print(
            f"All right: {len(report['entries'])} kernels ({hits} from the store), "
            f"{len(report['runs'])} answers within what arithmetic allows, "
            f"{report['seconds']} s.",
            style="bold green",
        )
    else:
        console.print(f"{len(report['problems'])} problems.", style="bold red")
