"""How much a plan of this family has to do: what `ssmgen.cost` needs to know.

The constants are found by ``benchmarks/fit.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...cost import Work
from .config import ITEMSIZE, Conv1dConfig

if TYPE_CHECKING:
    from ...plan import Plan

__all__ = ["COUNTS", "Counts", "counted", "facts", "work"]

# Of a row that may have several: a config does not say how many.
TOKENS = 4


@dataclass(frozen=True)
class Counts:
    """Instructions: before the first block, of a channel of a lane and each of its taps, of a token
    of a channel and each of its taps. ``held`` is registers a column of the window, and ``kept`` a
    token's input."""

    prologue: float = 161.0
    channel: float = 0.511
    tap: float = 0.0575
    value: float = 9.23
    product: float = 2.93
    held: float = 1.28
    kept: float = 0.696


COUNTS = Counts()


def facts(config: Conv1dConfig, plan: Plan) -> dict[str, float]:
    """What of config and plan the counts depend on. What is counted as heads are channels."""
    each = plan.block_n / (32 * plan.num_warps)
    # A program has the whole row of its channels; a prefill counts tokens, and has a chunk of them.
    tokens = plan.block_m if config.prefill else TOKENS if config.many else 1
    counted_as = plan.block_m if config.prefill else 1
    state = ITEMSIZE[str(config.state_dtype)] * (config.depth or config.width)
    return {
        "programs": 1 / (plan.block_n * counted_as),
        "warps": plan.num_warps,
        "channels": each,
        "tokens": tokens,
        "block": plan.block_m,
        "width": config.width,
        "bytes": (2 * ITEMSIZE[config.dtype] * tokens + 2 * state) / counted_as,
    }


def counted(f: Any, c: Counts = COUNTS) -> dict[str, Any]:
    """The fields of `Work` from `facts`, which may be arrays."""
    once = c.channel + c.tap * f["width"]
    blocks = -(-f["tokens"] // f["block"])
    each = c.value + c.product * f["width"]
    registers = 24 + f["channels"] * (c.held * 2 * f["width"] + c.kept * f["block"])
    return {
        "programs": f["programs"],
        "warps": f["warps"],
        "bytes": f["bytes"],
        "registers": (registers + 255 - abs(registers - 255)) / 2,
        "prologue": c.prologue + f["channels"] * once,
        # Tokens of a block that a row does not have are masked, and take their turn.
        "instructions": f["channels"] * each * f["block"] * blocks,
    }


def work(config: Conv1dConfig, plan: Plan) -> Work:
    """What `plan` makes a program do."""
    return Work(**counted(facts(config, plan)))
