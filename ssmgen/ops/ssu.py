"""selective_state_update: the public op."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ArgumentValueError, UnsupportedError
from ..families.base import Layout
from ..families.ssu.contract import ABI_TENSORS, check_dtypes, check_out, layout, normalise
from ..reference.ssu import selective_state_update as reference
from ..reference.tables import check_apart, read_tables
from .operation import Operation, require_tensor

__all__ = ["selective_state_update"]

Tensor = torch.Tensor


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    intermediate_state_scales: Tensor | None = None,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    cache_steps: int = 0,
    algorithm: str = "auto",
    dst_state_batch_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    backend: str = "auto",
    *,
    pdl: bool = False,
    parent_tokens: Tensor | None = None,
    precision: str = "fast",
) -> Tensor:
    """One or more decode steps of Mamba2 (Dao and Gu 2024, "Transformers are SSMs") or Mamba1.

    In fp32, per head::

        dt' = softplus(dt + dt_bias)          softplus only if dt_softplus
        h'  = exp(A dt') h + dt' B x
        y   = <h', C> + D x                   times silu(z) if z is given

    ``state`` is updated in place (rounded; y comes from the unrounded h') and ``out`` is written
    and returned. Same signature as FlashInfer 0.7's function of that name, plus ``pdl``,
    ``parent_tokens`` and ``precision``. The state stays in fp32 from the first token of a row to
    the last.

    Args:
        state: (slots, nheads, dim, dstate) fp32, bf16, fp16, int16, int8 or float8_e4m3fn; slot
            pitch is free, the rest packed. dim and dstate are multiples of 8 up to 512. Headless
            (Mamba1) layouts drop nheads here and in every argument; dim is then unlimited.
        x: (batch, nheads, dim) fp32, bf16 or fp16; or (batch, tokens, nheads, dim); or (tokens,
            nheads, dim) with ``cu_seqlens``. Every per-row argument has the same leading axes.
        dt: (batch, nheads, dim), any float dtype.
        A: (nheads, dim, dstate). A, dt, D and dt_bias expanded from one value per head (stride 0)
            take the Mamba2 kernel, otherwise the Mamba1 one.
        B, C: (batch, ngroups, dstate), dtype of x; ngroups divides nheads.
        D, dt_bias: (nheads, dim), of one dtype, or None.
        z: (batch, nheads, dim), dtype of x, or None.
        state_batch_indices: (batch,) or (batch, n) int32/int64, of which column 0 is used, or
            ``max(accepted - 1, 0)`` with ``num_accepted_tokens``; None: row i has slot i. Values
            that are not padding must be slots, each at most once.
        pad_slot_id: a row of this slot, or of a negative one, is padding: it touches no state; its
            output is that of a zero state.
        dst_state_batch_indices: where h' goes instead of the source slot; padding: nowhere.
            (batch,) or (batch, 1): after the last token; (batch, at least tokens): after each.
        state_scale: (slots, nheads, dim) or (..., 1) fp32 decode scales of an integer or fp8 state.
        out: like x, and may be x or z itself, but not x with ``parent_tokens``; allocated if None.
        disable_state_update: write no state; the intermediate states are written all the same.
        intermediate_states_buffer: (entries, at least tokens, nheads, dim, dstate), dtype of the
            state: takes the state after each token, besides what is written to ``state``.
        intermediate_state_indices: (batch,) entries of the buffer; padding: nowhere; None: the
            source slots.
        intermediate_state_scales: (entries, at least tokens, nheads, dim) fp32, with block-scaled
            states.
        cu_seqlens: (sequences + 1,): sequence i is the tokens ``cu_seqlens[i]`` to
            ``cu_seqlens[i + 1]`` of x, at most ``cache_steps`` of them, or none.
        cache_steps: the most tokens of a sequence of ``cu_seqlens``; otherwise 0, or at least the
            tokens of x.
        num_accepted_tokens: (batch,): which column of ``state_batch_indices`` a row starts from.
        parent_tokens: (batch, tokens): the earlier token of its row that each token follows, -1:
            the slot; None: the one before it.
        rand_seed: one int64 on the device: round stochastically (docs/random-bits.md).
        philox_rounds: rounds of the generator, 1 to 16.
        algorithm: auto, simple, vertical, horizontal or matrix (several tokens; docs/semantics.md
            says which calls it serves).
        pdl: launch with programmatic dependent launch: the state, the index tables are read before
            the kernel ahead of this one has finished (docs/semantics.md).
        precision: exact: the bits of one token after the other, for an fp32 state; fast: the sums
            may have another order, where that is faster.

    Returns:
        out, of the shape of x.

    Raises:
        ArgumentValueError, ArgumentTypeError, ConfigError, DeviceError: before anything is
            written; the message names argument, what was found and what is allowed.
        UnsupportedError: for another ``backend``.

    A sequence whose tables cannot be followed (more than ``cache_steps`` tokens, a parent that is
    no earlier token) has NaN in all its outputs and writes no state (docs/semantics.md).
    """
    if backend != "auto":
        raise UnsupportedError(f"backend: {backend!r}; allowed: 'auto'")
    if out is None:
        require_tensor("x", x, needed=True)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    elif out is x:
        check_out(out, x, parent_tokens)
    tensors = (
        state, state_scale, x, dt, A, B, C, D, z, dt_bias, out, state_batch_indices,
        dst_state_batch_indices, rand_seed, intermediate_states_buffer, intermediate_state_indices,
        intermediate_state_scales, cu_seqlens, num_accepted_tokens, parent_tokens,
    )  # fmt: skip
    switches = (dt_softplus, pad_slot_id, disable_state_update, philox_rounds, algorithm, pdl,
                cache_steps, precision)  # fmt: skip
    operation.apply(tensors, switches)
    return out


def _views(arguments: dict[str, Any]) -> dict[str, Any]:
    return normalise({n: arguments[n] for n in ABI_TENSORS if arguments[n] is not None})


def _reference(arguments: dict[str, Any], described: Layout) -> None:
    views = _views(arguments)
    config: Any = described.config
    seed = views.pop("rand_seed", None)
    reference(
        **views,
        dt_softplus=arguments["dt_softplus"],
        pad_slot_id=arguments["pad_slot_id"],
        disable_state_update=arguments["disable_state_update"],
        rand_seed=seed if config.rounding == "stochastic" else None,
        philox_rounds=config.philox_rounds or 10,
        cache_steps=arguments["cache_steps"],
    )


def _check_tables(arguments: dict[str, Any]) -> None:
    views, update = _views(arguments), not arguments["disable_state_update"]
    tables = {n: views[n] for n in _TABLES if n in views}
    if not update:
        tables.pop("dst_state_batch_indices", None)
    rows = read_tables(
        views["x"],
        len(views["state"]),
        arguments["pad_slot_id"],
        cache_steps=arguments["cache_steps"],
        **tables,
    )
    buffer = tables.get("intermediate_states_buffer", ())
    check_apart(rows, len(views["state"]) if update else 0, len(buffer))


_TABLES = (
    "state_batch_indices",
    "dst_state_batch_indices",
    "intermediate_states_buffer",
    "intermediate_state_indices",
    "cu_seqlens",
    "num_accepted_tokens",
    "parent_tokens",
)


def _fake(tensors: dict[str, Tensor]) -> None:
    views = normalise(tensors)
    if views["x"].shape != views["out"].shape:
        raise ArgumentValueError("out: not of the shape of x")
    check_dtypes(views)


operation = Operation(
    "selective_state_update(Tensor(a!) state, Tensor(b!)? state_scale, Tensor x, Tensor dt, "
    "Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor(c!) out, "
    "Tensor? state_batch_indices, Tensor? dst_state_batch_indices, Tensor? rand_seed, "
    "Tensor(d!)? intermediate_states_buffer, Tensor? intermediate_state_indices, "
    "Tensor(e!)? intermediate_state_scales, Tensor? cu_seqlens, Tensor? num_accepted_tokens, "
    "Tensor? parent_tokens, bool dt_softplus, SymInt pad_slot_id, bool disable_state_update, "
    "int philox_rounds, str algorithm, bool pdl, int cache_steps, str precision) -> ()",
    rows="x",
    aligned=("state", "x", "A", "B", "C", "intermediate_states_buffer"),
    layout=layout,
    reference=_reference,
    fake=_fake,
    check=_check_tables,
)
