"""A kernel as one Python file that needs Triton and PyTorch and nothing of ours.

The generated source stays as it is; after it stands what the family's template
``<family>/standalone/main.py.j2`` makes: inputs, one launch, a check of the result.
"""

from __future__ import annotations

import dataclasses
import functools

from .arch import KNOWN, Arch
from .config import KernelConfig
from .errors import UnsupportedError
from .families import spec
from .plan import Plan
from .template import _environment, entry_name, options, render

__all__ = ["standalone"]


def standalone(config: KernelConfig, plan: Plan, arch: Arch, *, interpret: bool = False) -> str:
    """The file. With `interpret` it also runs on a CPU, under ``TRITON_INTERPRET=1``; it then has
    the source of the oldest architecture, without conversions that the interpreter gets wrong.

    Raises `UnsupportedError` if the family has no such form, or not for this config.
    """
    from jinja2 import TemplateNotFound

    name = f"{config.family}/standalone/main.py.j2"
    try:
        template = _environment().get_template(name)
    except TemplateNotFound:
        raise UnsupportedError(f"family {config.family}: has no standalone form") from None
    family = spec(config.family)

    def unsupported(what: str) -> None:
        raise UnsupportedError(f"standalone: {what} are not served in a file that runs alone")

    if interpret:
        if plan.algorithm == "matrix":
            unsupported("Gluon kernels (algorithm matrix) in the interpreter")
        # Who holds what, and what is on its way, mean nothing there.
        plan = dataclasses.replace(plan, placed=False, prefetch=0)
        arch = Arch.of(KNOWN[0])
    main = template.render(
        config=config,
        entry=entry_name(config, plan),
        arguments=family.arguments(config),
        grid=functools.partial(family.grid, config, plan),
        options=options(config, plan, arch),
        interpret=interpret,
        unsupported=unsupported,
        **family.context(config, plan, arch),
    )
    where = "a GPU, or on a CPU with TRITON_INTERPRET=1" if interpret else "a GPU"
    source = render(config, plan, arch, interpret=interpret)
    head, body = source.split('\n"""\n\n', 1)
    head += f"\n\nRun it on {where}. It needs Triton and PyTorch,\nand checks its own result.\n"
    source = f'{head}"""\n\nimport torch\n{body}'
    return f"{source}\n\n{main.rstrip()}\n"
