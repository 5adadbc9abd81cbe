"""Who is measured: ssmgen, other libraries where they can be imported, and a plain copy.

An adapter makes, of a `Problem`, one callable per slot set; what it cannot serve it says with
`Missing`. A family's peers are the entries of `PEERS`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

from .problem import POOL_BYTES, Problem

__all__ = ["COPY", "NAMES", "OURS", "Adapter", "Calls", "Missing", "adapter", "forgiven",
           "versions"]  # fmt: skip

OURS, COPY = "ssmgen", "copy"

Calls = Sequence[Callable[[], Any]]
Adapter = Callable[[Problem], Calls]


class Missing(Exception):
    """A contestant that is not here, or does not do what the problem asks."""


def ours(problem: Problem) -> Calls:
    """The op, as an engine calls it."""
    return [problem.call(which) for which in range(problem.sets)]


def copy(problem: Problem) -> Calls:
    """An in-place pass that reads and writes as many bytes as the problem must move: the limit."""
    import torch

    count = max(1, problem.bytes // 8)
    turns = min(problem.sets, -(-POOL_BYTES // (4 * count)))
    parts = torch.randn(turns, count, device=problem.device)
    return [
        functools.partial(torch.neg, parts[i % turns], out=parts[i % turns])
        for i in range(problem.sets)
    ]


def _public(name: str, module: str, function: str = "selective_state_update") -> Any:
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise Missing(f"{name} is not installed") from None
        raise Missing(f"{name} cannot be imported: {error}") from None
    except Exception as error:
        raise Missing(f"{name} cannot be imported: {error}") from None


def _every(problem: Problem, function: Any, take: Callable[[dict[str, Any]], Any]) -> Calls:
    """Calls with what `take` keeps of the op's arguments."""
    return [
        functools.partial(function, **take(problem.arguments(i))) for i in range(problem.sets)
    ]  # fmt: skip


# What every selective_state_update has; the signature of mamba_ssm's.
COMMON = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus",
          "state_batch_indices")  # fmt: skip


def _plain(name: str, config: Any) -> None:
    """Raise `Missing` unless a config is one token a row, rounded to nearest, without scales."""
    if config.many:
        raise Missing(f"{name} is measured with one token a row")
    if config.state_scale_t:
        raise Missing(f"{name} has no block-scaled states ({config.state_dtype})")
    if config.rounding == "stochastic":
        raise Missing(f"{name} is measured with rounding to nearest")


def flashinfer_ssu(problem: Problem) -> Calls:
    function = _public("flashinfer", "flashinfer.mamba")
    config: Any = problem.config
    if config.state_dtype in ("int8", "fp8_e4m3fn"):
        raise Missing(f"flashinfer has no {config.state_dtype} states")
    if config.dim % 64:
        raise Missing(f"flashinfer needs a dim that is a multiple of 64, not {config.dim}")
    stochastic = config.rounding == "stochastic"
    if stochastic and config.state_dtype != "fp16":
        raise Missing(f"flashinfer rounds only fp16 stochastically, not {config.state_dtype}")
    names = [*COMMON, "out"]
    if stochastic:
        names += ["rand_seed", "philox_rounds"]
    if config.state_scale_t:
        names.append("state_scale")
    if config.has_intermediate:
        names += ["disable_state_update", "intermediate_states_buffer",
                  "intermediate_state_indices"]  # fmt: skip
    steps = {"cache_steps": config.ntokens} if config.many else {}
    return _every(problem, function, lambda a: {n: a[n] for n in names if n in a} | steps)


def vllm_ssu(problem: Problem) -> Calls:
    function = _public("vllm", "vllm.model_executor.layers.mamba.ops.mamba_ssm")
    _plain("vllm", problem.config)
    return _every(problem, function, lambda a: {n: a[n] for n in (*COMMON, "out") if n in a})


def mamba_ssm_ssu(problem: Problem) -> Calls:
    """Returns its output: this function has no `out`."""
    function = _public("mamba_ssm", "mamba_ssm.ops.triton.selective_state_update")
    _plain("mamba_ssm", problem.config)
    return _every(problem, function, lambda a: {n: a[n] for n in COMMON if n in a})


PEERS: dict[str, dict[str, Adapter]] = {
    "ssu": {"flashinfer": flashinfer_ssu, "vllm": vllm_ssu, "mamba_ssm": mamba_ssm_ssu},
}
NAMES = (OURS, "flashinfer", "vllm", "mamba_ssm", "fla", COPY)
DISTRIBUTIONS = {"flashinfer": "flashinfer-python", "vllm": "vllm", "mamba_ssm": "mamba-ssm",
                 "fla": "flash-linear-attention"}  # fmt: skip


def adapter(name: str, family: str) -> Adapter:
    """The adapter of a contestant of `NAMES` for a family; one that says why it has none."""
    if name == OURS:
        return ours
    if name == COPY:
        return copy
    found = PEERS.get(family, {}).get(name)
    if found is not None:
        return found

    def lacks(problem: Problem) -> Calls:
        raise Missing(f"{name} has nothing for the family {family}")

    return lacks


def forgiven(name: str, problem: Problem) -> float:
    """What a contestant's states may be off by besides rounding.

    FlashInfer's software rounding flushes what would be an fp16 subnormal to zero; it is timed all
    the same, by decision.
    """
    stochastic = getattr(problem.config, "rounding", None) == "stochastic"
    return 2.0**-14 if name == "flashinfer" and stochastic else 0.0


def versions() -> dict[str, str]:
    """The versions of the peers that are installed."""
    found = {}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
