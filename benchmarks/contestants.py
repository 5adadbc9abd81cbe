"""Who runs in a benchmark: ssmgen, and other libraries where they can be imported.

A contestant is a function from a `Problem` to `launch(i)`, which runs slot set i; None if it is not
installed or does not support the problem.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from problem import Problem

import ssmgen
from ssmgen.timing import time_graph

Launch = Callable[[int], Any]
Cell = dict[str, Any]


def _arguments(p: Problem) -> dict[str, Any]:
    return {**p.inputs, "dt_softplus": True, "out": p.out}


def ours(p: Problem, **options: Any) -> Launch:
    arguments = _arguments(p) | options

    def launch(i: int) -> Any:
        return ssmgen.selective_state_update(
            p.pool, **arguments, **p.tables(i), state_scale=p.scale, rand_seed=p.seed,
            philox_rounds=p.philox_rounds,
        )  # fmt: skip

    return launch


def flashinfer(p: Problem) -> Launch | None:
    try:
        from flashinfer.mamba import selective_state_update
    except ImportError:
        return None
    if p.state in ("int8", "fp8_e4m3fn") or p.dim % 64 or (p.stochastic and p.state != "fp16"):
        return None
    arguments = _arguments(p)
    if p.stochastic:
        arguments |= {"rand_seed": p.seed, "philox_rounds": p.philox_rounds}
    if p.scale is not None:
        arguments["state_scale"] = p.scale

    def launch(i: int) -> Any:
        return selective_state_update(p.pool, **arguments, **p.tables(i))

    return launch


def vllm(p: Problem) -> Launch | None:
    try:
        from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update
    except ImportError:
        return None
    if p.scale is not None or p.stochastic or p.tokens is not None:
        return None
    arguments = _arguments(p)

    def launch(i: int) -> Any:
        return selective_state_update(p.pool, **arguments, state_batch_indices=p.indices[i])

    return launch


# FlashInfer's software rounding flushes what would be an fp16 subnormal to zero; it is timed all
# the same.
FLUSHED_BELOW = {"flashinfer": 2.0**-14}

CONTESTANTS: dict[str, Callable[[Problem], Launch | None]] = {
    "ssmgen": ours,
    "flashinfer": flashinfer,
    "vllm": vllm,
}


def contest(p: Problem, bandwidth: float, names: Sequence[str] = tuple(CONTESTANTS)) -> Cell:
    """Check every contestant of a problem against fp64, then time those that are right.

    Returns:
        floor_us: the bytes that must move over `bandwidth`; us: microseconds by contestant;
        wrong: what is wrong by contestant; missing: who is not installed or does not do this.
    """
    cell: Cell = {"floor_us": p.bytes / bandwidth * 1e6, "us": {}, "wrong": {}, "missing": []}
    for name in names:
        if (launch := CONTESTANTS[name](p)) is None:
            cell["missing"].append(name)
            continue
        absolute = FLUSHED_BELOW.get(name, 0.0) if p.stochastic else 0.0
        try:
            if wrong := p.verify(launch, absolute=max(absolute, 2.0**-24)):
                cell["wrong"][name] = wrong
            else:
                cell["us"][name] = time_graph([functools.partial(launch, i) for i in range(p.sets)])
        except Exception as error:
            cell["wrong"][name] = f"{type(error).__name__}: {str(error)[:200]}"
    return cell


def line(cell: Cell) -> str:
    """A cell's results on one line."""
    floor = cell["floor_us"]
    parts = [f"floor {floor:8.2f}"]
    parts += [f"{name} {t:.2f} ({100 * floor / t:.0f}%)" for name, t in cell["us"].items()]
    parts += [f"WRONG {name}: {text}" for name, text in cell["wrong"].items()]
    return "  ".join(parts)
