"""One launch of one plan, whatever sizes the dispatch has it for."""

from __future__ import annotations

from typing import Any

import torch

from ssmgen.arch import Arch
from ssmgen.families import spec
from ssmgen.kernel import build
from ssmgen.launcher import Launch, load
from ssmgen.plan import Plan

__all__ = ["launch"]


def launch(call: Any, plan: Plan) -> None:
    """Launch `call`, whose tensors are on the GPU, with a `plan` of its dispatch, and wait."""
    layout, arch = call.layout(), Arch.detect()
    family = spec(layout.config.family)
    function = load(build(layout.config, plan, arch), torch.cuda.current_device())
    grid = family.grid(layout.config, plan, layout.batch, layout.nheads)
    tensors = [call.tensors[name] for name in layout.tensors]
    stream = torch.cuda.current_stream().cuda_stream
    Launch(function, grid, layout.scalars, False)(stream, *(t.data_ptr() for t in tensors))
    torch.cuda.synchronize()
