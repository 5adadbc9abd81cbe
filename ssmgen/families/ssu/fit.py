"""From a plan of the dispatch table, which is written for one shape, to one of a config's shape."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from . import matrix
from .config import ITEMSIZE, SsuConfig

if TYPE_CHECKING:
    from ...arch import Arch
    from ...plan import Plan

__all__ = ["REFERENCE_DIM", "REFERENCE_DSTATE", "fit", "lanes", "next_power_of_2", "placeable",
           "tile_bytes"]  # fmt: skip

# The shape the dispatch table is written for: one Mamba2 head.
REFERENCE_DIM, REFERENCE_DSTATE = 64, 128


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def power_of_2_divisor(n: int) -> int:
    return n & -n


def fit(config: SsuConfig, plan: Plan, arch: Arch) -> Plan:
    """Raises `ConfigError` if the algorithm does not serve the config."""
    if plan.algorithm == "matrix":
        return _matrix(config, plan)
    if config.many and plan.algorithm != "simple":
        config.reject("algorithm", plan.algorithm, "auto, simple, matrix with several tokens")
    by_algorithm = {"simple": _simple, "vertical": _vertical, "horizontal": _horizontal}
    plan = by_algorithm[plan.algorithm](config, plan)
    warps, stages = _warps(config, plan), _stages(config, plan, arch)
    # The other forms load the state as they go: none of it before they wait.
    early = plan.early or not (config.pdl and arch.pdl and plan.algorithm == "simple")
    # A cap is measured with the tile it was found for; elements of 8 bits leave registers to spare.
    capped = ITEMSIZE[config.state_dtype] == 1 and not config.many
    cap = plan.maxnreg if capped and plan.algorithm == "vertical" else None
    placed = plan.placed and plan.algorithm == "simple" and placeable(config)
    plain = plan.algorithm == "simple" and not (placed or config.many)
    asks = plain and config.aligned and arch.bulk_prefetch and tile_bytes(config, plan) % 16 == 0
    return replace(
        plan, num_warps=warps, num_stages=stages, maxnreg=cap, early=early, placed=placed,
        prefetch=plan.prefetch if asks else 0,
    )  # fmt: skip


def tile_bytes(config: SsuConfig, plan: Plan) -> int:
    """The bytes of a tile that lie in memory."""
    return plan.block_m * config.dstate * ITEMSIZE[config.state_dtype]


def placeable(config: SsuConfig) -> bool:
    """Whether the source may say who holds what: 16 bytes a lane of what is stored as it is."""
    plain = config.rounding == "nearest" and not config.state_scale_t
    return config.aligned and plain and not config.parents_dtype and not config.pdl


def lanes(plan: Plan, itemsize: int) -> dict[str, int]:
    """Of a placed plan: the columns of a row that a lane has side by side, 16 bytes of them where
    there are as many, and the lanes along a row."""
    if not plan.placed:
        return {}
    held = plan.block_m * plan.block_n // (32 * plan.num_warps)
    columns = max(1, min(16 // itemsize, held, plan.block_n))
    return {"lane_columns": columns, "lanes": min(32, plan.block_n // columns)}


def crowded(config: SsuConfig, plan: Plan) -> bool:
    """Whether a lane has so much of a tile, 256 bytes of 16-bit elements, that one address has to
    do for it. Of other states nothing like it was measured."""
    elements = plan.block_m * plan.block_n // (32 * plan.num_warps)
    return ITEMSIZE[config.state_dtype] == 2 and elements >= 128


def unrolled(config: SsuConfig, plan: Plan) -> bool:
    """Whether a walk down the rows takes two turns at once: where instructions bound it, that saves
    those that count them."""
    busy = config.state_dtype == "fp8_e4m3fn" or (config.state_dtype, config.rounding) == (
        "int8", "stochastic",
    )  # fmt: skip
    return (
        busy and plan.algorithm == "vertical" and config.dim // plan.block_m // plan.split % 2 == 0
    )


def _matrix(config: SsuConfig, plan: Plan) -> Plan:
    if outside := config.outside_matrix():
        name, value, allowed = outside
        config.reject(name, value, f"{allowed} with algorithm matrix")
    rows, warps = matrix.fit(config, plan)
    return replace(
        plan, block_m=rows, block_n=config.dstate, num_warps=warps, num_stages=1, split=1,
        evict_first=False, early=True, placed=False, prefetch=0,
    )  # fmt: skip


def _simple(config: SsuConfig, plan: Plan) -> Plan:
    """As many elements a tile and a warp as in the table, as far as dim has rows."""
    columns = next_power_of_2(config.dstate)
    wanted = max(1, plan.block_m * REFERENCE_DSTATE // columns)
    rows = min(power_of_2_divisor(config.dim), wanted)
    warps = max(1, plan.num_warps * rows // wanted)
    return replace(plan, block_m=rows, block_n=columns, num_warps=warps, num_stages=1, split=1)


def _vertical(config: SsuConfig, plan: Plan) -> Plan:
    tile = _simple(config, plan)
    steps = config.dim // tile.block_m
    split = next(n for n in range(min(plan.split, steps), steps + 1) if steps % n == 0)
    return replace(tile, split=split, num_stages=min(plan.num_stages, steps // split))


def _horizontal(config: SsuConfig, plan: Plan) -> Plan:
    if config.state_scale_t:
        config.reject(
            "algorithm",
            "horizontal",
            f"auto, simple, vertical with a block-scaled state ({config.state_dtype}): "
            "horizontal sees a row in pieces, its scale needs the whole row",
        )
    rows = next_power_of_2(config.dim)
    columns = min(plan.block_n, power_of_2_divisor(config.dstate))
    stages = min(plan.num_stages, max(1, config.dstate // columns))
    return replace(plan, block_m=rows, block_n=columns, num_stages=stages, split=1)


def _warps(config: SsuConfig, plan: Plan) -> int:
    elements = plan.block_m * plan.block_n
    # A thread below one 16-byte vector only adds idle lanes.
    vector = max(1, 16 // ITEMSIZE[config.state_dtype])
    warps = max(1, min(plan.num_warps, elements // (32 * vector)))
    # The slot's state of a tree, and A where it is a matrix, stay in registers beside h.
    tiles = 1 + bool(config.parents_dtype) + (not config.tie_hdim)
    if config.many and tiles > 1:
        warps = max(warps, min(16, next_power_of_2(tiles) * elements // 2048))
    # Horizontal keeps the tile and its partial sums in registers.
    if plan.algorithm == "horizontal":
        warps = max(warps, min(16, elements // (32 * 64)))
    return warps


def _stages(config: SsuConfig, plan: Plan, arch: Arch) -> int:
    """Half of the shared memory for one program, so that two may be resident."""
    tile = plan.block_m * plan.block_n * ITEMSIZE[config.state_dtype] * (1 + unrolled(config, plan))
    return max(1, min(plan.num_stages, arch.shared_memory // 2 // tile))
