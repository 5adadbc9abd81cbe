"""``ssmgen bench``: how fast the kernels are here, beside others and beside a copy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ArgumentValueError, SsmgenError

if TYPE_CHECKING:
    from rich.console import Console

    from ..bench.grid import Wanted
    from ..bench.report import Result, Table
    from ..bench.session import Session

__all__ = ["bench"]

# Which options a section that is no grid heeds.
HEEDS: dict[str, tuple[str, ...]] = {
    "chain": ("heads", "batches", "rounds"),
    "host": ("contestants",),
    "jit": (),
}
NO_GPU = 3


def bench(
    section: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SECTION",
            help="ssu (the default), tokens, gdn, conv1d, chain, host, jit, odd, scaling; or all.",
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Heads of a layer, of gdn value heads: 128,16."),
    ] = None,
    dims: Annotated[
        str | None,
        typer.Option(
            metavar="N,N", help="Sizes of a head, of ssu: 64,80; channels, of conv1d: 8192."
        ),
    ] = None,
    states: Annotated[
        str | None,
        typer.Option(
            metavar="S,S",
            help="State dtypes; +sr rounds stochastically, with 10 rounds of Philox, +sr5 with 5: "
            "fp32,fp16+sr5.",
        ),
    ] = None,
    batches: Annotated[
        str | None, typer.Option(metavar="N,N", help="Batch sizes: 1,16,256.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N,N", help="Tokens a row, of tokens, gdn, conv1d: 2,4.")
    ] = None,
    writes: Annotated[
        str | None,
        typer.Option(
            metavar="W,W",
            help="Of tokens, which states are written: last (after the last token), every (after "
            "each).",
        ),
    ] = None,
    contestants: Annotated[
        str | None,
        typer.Option(
            metavar="C,C",
            help="Who is measured: ssmgen, flashinfer, vllm, mamba_ssm, fla, copy. Left out: all.",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Turns of every contestant in a cell (7)."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small part of each grid, in a minute or so.")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Folder of the result files and pictures (left out: this one), or the file of the "
            "one section, NAME.json.",
        ),
    ] = None,
    table: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Measure nothing; print this result file as Markdown. Repeat it for more.",
        ),
    ] = None,
    plot: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Measure nothing; draw this result file, a picture for each state dtype.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as one JSON value and nothing else.")
    ] = False,
) -> None:
    """Measure the kernels on this GPU, beside other libraries and beside a copy of the same bytes.

    **ssu**: one token a row, by state dtype, rounding and batch. **tokens**: several tokens a row.
    **gdn**: gated delta nets, one token a row and the verification of drafts. **conv1d**: the
    convolutions ahead of those. **chain**: a convolution and the op after it in one graph, with and
    without programmatic dependent launch. **host**: what calls cost on the CPU. **jit**: what a
    kernel costs before its first launch; needs no GPU. **odd**: batches, heads, dims and dstates
    between those that plans are tuned at. **scaling**: how the time grows with batch, heads, dim,
    dstate and tokens.

        ssmgen bench --quick

        ssmgen bench ssu --heads 128 --states fp16,fp16+sr --batches 1,16,256

        ssmgen bench all --out results/

        ssmgen bench --table results/ssu-h200.json --states fp16 > table.md

        ssmgen bench --plot results/ssu-h200.json --heads 128 --out images/

    Every call is first compared with fp64 on poisoned outputs; who is wrong is named and gets no
    time. A time is that of one launch in a CUDA graph that goes through at least 512 MB of states,
    so that none is in the L2, the median over rounds in which the contestants take turns. The floor
    is the bytes that must move over the bandwidth of an in-place pass in the same run. ssmgen is
    measured twice in every cell: what its two times differ by is the noise, and no smaller
    difference counts. docs/performance.md says more.

    Each section writes SECTION-GPU.json. Exits with 0 if ssmgen was right in every cell, with 1 if
    it was not, with 2 for wrong usage, with 3 if there is no GPU, with 130 after Ctrl-C (what was
    measured until then is written).
    """
    given = {"heads": heads, "dims": dims, "states": states, "batches": batches, "tokens": tokens,
             "writes": writes, "contestants": contestants, "rounds": rounds,
             "quick": quick or None}  # fmt: skip
    wanted = _wanted(given, quick)
    if table or plot:
        if section or (table and plot) or as_json or quick or contestants or rounds:
            raise typer.BadParameter("--table or --plot takes files and a choice of cells alone")
        if table and out:
            raise typer.BadParameter("--out: a table is printed; direct it into a file")
        try:
            _replay(table, plot or [], Path(out or "."), wanted)
        except ArgumentValueError as error:
            raise typer.BadParameter(str(error)) from None
        return
    chosen = _sections(section or ["ssu"])
    for name, value in given.items():
        if value is not None and name != "quick" and not any(name in _heeds(s) for s in chosen):
            raise typer.BadParameter(f"--{name} means nothing to {', '.join(chosen)}")
    folder, file = _target(out, chosen)
    from rich.console import Console

    from ..bench.session import run

    console = Console(stderr=as_json, highlight=False)
    session = _session(wanted, contestants, rounds or (3 if quick else 7), chosen)
    results = []
    with _display(console, session):
        for name in chosen:
            results.append(run(name, session))
            _write(results[-1], folder, file, console)
            if "interrupted" in results[-1] or "failed" in results[-1]:
                break
    if as_json:
        typer.echo(json.dumps(results, indent=1))
    else:
        _show(console, results, wanted)
    if "interrupted" in results[-1]:
        raise typer.Exit(130)
    if "failed" in results[-1]:
        typer.echo(f"error: {results[-1]['failed']}", err=True)
    if "failed" in results[-1] or any(map(_wrong, results)):
        raise typer.Exit(1)


def _heeds(section: str) -> tuple[str, ...]:
    from ..bench.grid import GRIDS

    if section in GRIDS:
        return (*GRIDS[section].heeds, "contestants", "rounds")
    return HEEDS[section]


def _sections(names: list[str]) -> list[str]:
    from ..bench.grid import SECTIONS

    if names == ["all"]:
        return list(SECTIONS)
    for name in names:
        if name not in SECTIONS:
            raise typer.BadParameter(
                f"section {name} is not known; allowed: {', '.join(SECTIONS)}, or all alone"
            )
    return list(dict.fromkeys(names))


def _wanted(given: dict[str, Any], quick: bool) -> Wanted:
    from ..bench.grid import WRITTEN, Wanted, parse_state

    def integers(name: str) -> tuple[int, ...] | None:
        if given[name] is None:
            return None
        try:
            found = tuple(dict.fromkeys(int(text) for text in given[name].split(",")))
        except ValueError:
            found = (0,)
        if min(found) < 1:
            raise typer.BadParameter(
                f"--{name} {given[name]}: not positive integers between commas"
            )  # fmt: skip
        return found

    labels = None
    if given["states"] is not None:
        try:
            labels = tuple(dict.fromkeys(parse_state(text) for text in given["states"].split(",")))
        except SsmgenError as error:
            raise typer.BadParameter(f"--states: {error}") from None
    writes = None
    if given["writes"] is not None:
        named = dict.fromkeys(given["writes"].split(","))
        if unknown := [name for name in named if name not in WRITTEN]:
            raise typer.BadParameter(
                f"--writes: {unknown[0]!r} is not known; allowed: {', '.join(WRITTEN)}"
            )
        writes = tuple(WRITTEN[name] for name in named)
    return Wanted(
        heads=integers("heads"),
        dims=integers("dims"),
        states=labels,
        batches=integers("batches"),
        tokens=integers("tokens"),
        writes=writes,
        quick=quick,
    )


def _target(out: str | None, chosen: list[str]) -> tuple[Path, str | None]:
    """The folder to write to, and the one file's name if it was given."""
    path = Path(out or ".")
    if path.suffix != ".json":
        return path, None
    if len(chosen) > 1:
        raise typer.BadParameter(f"--out {out}: one file for {len(chosen)} sections; name a folder")
    return path.parent, path.name


def _session(
    wanted: Wanted, contestants: str | None, rounds: int, chosen: list[str]
) -> Session:  # fmt: skip
    import torch

    from ..arch import Arch
    from ..bench.contestants import NAMES
    from ..bench.session import Session

    names = tuple(dict.fromkeys(contestants.split(","))) if contestants else NAMES
    for name in names:
        if name not in NAMES:
            raise typer.BadParameter(
                f"--contestants: {name!r} is not known; allowed: {', '.join(NAMES)}"
            )
    session = Session(wanted=wanted, names=names, rounds=rounds)
    try:
        _probe(session, wanted, chosen)
    except SsmgenError as error:
        raise typer.BadParameter(str(error)) from None
    if torch.cuda.is_available():
        from ..timing import copy_bandwidth, warm_clocks

        session.arch = Arch.detect()
        if chosen != ["jit"]:
            warm_clocks()
            session.bandwidth = copy_bandwidth()
    elif chosen != ["jit"]:
        typer.echo(
            "error: bench: no CUDA device is visible, and times are those of a GPU. "
            "Without one there is ssmgen bench jit, and --table and --plot of result files.",
            err=True,
        )
        raise typer.Exit(NO_GPU)
    return session


def _probe(session: Session, wanted: Wanted, chosen: list[str]) -> None:
    """Enumerate the grids once, so that a size no kernel has is an error before any work."""
    from ..bench.grid import GRIDS

    for name in chosen:
        if name in GRIDS:
            GRIDS[name].cells(wanted)


@contextmanager
def _display(console: Console, session: Session) -> Iterator[None]:
    """Show what a session finds, and how far it is: a bar on a terminal, else a line a cell."""
    session.tell = lambda text: console.print(f"    {text}", markup=False, soft_wrap=True)
    if not console.is_terminal:

        def note(done: int, total: int, text: str) -> None:
            console.print(f"{done + 1}/{total} {text}", markup=False, soft_wrap=True)

        session.note = note
        yield
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), Remaining(),
               "{task.description}")  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def advance(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, description=text)

        session.note = advance
        yield


def _write(result: Result, folder: Path, file: str | None, console: Console) -> None:
    from ..bench.report import dump

    gpu = result["environment"].get("gpu", "cpu").removeprefix("NVIDIA ").replace(" ", "-").lower()
    path = folder / (file or f"{result['section']}-{gpu}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(dump(result))
    except OSError as error:
        # What was measured is worth more than a clean exit.
        typer.echo(f"error: {path}: {error.strerror}; the result follows\n{dump(result)}", err=True)
        raise typer.Exit(1) from None
    console.print(f"wrote {path}", markup=False, soft_wrap=True)


def _replay(table: list[str] | None, plot: list[str], folder: Path, wanted: Wanted) -> None:
    """Print result files, or draw them."""
    from ..bench.plots import plot as draw
    from ..bench.report import load, markdown, tables

    if table:
        results = [load(file) for file in table]
        if not any(one.rows for result in results for one in tables(result, wanted)):
            raise typer.BadParameter("table: no cell of these files is among those that are chosen")
        typer.echo(markdown(results, wanted), nl=False)
    for result in [load(file) for file in plot]:
        for path in draw(result, folder, wanted):
            typer.echo(f"wrote {path}")


def _show(console: Console, results: list[Result], wanted: Wanted) -> None:
    from ..bench.report import intro, tables

    for result in results:
        console.print(f"\n[bold]{result['section']}[/]  {intro(result)}", soft_wrap=True)
        for table in tables(result, wanted):
            console.print(_rich(table))
            for note in table.notes:
                style = "bold red" if note.startswith("WRONG") else None
                console.print(note, markup=False, soft_wrap=True, style=style)


def _rich(table: Table) -> Any:
    from rich import box
    from rich.table import Table as Drawn

    drawn = Drawn(box=box.SIMPLE_HEAD, title=table.title or None, title_justify="left",
                  pad_edge=False)  # fmt: skip
    for column in table.columns:
        left = column in ("state", "host", "jit")
        drawn.add_column(column, justify="left" if left else "right")
    for row in table.rows:
        drawn.add_row(*map(str, row))
    return drawn


def _wrong(result: Result) -> bool:
    """Whether ssmgen was wrong, alone or in a chain."""
    from ..bench.contestants import OURS

    wrong = [name for cell in (*result.get("cells", ()), result) for name in cell.get("wrong", {})]
    return OURS in wrong or any(name.startswith("chain") for name in wrong)
