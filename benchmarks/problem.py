"""Inputs of the selective_state_update benchmarks, distributed as in a real Mamba2 layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ssmgen.families.ssu.config import ITEMSIZE, SCALED
from ssmgen.reference.rounding import dequantise, quantise
from ssmgen.reference.ssu import ssu_step

POOL_BYTES = 512 * 2**20
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int16": torch.int16,
    "int8": torch.int8,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}


@dataclass
class Problem:
    """One cell: shapes and dtypes. `sets` slot sets share a pool of at least `POOL_BYTES`.

    With `tokens` a row has that many, and its state is written after the last one; with `every`
    the state after each token goes to a buffer and the slot stays as it was, which is how drafts
    are verified. The buffer holds as many sets of entries as make up `POOL_BYTES`, in turn.
    """

    batch: int
    state: str = "fp32"
    stochastic: bool = False
    philox_rounds: int = 10
    nheads: int = 128
    ngroups: int = 8
    dim: int = 64
    dstate: int = 128
    tokens: int | None = None
    every: bool = False
    pool_bytes: int = POOL_BYTES
    device: str = "cuda"
    inputs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        gen = torch.Generator(self.device).manual_seed(1)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=self.device, generator=gen)

        def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
            return low + (high - low) * torch.rand(*shape, device=self.device, generator=gen)

        b, h, g, p, n = self.batch, self.nheads, self.ngroups, self.dim, self.dstate
        lead = (b,) if self.tokens is None else (b, self.tokens)
        row = h * p * n * ITEMSIZE[self.state]
        self.sets = min(2048, max(2, -(-self.pool_bytes // (b * row))))
        # Slot 0 is left alone: some engines keep it for padding.
        slots = self.sets * b + 1
        dtype = DTYPES[self.state]
        self.scale = None
        if self.state in SCALED:
            self.pool = torch.empty(slots, h, p, n, dtype=dtype, device=self.device)
            self.scale = torch.empty(slots, h, p, device=self.device)
            for i in range(0, slots, 64):
                m = min(64, slots - i)
                q, self.scale[i : i + m] = quantise(randn(m, h, p, n), dtype)
                self.pool[i : i + m] = q
        else:
            self.pool = torch.empty(slots, h, p, n, dtype=dtype, device=self.device)
            for i in range(0, slots, 64):
                m = min(64, slots - i)
                self.pool[i : i + m] = randn(m, h, p, n)
        silu = torch.nn.functional.silu
        # softplus(dt_bias) is log-uniform in [1e-3, 1e-1], A in [-16, -1]: Mamba2's own init.
        step = torch.exp(uniform(-6.907755, -2.302585, h))
        bias = step + torch.log(-torch.expm1(-step))
        self.inputs = {
            "x": silu(randn(*lead, h, p)).bfloat16(),
            "dt": (0.1 * randn(*lead, h))[..., None].expand(*lead, h, p),
            "A": (-uniform(1, 16, h))[:, None, None].expand(h, p, n),
            "B": silu(randn(*lead, g, n)).bfloat16(),
            "C": silu(randn(*lead, g, n)).bfloat16(),
            "D": uniform(0.5, 1.5, h)[:, None].expand(h, p),
            "dt_bias": bias[:, None].expand(h, p),
        }
        order = torch.randperm(slots - 1, device=self.device, generator=gen) + 1
        self.indices = [order[i * b : (i + 1) * b].contiguous() for i in range(self.sets)]
        self.out = torch.empty_like(self.inputs["x"])
        self.buffer = None
        if self.every:
            assert self.tokens, "intermediate states are those of several tokens"
            assert self.scale is None, "intermediate states with scales are not measured"
            shape = (self.tokens, h, p, n)
            turns = min(self.sets, max(1, -(-self.pool_bytes // (b * self.tokens * row))))
            self.buffer = torch.empty(turns * b, *shape, dtype=dtype, device=self.device)
            order = torch.randperm(turns * b, device=self.device, generator=gen)
            self.entries = [order[i * b : (i + 1) * b].contiguous() for i in range(turns)]
        self.seed = (
            torch.tensor([20261121], device=self.device, dtype=torch.int64)
            if self.stochastic
            else None
        )

    def tables(self, which: int) -> dict[str, Any]:
        """The arguments of slot set `which`: where its states come from and go to."""
        found: dict[str, Any] = {"state_batch_indices": self.indices[which]}
        if self.tokens is not None:
            found["cache_steps"] = self.tokens
        if self.buffer is not None:
            found |= {
                "disable_state_update": True,
                "intermediate_states_buffer": self.buffer,
                "intermediate_state_indices": self.entries[which % len(self.entries)],
            }
        return found

    @property
    def bytes(self) -> int:
        """Bytes that must move: states read and written, scales, inputs, output, indices."""
        state = self.batch * self.nheads * self.dim * self.dstate * ITEMSIZE[self.state]
        scales = self.batch * self.nheads * self.dim * 4 if self.scale is not None else 0
        small = sum(
            t.untyped_storage().nbytes()
            for t in (*self.inputs.values(), self.out, self.indices[0])
        )  # fmt: skip
        if self.buffer is not None:
            return (1 + len(self.buffer[0])) * state + small + self.entries[0].nbytes
        return 2 * (state + scales) + small

    def before(self, slots: torch.Tensor) -> torch.Tensor:
        """The states of `slots` as they are, in fp64."""
        if self.scale is not None:
            return dequantise(self.pool[slots], self.scale[slots], torch.float64)
        return self.pool[slots].double()

    def verify(
        self, launch: Any, which: int = 0, rows: int = 32, absolute: float = 2.0**-24
    ) -> str | None:
        """Run `launch(which)` on poisoned output; None if outputs and states are right.

        Bounds wide enough for kernels built with fast-math: an output may be off by two units of
        bf16; a state element by two units of its storage, by 2^-13 of what was added up to it (a
        softplus of the form log(1 + e^v) is off by 2^-14 where dt is 1e-3), and by `absolute`.
        """
        chosen = self._chosen(which, rows)
        slots = self.indices[which][chosen]
        x, dt, B, C = (
            t[chosen] if self.tokens is not None else t[chosen].unsqueeze(1)
            for t in (self.inputs[name] for name in ("x", "dt", "B", "C"))
        )
        weights = {k: self.inputs[k] for k in ("A", "D", "dt_bias")}
        old = h = self.before(slots)
        summed = old.abs()
        self.out.fill_(float("nan"))
        if self.buffer is not None:
            self.buffer.fill_(float("nan"))
        launch(which)
        torch.cuda.synchronize()
        if not torch.isfinite(self.out).all():
            return "output not written everywhere"
        if self.buffer is not None and (wrong := self._written(which)):
            return wrong
        out = self.out[chosen].double().view(x.shape)
        for token in range(x.shape[1]):
            y, h = ssu_step(
                h, x[:, token], dt[:, token], B=B[:, token], C=C[:, token], **weights,
                dt_softplus=True, compute_dtype=torch.float64,
            )  # fmt: skip
            summed += h.abs()
            if (error := ((out[:, token] - y).abs() - 2**-7 * y.abs()).max().item()) > 1e-4:
                return f"output{self._of(token)} off by {error:.2e}"
            last = token == x.shape[1] - 1
            if self.buffer is not None:
                entries = self.entries[which % len(self.entries)][chosen]
                new = self.buffer[entries, token].double()
            elif last:
                new = self.before(slots)
            else:
                continue
            if self.scale is not None:
                largest = {"int16": 32767, "int8": 127}.get(self.state, 14)
                unit = h.abs().amax(-1, keepdim=True) / largest
            else:
                unit = h.abs() * 2.0 ** -{"fp32": 23, "fp16": 10, "bf16": 7}[self.state]
            allowed = 2 * unit + summed * 2.0**-13 + absolute
            if (error := ((new - h).abs() / allowed).max().item()) > 1 or math.isnan(error):
                return f"state{self._of(token)} off by {error:.2f} of what is allowed"
        if self.buffer is not None and not torch.equal(self.before(slots), old):
            return "state written, though its update is disabled"
        return None

    def _of(self, token: int) -> str:
        return "" if self.tokens is None else f" of token {token}"

    def _chosen(self, which: int, rows: int) -> torch.Tensor:
        """`rows` rows of the batch from first to last, and those at the far end of memory."""
        if rows >= self.batch:
            return torch.arange(self.batch, device=self.device)
        chosen = torch.linspace(0, self.batch - 1, rows, device=self.device).long()
        far = [self.indices[which].argmax()]
        if self.buffer is not None:
            far.append(self.entries[which % len(self.entries)].argmax())
        return torch.cat([chosen, torch.stack(far)]).unique()

    def _written(self, which: int) -> str | None:
        """None if the launch wrote all of its own entries of the poisoned buffer and no others."""
        assert self.buffer is not None
        mine = torch.zeros(len(self.buffer), dtype=torch.bool, device=self.device)
        mine[self.entries[which % len(self.entries)]] = True
        for i in range(0, len(self.buffer), 64):
            part, wanted = self.buffer[i : i + 64], mine[i : i + 64]
            written = torch.isfinite(part).flatten(1)
            if not written[wanted].all():
                return "buffer not written everywhere"
            if written[~wanted].any():
                return "buffer written where another row's entry is"
        return None
