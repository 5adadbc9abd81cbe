"""GdnConfig: the fields of a gated_delta_rule_decode kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import KernelConfig, choice, flag, integer

__all__ = ["FLOATS", "GATES", "ITEMSIZE", "GdnConfig"]

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
FLOATS = ("fp32", "bf16", "fp16")
GATES = ("softplus", "bounded", "given")
INDICES = ("int32", "int64", None)


@dataclass(frozen=True, kw_only=True)
class GdnConfig(KernelConfig, family="gdn"):
    """gated_delta_rule_decode for one token a row, or for many.

    dtype: q, k, v, out. head_k_dim, head_v_dim: K and V. state_layout: which of the two axes of a
    head's state is packed, the other steps by its size. gate: the decay comes from A_log, a and
    dt_bias by ``-exp(A_log) softplus(a + dt_bias)`` (softplus) or by ``lower_bound
    sigmoid(exp(A_log) (a + dt_bias))`` (bounded), and beta is sigmoid(b); or both are given (then
    a_dtype is that of g, b_dtype that of beta). kda: one decay per channel of K, not per head.
    grouped: v, a and b have strides of their own from key head to key head.

    ntokens: tokens a row, the most of them where seqlens_dtype says that rows are sequences of
    cu_seqlens. accepted_dtype: of num_accepted_tokens. dst_tokens: every token has a destination,
    not the last alone. has_intermediate: every token's state goes into a buffer, at entries of
    entry_dtype, or at the row of the batch if None. aligned: state, q and k, and the buffer, start
    and step at multiples of 16 bytes. philox_rounds: 10 unless given when rounding is stochastic,
    else 0.
    """

    derived: ClassVar[tuple[str, ...]] = ("philox_rounds",)

    family: str = choice("gdn", ("gdn",))
    state_dtype: str = choice("fp32", FLOATS)
    state_layout: str = choice("VK", ("VK", "KV"))
    rounding: str = choice("nearest", ("nearest", "stochastic"))
    philox_rounds: int | None = integer(None, 0, 16)
    head_k_dim: int = integer(128, 8, 256, 8)
    head_v_dim: int = integer(128, 8, 256, 8)
    gate: str = choice("softplus", GATES)
    kda: bool = flag(False)
    a_dtype: str = choice("bf16", FLOATS)
    b_dtype: str = choice("bf16", FLOATS)
    a_log_dtype: str = choice("fp32", FLOATS)
    has_dt_bias: bool = flag(True)
    dt_bias_dtype: str = choice("fp32", FLOATS)
    use_qk_l2norm: bool = flag(True)
    grouped: bool = flag(False)
    ntokens: int = integer(1, 1, 2**20)
    has_dst: bool = flag(False)
    update_state: bool = flag(True)
    seqlens_dtype: str | None = choice(None, INDICES)
    accepted_dtype: str | None = choice(None, INDICES)
    dst_tokens: bool = flag(False)
    has_intermediate: bool = flag(False)
    entry_dtype: str | None = choice(None, INDICES)

    @property
    def many(self) -> bool:
        """Whether the kernel walks along tokens; it does also for one token of a sequence."""
        return self.ntokens > 1 or bool(self.seqlens_dtype)

    @property
    def stores(self) -> bool:
        """Whether any state is written."""
        return self.update_state or self.has_intermediate

    def check(self) -> None:
        if self.algorithm not in ("auto", "simple"):
            self.reject("algorithm", self.algorithm, "auto, simple")
        if self.gate == "given":
            # Of nothing: one config for one binary.
            self.resolve("has_dt_bias", False)
            self.resolve("a_log_dtype", "fp32")
        if not self.has_dt_bias:
            self.resolve("dt_bias_dtype", "fp32")
        stochastic = self.rounding == "stochastic"
        if stochastic and self.state_dtype == "fp32":
            self.reject("rounding", "stochastic", "nearest with an fp32 state: nothing is rounded")
        if stochastic and not self.stores:
            self.reject("rounding", "stochastic", "nearest when no state is written")
        if self.philox_rounds is None:
            self.resolve("philox_rounds", 10 if stochastic else 0)
        elif stochastic != (self.philox_rounds > 0):
            self.reject(
                "philox_rounds",
                self.philox_rounds,
                "1 to 16 with stochastic rounding" if stochastic else "0 with nearest rounding",
            )
        if self.index_dtype is None:
            for name in ("has_dst", "accepted_dtype"):
                if value := getattr(self, name):
                    allowed = "False" if value is True else "None"
                    self.reject(name, value, f"{allowed} without state_batch_indices (index_dtype)")
        if self.has_dst and not self.update_state:
            self.reject("has_dst", True, "False when no state is written")
        if self.dst_tokens and not (self.has_dst and self.ntokens > 1):
            self.reject("dst_tokens", True, "False without has_dst and several tokens")
        if self.entry_dtype and not self.has_intermediate:
            self.reject("entry_dtype", self.entry_dtype, "None without has_intermediate")
