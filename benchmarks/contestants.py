"""Who runs in a benchmark: ssmgen, and other libraries where they can be imported.

A contestant is a function from a `Problem` to `launch(i)`, which runs slot set i; None if it does
not support the problem.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from problem import Problem

import ssmgen

Launch = Callable[[int], Any]


def _arguments(p: Problem) -> dict[str, Any]:
    return {**p.inputs, "dt_softplus": True, "out": p.out}


def ours(p: Problem, **options: Any) -> Launch:
    arguments = _arguments(p) | options

    def launch(i: int) -> Any:
        return ssmgen.selective_state_update(
            p.pool, **arguments, state_batch_indices=p.indices[i], state_scale=p.scale,
            rand_seed=p.seed, philox_rounds=p.philox_rounds,
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
        return selective_state_update(p.pool, **arguments, state_batch_indices=p.indices[i])

    return launch


def vllm(p: Problem) -> Launch | None:
    try:
        from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update
    except ImportError:
        return None
    if p.scale is not None or p.stochastic:
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
