"""What a kernel made of a problem, judged against fp64.

What an answer may be off by is derived, not fitted: half a unit in the last place of its storage
(one where it is rounded stochastically) plus a bound on the fp32 arithmetic before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..arch import Arch
from ..bench.problem import plan_of
from ..bench.problems.ssu import SsuProblem
from ..families.ssu.contract import layout
from ..reference import QMAX, ssu_step

__all__ = ["Verdict", "interpret", "judge", "ulp"]

EPS = 2.0**-24  # half a unit in the last place of fp32, relative


@dataclass(frozen=True)
class Verdict:
    """Errors in units: that of the storage dtype at the exact value, or 2^-23 of the sum of the
    magnitudes of all added terms where that is larger. ``share`` is the largest error as a share
    of what arithmetic allows; above 1 is wrong."""

    out_max: float
    out_mean: float
    state_max: float
    state_mean: float
    share: float
    wrong: tuple[str, ...]

    def errors(self) -> dict[str, float]:
        """The numbers."""
        return {k: v for k, v in asdict(self).items() if k != "wrong"}


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One unit in the last place of `dtype` at fp64 `values`; subnormals have the smallest."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full_like(values, info.eps / 2), exponent)


def interpret(problem: SsuProblem, arch: Arch) -> None:
    """Run slot set 0 in Triton's interpreter, as `arch` would."""
    from ..interpreter import interpret

    arguments = problem.arguments(0)
    interpret(layout(**arguments), arguments, plan=plan_of(problem, arch), arch=arch)


def judge(problem: SsuProblem, run: Callable[[], Any], rows: int = 8) -> Verdict:
    """Run slot set 0, of one token a row, and compare the first `rows` rows with fp64, and that no
    other slot has changed."""
    return _Judge(problem, rows).judge(run)


class _Judge:
    def __init__(self, problem: SsuProblem, rows: int) -> None:
        assert problem.sources is not None
        self.config, self.state, self.scale = problem.config, problem.pool, problem.scale
        self.inputs, self.out, self.slots = problem.inputs, problem.out, problem.sources[0]
        self.keep = min(rows, problem.batch)

    def judge(self, run: Callable[[], Any]) -> Verdict:
        keep = self.keep
        slots = self.slots[:keep]
        inputs = {k: v[:keep] if k in ("x", "dt", "B", "C") else v for k, v in self.inputs.items()}
        h = self._decoded(slots)
        y, exact = ssu_step(h, **inputs, dt_softplus=True, compute_dtype=torch.float64)
        # The same recurrence on magnitudes gives the sum of the magnitudes of all terms.
        sizes = {k: v if k in ("dt", "A", "dt_bias") else v.abs() for k, v in inputs.items()}
        y_terms, terms = ssu_step(h.abs(), **sizes, dt_softplus=True, compute_dtype=torch.float64)
        others = torch.ones(len(self.state), dtype=torch.bool, device=self.state.device)
        others[self.slots] = False
        before = self._raw()[others].clone()

        self.out.fill_(torch.nan)
        run()

        wrong = []
        if not torch.isfinite(self.out).all():
            wrong.append("the output is not finite everywhere")
        if not torch.equal(before, self._raw()[others]):
            wrong.append("a slot that was not named has changed")
        slack = self._relative_error(inputs)
        state_off = (self._decoded(slots) - exact).abs()
        slack_h = slack * terms + 2 * EPS * exact.abs()
        if self.scale is not None:
            slack_h += 10 * EPS * exact.abs()  # encode, scale, and their product
            if fault := self._scale_fault(slots, exact, slack_h):
                wrong.append(fault)
        unit = self._unit(slots, exact.abs() + slack_h)
        stochastic = self.config.rounding == "stochastic"
        state_share = state_off / ((1.0 if stochastic else 0.5) * unit + slack_h)

        out_off = (self.out[:keep].double() - y).abs()
        # Each sum of dstate products in any order, then D x, then the store.
        slack_y = (slack[..., 0] + (self.config.dstate + 3) * EPS) * y_terms
        out_unit = ulp(y.abs() + slack_y, torch.bfloat16)
        out_share = out_off / (0.5 * out_unit + slack_y)

        out_units = out_off / torch.maximum(out_unit, 2 * EPS * y_terms)
        state_units = state_off / torch.maximum(unit, 2 * EPS * terms)
        for name, share, units in (
            ("output", out_share, out_units),
            ("state", state_share, state_units),
        ):
            if not share.max() <= 1:  # NaN fails too
                wrong.append(
                    f"the {name} is off by {units.max():.2f} units, "
                    f"{share.max():.3g} times what arithmetic allows"
                )
        return Verdict(
            out_max=float(out_units.max()),
            out_mean=float(out_units.mean()),
            state_max=float(state_units.max()),
            state_mean=float(state_units.mean()),
            share=float(torch.maximum(out_share.max(), state_share.max())),
            wrong=tuple(wrong),
        )

    def _raw(self) -> torch.Tensor:
        return self.state.view(torch.uint8)

    def _decoded(self, slots: torch.Tensor) -> torch.Tensor:
        stored = self._raw()[slots].view(self.state.dtype).double()
        return stored if self.scale is None else stored * self.scale[slots].double()[..., None]

    def _relative_error(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Bound on the error of every term of h', relative to it: (batch, nheads, 1, 1)."""
        dt, bias, A = (inputs[k][..., 0].double() for k in ("dt", "dt_bias", "A"))
        v = dt + bias
        # exp(v) is off by 2|v| + 4 units of EPS (the argument times log2 e, ex2.approx), v itself
        # by |v|, and the rest of softplus by 8.
        step = 3 * v.abs() + 12
        growth = (A[..., 0] * torch.nn.functional.softplus(v)).abs()
        decay = growth * (step + 3) + 5
        return (torch.maximum(decay, step + 2) + 1)[..., None, None] * EPS

    def _unit(self, slots: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            return ulp(size, self.state.dtype)
        scale = self.scale[slots].double()[..., None]
        if self.config.state_dtype != "fp8_e4m3fn":
            return scale.expand_as(size)
        return ulp(size / scale, self.state.dtype) * scale

    def _scale_fault(
        self, slots: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor
    ) -> str | None:
        assert self.scale is not None
        largest = QMAX[self.state.dtype]
        found = self.scale[slots].double()
        expected = exact.abs().amax(-1) / largest
        # The peak is encoded 2^-21 below the largest code.
        if ((found - expected).abs() <= 2.0**-20 * expected + slack.amax(-1) / largest).all():
            return None
        return "a scale is not that of its row's largest element"
