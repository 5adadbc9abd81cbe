"""Tolerances that FlashInfer and flash-linear-attention publish in their tests of the gated delta
rule, for results of the op and of the adapters on any device, against fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gdn_calls import GdnCall

from ssmgen.adapters import fla
from ssmgen.reference import delta_gates, delta_step

# (atol, rtol) by dtype of the state: of the tests of FlashInfer 0.7 for one token and for several
# (tests/gdn/test_decode_delta_rule.py) the strictest. The reference there rounds a bf16 state after
# each token; here it is rounded once, so one bound holds for any number of tokens.
FLASHINFER = {
    "fp32": {"out": (1e-3, 5e-3), "state": (1e-3, 1e-3)},
    "bf16": {"out": (1e-3, 5e-3), "state": (0.016, 5e-3)},
}
# Root mean square of the error over that of the result, of o and of the final state: fla-core 0.6,
# test_fused_recurrent in tests/ops/test_gated_delta.py and in tests/ops/test_kda.py.
FLA = {"gated_delta_rule": 0.002, "kda": 0.005}


def assert_within_flashinfer(call: GdnCall, run: Callable[[GdnCall], GdnCall], state: str) -> None:
    """Of a call (batch, tokens, ...) whose row i has slot i."""
    after = run(call)
    S = call["state"].double()
    g, beta = delta_gates(*(call[n].double() for n in ("A_log", "a", "dt_bias", "b")),
                          compute_dtype=torch.float64)  # fmt: skip
    (atol, rtol), (state_atol, state_rtol) = FLASHINFER[state]["out"], FLASHINFER[state]["state"]
    for t in range(call["q"].shape[1]):
        inputs = [call[n][:, t].double() for n in ("q", "k", "v")]
        o, S = delta_step(S, *inputs, g[:, t], beta[:, t], compute_dtype=torch.float64)
        torch.testing.assert_close(after["out"][:, t].double(), o, atol=atol, rtol=rtol)
    torch.testing.assert_close(after["state"].double(), S, atol=state_atol, rtol=state_rtol)


def assert_within_fla(
    rule: str, device: str, dtype: torch.dtype, K: int, V: int, tokens: int, l2norm: bool,
    normalizer: float = 1.0,
) -> None:  # fmt: skip
    """Of fla's function of this name on its test's inputs: two sequences, 2 heads and 4."""
    B, H, HV = 2, 2, 4
    gen = torch.Generator(device).manual_seed(42)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen, device=device)

    kda = rule == "kda"
    q, k, v = randn(B, tokens, H, K), randn(B, tokens, H, K), randn(B, tokens, HV, V).to(dtype)
    if not l2norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    q, k = q.to(dtype), k.to(dtype)
    g = torch.nn.functional.logsigmoid(randn(B, tokens, HV, *((K,) if kda else ()))) / normalizer
    beta = randn(B, tokens, HV).sigmoid().to(dtype)
    h0 = randn(B, HV, K, V)
    function = fla.fused_recurrent_kda if kda else fla.fused_recurrent_gated_delta_rule
    options: dict[str, Any] = {"scale": 1.0, "initial_state": h0.clone(),
                               "use_qk_l2norm_in_kernel": l2norm}  # fmt: skip
    out, final = function(q, k, v, g=g, beta=beta, output_final_state=True, **options)
    assert final is not None
    S, o = h0.double().mT, []
    for t in range(tokens):
        inputs = [x[:, t].double() for x in (q, k, v, g, beta)]
        step, S = delta_step(S, *inputs, scale=1.0, use_qk_l2norm=l2norm,
                             compute_dtype=torch.float64)  # fmt: skip
        o.append(step)
    for found, wanted in ((out, torch.stack(o, 1)), (final, S.mT)):
        error = (found.double() - wanted).square().mean().sqrt()
        assert error <= FLA[rule] * wanted.square().mean().sqrt(), rule
