"""``ssmgen render``: the source of one kernel."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import SsmgenError
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
) -> None:
    """Print the Triton source of a kernel, exactly as it is compiled.

    The source has no flags and no dead branches: it holds what the config asks for and the
    architecture can do. Its header names the config, the plan and the key in the store.

        ssmgen render '{"state_dtype": "fp16", "rounding": "stochastic"}'

        ssmgen render config.json --arch sm_100

        ssmgen render '{"dim": 80, "algorithm": "vertical"}' --interpret
    """
    from .. import template
    from ..arch import Arch
    from ..plan import dispatch

    try:
        wanted = read_config(config)
        target = Arch.of(arch)
        choices = dispatch(wanted, target)
    except SsmgenError as error:
        raise typer.BadParameter(str(error)) from None
    plan = next(
        c.plan for c in choices if c.limit is None or (heads is not None and heads <= c.limit)
    )
    sys.stdout.write(template.render(wanted, plan, target, interpret=interpret))
