"""Conv1dConfig: the fields of a causal_conv1d kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import KernelConfig, choice, flag, integer

__all__ = ["FLOATS", "ITEMSIZE", "MAX_DEPTH", "Conv1dConfig"]

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
FLOATS = ("fp32", "bf16", "fp16")
INDICES = ("int32", "int64", None)
# Columns of a right-aligned window: all of them pass through registers.
MAX_DEPTH = 16


@dataclass(frozen=True, kw_only=True)
class Conv1dConfig(KernelConfig, family="conv1d"):
    """A causal depthwise convolution along the tokens of a row, with a window of its past.

    dtype: x, out. weight_dtype: weight, bias. state_dtype: conv_state and initial_states; that of
    x, or fp32, so that a stored input is that input. width: taps. depth: columns of the window,
    oldest first; those beyond width - 1 are moved, not read as taps. history: where a row's past
    comes from: its slot of the pool, its row of initial_states, or nowhere. update_state: whether
    the window is written. has_initial: a table says which rows have a past.

    many: rows have several tokens, as many as seqlens_dtype's query_start_loc says or all alike;
    prefill: they are cut into chunks that run in parallel, and channels are the first axis of x.
    accepted_dtype: of num_accepted_tokens; counts_dtype: of cache_seqlens, which makes the window
    circular. packed_channels: the channels of a window's column lie side by side. aligned: x, out,
    weight, bias (and the state where packed_channels) start and step at multiples of 16 bytes and
    are packed, and the channels are a multiple of 8.
    """

    derived: ClassVar[tuple[str, ...]] = ("state_dtype", "depth")

    family: str = choice("conv1d", ("conv1d",))
    index_dtype: str | None = choice("int32", INDICES)
    weight_dtype: str = choice("bf16", FLOATS)
    state_dtype: str | None = choice(None, (*FLOATS, None))
    width: int = integer(4, 2, 6)
    depth: int | None = integer(None, 1, MAX_DEPTH)
    has_bias: bool = flag(False)
    activation: str | None = choice("silu", ("silu", None))
    history: str | None = choice("pool", ("pool", "rows", None))
    update_state: bool = flag(True)
    has_initial: bool = flag(False)
    has_dst: bool = flag(False)
    many: bool = flag(False)
    prefill: bool = flag(False)
    seqlens_dtype: str | None = choice(None, INDICES)
    accepted_dtype: str | None = choice(None, INDICES)
    counts_dtype: str | None = choice(None, INDICES)
    packed_channels: bool = flag(True)

    @property
    def has_pool(self) -> bool:
        """Whether there is a conv_state."""
        return self.history == "pool" or self.update_state

    @property
    def refuses(self) -> bool:
        """Whether tables can make a row one that cannot be followed."""
        return bool(self.seqlens_dtype or self.accepted_dtype or self.counts_dtype)

    def check(self) -> None:
        stateless = not self.has_pool and self.history != "rows"
        if self.state_dtype is None or stateless:
            self.resolve("state_dtype", self.dtype)  # of nothing: one config for one binary
        elif self.state_dtype not in (self.dtype, "fp32"):
            self.reject(
                "state_dtype", self.state_dtype, f"that of x ({self.dtype}) or fp32: a stored "
                "input must be that input"
            )  # fmt: skip
        if self.depth is None:
            self.resolve("depth", self.width - 1)
        elif self.depth < self.width - 1:
            self.reject("depth", self.depth, f"width - 1 ({self.width - 1}) to {MAX_DEPTH}")
        if self.algorithm not in ("auto", "simple"):
            self.reject("algorithm", self.algorithm, "auto, simple")
        deep = self.depth != self.width - 1  # type: ignore[operator]
        rules = (
            ("prefill", self.prefill and not self.many, "False unless many"),
            ("seqlens_dtype", self.seqlens_dtype and not self.many, "None unless many"),
            ("history", self.history != "pool" and not self.prefill, "pool unless prefill"),
            ("update_state", not self.update_state and not self.prefill, "True unless prefill"),
            ("has_initial", self.has_initial and not (self.prefill and self.history == "pool"),
             "False unless prefill, with history pool"),
            ("index_dtype", self.index_dtype and not self.has_pool, "None without a pool"),
            ("has_dst", self.has_dst and not (self.index_dtype and self.update_state),
             "False without conv_state_indices (index_dtype), or where no state is written"),
            ("accepted_dtype", self.accepted_dtype and (deep or self.counts_dtype),
             "None with more than width - 1 columns, with cache_seqlens"),
            ("accepted_dtype", self.accepted_dtype and self.prefill and not self.has_initial,
             "None with prefill, unless has_initial"),
            ("counts_dtype", self.counts_dtype and (self.prefill or deep or self.has_dst),
             "None with prefill, with more than width - 1 columns, with has_dst"),
        )  # fmt: skip
        for name, broken, allowed in rules:
            if broken:
                self.reject(name, getattr(self, name), allowed)
        if deep and not self.update_state:
            self.reject("depth", self.depth, "width - 1 where no state is written")
        if stateless:
            self.resolve("packed_channels", True)
