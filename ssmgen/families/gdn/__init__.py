"""gdn: gated_delta_rule_decode, the decode step of the gated delta net and of Kimi's KDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...cost import Work
from ..base import Argument, Family, Layout
from .config import ITEMSIZE, GdnConfig
from .layers import DeltaNet, Kda
from .work import work

if TYPE_CHECKING:
    from ...arch import Arch
    from ...plan import Plan

__all__ = ["FAMILY", "Gdn", "GdnConfig"]

# The shape the dispatch table is written for: K and V of one head.
REFERENCE_K, REFERENCE_V = 128, 128


# (rows, how many programs ahead, evict_first; one warp) of one token, by the bytes of an element: 4
# to 8 MB.
PREFETCH = {
    2: ((8, 4096, False), (8, 2048, True), (16, 2048, False), (16, 1024, True), (32, 512, False),
        (32, 768, False)),
    4: ((4, 4096, False), (4, 4096, True), (8, 2048, False), (16, 1024, False)),
}  # fmt: skip


class Gdn(Family):
    name = "gdn"
    heads = (32, 8)
    layers = (DeltaNet(), Kda())
    fuses = False  # T tokens in one call have the bits of T calls

    def arguments(self, config: GdnConfig) -> tuple[Argument, ...]:  # type: ignore[override]
        align = 16 if config.aligned else 1

        def stride(name: str, type: str, dtype: str | None = None) -> Argument:
            return Argument(name, type, align // ITEMSIZE[dtype] if dtype and align > 1 else 1)

        def keep(*pairs: tuple[bool, Argument]) -> tuple[Argument, ...]:
            return tuple(argument for wanted, argument in pairs if wanted)

        c, io = config, config.dtype
        indexed, varlen, raw = bool(c.index_dtype), bool(c.seqlens_dtype), c.gate != "given"
        decay, beta = ("a", "b") if raw else ("g", "beta")

        def row(name: str, dtype: str | None = None) -> tuple[tuple[bool, Argument], ...]:
            """The steps from row to row, from token to token, and from head to head."""
            return (
                (not varlen, stride(f"{name}_row_stride", "i32", dtype)),
                (c.many, stride(f"{name}_token_stride", "i32", dtype)),
                (True, stride(f"{name}_head_stride", "i32", dtype)),
            )

        def grouped(name: str) -> tuple[bool, Argument]:
            """What a head is further on than the head stride says, per group before it."""
            return c.grouped, stride(f"{name}_group_step", "i32")

        pointers = keep(
            (True, Argument("state", f"*{c.state_dtype}", align)),
            (True, Argument("q", f"*{io}", align)),
            (True, Argument("k", f"*{io}", align)),
            (True, Argument("v", f"*{io}")),
            (raw, Argument("A_log", f"*{c.a_log_dtype}")),
            (True, Argument(decay, f"*{c.a_dtype}")),
            (c.has_dt_bias, Argument("dt_bias", f"*{c.dt_bias_dtype}")),
            (True, Argument(beta, f"*{c.b_dtype}")),
            (True, Argument("out", f"*{io}")),
            (indexed, Argument("slots", f"*{c.index_dtype}")),
            (c.has_dst, Argument("dst_slots", f"*{c.index_dtype}")),
            (c.rounding == "stochastic", Argument("seed", "*int64")),
            (c.has_intermediate, Argument("buffer", f"*{c.state_dtype}", align)),
            (bool(c.entry_dtype), Argument("entries", f"*{c.entry_dtype}")),
            (varlen, Argument("seqlens", f"*{c.seqlens_dtype}")),
            (bool(c.accepted_dtype), Argument("accepted", f"*{c.accepted_dtype}")),
        )
        integers = keep(
            (True, stride("state_slot_stride", "i64", c.state_dtype)),
            (True, stride("state_head_stride", "i64", c.state_dtype)),
            *row("q", io),
            *row("k", io),
            *row("v"),
            grouped("v"),
            (raw, stride("A_log_stride", "i32")),
            *row(decay),
            grouped(decay),
            (c.kda, stride(f"{decay}_channel_stride", "i32")),
            (c.has_dt_bias, stride("dt_bias_head_stride", "i32")),
            (c.has_dt_bias and c.kda, stride("dt_bias_channel_stride", "i32")),
            *row(beta),
            grouped(beta),
            *row("out"),
            (indexed, stride("slots_stride", "i32")),
            (bool(c.accepted_dtype), stride("slots_column_stride", "i32")),
            (bool(c.accepted_dtype), stride("slots_width", "i32")),
            (c.has_dst, stride("dst_slots_stride", "i32")),
            (c.dst_tokens, stride("dst_slots_column_stride", "i32")),
            (c.has_intermediate, stride("buffer_entry_stride", "i64", c.state_dtype)),
            (
                c.has_intermediate and c.many,
                stride("buffer_token_stride", "i64", c.state_dtype),
            ),
            (c.has_intermediate, stride("buffer_head_stride", "i64", c.state_dtype)),
            (bool(c.entry_dtype), stride("entries_stride", "i32")),
            (bool(c.accepted_dtype), stride("accepted_stride", "i32")),
            (varlen, stride("total", "i32")),
            (indexed or bool(c.entry_dtype), stride("pad_slot_id", "i64")),
            (True, stride("group_recip", "u32")),
            (True, stride("scale_bits", "u32")),
            (c.gate == "bounded", stride("lower_bound_bits", "u32")),
        )
        return pointers + integers

    def context(self, config: GdnConfig, plan: Plan, arch: Arch) -> Mapping[str, Any]:  # type: ignore[override]
        return {
            "hardware_rounding": arch.cvt_rs and config.state_dtype in ("fp16", "bf16"),
            "mask_cols": config.head_k_dim != plan.block_n,
            "tiles": config.head_v_dim // plan.block_m,
            **({"prefetch_bytes": _tile_bytes(config, plan.block_m)} if plan.prefetch else {}),
        }

    def dispatch_keys(self, config: GdnConfig) -> tuple[str, ...]:  # type: ignore[override]
        key = f"{8 * ITEMSIZE[config.state_dtype]}bit.{config.rounding}.{config.state_layout}"
        keys = [f"{key}.many", key] if config.many else [key]
        return (*(f"{k}.pdl" for k in keys if config.pdl), *keys)

    def listings(self, config: GdnConfig) -> tuple[str, ...]:  # type: ignore[override]
        # A list for several tokens is worth more than one for PDL.
        return tuple(sorted(self.dispatch_keys(config), key=lambda key: ".many" not in key))

    def staples(self, config: GdnConfig, arch: Arch) -> list[Plan]:  # type: ignore[override]
        from ...plan import Plan

        if not _beside(config):
            return []
        return [
            Plan(
                algorithm="simple",
                block_m=rows,
                block_n=REFERENCE_K,
                num_warps=1,
                evict_first=evict,
                prefetch=ahead,
            )
            for rows, ahead, evict in PREFETCH[ITEMSIZE[config.state_dtype]]
        ]

    def fit(self, config: GdnConfig, plan: Plan, arch: Arch) -> Plan:  # type: ignore[override]
        from ...plan import Plan

        if plan.algorithm != "simple":
            config.reject("algorithm", plan.algorithm, "auto, simple")
        block_n = 1 << (config.head_k_dim - 1).bit_length()
        wanted = max(1, plan.block_m * REFERENCE_K // block_n)
        if config.state_layout == "KV":
            # Rows lie side by side there: fewer of them would leave parts of a sector unused.
            wanted = max(wanted, 32 // ITEMSIZE[config.state_dtype])
        block_m = min(config.head_v_dim & -config.head_v_dim, wanted)
        # A thread below one 16-byte vector only adds idle lanes.
        vector = 16 // ITEMSIZE[config.state_dtype]
        warps = max(1, plan.num_warps * block_m // wanted)
        # With more than 128 elements a thread the state leaves no registers for its products.
        warps = max(warps, block_m * block_n // (32 * 128))
        warps = max(1, min(warps, block_m * block_n // (32 * vector)))
        asks = arch.bulk_prefetch and _beside(config) and _tile_bytes(config, block_m) % 16 == 0
        return Plan(
            algorithm="simple",
            block_m=block_m,
            block_n=block_n,
            num_warps=warps,
            evict_first=plan.evict_first,
            maxnreg=plan.maxnreg,
            early=plan.early or not (config.pdl and arch.pdl),
            prefetch=plan.prefetch if asks else 0,
        )

    def work(self, config: GdnConfig, plan: Plan) -> Work:  # type: ignore[override]
        return work(config, plan)

    def limit(self, config: GdnConfig, heads: int) -> int:  # type: ignore[override]
        return max(1, heads * REFERENCE_K * REFERENCE_V // (config.head_k_dim * config.head_v_dim))

    def grid(self, config: GdnConfig, plan: Plan, batch: int, nheads: int) -> tuple[int, ...]:  # type: ignore[override]
        return config.head_v_dim // plan.block_m * nheads, batch, 1

    def layout(self, **arguments: Any) -> Layout:
        from .contract import layout

        return layout(**arguments)

    def switches(self, config: GdnConfig) -> dict[str, Any]:  # type: ignore[override]
        return {
            "use_qk_l2norm": config.use_qk_l2norm,
            "disable_state_update": not config.update_state,
            "philox_rounds": config.philox_rounds or 10,
            "pdl": config.pdl,
            "cache_steps": config.ntokens if config.seqlens_dtype else 0,
        }


def _beside(config: GdnConfig) -> bool:
    """Whether a row is one token, on the slot that its table begins with, and a tile of it lies in
    one piece: what a program may prefetch for a later one."""
    one = not (config.many or config.accepted_dtype)
    return one and config.aligned and config.state_layout == "VK"


def _tile_bytes(config: GdnConfig, rows: int) -> int:
    return rows * config.head_k_dim * ITEMSIZE[config.state_dtype]


FAMILY = Gdn()
