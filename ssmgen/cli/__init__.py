"""The ``ssmgen`` command."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from .._version import __version__
from ..errors import SsmgenError
from . import bench, cache, demo, doctor, prewarm, render, tune

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(render.render)
app.command()(prewarm.prewarm)
app.command()(tune.tune)
app.add_typer(cache.app, name="cache")
app.command()(doctor.doctor)
app.command()(bench.bench)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ssmgen {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Decode kernels for state-space models: generated from templates, compiled on any machine
    with or without a GPU, cached on disk.

    Start with **ssmgen demo**. **ssmgen render '{}'** prints the kernel of the default config,
    **ssmgen prewarm** fills the store before the first request, **ssmgen cache** shows what is in
    it, **ssmgen doctor** says what is wrong with this host, **ssmgen bench** how fast it is, and
    **ssmgen tune** finds faster plans on it.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


def main() -> None:
    """Entry point of the command."""
    try:
        app(prog_name="ssmgen")
    except SsmgenError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
