"""The selective state update (Mamba2 decode) in plain PyTorch, token by token.

The recurrence is the discretised state-space step of Dao and Gu, "Transformers are SSMs" (2024):
``h' = exp(A dt) h + dt B x``, ``y = C h' + D x``, gated by ``z * sigmoid(z)``. Slots, padding,
block scales and random bits follow the contract that all implementations share.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentTypeError, ArgumentValueError
from .philox import random_bits
from .rounding import QMAX, dequantise, quantise, round_to
from .tables import read_tables

__all__ = ["selective_state_update", "ssu_step"]

_FLOAT_STATES = (torch.float32, torch.bfloat16, torch.float16)


def ssu_step(
    h: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    dt_softplus: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence alone: no slots, no storage rounding, nothing written.

    With dt' = dt + dt_bias (softplus of it as ``max(v, 0) + log1p(exp(-|v|))`` if `dt_softplus`):
    ``h' = exp(A dt') h + (dt' x) B``, ``y = sum(h' C) + D x``, times ``z sigmoid(z)`` if z is
    given. Head i uses group ``i // (nheads // ngroups)`` of B and C.

    Args:
        h: (batch, nheads, dim, dstate).
        x, dt, z: (batch, nheads, dim).
        A: (nheads, dim, dstate).
        B, C: (batch, ngroups, dstate).
        D, dt_bias: (nheads, dim).
        compute_dtype: every argument is converted to this dtype before it is used.

    Returns:
        (y, h'): (batch, nheads, dim) and (batch, nheads, dim, dstate), both in `compute_dtype`.

    Raises:
        ArgumentValueError: nheads is not a multiple of ngroups.
    """
    nheads, ngroups = h.shape[1], B.shape[1]
    if ngroups == 0 or nheads % ngroups:
        raise ArgumentValueError(
            f"nheads must be a multiple of ngroups, found nheads={nheads}, ngroups={ngroups}"
        )

    def per_head(t: torch.Tensor) -> torch.Tensor:
        return t.to(compute_dtype).repeat_interleave(nheads // ngroups, dim=1).unsqueeze(2)

    step = dt.to(compute_dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(compute_dtype)
    if dt_softplus:
        step = step.clamp(min=0) + torch.log1p(torch.exp(-step.abs()))
    inputs = x.to(compute_dtype)
    # Mamba2 expands one A per head with stride 0: one exponential per row is enough.
    rate = A[..., :1] if A.stride(-1) == 0 else A
    decay = torch.exp(rate.to(compute_dtype) * step.unsqueeze(-1))
    h_new = decay * h.to(compute_dtype) + (step * inputs).unsqueeze(-1) * per_head(B)
    y = (h_new * per_head(C)).sum(-1)
    if D is not None:
        y = y + D.to(compute_dtype) * inputs
    if z is not None:
        gate = z.to(compute_dtype)
        # Not torch.sigmoid, whose bits on a CPU depend on where in the tensor an element lies.
        y = y * (gate / (1 + torch.exp(-gate)))
    return y, h_new


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    dst_state_batch_indices: torch.Tensor | None = None,
    pad_slot_id: int = -1,
    state_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    intermediate_state_scales: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cache_steps: int = 0,
    num_accepted_tokens: torch.Tensor | None = None,
    parent_tokens: torch.Tensor | None = None,
    rand_seed: int | torch.Tensor | None = None,
    philox_rounds: int = 10,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`ssu_step` on slots of a state pool, which is updated in place.

    A row whose source slot is `pad_slot_id` or negative starts from a zero state, touches no slot,
    and still gives its output. Such a destination or entry is not written. All sources are read
    before any destination is written; destinations of different rows must differ.

    Args:
        state: (slots, nheads, dim, dstate); fp32, bf16, fp16, or block-scaled int16, int8, fp8
            e4m3. The new state is converted to fp32 and then rounded as in `rounding`.
        x, dt, z: (batch, nheads, dim), (batch, tokens, nheads, dim), or with `cu_seqlens` (tokens,
            nheads, dim).
        A: (nheads, dim, dstate).
        B, C: (batch, ngroups, dstate), with the leading axes of x.
        D, dt_bias: (nheads, dim).
        state_batch_indices: source slots, (batch,) or (batch, width) of which column 0 is used,
            or ``max(accepted - 1, 0)`` with `num_accepted_tokens`; int32 or int64. None: row i
            uses slot i, and no source is padding.
        dst_state_batch_indices: slots to write: (batch,) or (batch, 1) after the last token,
            (batch, at least tokens) after each. None: the source slots, after the last token.
        state_scale: (slots, nheads, dim) fp32, updated with the written slots; block-scaled
            states need it and no other may have it.
        out: of the shape of x, any float dtype; None makes one in the dtype of x.
        disable_state_update: write neither state nor scale.
        intermediate_states_buffer: (entries, at least tokens, nheads, dim, dstate): takes the
            state after each token.
        intermediate_state_indices: (batch,) entries. None: the source slots.
        intermediate_state_scales: (entries, at least tokens, nheads, dim), for scaled states.
        cu_seqlens: (batch + 1,): row i is the tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]`` of
            x. A row without tokens touches nothing.
        cache_steps: the most tokens a row of `cu_seqlens` may have.
        num_accepted_tokens: (batch,), see `state_batch_indices`.
        parent_tokens: (batch, tokens): which token of the row each one follows, an earlier one;
            -1: the slot. None: each follows the one before.
        rand_seed: int or one-element int64 tensor: stochastic rounding with `philox.random_bits`
            of what is written: slot or entry, and token. None: round to nearest.
        philox_rounds: at least 1; used with `rand_seed` only.
        compute_dtype: dtype of all arithmetic before the state is rounded.

    Returns:
        `out`, computed from the state before it is rounded. What belongs to no row of `cu_seqlens`
        is left as it was.

    Raises:
        ArgumentTypeError: the state has another dtype.
        ArgumentValueError: a value of an index table is not allowed (`read_tables`); `state_scale`
            missing or not wanted; `rand_seed` with an fp32 state; `out` of another shape; nheads
            not a multiple of ngroups. Nothing has been written then.
    """
    _check_storage(state, state_scale, rand_seed)
    if out is not None and out.shape != x.shape:
        raise ArgumentValueError(
            f"out must have the shape of x {tuple(x.shape)}, found {tuple(out.shape)}"
        )
    rows = read_tables(
        x,
        len(state),
        pad_slot_id,
        state_batch_indices=state_batch_indices,
        dst_state_batch_indices=None if disable_state_update else dst_state_batch_indices,
        intermediate_states_buffer=intermediate_states_buffer,
        intermediate_state_indices=intermediate_state_indices,
        cu_seqlens=cu_seqlens,
        cache_steps=cache_steps,
        num_accepted_tokens=num_accepted_tokens,
        parent_tokens=parent_tokens,
    )
    batch = len(rows.length)
    ntokens = int(rows.length.max()) if batch else 0
    inputs = [None if t is None else t.flatten(0, t.dim() - 3) for t in (x, dt, B, C, z)]
    y = torch.zeros(x.shape, dtype=compute_dtype, device=x.device)
    # The states of every row: h[0] before its tokens, h[t + 1] after token t.
    h = torch.zeros(ntokens + 1, batch, *state.shape[1:], dtype=compute_dtype, device=x.device)
    read = rows.live & (rows.length > 0)
    if ntokens:
        h[0, read] = _load(state, state_scale, rows.source[read], compute_dtype)
    for token in range(ntokens):
        here = rows.at(token)
        at = rows.begin[here] + token
        x_, dt_, B_, C_, z_ = (None if t is None else t[at] for t in inputs)
        y.flatten(0, y.dim() - 3)[at], h[token + 1, here] = ssu_step(
            h[rows.parent(token) + 1, here], x_, dt_, A, B_, C_, D, z_, dt_bias,  # type: ignore[arg-type]
            dt_softplus=dt_softplus, compute_dtype=compute_dtype,
        )  # fmt: skip

    def save(pool: torch.Tensor, scale: torch.Tensor | None, row: torch.Tensor, to: torch.Tensor,
             token: int, buffer: bool) -> None:  # fmt: skip
        bits = None
        if rand_seed is not None:
            nheads, dim, dstate = state.shape[1:]
            bits = random_bits(rand_seed, to, nheads, dim, dstate, philox_rounds, token, buffer)
        _save(pool, scale, to, h[token + 1, row], bits)

    for token in range(ntokens):
        if not disable_state_update:
            save(state, state_scale, *rows.targets(token), token, False)
        if intermediate_states_buffer is not None:
            scales = intermediate_state_scales
            save(
                intermediate_states_buffer[:, token],
                None if scales is None else scales[:, token],
                *rows.entries(token),
                token,
                True,
            )
    if out is None:
        return y.to(x.dtype)
    if cu_seqlens is None:
        return out.copy_(y)
    for begin, length in zip(rows.begin.tolist(), rows.length.tolist()):
        out[begin : begin + length] = y[begin : begin + length].to(out.dtype)
    return out


def _check_storage(
    state: torch.Tensor,
    state_scale: torch.Tensor | None,
    rand_seed: int | torch.Tensor | None,
) -> None:
    scaled = state.dtype in QMAX
    if not scaled and state.dtype not in _FLOAT_STATES:
        raise ArgumentTypeError(
            "state must be float32, bfloat16, float16, int16, int8 or float8_e4m3fn, "
            f"found {state.dtype}"
        )
    if scaled and state_scale is None:
        raise ArgumentValueError(f"a {state.dtype} state needs state_scale")
    if not scaled and state_scale is not None:
        raise ArgumentValueError(f"a {state.dtype} state takes no state_scale")
    if rand_seed is not None and state.dtype == torch.float32:
        raise ArgumentValueError("rand_seed needs a 16- or 8-bit state, found float32")


def _indexable(state: torch.Tensor) -> torch.Tensor:
    """The same memory in a dtype that every torch device can index."""
    return state.view(torch.uint8) if state.dtype == torch.float8_e4m3fn else state


def _load(
    state: torch.Tensor, state_scale: torch.Tensor | None, slots: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    stored = _indexable(state)[slots].view(state.dtype)
    if state_scale is None:
        return stored.to(dtype)
    return dequantise(stored, state_scale[slots], dtype)


def _save(
    state: torch.Tensor,
    state_scale: torch.Tensor | None,
    slots: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor | None,
) -> None:
    if state_scale is None:
        state[slots] = round_to(values, state.dtype, bits)
        return
    codes, scale = quantise(values, state.dtype, bits)
    _indexable(state)[slots] = _indexable(codes)
    state_scale[slots] = scale
