"""flash-linear-attention's recurrent gated delta rule and KDA, on `ssmgen.gated_delta_rule_decode`.

Signatures of fla-core 0.6, without autograd. Where they differ from fla's:
docs/gated-delta-net.md.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ArgumentValueError, UnsupportedError
from ..ops.gdn import gated_delta_rule_decode
from ..reference.gdn import delta_gates

__all__ = ["fused_recurrent_gated_delta_rule", "fused_recurrent_kda"]

Tensor = torch.Tensor


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    inplace_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule, token by token.

    Args:
        q, k: (B, T, H, K), or with `cu_seqlens` (1, tokens, H, K).
        v: (B, T, HV, V).
        g: (B, T, HV) logarithm of the decay; None: no decay. With `use_gate_in_kernel` what it
            comes from, ``-exp(A_log) softplus(g + dt_bias)``.
        gk: (B, T, HV, K) logarithm of a decay per channel, added to g.
        beta: (B, T, HV), or its logits with `use_beta_sigmoid_in_kernel` (twice the sigmoid with
            `allow_neg_eigval`); None: 1.
        initial_state: (N, HV, K, V), (N, HV, V, K) with `state_v_first`; None: zeros.
        cu_seqlens: (N + 1,).
        inplace_final_state: update `initial_state` and return it, where fla makes a new tensor.

    Returns:
        (o, final_state): (B, T, HV, V), and the layout of `initial_state` in fp32 (in its own
        dtype if in place), or None unless `output_final_state`.

    Raises:
        UnsupportedError: `gv`, a beta per channel; ArgumentValueError: arguments that exclude
            another; and what `ssmgen.gated_delta_rule_decode` raises.
    """
    if gv is not None:
        raise UnsupportedError("gv: given; allowed: None")
    if gk is not None and use_gate_in_kernel:
        raise UnsupportedError("gk: given with use_gate_in_kernel; allowed: None")
    if not use_gate_in_kernel:
        A_log = dt_bias = None
        if g is None and gk is None:
            g = v.new_zeros(v.shape[:-1], dtype=torch.float32)
        elif gk is not None:
            g = gk if g is None else gk.float() + g.float().unsqueeze(-1)
    if g is None or (use_gate_in_kernel and A_log is None):
        raise ArgumentValueError("use_gate_in_kernel: allowed: with g and A_log")
    return _recurrent(
        q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, None, state_v_first,
        cu_seqlens, inplace_final_state,
    )  # fmt: skip


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    inplace_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention, token by token: g is (B, T, HV, K).

    With `use_gate_in_kernel` the decay is ``exp(-exp(A_log) softplus(g + dt_bias))``, or with
    `lower_bound` ``exp(lower_bound sigmoid(exp(A_log) (g + dt_bias)))``, where A_log may be None
    for zeros. dt_bias is (HV K,), (HV, K) or (HV,). The rest as in
    `fused_recurrent_gated_delta_rule`.
    """
    if not use_gate_in_kernel:
        A_log = dt_bias = lower_bound = None
    elif A_log is None:
        if lower_bound is None:
            raise ArgumentValueError("A_log: allowed: a tensor, or None with lower_bound")
        A_log = v.new_zeros(v.shape[2], dtype=torch.float32)
    if dt_bias is not None:
        dt_bias = dt_bias.reshape(v.shape[2], -1).expand(v.shape[2], k.shape[-1])
    return _recurrent(
        q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound,
        state_v_first, cu_seqlens, inplace_final_state,
    )  # fmt: skip


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, A_log: Tensor | None,
    dt_bias: Tensor | None, scale: float | None, initial_state: Tensor | None,
    output_final_state: bool, l2norm: bool, sigmoid: bool, negative: bool,
    lower_bound: float | None, state_v_first: bool, cu_seqlens: Tensor | None, inplace: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if negative and not sigmoid:
        raise ArgumentValueError("allow_neg_eigval: allowed: with use_beta_sigmoid_in_kernel")
    if inplace and initial_state is None:
        raise ArgumentValueError("inplace_final_state: allowed: with initial_state")
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ArgumentValueError(f"q: found batch {q.shape[0]}; allowed: 1 with cu_seqlens")
    if beta is None:
        beta = v.new_ones(v.shape[:-1])
        if sigmoid:
            raise ArgumentValueError("use_beta_sigmoid_in_kernel: allowed: with beta")
    elif beta.dim() == v.dim():
        raise UnsupportedError(f"beta: found shape {tuple(beta.shape)}; allowed: one a head")

    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = (v.shape[-1], k.shape[-1]) if state_v_first else (k.shape[-1], v.shape[-1])
    state = initial_state
    if state is None:
        state = v.new_zeros((sequences, v.shape[2], *last), dtype=torch.float32)
    elif tuple(state.shape) != (sequences, v.shape[2], *last):
        raise ArgumentValueError(
            f"initial_state: found shape {tuple(state.shape)}; allowed: "
            f"{(sequences, v.shape[2], *last)}"
        )
    elif output_final_state and not inplace:
        state = state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    elif not inplace:
        state = state.contiguous()  # only read
    gates: dict[str, Any]
    if A_log is not None and sigmoid and not negative:
        gates = {"A_log": A_log, "a": g, "dt_bias": dt_bias, "b": beta}
    else:
        # One of the two is ready, or beta is doubled: the other is computed ahead of the kernel.
        if A_log is not None:
            g, _ = delta_gates(A_log, g, dt_bias, beta, lower_bound=lower_bound)
            lower_bound = None
        if sigmoid:
            beta = beta.float().sigmoid() * (2 if negative else 1)
        gates = {"g": g, "beta": beta}

    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
    batch, tokens = q.shape[:2]
    if cu_seqlens is None and tokens > 1:
        # As sequences: a kernel has the tokens of a dense call as a constant.
        cu_seqlens = torch.arange(0, batch * tokens + 1, tokens, device=q.device)
    if cu_seqlens is not None:
        inputs = [x.flatten(0, 1) for x in inputs]
        gates |= {n: gates[n].flatten(0, 1) for n in gates.keys() & {"a", "b", "g", "beta"}}
    out = gated_delta_rule_decode(
        state if state_v_first else state.transpose(-1, -2),
        *inputs,
        **gates,
        lower_bound=lower_bound,
        scale=scale,
        use_qk_l2norm=l2norm,
        disable_state_update=not (output_final_state or inplace),
        cu_seqlens=cu_seqlens,
        # A power of two, so that few kernels serve all lengths.
        cache_steps=0 if cu_seqlens is None else 1 << max(0, tokens - 1).bit_length(),
    )
    if cu_seqlens is not None:
        out = out.unflatten(0, (batch, tokens))
    return out, state if output_final_state else None
