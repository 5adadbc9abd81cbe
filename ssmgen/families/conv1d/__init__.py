"""conv1d: the causal depthwise convolution ahead of a state-space layer, decode and prefill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...cost import Work
from ..base import Argument, Family, Layout
from .config import ITEMSIZE, Conv1dConfig
from .work import work

if TYPE_CHECKING:
    from ...arch import Arch
    from ...plan import Plan

__all__ = ["FAMILY", "Conv1d", "Conv1dConfig"]


# What the values of a tile may take of a thread's 255 registers.
MAX_REGISTERS = 184


class Conv1d(Family):
    """Its plans have block_m tokens (of a row of several, or of a chunk) by block_n channels, and
    what it counts as heads are channels."""

    name = "conv1d"
    sizes = tuple(4**k for k in range(5, 13))
    heads = (8192, 1024)

    def arguments(self, config: Conv1dConfig) -> tuple[Argument, ...]:  # type: ignore[override]
        c = config
        io = 16 if c.aligned else 1
        pool = io if c.packed_channels else 1

        def stride(name: str, align: int = 1, dtype: str = "fp32", type: str = "i32") -> Argument:
            return Argument(name, type, align // ITEMSIZE[dtype] if align > 1 else 1)

        def keep(*pairs: tuple[Any, Argument]) -> tuple[Argument, ...]:
            return tuple(argument for wanted, argument in pairs if wanted)

        def inputs(name: str) -> tuple[tuple[Any, Argument], ...]:
            return (
                (not c.seqlens_dtype, stride(f"{name}_row_stride", io, c.dtype)),
                (c.many, stride(f"{name}_token_stride", io, c.dtype)),
                (not c.aligned, stride(f"{name}_dim_stride")),
            )

        def window(
            name: str, outer: str, type: str, columns: bool
        ) -> tuple[tuple[Any, Argument], ...]:
            state = str(c.state_dtype)
            return (
                (True, stride(f"{name}_{outer}_stride", pool, state, type)),
                (columns, stride(f"{name}_column_stride", pool, state)),
                (not c.packed_channels, stride(f"{name}_dim_stride")),
            )

        rows = c.history == "rows"
        # A window of one column is where its slot is.
        several = c.depth != 1 or c.accepted_dtype or c.counts_dtype
        moves = bool(c.update_state and several)
        pointers = keep(
            (True, Argument("x", f"*{c.dtype}", io)),
            (c.has_pool, Argument("conv_state", f"*{c.state_dtype}", pool)),
            (rows, Argument("initial", f"*{c.state_dtype}", pool)),
            (True, Argument("weight", f"*{c.weight_dtype}", io)),
            (c.has_bias, Argument("bias", f"*{c.weight_dtype}", io)),
            (True, Argument("out", f"*{c.dtype}", io)),
            (c.index_dtype, Argument("slots", f"*{c.index_dtype}")),
            (c.has_dst, Argument("dst_slots", f"*{c.index_dtype}")),
            (c.has_initial, Argument("has_initial", "*int8")),
            (c.seqlens_dtype, Argument("seqlens", f"*{c.seqlens_dtype}")),
            (c.accepted_dtype, Argument("accepted", f"*{c.accepted_dtype}")),
            (c.counts_dtype, Argument("counts", f"*{c.counts_dtype}")),
        )
        integers = keep(
            *inputs("x"),
            *inputs("out"),
            *(window("state", "slot", "i64", moves) if c.has_pool else ()),
            *(window("initial", "row", "i32", c.width > 2 or moves) if rows else ()),
            (not c.aligned, stride("weight_dim_stride")),
            (not c.aligned, stride("weight_tap_stride")),
            (not c.aligned and c.has_bias, stride("bias_stride")),
            (c.index_dtype, stride("slots_stride")),
            (c.has_dst, stride("dst_slots_stride")),
            (c.has_initial, stride("has_initial_stride")),
            (c.accepted_dtype, stride("accepted_stride")),
            (c.counts_dtype, stride("counts_stride")),
            (c.accepted_dtype or c.counts_dtype, Argument("state_len", "i32")),
            (c.prefill, Argument("rows", "i32")),
            (c.seqlens_dtype, Argument("total", "i32")),
            (c.many and not c.seqlens_dtype, Argument("length", "i32")),
            (True, Argument("dim", "i32", 8 if c.aligned else 1)),
            (c.index_dtype, Argument("pad_slot_id", "i64")),
        )
        return pointers + integers

    def context(self, config: Conv1dConfig, plan: Plan, arch: Arch) -> Mapping[str, Any]:  # type: ignore[override]
        # The taps of a channel, where they are one word that a load of integers can fetch.
        bits = 8 * config.width * ITEMSIZE[config.weight_dtype]
        return {
            "word": f"int{bits}" if config.aligned and bits in (32, 64) else None,
            "tap_bits": 8 * ITEMSIZE[config.weight_dtype],
        }

    def dispatch_keys(self, config: Conv1dConfig) -> tuple[str, ...]:  # type: ignore[override]
        form = "prefill" if config.prefill else "many" if config.many else "one"
        key = f"{8 * ITEMSIZE[config.dtype]}bit.{form}"
        return (f"{key}.pdl", key) if config.pdl else (key,)

    def fit(self, config: Conv1dConfig, plan: Plan, arch: Arch) -> Plan:  # type: ignore[override]
        from ...plan import Plan

        if plan.algorithm != "simple":
            config.reject("algorithm", plan.algorithm, "auto, simple")
        least = 8 if config.prefill else 1  # the first chunk of a sequence needs all of its past
        tokens, channels = max(least, plan.block_m) if config.many else 1, plan.block_n
        vector = 16 // ITEMSIZE[config.dtype]
        # Only of a chunk are tokens shared out among threads too.
        spread = (tokens if config.prefill else 1) * channels
        # A thread below one 16-byte vector only adds idle lanes.
        warps = max(1, min(plan.num_warps, spread // (32 * vector)))

        def registers() -> float:
            """Of a thread, roughly: taps and window of its channels, and its inputs, in a chunk
            under each tap."""
            words = ITEMSIZE[str(config.state_dtype)] / 4
            window = config.width + words * config.depth  # type: ignore[operator]
            inputs = words * (config.width - 1) if config.prefill else 0
            inputs += 2 if config.aligned else 7
            own = channels / 32 / warps
            # Beside a tile every warp has the vectors of all its channels.
            beside = min(max(own, vector), channels / 32) if config.prefill else own
            return window * beside + inputs * tokens * own

        while registers() > MAX_REGISTERS and (tokens > least or channels > 32):
            # A row is to be one block, where a sequence may have any number of chunks.
            if tokens > least and (config.prefill or channels <= 32 * warps):
                tokens //= 2
            else:
                channels //= 2
        # A chunk signals at once: there are many, and those that are far ahead have ended.
        early = plan.early or config.prefill or not (config.pdl and arch.pdl)
        return Plan(
            algorithm="simple", block_m=tokens, block_n=channels, num_warps=warps, early=early
        )

    def candidates(self, config: Conv1dConfig, arch: Arch) -> list[Plan]:  # type: ignore[override]
        from ...plan import Plan

        return [
            Plan(algorithm="simple", block_m=tokens, block_n=channels, num_warps=warps, early=early)
            for early in ((True, False) if config.pdl and not config.prefill else (True,))
            for tokens in ((8, 16, 32) if config.prefill else (4, 8) if config.many else (1,))
            for channels in (32, 64, 128, 256, 512, 1024, 2048)
            for warps in (1, 2, 4, 8)
        ]

    def work(self, config: Conv1dConfig, plan: Plan) -> Work:  # type: ignore[override]
        return work(config, plan)

    def limit(self, config: Conv1dConfig, heads: int) -> int:  # type: ignore[override]
        return heads

    def grid(self, config: Conv1dConfig, plan: Plan, batch: int, nheads: int) -> tuple[int, ...]:  # type: ignore[override]
        blocks = -(-nheads // plan.block_n)
        if config.prefill:
            # A program takes chunks in turns: short sequences make more of them than tokens say.
            return -(-batch // plan.block_m), blocks, 1
        return blocks, batch, 1

    def layout(self, **arguments: Any) -> Layout:
        from .contract import layout

        return layout(**arguments)

    def switches(self, config: Conv1dConfig) -> dict[str, Any]:  # type: ignore[override]
        deep = config.depth != config.width - 1
        return {
            "activation": config.activation,
            "alignment": "circular" if config.counts_dtype else "right" if deep else "left",
            "pdl": config.pdl,
            "prefill": config.prefill,
        }


FAMILY = Conv1d()
