"""Run a generated kernel on the CPU, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .arch import Arch
from .compiler import load_source, triton_lock
from .config import KernelConfig
from .families import spec
from .families.base import Layout
from .plan import Plan, dispatch
from .template import entry_name, render

__all__ = ["interpret"]


def interpret(
    layout: Layout,
    tensors: dict[str, torch.Tensor],
    *,
    plan: Plan | None = None,
    arch: Arch | str = "sm_90",
) -> None:
    """Run the kernel `layout` asks for on CPU tensors, as `arch` would run it.

    Slow: for numerics and tests, not for work.
    """
    config = layout.config
    arch = Arch.of(arch)
    family = spec(config.family)
    if plan is None:
        plan = next(
            c.plan
            for c in dispatch(config, arch)
            if c.limit is None or layout.batch * layout.nheads <= c.limit
        )
    from .triton_on_cpu import interpreting, scalar

    grid = family.grid(config, plan, layout.batch, layout.nheads)
    if 0 in grid:
        return
    pointers = [tensors[name] for name in layout.tensors]
    pointers = [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in pointers]
    types = [a.type for a in family.arguments(config) if not a.pointer]
    scalars = [scalar(type, value) for type, value in zip(types, layout.scalars)]
    with triton_lock, interpreting(), np.errstate(all="ignore"):
        _kernel(config, plan, arch)[grid](*pointers, *scalars)


def _kernel(config: KernelConfig, plan: Plan, arch: Arch) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    source = render(config, plan, arch, interpret=True)
    return load_source(source, entry_name(config, plan), InterpretedFunction)
