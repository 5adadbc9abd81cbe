"""``ssmgen render``: the source of one kernel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SsmgenError, UnsupportedError
from .inputs import read_config

__all__ = ["render"]


def render(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A JSON object of config fields: a file, - for standard input, or the JSON "
            "itself. Fields left out take their defaults.",
        ),
    ],
    arch: Annotated[str, typer.Option(help="Architecture to render for.")] = "sm_90",
    heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Show the variant that serves calls of batch x heads = N, not the one for the "
            "largest.",
        ),
    ] = None,
    interpret: Annotated[
        bool,
        typer.Option(
            "--interpret",
            help="The source that runs in Triton's interpreter on a CPU: no inline assembly.",
        ),
    ] = False,
    alone: Annotated[
        bool,
        typer.Option(
            "--standalone",
            help="A Python file that needs Triton and PyTorch alone: the source, inputs, a launch "
            "and a check of the result.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write here, not to standard output."),
    ] = None,
) -> None:
    """Print the Triton source of a kernel, exactly as it is compiled.

    The source has no flags and no dead branches: it holds what the config asks for and the
    architecture can do. Its header names the config, the plan and the key in the store.

        ssmgen render '{"state_dtype": "fp16", "rounding": "stochastic"}'

        ssmgen render config.json --arch sm_100

        ssmgen render '{"dim": 80, "algorithm": "vertical"}' --interpret

        ssmgen render '{"state_dtype": "int8"}' --standalone --output kernel.py
    """
    from ..arch import Arch
    from ..plan import dispatch
    from ..standalone import standalone
    from ..template import render as source

    try:
        wanted = read_config(config)
        target = Arch.of(arch)
        choices = dispatch(wanted, target)
    except SsmgenError as error:
        raise typer.BadParameter(str(error)) from None
    plan = next(
        c.plan for c in choices if c.limit is None or (heads is not None and heads <= c.limit)
    )
    try:
        text = (standalone if alone else source)(wanted, plan, target, interpret=interpret)
        if output is None:
            sys.stdout.write(text)
        else:
            output.write_text(text, encoding="utf-8")
    except UnsupportedError as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        raise typer.BadParameter(f"output {output}: {error.strerror}") from None
