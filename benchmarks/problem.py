"""Inputs of the selective_state_update benchmarks, distributed as in a real Mamba2 layer."""

from __future__ import annotations

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
    """One cell: shapes and dtypes. `sets` slot sets share a pool of at least `POOL_BYTES`."""

    batch: int
    state: str = "fp32"
    stochastic: bool = False
    philox_rounds: int = 10
    nheads: int = 128
    ngroups: int = 8
    dim: int = 64
    dstate: int = 128
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
            "x": silu(randn(b, h, p)).bfloat16(),
            "dt": (0.1 * randn(b, h))[:, :, None].expand(b, h, p),
            "A": (-uniform(1, 16, h))[:, None, None].expand(h, p, n),
            "B": silu(randn(b, g, n)).bfloat16(),
            "C": silu(randn(b, g, n)).bfloat16(),
            "D": uniform(0.5, 1.5, h)[:, None].expand(h, p),
            "dt_bias": bias[:, None].expand(h, p),
        }
        order = torch.randperm(slots - 1, device=self.device, generator=gen) + 1
        self.indices = [order[i * b : (i + 1) * b].contiguous() for i in range(self.sets)]
        self.out = torch.empty_like(self.inputs["x"])
        self.seed = (
            torch.tensor([20261121], device=self.device, dtype=torch.int64)
            if self.stochastic
            else None
        )

    @property
    def bytes(self) -> int:
        """Bytes that must move: state read and written, scales, inputs, output, indices."""
        state = self.batch * self.nheads * self.dim * self.dstate * ITEMSIZE[self.state]
        scales = self.batch * self.nheads * self.dim * 4 if self.scale is not None else 0
        small = sum(
            t.untyped_storage().nbytes()
            for t in (*self.inputs.values(), self.out, self.indices[0])
        )  # fmt: skip
        return 2 * (state + scales) + small

    def before(self, slots: torch.Tensor) -> torch.Tensor:
        """The states of `slots` as they are, in fp64."""
        if self.scale is not None:
            return dequantise(self.pool[slots], self.scale[slots], torch.float64)
        return self.pool[slots].double()

    def verify(
        self, launch: Any, which: int = 0, rows: int = 32, absolute: float = 2.0**-24
    ) -> str | None:
        """Run `launch(which)` on poisoned output; None if output and state are right.

        Bounds wide enough for kernels built with fast-math: an output may be off by two units of
        bf16; a state element by two units of its storage, by 2^-13 of what was added up to it (a
        softplus of the form log(1 + e^v) is off by 2^-14 where dt is 1e-3), and by `absolute`.
        """
        slots = self.indices[which][: min(rows, self.batch)]
        keep = len(slots)
        inputs = {k: v[:keep] if k in ("x", "dt", "B", "C") else v for k, v in self.inputs.items()}
        old = self.before(slots)
        y, h = ssu_step(old, **inputs, dt_softplus=True, compute_dtype=torch.float64)
        self.out.fill_(float("nan"))
        launch(which)
        torch.cuda.synchronize()
        out = self.out.double()
        if not torch.isfinite(out).all():
            return "output not written everywhere"
        out = out[:keep]
        if (error := ((out - y).abs() - 2**-7 * y.abs()).max().item()) > 1e-4:
            return f"output off by {error:.2e}"
        if self.scale is not None:
            largest = {"int16": 32767, "int8": 127}.get(self.state, 14)
            unit = h.abs().amax(-1, keepdim=True) / largest
        else:
            unit = h.abs() * 2.0 ** -{"fp32": 23, "fp16": 10, "bf16": 7}[self.state]
        allowed = 2 * unit + (old.abs() + h.abs()) * 2.0**-13 + absolute
        error = ((self.before(slots) - h).abs() / allowed).max().item()
        return f"state off by {error:.2f} of what is allowed" if error > 1 else None
