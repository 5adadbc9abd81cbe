"""One token of the selective state update (Mamba2 decode), in plain PyTorch.

The recurrence is the discretised state-space step of Dao and Gu, "Transformers are SSMs" (2024):
``h' = exp(A dt) h + dt B x``, ``y = C h' + D x``, gated by ``z * sigmoid(z)``. Slots, padding,
block scales and random bits follow the contract that all implementations share.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentTypeError, ArgumentValueError
from .philox import random_bits
from .rounding import QMAX, dequantise, quantise, round_to

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
    rand_seed: int | torch.Tensor | None = None,
    philox_rounds: int = 10,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`ssu_step` on slots of a state pool, which is updated in place.

    A row whose source slot equals `pad_slot_id` starts from a zero state, touches no slot, and
    still gives its output. A destination slot equal to `pad_slot_id` is not written. All sources
    are read before any destination is written; destinations must differ from one another.

    Args:
        state: (slots, nheads, dim, dstate); fp32, bf16, fp16, or block-scaled int16, int8, fp8
            e4m3. The new state is converted to fp32 and then rounded as in `rounding`.
        x, dt, z: (batch, nheads, dim).
        A: (nheads, dim, dstate).
        B, C: (batch, ngroups, dstate).
        D, dt_bias: (nheads, dim).
        state_batch_indices: source slots, (batch,) or (batch, width) of which column 0 is used;
            int32 or int64. None: row i uses slot i, and no source is padding.
        dst_state_batch_indices: slots to write, same forms. None: the source slots.
        state_scale: (slots, nheads, dim) fp32, updated with the written slots; block-scaled
            states need it and no other may have it.
        out: (batch, nheads, dim), any float dtype; None makes one in the dtype of x.
        disable_state_update: write neither state nor scale.
        rand_seed: int or one-element int64 tensor: stochastic rounding with
            `philox.random_bits` of the written slots. None: round to nearest.
        philox_rounds: at least 1; used with `rand_seed` only.
        compute_dtype: dtype of all arithmetic before the state is rounded.

    Returns:
        `out`, computed from the state before it is rounded.

    Raises:
        ArgumentTypeError: the state has another dtype.
        ArgumentValueError: a slot lies outside the pool; `state_scale` missing or not wanted;
            `rand_seed` with an fp32 state; `out` of another shape; nheads not a multiple of
            ngroups. Nothing has been written then.
    """
    _check_storage(state, state_scale, rand_seed)
    if out is not None and out.shape != x.shape:
        raise ArgumentValueError(
            f"out must have the shape of x {tuple(x.shape)}, found {tuple(out.shape)}"
        )
    nslots, nheads, dim, dstate = state.shape
    batch = x.shape[0]
    every_row = torch.ones(batch, dtype=torch.bool, device=state.device)

    if state_batch_indices is None:
        source = torch.arange(batch, device=state.device)
        read = every_row
    else:
        source = _column(state_batch_indices)
        read = source != pad_slot_id
    if dst_state_batch_indices is None:
        target, written = source, read
    else:
        target = _column(dst_state_batch_indices)
        written = read & (target != pad_slot_id)
    _check_slots("state_batch_indices", source[read], nslots)

    h = torch.zeros(batch, nheads, dim, dstate, dtype=compute_dtype, device=state.device)
    h[read] = _load(state, state_scale, source[read], compute_dtype)
    y, h_new = ssu_step(
        h, x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus, compute_dtype=compute_dtype
    )
    if not disable_state_update:
        slots = target[written]
        _check_slots("dst_state_batch_indices", slots, nslots)
        bits = None
        if rand_seed is not None:
            bits = random_bits(rand_seed, slots, nheads, dim, dstate, philox_rounds)
        _save(state, state_scale, slots, h_new[written], bits)
    if out is None:
        return y.to(x.dtype)
    return out.copy_(y)


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


def _check_slots(name: str, slots: torch.Tensor, nslots: int) -> None:
    outside = slots[(slots < 0) | (slots >= nslots)]
    if outside.numel():
        raise ArgumentValueError(
            f"{name}: slot {int(outside[0])} lies outside a pool of {nslots} slots"
        )


def _column(table: torch.Tensor) -> torch.Tensor:
    return (table[:, 0] if table.dim() == 2 else table).to(torch.int64)


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
