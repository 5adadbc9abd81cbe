"""causal_conv1d_update and causal_conv1d_fn: the public ops."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..errors import ArgumentTypeError, ArgumentValueError, DeviceError
from ..families.base import Layout
from ..families.conv1d.contract import ABI_TENSORS, ALIGNABLE, check_dtypes, layout, normalise
from ..reference import conv1d as reference
from ..reference.tables import refuse_races
from .operation import Operation, require_tensor

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]

Tensor = torch.Tensor


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    conv_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    pad_slot_id: int = -1,
    out: Tensor | None = None,
    *,
    alignment: str | None = None,
    cache_seqlens: Tensor | None = None,
    dst_state_indices: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """The next tokens of every row, convolved with the inputs before them: the decode step.

    In fp32, per channel, with v the last ``width - 1`` inputs of the row's past and then x::

        y_t = bias + sum_k weight[k] v[t + k]        times 1 / (1 + exp(-y_t)) with silu

    ``conv_state``, a pool of windows of past inputs, is updated in place; ``out`` is written and
    returned. T tokens in one call have the bits of T calls. docs/conv1d.md defines where in a slot
    the past lies, and what differs from vLLM's and Dao-AILab's functions of this name.

    Args:
        x: (batch, dim), (batch, dim, tokens), or (tokens, dim) with ``query_start_loc``; fp32,
            bf16 or fp16.
        conv_state: (slots, dim, state_len), state_len at least width - 1; dtype of x, or fp32. All
            strides are free; channels side by side, ``conv_state.stride(1) == 1``, are fastest.
        weight: (dim, width), width 2 to 6. bias: (dim,), dtype of weight, or None.
        activation: None, silu or swish (the same).
        conv_state_indices: (batch,) or (batch, n) int32/int64, of which column 0 is used; None:
            row i has slot i. Values that are not padding must be slots, each at most once.
        num_accepted_tokens: (batch,), n: the past is columns n - 1 to n + width - 3, and the
            window written is the last width - 2 inputs of it and every token, from column 0. At
            most ``state_len - width + 2``, and a row has at most so many tokens.
        query_start_loc: (batch + 1,): row i is the tokens ``query_start_loc[i]`` to
            ``query_start_loc[i + 1]`` of x; none, unless that is more, and it touches nothing.
        pad_slot_id: a row of this slot, or of a negative one, touches no slot; its past is zeros.
        out: of the shape of x; allocated, with channels side by side, if None. It may be x where
            every row has one token and no ``query_start_loc`` says so; otherwise it shares no
            memory with x, which is checked when a layout is first seen.
        alignment: left (columns 0 to width - 2 are the past: vLLM), right (the last width - 1 are,
            and all move: Dao-AILab, transformers) or circular (with ``cache_seqlens``). Required
            if state_len is more than width - 1.
        cache_seqlens: (batch,), inputs before x: token t goes to column ``(cache_seqlens + t) %
            state_len``.
        dst_state_indices: (batch,): slots to write instead; padding: none.
        pdl: launch with programmatic dependent launch: all but x may be read before the kernel
            ahead of this one has finished (docs/conv1d.md).

    Returns:
        out, of the shape of x.

    Raises:
        ArgumentValueError, ArgumentTypeError, ConfigError, DeviceError: before anything is
            written; the message names argument, what was found and what is allowed.

    A row whose tables cannot be followed (outside of x, too many tokens or accepted ones, a
    negative ``cache_seqlens``) has NaN in all its outputs and writes no state.
    """
    require_tensor("x", x, needed=True)
    if out is None:
        out = _like(x) if x.dim() == 3 else torch.empty_like(x, memory_format=_CONTIGUOUS)
    elif out is x and (query_start_loc is not None or (x.dim() == 3 and x.shape[2] > 1)):
        _refuse_in_place()
    update.apply(
        (
            x, conv_state, weight, bias, out, conv_state_indices, dst_state_indices,
            query_start_loc, num_accepted_tokens, cache_seqlens,
        ),
        (activation, alignment, pad_slot_id, pdl),
    )  # fmt: skip
    return out


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    conv_states: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    activation: str | None = None,
    pad_slot_id: int = -1,
    *,
    initial_states: Tensor | None = None,
    dst_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    alignment: str | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Whole sequences, convolved causally: prefill, by the formula of `causal_conv1d_update`.

    Sequences are cut into chunks that run in parallel; nothing is read back to the host.

    Args:
        x: (dim, tokens) with ``query_start_loc``, or (batch, dim, tokens). Channels side by side
            (``x.stride(-2) == 1``) are fastest.
        conv_states: (slots, dim, state_len): takes the window after each sequence, updated in
            place; None: no window is kept.
        query_start_loc: (sequences + 1,), as in `causal_conv1d_update`.
        cache_indices: (sequences,), the slot of each; as conv_state_indices there.
        has_initial_state: (sequences,) bool: whether the past of a sequence is in its slot. None:
            no sequence has a past, but for ``initial_states``.
        initial_states: (sequences, dim, width - 1): the past of each sequence, only read.
        num_accepted_tokens: (sequences,), with ``has_initial_state``, n: the past in a slot is
            columns n - 1 to n + width - 3, as an update that verified drafts left it. The window
            written begins at column 0, so that n is 1 after it.
        alignment: left or right, where ``conv_states`` have more than width - 1 columns.
        out: of the shape of x, sharing no memory with it; allocated if None.

    The other arguments, the result and the errors are those of `causal_conv1d_update`.
    """
    require_tensor("x", x, needed=True)
    if out is None:
        out = _like(x)
    elif out is x:
        _refuse_in_place()
    prefill.apply(
        (
            x, conv_states, initial_states, weight, bias, out, cache_indices, dst_state_indices,
            has_initial_state, query_start_loc, num_accepted_tokens,
        ),
        (activation, alignment, pad_slot_id, pdl),
    )  # fmt: skip
    return out


_CONTIGUOUS = torch.contiguous_format


def _like(x: Tensor) -> Tensor:
    """Of the shape of x, with its channels, the last axis but one, side by side."""
    last = x.transpose(-1, -2)
    return torch.empty_like(last, memory_format=_CONTIGUOUS).transpose(-1, -2)


def _refuse_in_place() -> None:
    raise ArgumentValueError(
        "out: found x itself; allowed: memory of its own: a token is read for those after it"
    )


def _views(arguments: dict[str, Any], prefill: bool) -> dict[str, Any]:
    given = {n: arguments[n] for n in ABI_TENSORS if arguments.get(n) is not None}
    return normalise(given, prefill=prefill)


_SLOTS = ("conv_state_indices", "dst_state_indices")
_TABLES = ("conv_state_indices", "dst_state_indices", "num_accepted_tokens", "cache_seqlens",
           "query_start_loc")  # fmt: skip


def _check_tables(arguments: dict[str, Any], prefill: bool) -> None:
    views = _views(arguments, prefill)
    rows = reference.read_rows(
        views["x"],
        views.get("conv_state"),
        views["weight"].shape[1],
        arguments["pad_slot_id"],
        alignment=arguments["alignment"],
        whole=prefill,
        **{n: views[n] for n in _TABLES if n in views},
    )
    if "conv_state" not in views:
        return
    read = rows.live & (rows.length > 0)
    if prefill:
        # Only a sequence that goes on reads its slot.
        continued = views.get("has_initial_state")
        read &= False if continued is None or "initial_states" in views else continued
    names = [_NAMES_IN_PREFILL.get(n, n) if prefill else n for n in _SLOTS]
    refuse_races(
        (names[0], names[1]),
        len(views["conv_state"]),
        (read.nonzero()[:, 0], rows.slot[read]),
        [(rows.kept.nonzero()[:, 0], rows.target[rows.kept])],
        "dst_state_indices" in views,
    )


def _update_on_cpu(arguments: dict[str, Any], described: Layout) -> None:
    reference.causal_conv1d_update(**{n: v for n, v in arguments.items() if n != "pdl"})


# What causal_conv1d_fn calls the tensors of the contract.
_NAMES_IN_PREFILL = {"conv_state": "conv_states", "conv_state_indices": "cache_indices"}


def _prefill_layout(**arguments: Any) -> Layout:
    try:
        return layout(prefill=True, **arguments)
    except (ArgumentValueError, ArgumentTypeError, DeviceError) as error:
        name, _, rest = str(error).partition(":")
        raise type(error)(f"{_NAMES_IN_PREFILL.get(name, name)}:{rest}") from None


def _prefill_on_cpu(arguments: dict[str, Any], described: Layout) -> None:
    named = {_NAMES_IN_PREFILL.get(n, n): v for n, v in arguments.items() if n != "pdl"}
    reference.causal_conv1d_fn(**named)


def _fake(tensors: dict[str, Tensor], prefill: bool) -> None:
    views = normalise(tensors, prefill=prefill)
    if views["x"].shape != views["out"].shape:
        raise ArgumentValueError("out: not of the shape of x")
    check_dtypes(views)


_SWITCHES = "str? activation, str? alignment, SymInt pad_slot_id, bool pdl) -> ()"

update = Operation(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, "
    "Tensor(b!) out, Tensor? conv_state_indices, Tensor? dst_state_indices, "
    "Tensor? query_start_loc, Tensor? num_accepted_tokens, Tensor? cache_seqlens, " + _SWITCHES,
    rows="x",
    aligned=tuple(name for name in ALIGNABLE if name != "initial_states"),
    layout=functools.partial(layout, prefill=False),
    reference=_update_on_cpu,
    fake=functools.partial(_fake, prefill=False),
    check=functools.partial(_check_tables, prefill=False),
)

prefill = Operation(
    "causal_conv1d_fn(Tensor x, Tensor(a!)? conv_state, Tensor? initial_states, Tensor weight, "
    "Tensor? bias, Tensor(b!) out, Tensor? conv_state_indices, Tensor? dst_state_indices, "
    "Tensor? has_initial_state, Tensor? query_start_loc, Tensor? num_accepted_tokens, " + _SWITCHES,
    rows="x",
    aligned=ALIGNABLE,
    layout=_prefill_layout,
    reference=_prefill_on_cpu,
    fake=functools.partial(_fake, prefill=True),
    check=functools.partial(_check_tables, prefill=True),
)
