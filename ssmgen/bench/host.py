"""What a launch costs on the host: the public functions, and a bound launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..families import spec
from .contestants import COPY, OURS, Missing, adapter
from .grid import config_of
from .measure import host_time
from .problem import make
from .session import check

if TYPE_CHECKING:
    from .session import Session

__all__ = ["host"]


def host(session: Session, result: dict[str, Any]) -> None:
    """Rows of `name`, `value`, `unit`; one row of a batch, so that the GPU keeps up."""
    from ..kernel import get_kernel

    problem = make(config_of("fp32"), 1, 128, device=session.device, pool_bytes=2**23)
    result |= {"rows": [], "missing": {}, "wrong": {}}
    samples = 5 if session.wanted.quick else 20
    names = [name for name in session.names if name != COPY]
    for done, name in enumerate(names):
        session.note(done, len(names), f"host cost of {name}")
        try:
            calls = adapter(name, problem.config.family)(problem)
        except Missing as reason:
            result["missing"][name] = str(reason)
            continue
        if fault := check(name, problem, calls):
            result["wrong"][name] = fault
            continue
        _row(result, f"{name} op call", host_time(calls[0], samples=samples))
    if OURS in names:
        tensors = {
            n: t for n, t in problem.arguments(0).items() if hasattr(t, "data_ptr")
        }  # fmt: skip
        layout = spec(problem.config.family).layout(**problem.arguments(0))
        kernel = get_kernel(layout.config)
        _row(result, f"{OURS} bound launch", host_time(kernel.bind(**tensors), samples=samples))
        found = host_time(lambda: get_kernel(layout.config), samples=samples)
        _row(result, "get_kernel again", found)


def _row(result: dict[str, Any], name: str, value: float, unit: str = "us") -> None:
    result["rows"].append({"name": name, "value": value, "unit": unit})
