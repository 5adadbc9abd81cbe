"""ssu: selective_state_update, the decode step of Mamba1 and Mamba2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..base import Argument, Family, Layout
from . import matrix, space
from .config import ITEMSIZE, SsuConfig
from .fit import (
    REFERENCE_DIM,
    REFERENCE_DSTATE,
    crowded,
    fit,
    lanes,
    next_power_of_2,
    tile_bytes,
    unrolled,
)
from .layers import Mamba1, Mamba2
from .work import work

if TYPE_CHECKING:
    from ...arch import Arch
    from ...cost import Work
    from ...plan import Plan

__all__ = ["FAMILY", "Ssu", "SsuConfig"]


class Ssu(Family):
    name = "ssu"
    layers = (Mamba2(), Mamba1())

    def arguments(self, config: SsuConfig) -> tuple[Argument, ...]:  # type: ignore[override]
        align = 16 if config.aligned else 1

        def stride(name: str, type: str, dtype: str | None = None) -> Argument:
            return Argument(name, type, align // ITEMSIZE[dtype] if dtype and align > 1 else 1)

        def keep(*pairs: tuple[bool, Argument]) -> tuple[Argument, ...]:
            return tuple(argument for wanted, argument in pairs if wanted)

        c, io, weight = config, config.dtype, config.weight_dtype
        scaled, indexed, untied = bool(c.state_scale_t), bool(c.index_dtype), not c.tie_hdim
        stochastic = c.rounding == "stochastic"
        varlen = bool(c.seqlens_dtype)

        def row(name: str, dtype: str | None = None) -> tuple[tuple[bool, Argument], ...]:
            """The steps from row to row, and from token to token where a row has several."""
            return (
                (not varlen, stride(f"{name}_row_stride", "i32", dtype)),
                (c.many, stride(f"{name}_token_stride", "i32", dtype)),
            )

        pointers = keep(
            (True, Argument("state", f"*{c.state_dtype}", align)),
            (scaled, Argument("state_scale", "*fp32")),
            (True, Argument("x", f"*{io}", align)),
            (True, Argument("dt", f"*{c.dt_dtype}")),
            (True, Argument("A", f"*{c.a_dtype}", align if untied else 1)),
            (True, Argument("B", f"*{io}", align)),
            (True, Argument("C", f"*{io}", align)),
            (c.has_d, Argument("D", f"*{weight}")),
            (c.has_z, Argument("z", f"*{io}")),
            (c.has_dt_bias, Argument("dt_bias", f"*{weight}")),
            (True, Argument("out", f"*{io}")),
            (indexed, Argument("slots", f"*{c.index_dtype}")),
            (c.has_dst, Argument("dst_slots", f"*{c.index_dtype}")),
            (stochastic, Argument("seed", "*int64")),
            (c.has_intermediate, Argument("buffer", f"*{c.state_dtype}", align)),
            (bool(c.entry_dtype), Argument("entries", f"*{c.entry_dtype}")),
            (scaled and c.has_intermediate, Argument("buffer_scale", "*fp32")),
            (varlen, Argument("seqlens", f"*{c.seqlens_dtype}")),
            (bool(c.accepted_dtype), Argument("accepted", f"*{c.accepted_dtype}")),
            (bool(c.parents_dtype), Argument("parents", f"*{c.parents_dtype}")),
        )
        integers = keep(
            (True, stride("state_slot_stride", "i64", c.state_dtype)),
            (scaled, stride("scale_slot_stride", "i64")),
            *row("x", io),
            (True, stride("x_head_stride", "i32", io)),
            *row("dt"),
            (True, stride("dt_head_stride", "i32")),
            (untied, stride("dt_dim_stride", "i32")),
            (True, stride("A_head_stride", "i32", c.a_dtype if untied else None)),
            (untied, stride("A_dim_stride", "i32", c.a_dtype)),
            (untied and not c.aligned, stride("A_dstate_stride", "i32")),
            *row("B", io),
            (True, stride("B_group_stride", "i32", io)),
            *row("C", io),
            (True, stride("C_group_stride", "i32", io)),
            (c.has_d, stride("D_head_stride", "i32")),
            (c.has_d and untied, stride("D_dim_stride", "i32")),
            *(row("z") if c.has_z else ()),
            (c.has_z, stride("z_head_stride", "i32")),
            (c.has_dt_bias, stride("dt_bias_head_stride", "i32")),
            (c.has_dt_bias and untied, stride("dt_bias_dim_stride", "i32")),
            *row("out"),
            (True, stride("out_head_stride", "i32")),
            (indexed, stride("slots_stride", "i32")),
            (bool(c.accepted_dtype), stride("slots_column_stride", "i32")),
            (bool(c.accepted_dtype), stride("slots_width", "i32")),
            (c.has_dst, stride("dst_slots_stride", "i32")),
            (c.dst_tokens, stride("dst_slots_column_stride", "i32")),
            (c.has_intermediate, stride("buffer_entry_stride", "i64", c.state_dtype)),
            (c.has_intermediate, stride("buffer_token_stride", "i64", c.state_dtype)),
            (bool(c.entry_dtype), stride("entries_stride", "i32")),
            (scaled and c.has_intermediate, stride("buffer_scale_entry_stride", "i64")),
            (scaled and c.has_intermediate, stride("buffer_scale_token_stride", "i64")),
            (bool(c.accepted_dtype), stride("accepted_stride", "i32")),
            (bool(c.parents_dtype), stride("parents_row_stride", "i32")),
            (varlen, stride("total", "i32")),
            (indexed or bool(c.entry_dtype), stride("pad_slot_id", "i64")),
            (True, stride("group_recip", "u32")),
        )
        return pointers + integers

    def context(self, config: SsuConfig, plan: Plan, arch: Arch) -> Mapping[str, Any]:  # type: ignore[override]
        return {
            "qmax": {"int16": 32767, "int8": 127, "fp8_e4m3fn": 448}.get(config.state_dtype),
            "hardware_rounding": arch.cvt_rs and config.state_dtype in ("fp16", "bf16"),
            "hardware_fp8": arch.fp8,
            "paired_octets": ITEMSIZE[config.state_dtype] == 1 and plan.block_n >= 16,
            "tokens_block": next_power_of_2(config.ntokens),
            "unrolled": unrolled(config, plan),
            "crowded": crowded(config, plan),
            "mask_rows": config.dim % plan.block_m != 0,
            "mask_cols": config.dstate % plan.block_n != 0,
            "tiles": -(-config.dim // plan.block_m)
            if plan.algorithm in ("simple", "matrix")
            else plan.split,
            **({"prefetch_bytes": tile_bytes(config, plan)} if plan.prefetch else {}),
            **(matrix.layouts(config, plan) if plan.algorithm == "matrix" else {}),
            **lanes(plan, ITEMSIZE[config.state_dtype]),
        }

    def dispatch_keys(self, config: SsuConfig) -> tuple[str, ...]:  # type: ignore[override]
        key = f"{config.state_dtype}.{config.rounding}"
        keys = [key]
        if config.philox_rounds not in (0, 10):
            keys.insert(0, f"{key}.{config.philox_rounds}")
        if config.many:
            fitting = [str(n) for n in (2, 4, 8, 16) if config.ntokens <= n][:2] or ["more"]
            form = "many"
            if config.outside_matrix() or config.algorithm == "simple":
                form = "each" if config.has_intermediate else "loop"
            keys = [f"{k}.{form}.{tokens}" for tokens in fitting for k in keys]
        if config.pdl:
            keys = [f"{k}.pdl" for k in keys] + keys
        if (config.dim, config.dstate, config.tie_hdim) != (REFERENCE_DIM, REFERENCE_DSTATE, True):
            shape = f"{config.dim}x{config.dstate}" + ("" if config.tie_hdim else ".untied")
            keys = [f"{shape}.{k}" for k in keys] + keys
        return tuple(keys)

    def fit(self, config: SsuConfig, plan: Plan, arch: Arch) -> Plan:  # type: ignore[override]
        return fit(config, plan, arch)

    def limit(self, config: SsuConfig, heads: int) -> int:  # type: ignore[override]
        return max(1, heads * REFERENCE_DIM * REFERENCE_DSTATE // (config.dim * config.dstate))

    def candidates(self, config: SsuConfig, arch: Arch) -> list[Plan]:  # type: ignore[override]
        return space.candidates(config)

    def listings(self, config: SsuConfig) -> tuple[str, ...]:  # type: ignore[override]
        return space.listings(config)

    def general(self, config: SsuConfig, arch: Arch) -> list[Plan]:  # type: ignore[override]
        return space.general(config)

    def staples(self, config: SsuConfig, arch: Arch) -> list[Plan]:  # type: ignore[override]
        found = [*self.shortlist(config, arch), *space.general(config)]
        return found + space.prefetching(config)

    def tuned_at(self, config: SsuConfig) -> list[int]:  # type: ignore[override]
        return space.sizes(config, self.sizes)

    def work(self, config: SsuConfig, plan: Plan) -> Work:  # type: ignore[override]
        return work(config, plan)

    def grid(self, config: SsuConfig, plan: Plan, batch: int, nheads: int) -> tuple[int, ...]:  # type: ignore[override]
        tiles = {
            "simple": config.dim // plan.block_m,
            "matrix": config.dim // plan.block_m,
            "vertical": plan.split,
            "horizontal": 1,
        }[plan.algorithm]
        return tiles * nheads, batch, 1

    def layout(self, **arguments: Any) -> Layout:
        from .contract import layout

        return layout(**arguments)

    def switches(self, config: SsuConfig) -> dict[str, Any]:  # type: ignore[override]
        return {
            "dt_softplus": config.dt_softplus,
            "disable_state_update": not config.update_state,
            "philox_rounds": config.philox_rounds or 10,
            "pdl": config.pdl,
            "cache_steps": config.ntokens if config.seqlens_dtype else 0,
        }


FAMILY = Ssu()
