"""FlashInfer 0.7's gated delta net functions, on `ssmgen.gated_delta_rule_decode`.

Where they differ from FlashInfer's: docs/gated-delta-net.md.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentValueError, UnsupportedError
from ..ops.gdn import gated_delta_rule_decode as decode

__all__ = [
    "gated_delta_rule_decode",
    "gated_delta_rule_decode_pretranspose",
    "gated_delta_rule_mtp",
]

Tensor = torch.Tensor


def gated_delta_rule_decode_pretranspose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    initial_state: Tensor | None = None,
    initial_state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    disable_state_update: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Decode on states (B, HV, V, K), or on a pool of them by indices.

    Args:
        q, k: (B, T, H, K); v: (B, T, HV, V); a, b: (B, T, HV); A_log, dt_bias: (HV,).
        state: (B, HV, V, K), updated in place; None with `initial_state`.
        output: (B, T, HV, V), dtype of q.
        initial_state: (slots, HV, V, K), updated in place.
        initial_state_indices: (B,) slots of `initial_state`; -1: zero output, nothing touched.
        output_state_indices: (B,) slots written instead; -1: none.
        intermediate_states_buffer: (at least B, at least T, HV, V, K), by row of the batch.
        backend: auto.

    Returns:
        (output, the state or the pool).

    Raises:
        ArgumentValueError: both or none of `state` and a pool with indices; UnsupportedError:
            another `backend`; and what `gated_delta_rule_decode` raises.
    """
    if backend != "auto":
        raise UnsupportedError(f"backend: {backend!r}; allowed: 'auto'")
    if (initial_state is None) != (initial_state_indices is None):
        raise ArgumentValueError("initial_state: allowed: together with initial_state_indices")
    if (state is None) == (initial_state is None):
        raise ArgumentValueError("state: allowed: either state or initial_state")
    if output_state_indices is not None and initial_state is None:
        raise ArgumentValueError("output_state_indices: allowed: with initial_state")
    pool = state if initial_state is None else initial_state
    assert pool is not None
    out = decode(
        pool,
        q,
        k,
        v,
        A_log,
        a,
        dt_bias,
        b,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        out=output,
        state_batch_indices=initial_state_indices,
        dst_state_batch_indices=_as(output_state_indices, initial_state_indices),
        intermediate_states_buffer=intermediate_states_buffer,
        disable_state_update=disable_state_update,
    )
    return out, pool


def gated_delta_rule_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """Decode on states (B, HV, K, V), updated in place; the rest as in
    `gated_delta_rule_decode_pretranspose`."""
    out = decode(
        state.transpose(-1, -2),
        q,
        k,
        v,
        A_log,
        a,
        dt_bias,
        b,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        out=output,
    )
    return out, state


def gated_delta_rule_mtp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    disable_state_update: bool | None = None,
    use_qk_l2norm: bool = True,
    output_state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode of several tokens a row on a pool (slots, HV, V, K).

    Args:
        ssm_state_indices: (B, T) slots that take the state after each token, instead of the one
            after the last; -1: none.
        disable_state_update: write no slot. None: as FlashInfer 0.7 has it, True; but False with
            `ssm_state_indices`.
        The rest as in `gated_delta_rule_decode_pretranspose`.

    Returns:
        (output, initial_state).

    Raises:
        UnsupportedError: `ssm_state_indices` together with `output_state_indices`; and what
            `gated_delta_rule_decode` raises.
    """
    if ssm_state_indices is not None and output_state_indices is not None:
        raise UnsupportedError(
            "output_state_indices: given with ssm_state_indices; allowed: one of the two"
        )
    if disable_state_update is None:
        disable_state_update = ssm_state_indices is None
    targets = output_state_indices if ssm_state_indices is None else ssm_state_indices
    out = decode(
        initial_state,
        q,
        k,
        v,
        A_log,
        a,
        dt_bias,
        b,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        out=output,
        state_batch_indices=initial_state_indices,
        dst_state_batch_indices=_as(targets, initial_state_indices),
        intermediate_states_buffer=intermediate_states_buffer,
        disable_state_update=disable_state_update,
    )
    return out, initial_state


def _as(table: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The table in the dtype of another: kernels have one for both."""
    return table if table is None or other is None else table.to(other.dtype)
