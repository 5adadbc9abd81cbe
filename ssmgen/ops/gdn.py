"""gated_delta_rule_decode: the public op."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ArgumentValueError
from ..families.base import Layout
from ..families.gdn.contract import ABI_TENSORS, check_dtypes, layout, normalise
from ..families.gdn.packing import split_qkv
from ..reference.gdn import gated_delta_rule_decode as reference
from ..reference.tables import check_apart, read_tables
from .operation import Operation, require_tensor

__all__ = ["gated_delta_rule_decode", "split_qkv"]

Tensor = torch.Tensor


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
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    algorithm: str = "auto",
    pdl: bool = False,
) -> Tensor:
    """One or more decode steps of the gated delta net (Yang, Kautz and Hatamizadeh 2024, "Gated
    Delta Networks") or of KDA (Kimi Team 2025, "Kimi Linear").

    In fp32, per value head, with head ``hv // (HV / H)`` of q and k::

        q  = scale q / sqrt(sum(q^2) + 1e-6)      k = k / sqrt(sum(k^2) + 1e-6)
        g  = -exp(A_log) softplus(a + dt_bias)    beta = sigmoid(b)
        S' = exp(g) S
        S" = S' + beta (v - S' k) k^T
        o  = S" q

    ``state`` is updated in place (rounded; o comes from the unrounded S") and ``out`` is written
    and returned. The state stays in fp32 from the first token of a row to the last.

    Args:
        state: (slots, HV, V, K) fp32, bf16 or fp16; a head's matrix is packed, or is a packed
            (K, V) matrix transposed (``pool.transpose(-1, -2)``); strides of slots and heads are
            free. K and V are multiples of 8 up to 256.
        q, k: (batch, H, K) fp32, bf16 or fp16; or (batch, tokens, H, K); or (tokens, H, K) with
            ``cu_seqlens``. Every per-row argument has the same leading axes. H divides HV.
        v: (batch, HV, V), or with heads in groups (batch, H, HV / H, V); dtype of q. q, k and v may
            be views of one tensor (`split_qkv`).
        A_log: (HV,), any float dtype.
        a: (batch, HV), any float dtype; or (batch, HV, K), one decay per channel (KDA); heads also
            in groups.
        dt_bias: (HV,), or (HV, K) if a has channels; any float dtype; or None.
        b: (batch, HV), any float dtype; heads also in groups.
        g, beta: instead of A_log, a, dt_bias and b: the logarithm of the decay, as a, and beta.
        lower_bound: the decay is ``exp(lower_bound sigmoid(exp(A_log) (a + dt_bias)))``.
        scale: K^-1/2 if None.
        use_qk_l2norm: normalise q and k as above.
        out: (batch, HV, V), dtype of q; allocated if None.
        state_batch_indices: (batch,) or (batch, n) int32/int64, of which column 0 is used, or
            ``max(accepted - 1, 0)`` with ``num_accepted_tokens``; None: row i has slot i. Values
            that are not padding must be slots, each at most once.
        dst_state_batch_indices: where S" goes instead of the source slot; padding: nowhere.
            (batch,) or (batch, 1): after the last token; (batch, at least tokens): after each.
        pad_slot_id: a row of this slot, or of a negative one, touches no state; its output is zero,
            whatever its other tables say.
        disable_state_update: write no slot; the intermediate states are written all the same.
        intermediate_states_buffer: (entries, at least tokens, HV, V, K), dtype and inner strides of
            the state: takes the state after each token.
        intermediate_state_indices: (batch,) entries of the buffer; padding: nowhere; None: row i
            has entry i.
        cu_seqlens: (sequences + 1,): sequence i is the tokens ``cu_seqlens[i]`` to
            ``cu_seqlens[i + 1]`` of q, at most ``cache_steps`` of them, or none.
        cache_steps: the most tokens of a sequence of ``cu_seqlens``; otherwise 0, or at least the
            tokens of q.
        num_accepted_tokens: (batch,): which column of ``state_batch_indices`` a row starts from,
            also with one token a row.
        rand_seed: one int64 on the device: round stochastically (docs/random-bits.md).
        philox_rounds: rounds of the generator, 1 to 16.
        algorithm: auto or simple.
        pdl: launch with programmatic dependent launch: the state, the index tables, A_log and
            dt_bias are read before the kernel ahead of this one has finished.

    Returns:
        out.

    Raises:
        ArgumentValueError, ArgumentTypeError, ConfigError, DeviceError: before anything is
            written; the message names argument, what was found and what is allowed.

    A row whose tables cannot be followed (more than ``cache_steps`` tokens, more accepted than
    columns) has NaN in all its outputs and writes no state.
    """
    if out is None:
        require_tensor("q", q, needed=True)
        require_tensor("state", state, needed=True)
        out = q.new_empty((*q.shape[:-2], *state.shape[1:3]))
    tensors = (
        state, q, k, v, A_log, a, dt_bias, b, g, beta, out, state_batch_indices,
        dst_state_batch_indices, rand_seed, intermediate_states_buffer, intermediate_state_indices,
        cu_seqlens, num_accepted_tokens,
    )  # fmt: skip
    switches = (lower_bound, scale, use_qk_l2norm, pad_slot_id, disable_state_update,
                philox_rounds, algorithm, pdl, cache_steps)  # fmt: skip
    operation.apply(tensors, switches)
    return out


def _views(arguments: dict[str, Any]) -> dict[str, Any]:
    return normalise({n: arguments[n] for n in ABI_TENSORS if arguments[n] is not None})


def _reference(arguments: dict[str, Any], described: Layout) -> None:
    views = _views(arguments)
    config: Any = described.config
    seed = views.pop("rand_seed", None)
    switches = ("lower_bound", "scale", "use_qk_l2norm", "pad_slot_id", "disable_state_update",
                "cache_steps")  # fmt: skip
    reference(
        **views,
        **{name: arguments[name] for name in switches},
        rand_seed=seed if config.rounding == "stochastic" else None,
        philox_rounds=config.philox_rounds or 10,
    )


def _check_tables(arguments: dict[str, Any]) -> None:
    views = _views(arguments)
    tables = {n: views[n] for n in _TABLES if n in views}
    update = not arguments["disable_state_update"]
    if not update:
        tables.pop("dst_state_batch_indices", None)
    rows = read_tables(
        views["q"],
        len(views["state"]),
        arguments["pad_slot_id"],
        cache_steps=arguments["cache_steps"],
        entries_are_rows=True,
        strict_padding=False,
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
)


def _fake(tensors: dict[str, Tensor]) -> None:
    views = normalise(tensors)
    if views["out"].shape != (*views["q"].shape[:-2], *views["state"].shape[1:3]):
        raise ArgumentValueError("out: not of the leading axes of q and the (HV, V) of state")
    check_dtypes(views)


operation = Operation(
    "gated_delta_rule_decode(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor? A_log, "
    "Tensor? a, Tensor? dt_bias, Tensor? b, Tensor? g, Tensor? beta, Tensor(b!) out, "
    "Tensor? state_batch_indices, Tensor? dst_state_batch_indices, Tensor? rand_seed, "
    "Tensor(c!)? intermediate_states_buffer, Tensor? intermediate_state_indices, "
    "Tensor? cu_seqlens, Tensor? num_accepted_tokens, float? lower_bound, float? scale, "
    "bool use_qk_l2norm, SymInt pad_slot_id, bool disable_state_update, int philox_rounds, "
    "str algorithm, bool pdl, int cache_steps) -> ()",
    rows="q",
    aligned=("state", "q", "k", "intermediate_states_buffer"),
    layout=layout,
    reference=_reference,
    fake=_fake,
    check=_check_tables,
)
