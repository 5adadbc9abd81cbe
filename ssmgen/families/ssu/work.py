"""How much a plan of this family has to do: what `ssmgen.cost` needs to know.

The counts are of the generated code, so far as the plan decides between them; the constants are
found together with those of `ssmgen.cost` by ``benchmarks/fit.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...cost import Work
from .config import ITEMSIZE, SCALED, SsuConfig
from .fit import unrolled

if TYPE_CHECKING:
    from ...plan import Plan

__all__ = ["COUNTS", "Counts", "counted", "facts", "work"]


@dataclass(frozen=True)
class Counts:
    """Instructions: before the first tile and for each column a lane holds; for an element to be
    loaded and stored, besides those of each token; of a token after the first for itself, more
    where several warps share its inputs; more for an element with a scale, for stochastic rounding
    and for each of its rounds; for a row's sum over lanes. ``matrix`` is an element's in the matrix
    form, for each 8 tokens."""

    prologue: float = 29.1
    column: float = 15.1
    element: float = 2.02
    token: float = 3.29
    again: float = 94.7
    across: float = 0.239
    scaled: float = 2.72
    stochastic: float = 9.16
    round: float = 0.329
    row: float = 31.8
    matrix: float = 11.8


COUNTS = Counts()


def facts(config: SsuConfig, plan: Plan) -> dict[str, float]:
    """What of config and plan the counts depend on."""
    item = ITEMSIZE[config.state_dtype]
    vector = 16 // item
    elements = plan.block_m * plan.block_n / (32 * plan.num_warps)
    if plan.algorithm == "horizontal":
        programs, steps = 1, config.dstate // plan.block_n
    elif plan.algorithm == "vertical":
        programs, steps = plan.split, config.dim // plan.block_m // plan.split
    else:
        programs, steps = config.dim // plan.block_m, 1
    tokens = config.ntokens
    scaled = config.state_dtype in SCALED
    writes = config.update_state + config.has_intermediate * tokens
    state = config.dim * (config.dstate * item + 4 * scaled) * (1 + writes)
    turns = 1 + unrolled(config, plan)
    return {
        "programs": programs,
        "steps": steps,
        "warps": plan.num_warps,
        "elements": elements,
        "columns": min(elements, max(vector, plan.block_n / 32)),
        "scaled": scaled,
        "stochastic": config.rounding == "stochastic",
        "rounds": config.philox_rounds or 0,
        "tokens": tokens,
        "writes": writes,
        "matrix": (tokens + 7) // 8 if plan.algorithm == "matrix" else 0,
        "ahead": plan.num_stages > 1 or plan.algorithm == "vertical",
        "turns": turns,
        "cap": plan.maxnreg or 255,
        # Inputs and outputs of a head; eight heads share a group's B and C.
        "bytes": state + tokens * ITEMSIZE[config.dtype] * (2 * config.dim + config.dstate / 4),
        "shared": (plan.num_stages - 1) * turns * plan.block_m * plan.block_n * item,
    }


def counted(f: Any, c: Counts = COUNTS) -> dict[str, Any]:
    """The fields of `Work` from `facts`, which may be arrays. The registers are those that ptxas
    gave 864 kernels of one token on sm_90, the least squares of their ratios: half of them are
    within 13%, nine in ten within 27%."""
    store = f["scaled"] * c.scaled + f["stochastic"] * (c.stochastic + c.round * f["rounds"])
    loop = c.element + (f["tokens"] - 1) * c.token
    form = loop + (f["matrix"] > 0) * (c.element + c.matrix * f["matrix"] - loop)
    rows = f["elements"] / f["columns"]
    sums = rows * c.row * (1 + f["scaled"]) * (f["matrix"] == 0)
    again = (f["tokens"] - 1) * (c.again + (f["warps"] > 1) * c.across) * (f["matrix"] == 0)
    each = 1.37 + 0.38 * f["stochastic"] + 0.7 * f["matrix"]
    needed = 24 + f["elements"] * each + 13 * (f["steps"] > 1) + 24 * (f["turns"] - 1)
    registers = (needed + f["cap"] - abs(needed - f["cap"])) / 2
    return {
        "programs": f["programs"],
        "warps": f["warps"],
        "bytes": f["bytes"],
        "registers": registers,
        "prologue": c.prologue + c.column * f["columns"],
        "instructions": f["elements"] * (form + store * f["writes"]) + sums + again,
        "steps": f["steps"],
        "ahead": f["ahead"],
        "shared": f["shared"],
    }


def work(config: SsuConfig, plan: Plan) -> Work:
    """What `plan` makes a program do."""
    return Work(**counted(facts(config, plan)))
