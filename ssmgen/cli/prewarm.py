"""``ssmgen prewarm``: compile the kernels of models and manifests before they are needed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DeviceError, SsmgenError
from .inputs import read_config

if TYPE_CHECKING:
    from rich.console import Console

    from ..arch import Arch
    from ..cluster import DaskExecutor
    from ..config import KernelConfig
    from ..prewarm import Event, Job, Report

__all__ = ["configs_of", "prewarm", "writable"]


def prewarm(
    manifest: Annotated[
        list[str] | None,
        typer.Argument(metavar="MANIFEST", help="Manifest files (docs/prewarm.md)."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="The shipped manifest of a model, by its name or its repository's; repeat it for "
            "more.",
        ),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JSON",
            help="One config: a JSON object, a file, or - for standard input; repeat it for more.",
        ),
    ] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="Architecture to compile for; repeat it for more. Left out: that of the GPU here."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Only what this GPU needs, by the name its driver gives (NVIDIA H200). Left out: "
            "what any GPU of the architecture may need.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes to compile in; left out: one a core."),
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(metavar="dask://HOST:PORT", help="Compile on the workers of a dask cluster."),
    ] = None,
    report: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the report here, as JSON.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say which kernels are there and which are not.")
    ] = False,
    list_models: Annotated[
        bool, typer.Option("--list", help="List the models that have a manifest, and stop.")
    ] = False,
) -> None:
    """Compile kernels ahead of time into the user store, so that no request waits for a compiler.

    No GPU is needed: an image build compiles for the GPUs it will meet. What the store has already
    is left alone, so after an interruption the same command goes on where it stopped. A kernel
    that fails is named and stops no other.

        ssmgen prewarm --list

        ssmgen prewarm --model nemotron-h-8b --arch sm_90 --arch sm_100

        ssmgen prewarm mine.json --arch sm_80 --jobs 8 --report built.json

        ssmgen prewarm --config '{"state_dtype": "fp16", "index_dtype": "int32"}' --arch sm_90

        ssmgen prewarm --model bamba-9b --arch sm_90 --executor dask://scheduler:8786

    Exits with 0 if every kernel is in the store, with 1 if any failed, with 2 for wrong usage.
    """
    from rich.console import Console

    from ..prewarm import expand
    from ..prewarm import prewarm as compile_all

    if list_models:
        _list_models(as_json)
        return
    try:
        configs = configs_of(manifest or [], model or [], config or [])
        pairs = [(c, a) for a in _archs(arch or []) for c in configs]
        if not dry_run:
            writable(report)
        wanted = expand(pairs, gpu)
        _know(gpu, pairs)
    except SsmgenError as error:
        raise typer.BadParameter(str(error)) from None
    if dry_run:
        _dry_run(wanted, as_json)
        return
    console = Console(stderr=as_json, highlight=False)
    cluster = None if executor is None else _connect(executor)
    try:
        with _display(console) as progress:
            result = compile_all(pairs, gpu=gpu, executor=cluster, workers=jobs, progress=progress)
    except KeyboardInterrupt:
        console.print("Interrupted. What was built is in the store; the same command goes on.")
        raise typer.Exit(130) from None
    finally:
        if cluster is not None:
            cluster.shutdown()
    if report is not None:
        Path(report).write_text(result.to_json() + "\n")
    if as_json:
        typer.echo(result.to_json())
    _conclude(console, result)
    if result.failed:
        raise typer.Exit(1)


def _know(gpu: str | None, pairs: list[tuple[KernelConfig, Arch]]) -> None:
    """Warn of a GPU that no table is for: its name may be misspelt."""
    from ..tables import gpus, slug

    known = {name for config, arch in pairs for name in gpus(config.family, arch)}
    if gpu is not None and slug(gpu) not in known:
        some = ", ".join(sorted(known)) or "none"
        typer.echo(
            f"warning: no table is for {gpu}; there are tables for {some}. If it is spelt as its "
            "driver has it, all is well.",
            err=True,
        )


def configs_of(
    manifests: list[str], models: list[str], texts: list[str], every: bool = False
) -> list[KernelConfig]:
    """The distinct configs that arguments name; with `every`, also those that ship."""
    from ..manifest import find, read, shipped

    if not (manifests or models or texts or every):
        raise typer.BadParameter("nothing to do; give a MANIFEST, --model or --config")
    found = [config for path in manifests for config in read(path).configs]
    found += [config for name in models for config in find(name).configs]
    found += [read_config(text) for text in texts]
    found += [config for one in (shipped() if every else ()) for config in one.configs]
    return list(dict.fromkeys(found))


def _archs(names: list[str]) -> list[Arch]:
    from ..arch import Arch

    if names:
        return [Arch.of(name) for name in dict.fromkeys(names)]
    try:
        return [Arch.detect()]
    except DeviceError:
        raise typer.BadParameter(
            "there is no GPU here to compile for; name an architecture, e.g. --arch sm_90"
        ) from None


def _connect(url: str) -> DaskExecutor:
    from ..cluster import DaskExecutor

    scheme, _, address = url.partition("://")
    if scheme != "dask" or ":" not in address:
        raise typer.BadParameter(f"executor: {url!r} is not allowed; allowed: dask://HOST:PORT")
    try:
        return DaskExecutor(f"tcp://{address}")
    except SsmgenError as error:
        raise typer.BadParameter(str(error)) from None


def writable(report: str | None) -> None:
    """Find out before an hour of compiling that its report cannot be written."""
    if report is not None:
        try:
            Path(report).open("a").close()
        except OSError as error:
            raise typer.BadParameter(f"report {report}: {error.strerror}") from None


def _dry_run(jobs: list[Job], as_json: bool) -> None:
    from ..compiler import toolchain
    from ..store import user_store

    store, here = user_store(), toolchain()
    there = [store is not None and store.get(job.key, here) is not None for job in jobs]
    missing = [job for job, found in zip(jobs, there) if not found]
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "present": sum(there),
                    "missing": [{"key": j.key, "kernel": str(j)} for j in missing],
                },
                indent=1,
            )
        )
        return
    for job in missing:
        typer.echo(f"{job.key[:12]}  {job}")
    typer.echo(f"{len(jobs)} kernels: {sum(there)} present, {len(missing)} to compile")


def _list_models(as_json: bool) -> None:
    from ..manifest import shipped

    models: list[dict[str, Any]] = [
        {
            "name": model.name,
            "repositories": list(model.repositories),
            "facts": model.facts,
            "ranks": {str(size): model.rank(size) for size in manifest.tensor_parallel},
            "configs": len(manifest.configs),
            "manifest": Path(manifest.origin).name,
            "source": manifest.source,
        }
        for manifest in shipped()
        for model in manifest.models
    ]
    if as_json:
        typer.echo(json.dumps(models, indent=1))
        return
    width = max(len(m["name"]) for m in models)
    for m in models:
        facts = m["facts"]
        shape = ", ".join(f"{k} {v}" for k, v in facts.items() if not k.endswith("layers"))
        typer.echo(f"{m['name']:{width}}  {m['configs']} configs  {shape}")


@contextmanager
def _display(console: Console) -> Iterator[Any]:
    """A function to report progress to: live on a terminal, otherwise a line a kernel."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    from rich.live import Live

    view = _View()
    with Live(view, console=console, refresh_per_second=8):
        yield view


def _outcome(event: Event) -> str:
    row = event.row or {}
    if event.stage == "failed":
        return f"FAILED   {event.job}: {row['error']}"
    spills = f", {row['spills']} bytes SPILLED" if row["spills"] else ""
    return (
        f"{event.stage:8} {event.job}: {row['seconds']:.2f} s, {row['registers']} registers"
        f"{spills}, {row['size'] / 1e3:.0f} kB"
    )


class _Lines:
    """Plain lines; those for what is there already would only hide the others."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.done = 0

    def __call__(self, event: Event) -> None:
        if event.row is None:
            return
        self.done += 1
        if event.stage != "present":
            count = f"[{self.done}/{event.total}]"
            self.console.print(count, _outcome(event), markup=False, soft_wrap=True)


class _View:
    """A bar with rate and time left, and the stage of each kernel in work."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.total = 0
        self.count = {"built": 0, "present": 0, "failed": 0}
        self.working: dict[Job, tuple[str, float]] = {}
        self.failures: list[str] = []

    def __call__(self, event: Event) -> None:
        self.total = event.total
        if event.row is None:
            self.working[event.job] = (event.stage, time.perf_counter())
            return
        self.working.pop(event.job, None)
        self.count[event.stage] += 1
        if event.stage == "failed":
            self.failures.append(_outcome(event).partition("\n")[0])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.perf_counter()
        done = sum(self.count.values())
        compiled = self.count["built"] + self.count["failed"]
        rate = compiled / (now - self.start) if compiled else 0.0
        left = f"{(self.total - done) / rate:.0f} s left" if rate else "starting"
        head = Table.grid(padding=(0, 1))
        head.add_row(
            ProgressBar(self.total or 1, done, width=30),
            f"{done}/{self.total}",
            f"{rate:.1f}/s",
            left,
            *(f"{n} {stage}" for stage, n in self.count.items() if n),
        )
        work = Table.grid(padding=(0, 1))
        for _ in range(3):
            work.add_column(no_wrap=True)
        for job, (stage, since) in list(self.working.items()):
            work.add_row(f"  {stage}", f"{now - since:.1f} s", Text(str(job)))
        failures = (Text(line, style="bold red") for line in self.failures[-5:])
        return Group(*failures, head, work)


def _conclude(console: Console, report: Report) -> None:
    for row in report.failed:
        what = f"FAILED {row['arch']} {row['key'][:12]} {json.dumps(row['config'])}"
        console.print(what, style="bold red", markup=False, soft_wrap=True)
        console.print(f"       {row['error']}", markup=False, soft_wrap=True)
    spilled = sum(bool(row["spills"]) for row in report.built)
    text = (
        f"{len(report.built)} built, {len(report.present)} present, {len(report.failed)} failed in "
        f"{report.seconds:.1f} s"
    )
    if report.built:
        text += f" ({report.rate:.1f}/s)"
    if spilled:
        text += f"; {spilled} of those built spill registers"
    console.print(f"{text}. Store: {report.store}", markup=False, soft_wrap=True)
