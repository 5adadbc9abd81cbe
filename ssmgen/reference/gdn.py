"""The gated delta rule (decode) in plain PyTorch, token by token.

The recurrence is that of Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with
Delta Rule" (2024), equation 10; KDA has a decay for each channel of k (Kimi Team, "Kimi Linear",
2025). Slots, padding and random bits follow the contract that all implementations share.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentTypeError, ArgumentValueError
from .philox import random_bits
from .rounding import round_to
from .tables import read_tables

__all__ = ["delta_gates", "delta_step", "gated_delta_rule_decode"]

Tensor = torch.Tensor


def _sigmoid(v: Tensor) -> Tensor:
    # Not torch.sigmoid, whose bits on a CPU depend on where in the tensor an element lies.
    return 1 / (1 + torch.exp(-v))


def delta_gates(
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor | None,
    b: Tensor,
    *,
    lower_bound: float | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The logarithm of the decay and beta from what a layer projects.

    With v = a + dt_bias: ``g = -exp(A_log) softplus(v)``, softplus as ``max(v, 0) +
    log1p(exp(-|v|))``; with `lower_bound`: ``g = lower_bound sigmoid(exp(A_log) v)``. ``beta =
    sigmoid(b)``.

    Args:
        A_log: (HV,).
        a: (..., HV), or (..., HV, K) with one decay per channel.
        dt_bias: (HV,) or (HV, K), as a.
        b: (..., HV).
        compute_dtype: every argument is converted to this dtype before it is used.

    Returns:
        (g, beta) of the shapes of a and b, in `compute_dtype`.
    """
    rate = torch.exp(A_log.to(compute_dtype))
    if a.dim() > b.dim():
        rate = rate.unsqueeze(-1)
    v = a.to(compute_dtype)
    if dt_bias is not None:
        v = v + dt_bias.to(compute_dtype)
    if lower_bound is None:
        g = -rate * (v.clamp(min=0) + torch.log1p(torch.exp(-v.abs())))
    else:
        g = lower_bound * _sigmoid(rate * v)
    return g, _sigmoid(b.to(compute_dtype))


def delta_step(
    S: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The recurrence alone: no slots, no storage rounding, nothing written.

    q and k become ``x / sqrt(sum(x^2) + 1e-6)`` if `use_qk_l2norm`, and q is multiplied by
    `scale`. Then ``S' = exp(g) S``, ``S'' = S' + beta (v - S' k) k^T``, ``o = S'' q``. Value head
    i uses head ``i // (HV // H)`` of q and k.

    Args:
        S: (batch, HV, V, K).
        q, k: (batch, H, K).
        v: (batch, HV, V).
        g: (batch, HV) or (batch, HV, K), the logarithm of the decay.
        beta: (batch, HV).
        scale: K^-1/2 if None.
        compute_dtype: every argument is converted to this dtype before it is used.

    Returns:
        (o, S''): (batch, HV, V) and (batch, HV, V, K), both in `compute_dtype`.

    Raises:
        ArgumentValueError: HV is not a multiple of H.
    """
    value_heads, heads, k_dim = S.shape[1], q.shape[1], q.shape[2]
    if heads == 0 or value_heads % heads:
        raise ArgumentValueError(f"HV must be a multiple of H, found HV={value_heads}, H={heads}")

    def per_value_head(x: Tensor) -> Tensor:
        x = x.to(compute_dtype)
        if use_qk_l2norm:
            x = x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)
        return x.repeat_interleave(value_heads // heads, dim=1).unsqueeze(2)

    query = per_value_head(q) * (k_dim**-0.5 if scale is None else scale)
    key = per_value_head(k)
    decay = torch.exp(g.to(compute_dtype))
    S = S.to(compute_dtype) * (decay.unsqueeze(-2) if g.dim() == 3 else decay[..., None, None])
    delta = beta.to(compute_dtype).unsqueeze(-1) * (v.to(compute_dtype) - (S * key).sum(-1))
    S = S + delta.unsqueeze(-1) * key
    return (S * query).sum(-1), S


def gated_delta_rule_decode(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    A_log: Tensor | None = None,
    a: Tensor | None = None,
    dt_bias: Tensor | None = None,
    b: Tensor | None = None,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    out: Tensor | None = None,
    state_batch_indices: Tensor | None = None,
    dst_state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache_steps: int = 0,
    num_accepted_tokens: Tensor | None = None,
    rand_seed: int | Tensor | None = None,
    philox_rounds: int = 10,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`delta_gates` and `delta_step` on slots of a state pool, which is updated in place.

    A row whose source slot is `pad_slot_id` or negative is padding: it has zeros for output and
    touches no slot, whatever its other tables say. Such a destination or entry is not written. All
    sources are read before any destination is written; destinations of different rows must differ.

    Args:
        state: (slots, HV, V, K) in any strides; fp32, bf16 or fp16. The new state is converted to
            fp32 and then rounded as in `rounding`.
        q, k: (batch, H, K), (batch, tokens, H, K), or with `cu_seqlens` (tokens, H, K).
        v: (batch, HV, V); a, b, g, beta: (batch, HV), a and g also (batch, HV, K), all with the
            leading axes of q; or in groups (..., H, HV / H, ...). Either A_log, a and b, or g (the
            logarithm of the decay) and beta.
        A_log, dt_bias, lower_bound: as in `delta_gates`.
        out: (batch, HV, V), any float dtype; None makes one in the dtype of q.
        state_batch_indices: source slots, (batch,) or (batch, width) of which column 0 is used,
            or ``max(accepted - 1, 0)`` with `num_accepted_tokens`. None: row i uses slot i, and no
            source is padding.
        dst_state_batch_indices: slots to write: (batch,) or (batch, 1) after the last token,
            (batch, at least tokens) after each. None: the source slots, after the last token.
        disable_state_update: write no slot.
        intermediate_states_buffer: (entries, at least tokens, HV, V, K): takes the state after
            each token.
        intermediate_state_indices: (batch,) entries. None: row i has entry i.
        cu_seqlens: (batch + 1,): row i is the tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.
        cache_steps: the most tokens a row of `cu_seqlens` may have.
        num_accepted_tokens: (batch,), see `state_batch_indices`.
        rand_seed: int or one-element int64 tensor: stochastic rounding with `philox.random_bits`
            of what is written: slot or entry, head, row of V, column of K, and token. None: round
            to nearest.
        compute_dtype: dtype of all arithmetic before the state is rounded.

    Returns:
        `out`, computed from the state before it is rounded.

    Raises:
        ArgumentTypeError: the state is not fp32, bf16 or fp16.
        ArgumentValueError: a value of an index table is not allowed (`read_tables`); `rand_seed`
            with an fp32 state; `out` of another shape; HV not a multiple of H. Nothing has been
            written then.
    """
    if state.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ArgumentTypeError(f"state must be float32, bfloat16, float16, found {state.dtype}")
    if rand_seed is not None and state.dtype == torch.float32:
        raise ArgumentValueError("rand_seed needs a 16-bit state, found float32")
    lead, heads = q.shape[:-2], q.shape[-2]
    value_heads, v_dim, k_dim = state.shape[1:]
    if not heads or value_heads % heads:
        raise ArgumentValueError(f"HV must be a multiple of H, found HV={value_heads}, H={heads}")
    wanted = (*lead, value_heads, v_dim)
    if out is not None and tuple(out.shape) != wanted:
        raise ArgumentValueError(f"out must have shape {wanted}, found {tuple(out.shape)}")
    rows = read_tables(
        q,
        len(state),
        pad_slot_id,
        state_batch_indices=state_batch_indices,
        dst_state_batch_indices=None if disable_state_update else dst_state_batch_indices,
        intermediate_states_buffer=intermediate_states_buffer,
        intermediate_state_indices=intermediate_state_indices,
        cu_seqlens=cu_seqlens,
        cache_steps=cache_steps,
        num_accepted_tokens=num_accepted_tokens,
        entries_are_rows=True,
        strict_padding=False,
    )
    count = lead.numel()
    decay = a if g is None else g
    assert decay is not None
    # (H, HV / H) has as many axes as (HV, K), and is never equal to it: that would be K = 1.
    own = tuple(decay.shape[len(lead) :])
    channels = (k_dim,) if len(own) > 1 and own != (heads, value_heads // heads) else ()
    values = v.reshape(count, value_heads, v_dim)
    if g is None:
        assert A_log is not None
        assert a is not None
        assert b is not None
        a, b = a.reshape(count, value_heads, *channels), b.reshape(count, value_heads)
        g, beta = delta_gates(
            A_log, a, dt_bias, b, lower_bound=lower_bound, compute_dtype=compute_dtype
        )
    assert beta is not None
    g, beta = g.reshape(count, value_heads, *channels), beta.reshape(count, value_heads)
    inputs = (q.reshape(count, heads, k_dim), k.reshape(count, heads, k_dim), values, g, beta)

    ntokens = int(rows.length[rows.live].max()) if rows.live.any() else 0
    y = torch.zeros(count, value_heads, v_dim, dtype=compute_dtype, device=q.device)
    # The states of every row: S[0] before its tokens, S[t + 1] after token t.
    S = torch.zeros(
        ntokens + 1, len(rows.length), *state.shape[1:], dtype=compute_dtype, device=q.device
    )
    read = rows.live & (rows.length > 0)
    if ntokens:
        S[0, read] = state[rows.source[read]].to(compute_dtype)
    for token in range(ntokens):
        here = rows.at(token)
        at = rows.begin[here] + token
        o, S[token + 1, here] = delta_step(
            S[token, here], *(t[at] for t in inputs), scale=scale, use_qk_l2norm=use_qk_l2norm,
            compute_dtype=compute_dtype,
        )  # fmt: skip
        y[at] = torch.where(rows.live[here, None, None], o, 0)

    def save(pool: Tensor, row: Tensor, to: Tensor, token: int, buffer: bool) -> None:
        bits = None
        if rand_seed is not None:
            bits = random_bits(
                rand_seed, to, value_heads, v_dim, k_dim, philox_rounds, token, buffer
            )
        pool[to] = round_to(S[token + 1, row], pool.dtype, bits)

    for token in range(ntokens):
        if not disable_state_update:
            save(state, *rows.targets(token), token, False)
        if intermediate_states_buffer is not None:
            save(intermediate_states_buffer[:, token], *rows.entries(token), token, True)
    if out is None:
        return y.to(q.dtype).reshape(wanted)
    if cu_seqlens is None:
        return out.copy_(y.reshape(wanted))
    for begin, length in zip(rows.begin.tolist(), rows.length.tolist()):
        out[begin : begin + length] = y[begin : begin + length].to(out.dtype)
    return out
