"""``ssmgen tune``: measure which plans are fastest on the GPU here, and write tables of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DeviceError, SsmgenError
from .prewarm import configs_of, writable

if TYPE_CHECKING:
    from rich.console import Console

    from ..tune import Progress, Report
    from ..tune.rig import Rig

__all__ = ["tune"]


def tune(
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
    shipped: Annotated[
        bool,
        typer.Option(
            "--shipped",
            help="The configs of every manifest that ships; several tokens on their states, gated "
            "delta nets and convolutions.",
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the tables, and of the journal.")
    ] = Path("tuned"),
    budget: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Stop after so long.")
    ] = 570.0,
    sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--size",
            min=1,
            metavar="N",
            help="Batch x heads to measure at, counted in heads of the family's reference shape; "
            "repeat it for more. Left out: what the family names, 16 to 32768 for ssu.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes to compile in; left out: one a core."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Write nothing: race the plans in use at odd batches, heads, dims and dstates "
            "against the best there, and exit with 1 if one is more than 5% behind.",
        ),
    ] = False,
    report: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write all that was measured here, as JSON."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all that was measured as one JSON object.")
    ] = False,
) -> None:
    """Find the fastest plans on this GPU, by racing what the compiler made of them, and write
    dispatch tables for SSMGEN_TUNED_PATH.

    Plans take part in interleaved rounds and are halved until a few are left; the plan in use
    keeps its place unless another is faster by more than the noise of this very run. Ctrl-C keeps
    what is measured: the same command goes on from there.

        ssmgen tune --config '{"state_dtype": "fp16", "index_dtype": "int32"}'

        ssmgen tune --model nemotron-h-8b --out /opt/tuned --budget 120

        ssmgen tune --shipped --report tuned.json

        SSMGEN_TUNED_PATH=/opt/tuned ssmgen tune --model nemotron-h-8b --check

    Exits with 0 if every cell was measured, with 1 if some are missing or failed, with 2 for
    wrong usage.
    """
    from rich.console import Console

    from ..tune import tune as find_plans
    from ..tune.check import check as look_for_cliffs
    from ..tune.check import odd_cells
    from ..tune.shipped import grid
    from ..tune.tuner import compile_all

    def build(wanted: Any, note: Any) -> Any:
        return compile_all(wanted, note, workers=jobs)

    console = Console(stderr=as_json, highlight=False)
    try:
        configs = configs_of(manifest or [], model or [], config or [], shipped)
        configs = grid(configs) if shipped else configs
        writable(report)
        rig = _rig()
        with _display(console) as note:
            if check:
                cells = odd_cells(configs, rig)
                found = look_for_cliffs(cells, rig, budget=budget, compile=build, note=note)
            else:
                found = find_plans(
                    configs, rig, out, budget=budget, sizes=sizes, compile=build, note=note
                )
    except SsmgenError as error:
        raise typer.BadParameter(str(error)) from None
    text = json.dumps(vars(found), indent=1)
    if report is not None:
        Path(report).write_text(text + "\n")
    if as_json:
        typer.echo(text)
    behind = _conclude(console, found, check)
    if found.interrupted:
        console.print("Interrupted. What was measured is kept; the same command goes on.")
        raise typer.Exit(130)
    if found.missing or found.failed or behind:
        raise typer.Exit(1)


def _rig() -> Rig:
    """The GPU here."""
    from ..tune.rig import GpuRig

    try:
        return GpuRig()
    except DeviceError:
        raise typer.BadParameter("there is no GPU here to measure on") from None


@contextmanager
def _display(console: Console) -> Iterator[Any]:
    """A function to report progress to: a bar on a terminal, otherwise a line now and then."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"), TextColumn("{task.fields[what]}"), console=console,
    )  # fmt: skip
    with bar:
        task = bar.add_task("compile", total=None, left="", what="")

        def note(progress: Progress) -> None:
            left = "" if progress.left is None else f"at most {progress.left:.0f} s left"
            bar.update(task, description=progress.stage, total=progress.total,
                       completed=progress.done, left=left, what=progress.what)  # fmt: skip

        yield note


class _Lines:
    """A line for each tenth of a stage."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.said: tuple[str, int] | None = None

    def __call__(self, progress: Progress) -> None:
        tenth = (progress.stage, 10 * progress.done // max(1, progress.total))
        if tenth == self.said:
            return
        self.said = tenth
        left = "" if progress.left is None else f", at most {progress.left:.0f} s left"
        text = f"{progress.stage} {progress.done}/{progress.total}{left} {progress.what}"
        self.console.print(text.rstrip(), markup=False, soft_wrap=True)


def _conclude(console: Console, found: Report, check: bool) -> int:
    """Print the result and how sure it is; the cells of a check that are too far behind."""
    from ..plan import Plan
    from ..tune.check import LIMIT

    told = [c for c in found.cells if c["margin"] > (LIMIT if check else 0)]
    for cell in told:
        times = {str(Plan(**s["plan"])): s["us"] for s in cell["standings"]}
        present, winner = str(Plan(**cell["present"])), str(Plan(**cell["winner"]))
        sure = f"noise {cell['noise']:.1%}, {cell['rounds']} rounds"
        text = (
            f"{cell['cell']}: {times[winner]:.2f} us {winner}, {cell['margin']:.1%} faster than "
            f"{times[present]:.2f} us {present} ({sure})"
        )
        console.print(text, markup=False, soft_wrap=True)
    for row in found.failed:
        console.print(f"FAILED {row['kernel']}: {row['error']}", style="bold red", markup=False,
                      soft_wrap=True)  # fmt: skip
    noise = sorted(c["noise"] for c in found.cells)
    text = f"{found.gpu}: {len(found.cells)} cells, {found.measured} of them now"
    if found.missing:
        text += f", {len(found.missing)} missing"
    text += f", in {found.seconds:.0f} s"
    if noise:
        middle = noise[len(noise) // 2]
        text += f"; noise {middle:.1%} in the middle, {noise[-1]:.1%} at most"
    if check:
        text += f"; {len(told)} more than {LIMIT:.0%} behind"
    else:
        text += f"; {len(told)} have a faster plan; {len(found.tables)} tables written"
    console.print(text, markup=False, soft_wrap=True)
    if losses := [] if check else found.losses():
        far = sum(loss > 0.1 for loss in losses)
        console.print(
            f"without tables: the cost model's plans are {losses[len(losses) // 2]:.1%} behind in "
            f"the middle, {losses[-1]:.1%} at most, more than 10% in {far} of {len(losses)} cells",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    for path in found.tables:
        console.print(f"  {path}", markup=False, soft_wrap=True)
    return len(told) if check else 0
