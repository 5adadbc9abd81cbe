"""What a launch costs on the host: the public functions, and a bound launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .contestants import COPY, OURS
from .grid import config_of
from .measure import host_time
from .problem import make
from .session import admitted, noting

if TYPE_CHECKING:
    from .session import Session

__all__ = ["host"]


def host(session: Session, result: dict[str, Any]) -> None:
    """Rows of `name`, `value`, `unit`; of 16 heads and one row, so that the GPU keeps up: its
    kernels must be shorter than what is measured."""
    from ..kernel import get_kernel

    problem = make(config_of("fp32"), 1, 16, device=session.device, pool_bytes=2**23)
    result |= {"rows": [], "missing": {}, "wrong": {}}
    samples = 5 if session.wanted.quick else 20
    names = [name for name in session.names if name != COPY]
    for done, name in enumerate(names):
        session.note(done, len(names), f"host cost of {name}")
        with noting(name, result):
            cost = host_time(admitted(name, problem)[0], samples=samples)
            _row(result, f"{name} op call", cost)
    if OURS in names:
        arguments = problem.arguments(0)
        tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor)}
        bound = get_kernel(problem.config).bind(**tensors)
        _row(result, f"{OURS} bound launch", host_time(bound, samples=samples))
        again = host_time(lambda: get_kernel(problem.config), samples=samples)
        _row(result, "get_kernel again", again)


def _row(result: dict[str, Any], name: str, microseconds: float) -> None:
    result["rows"].append({"name": name, "value": microseconds, "unit": "us"})
