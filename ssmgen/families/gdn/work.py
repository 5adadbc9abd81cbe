"""How much a plan of this family has to do: what `ssmgen.cost` needs to know.

The counts are of the generated code, so far as the plan decides between them; the constants are
found by ``benchmarks/fit.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...cost import Work
from .config import ITEMSIZE, GdnConfig

if TYPE_CHECKING:
    from ...plan import Plan

__all__ = ["COUNTS", "Counts", "counted", "facts", "work"]


@dataclass(frozen=True)
class Counts:
    """Instructions: before the first token; of each token for itself, more where several warps
    have to agree on the length of k, for each column a lane holds, for an element, and for the two
    sums of a row over lanes; for an element to be stored, and more for stochastic rounding and for
    each of its rounds. ``held`` is registers an element, and ``rounded`` more of them when rounding
    is stochastic."""

    prologue: float = 194.0
    token: float = 12.2
    across: float = 123.0
    column: float = 7.78
    element: float = 5.52
    row: float = 10.4
    store: float = 0.01
    stochastic: float = 10.9
    round: float = 0.33
    held: float = 1.14
    rounded: float = 0.5


COUNTS = Counts()


def facts(config: GdnConfig, plan: Plan) -> dict[str, float]:
    """What of config and plan the counts depend on."""
    item = ITEMSIZE[config.state_dtype]
    elements = plan.block_m * plan.block_n / (32 * plan.num_warps)
    tokens = config.ntokens
    kept = config.dst_tokens + config.has_intermediate
    writes = kept * tokens + (config.update_state and not config.dst_tokens)
    K, V = config.head_k_dim, config.head_v_dim
    return {
        "programs": V // plan.block_m,
        "warps": plan.num_warps,
        "elements": elements,
        "columns": min(elements, max(16 // item, plan.block_n / 32)),
        "stochastic": config.rounding == "stochastic",
        "rounds": config.philox_rounds or 0,
        "tokens": tokens,
        "writes": writes,
        # Two value heads share the q and k of a head.
        "bytes": K * V * item * (1 + writes) + tokens * ITEMSIZE[config.dtype] * (2 * V + K),
    }


def counted(f: Any, c: Counts = COUNTS) -> dict[str, Any]:
    """The fields of `Work` from `facts`, which may be arrays."""
    store = c.store + f["stochastic"] * (c.stochastic + c.round * f["rounds"])
    rows = f["elements"] / f["columns"]
    each = c.token + (f["warps"] > 1) * c.across + c.column * f["columns"] + c.row * rows
    each = each + c.element * f["elements"]
    registers = 24 + f["elements"] * (c.held + c.rounded * f["stochastic"])
    return {
        "programs": f["programs"],
        "warps": f["warps"],
        "bytes": f["bytes"],
        "registers": (registers + 255 - abs(registers - 255)) / 2,
        "prologue": c.prologue,
        "instructions": f["tokens"] * each + f["writes"] * store * f["elements"],
    }


def work(config: GdnConfig, plan: Plan) -> Work:
    """What `plan` makes a program do."""
    return Work(**counted(facts(config, plan)))
