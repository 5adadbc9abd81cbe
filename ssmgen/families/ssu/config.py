"""SsuConfig: the fields of a selective_state_update kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...config import KernelConfig, choice, flag, integer

__all__ = ["ITEMSIZE", "SCALED", "SsuConfig"]

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "int16": 2, "int8": 1, "fp8_e4m3fn": 1}
SCALED = ("int16", "int8", "fp8_e4m3fn")
FLOATS = ("fp32", "bf16", "fp16")
INDICES = ("int32", "int64", None)


@dataclass(frozen=True, kw_only=True)
class SsuConfig(KernelConfig, family="ssu"):
    """selective_state_update for one token a row, or for many (`many`).

    dtype: x, B, C, z, out. dt_dtype: dt (default: weight_dtype). weight_dtype: D, dt_bias.
    a_dtype: A. state_scale_t: dtype of the block scales, one per (slot, head, row); integer and
    fp8 states have them, others do not. philox_rounds: 10 unless given when rounding is
    stochastic, else 0. tie_hdim: dt, A, D, dt_bias hold one value per head (Mamba2); else one per
    row (and for A per element). index_dtype: of state_batch_indices, None if slots are batch rows.
    aligned: state, x, B and C (and A unless tied, and the intermediate buffer) start and step at
    multiples of 16 bytes.

    ntokens: tokens a row, the most of them where seqlens_dtype says that rows are sequences of
    cu_seqlens. accepted_dtype: of num_accepted_tokens; parents_dtype: of parent_tokens. dst_tokens:
    every token has a destination, not the last alone. has_intermediate: every token's state goes
    into a buffer, at entries of entry_dtype, or at the source slot if None. precision: exact has
    the bits of token after token; fast leaves the order of the sums, not their accuracy, to the
    algorithm.
    """

    derived: ClassVar[tuple[str, ...]] = ("dt_dtype", "state_scale_t", "philox_rounds")

    family: str = choice("ssu", ("ssu",))
    dt_dtype: str | None = choice(None, (*FLOATS, None))
    weight_dtype: str = choice("fp32", FLOATS)
    a_dtype: str = choice("fp32", FLOATS)
    state_dtype: str = choice("fp32", (*FLOATS, *SCALED))
    state_scale_t: str | None = choice(None, ("fp32", None))
    rounding: str = choice("nearest", ("nearest", "stochastic"))
    philox_rounds: int | None = integer(None, 0, 16)
    dim: int = integer(64, 8, 512, 8)
    dstate: int = integer(128, 8, 512, 8)
    ntokens: int = integer(1, 1, 2**20)
    has_z: bool = flag(False)
    has_d: bool = flag(True)
    has_dt_bias: bool = flag(True)
    dt_softplus: bool = flag(True)
    tie_hdim: bool = flag(True)
    has_dst: bool = flag(False)
    update_state: bool = flag(True)
    seqlens_dtype: str | None = choice(None, INDICES)
    accepted_dtype: str | None = choice(None, INDICES)
    parents_dtype: str | None = choice(None, INDICES)
    dst_tokens: bool = flag(False)
    has_intermediate: bool = flag(False)
    entry_dtype: str | None = choice(None, INDICES)
    precision: str = choice("fast", ("fast", "exact"), dispatch=True)

    @property
    def many(self) -> bool:
        """Whether the kernel walks along tokens; it does also for one token of a sequence."""
        return (
            self.ntokens > 1
            or self.has_intermediate
            or bool(self.seqlens_dtype or self.accepted_dtype or self.parents_dtype)
        )

    @property
    def stores(self) -> bool:
        """Whether any state is written."""
        return self.update_state or self.has_intermediate

    def outside_matrix(self) -> tuple[str, Any, str] | None:
        """A field the matrix form does not serve, its value, what it serves; None if it does."""
        least = 16 if self.state_dtype == "fp32" else 32
        served = (
            ("ntokens", 2 <= self.ntokens <= 16, "2 to 16"),
            ("dtype", self.dtype == "bf16", "bf16"),
            ("state_dtype", self.state_dtype in FLOATS, ", ".join(FLOATS)),
            ("rounding", self.rounding == "nearest", "nearest"),
            ("dim", self.dim % 16 == 0, "multiples of 16"),
            ("dstate", self.dstate in (16, 32, 64, 128, 256) and self.dstate >= least,
             f"powers of two from {least} to 256"),
            ("tie_hdim", self.tie_hdim, "True"),
            ("aligned", self.aligned, "True"),
            ("pdl", not self.pdl, "False"),
            *((n, not getattr(self, n), "None")
              for n in ("seqlens_dtype", "accepted_dtype", "parents_dtype")),
            *((n, not getattr(self, n), "False") for n in ("dst_tokens", "has_intermediate")),
            ("precision", self.precision == "fast", "fast"),
        )  # fmt: skip
        return next(((n, getattr(self, n), what) for n, met, what in served if not met), None)

    def check(self) -> None:
        if self.dt_dtype is None:
            self.resolve("dt_dtype", self.weight_dtype)
        if not (self.has_d or self.has_dt_bias):
            self.resolve("weight_dtype", "fp32")  # of nothing: one config for one binary
        scaled = self.state_dtype in SCALED
        if scaled:
            self.resolve("state_scale_t", "fp32")
        elif self.state_scale_t is not None:
            self.reject("state_scale_t", self.state_scale_t, f"None with {self.state_dtype} states")
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
        if self.has_dst and self.index_dtype is None:
            self.reject("has_dst", True, "False without state_batch_indices (index_dtype)")
        if self.has_dst and not self.update_state:
            self.reject("has_dst", True, "False when no state is written")
        if self.dst_tokens and not (self.has_dst and self.ntokens > 1):
            self.reject("dst_tokens", True, "False without has_dst and several tokens")
        if self.accepted_dtype and self.index_dtype is None:
            self.reject(
                "accepted_dtype",
                self.accepted_dtype,
                "None without state_batch_indices (index_dtype)",
            )
        if self.entry_dtype and not self.has_intermediate:
            self.reject("entry_dtype", self.entry_dtype, "None without has_intermediate")
        if self.many and self.algorithm in ("vertical", "horizontal"):
            self.reject("algorithm", self.algorithm, "auto, simple, matrix with several tokens")
        if self.algorithm == "matrix" and (outside := self.outside_matrix()):
            name, value, allowed = outside
            self.reject(name, value, f"{allowed} with algorithm matrix")
        if self.algorithm == "horizontal" and scaled:
            self.reject(
                "algorithm", "horizontal", f"auto, simple, vertical with {self.state_dtype} states"
            )
