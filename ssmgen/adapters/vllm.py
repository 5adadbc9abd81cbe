"""vLLM 0.33's packed gated delta net decode, on `ssmgen.gated_delta_rule_decode`.

Where it differs from vLLM's: docs/gated-delta-net.md.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentValueError
from ..ops.gdn import gated_delta_rule_decode, split_qkv

__all__ = ["fused_recurrent_gated_delta_rule_packed_decode"]

Tensor = torch.Tensor


def fused_recurrent_gated_delta_rule_packed_decode(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    scale: float,
    initial_state: Tensor,
    out: Tensor,
    ssm_state_indices: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    num_accepted_tokens: Tensor | None = None,
    null_block_id: int = 0,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token a row, on q | k | v as the convolution leaves them.

    Args:
        mixed_qkv: (B, 2 H K + HV V), any row stride; H is what its width leaves.
        a, b: (B, HV); A_log, dt_bias: (HV,).
        initial_state: (slots, HV, V, K), updated in place.
        out: (B, 1, HV, V), dtype of mixed_qkv.
        ssm_state_indices: (B,); `null_block_id`: zero output, nothing touched. With
            `num_accepted_tokens` (B,): (B, n), the slots of the last step, of which a row reads
            column ``max(accepted - 1, 0)``, and writes column 0.

    Returns:
        (out, initial_state).

    Raises:
        ArgumentValueError: a width that no H explains, or one slot a row with
            `num_accepted_tokens`; and what `gated_delta_rule_decode` raises.
    """
    value_heads, v_dim, k_dim = initial_state.shape[1:]
    heads, rest = divmod(mixed_qkv.shape[-1] - value_heads * v_dim, 2 * k_dim)
    if mixed_qkv.dim() != 2 or heads < 1 or rest:
        raise ArgumentValueError(
            f"mixed_qkv: found shape {tuple(mixed_qkv.shape)}; allowed: (batch, 2 H {k_dim} + "
            f"{value_heads * v_dim})"
        )
    if num_accepted_tokens is not None and ssm_state_indices.dim() != 2:
        raise ArgumentValueError(
            f"ssm_state_indices: found shape {tuple(ssm_state_indices.shape)}; allowed: (batch, "
            "slots of the last step) with num_accepted_tokens"
        )
    q, k, v = split_qkv(mixed_qkv, heads, value_heads, k_dim, v_dim)
    gated_delta_rule_decode(
        initial_state,
        q,
        k,
        v,
        A_log,
        a,
        dt_bias,
        b,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm_in_kernel,
        out=out[:, 0],
        state_batch_indices=ssm_state_indices,
        dst_state_batch_indices=None if num_accepted_tokens is None else ssm_state_indices[:, 0],
        num_accepted_tokens=num_accepted_tokens,
        pad_slot_id=null_block_id,
        pdl=pdl,
    )
    return out, initial_state
