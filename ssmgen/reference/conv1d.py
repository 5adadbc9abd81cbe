"""The causal depthwise convolution ahead of a state-space layer, in plain PyTorch.

With v the inputs of a row after the last ``width - 1`` inputs of its past, every channel has
``y_t = activation(bias + sum_k weight[k] v[t + k])``: Dao-AILab's causal-conv1d, whose *window* of
past inputs lies in a slot of a pool. Where in the slot it lies is the *alignment*
(docs/conv1d.md). A window holds inputs, unchanged; only y is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ArgumentValueError
from .tables import named, sequences, within

__all__ = ["causal_conv1d", "causal_conv1d_fn", "causal_conv1d_update", "read_rows"]

Tensor = torch.Tensor


def causal_conv1d(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The formula alone: no pool, no rounding, nothing written.

    Args:
        v: (..., dim, width - 1 + tokens): the past, then the tokens.
        weight: (dim, width). bias: (dim,) or None.
        activation: None, silu or swish: ``u / (1 + exp(-u))``.
        compute_dtype: every argument is converted to it before it is used.

    Returns:
        (..., dim, tokens) in `compute_dtype`.
    """
    width = weight.shape[1]
    tokens = v.shape[-1] - width + 1
    v, weight = v.to(compute_dtype), weight.to(compute_dtype)
    y = torch.zeros_like(v[..., :tokens])
    if bias is not None:
        y = y + bias.to(compute_dtype)[:, None]
    for k in range(width):
        y = y + weight[:, k, None] * v[..., k : k + tokens]
    # Not torch.sigmoid, whose bits on a CPU depend on where in the tensor an element lies.
    return y if activation is None else y / (1 + torch.exp(-y))


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    conv_state_indices: Tensor | None = None,
    dst_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    alignment: str | None = None,
    pad_slot_id: int = -1,
    out: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`causal_conv1d` for the next tokens of every row, whose window in `conv_state` moves on.

    A row whose slot is `pad_slot_id` or negative is padding: it has a past of zeros and touches no
    slot, whatever its other tables say. All windows are read before any is written.

    Args:
        x: (batch, dim), (batch, dim, tokens), or (tokens, dim) with `query_start_loc`.
        conv_state: (slots, dim, state_len); written in place.
        conv_state_indices: (batch,), or (batch, n) of which column 0 is used. None: row i has
            slot i, and none is padding.
        dst_state_indices: (batch,) slots to write; padding: none. None: the slot read.
        num_accepted_tokens: (batch,), n: the past is columns n - 1 to n + width - 3 (n = 0 counts
            as 1), and the window written, from column 0, the last width - 2 inputs of the past
            and every token.
        cache_seqlens: (batch,), with the circular alignment: token t goes to column
            ``(cache_seqlens + t) % state_len``, and the past lies before them.
        query_start_loc: (batch + 1,): row i is the tokens ``query_start_loc[i]`` to
            ``query_start_loc[i + 1]`` of x, or none, and then touches nothing.
        alignment: left (or None): columns 0 to width - 2 are the past; right: the last ones, and
            all columns move; circular.
        out: of the shape of x; None makes one in the dtype of x.

    Returns:
        `out`. What belongs to no row of `query_start_loc` is left as it was.

    Raises:
        ArgumentValueError: a value of a table is not allowed (`read_rows`). Nothing has been
            written then.
    """
    rows = read_rows(
        x if x.dim() == 2 else x.transpose(1, 2),
        conv_state,
        weight.shape[1],
        pad_slot_id,
        conv_state_indices=conv_state_indices,
        dst_state_indices=dst_state_indices,
        num_accepted_tokens=num_accepted_tokens,
        cache_seqlens=cache_seqlens,
        query_start_loc=query_start_loc,
        alignment=alignment,
    )
    flat = x if x.dim() == 2 else x.transpose(1, 2).flatten(0, 1)
    y = _convolve(flat, weight, bias, activation, rows, conv_state, conv_state, compute_dtype)
    return _give(y, x, out, None if query_start_loc is None else rows, x.dim() == 3)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    conv_states: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    activation: str | None = None,
    *,
    num_accepted_tokens: Tensor | None = None,
    initial_states: Tensor | None = None,
    dst_state_indices: Tensor | None = None,
    alignment: str | None = None,
    pad_slot_id: int = -1,
    out: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`causal_conv1d` of whole sequences.

    Args:
        x: (dim, tokens) with `query_start_loc`, or (batch, dim, tokens).
        conv_states: (slots, dim, state_len): takes the window after each sequence; None: none is
            kept.
        has_initial_state: (batch,) bool: whether the past of a sequence is in its slot; None: no
            sequence has a past, but for `initial_states`.
        num_accepted_tokens: (batch,), n: the past in a slot is columns n - 1 to n + width - 3. The
            window written begins at column 0.
        initial_states: (batch, dim, width - 1): the past of each sequence; columns of a window
            that are older than that become zero.

    The others are as in `causal_conv1d_update`, with cache_indices for conv_state_indices.
    """
    width = weight.shape[1]
    rows = read_rows(
        x.transpose(-1, -2),
        conv_states,
        width,
        pad_slot_id,
        conv_state_indices=cache_indices,
        dst_state_indices=dst_state_indices,
        num_accepted_tokens=num_accepted_tokens,
        query_start_loc=query_start_loc,
        alignment=alignment,
        whole=True,
    )
    flat = x.transpose(-1, -2)
    flat = flat if flat.dim() == 2 else flat.flatten(0, 1)
    past: Tensor | None = None
    if initial_states is not None:
        depth = rows.columns.shape[1]
        past = initial_states.new_zeros(len(rows.length), x.shape[-2], depth)
        past[:, :, depth - width + 1 :] = initial_states
        source = torch.arange(len(past), device=x.device)
    elif conv_states is not None and has_initial_state is not None:
        past, source = conv_states, rows.slot
    if past is not None:
        rows.slot = torch.where(rows.live, source, 0)
        rows.continued = rows.live if has_initial_state is None else rows.live & has_initial_state
    y = _convolve(flat, weight, bias, activation, rows, past, conv_states, compute_dtype)
    return _give(y, x, out, None if query_start_loc is None else rows, True)


@dataclass
class Rows:
    """What the tables say of each row. Token t of row i is row ``begin[i] + t`` of x with its
    leading axes flattened; `columns` is where a row's past lies in its slot, and `target` the slot
    that its window goes to, if it is `kept`. `start` is the first column written, or None where
    the window moves; `modulus` is that of a circular one. `appends`: every token is kept.
    """

    begin: Tensor
    length: Tensor
    slot: Tensor
    live: Tensor
    continued: Tensor
    columns: Tensor
    target: Tensor
    kept: Tensor
    start: Tensor | None
    modulus: int | None
    appends: bool


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    rows: Rows,
    past: Tensor | None,
    pool: Tensor | None,
    compute_dtype: torch.dtype,
) -> Tensor:
    """y of every token of `rows`, and `pool` after them."""
    width, depth = weight.shape[1], rows.columns.shape[1]
    kind = (x if pool is None else pool).dtype if past is None else past.dtype
    y = torch.zeros(x.shape, dtype=compute_dtype, device=x.device)
    writes = []
    for tokens in sorted(set(rows.length.tolist()) - {0}):
        group = (rows.length == tokens).nonzero()[:, 0]
        at = rows.begin[group, None] + torch.arange(tokens, device=x.device)
        v = torch.zeros(len(group), x.shape[1], depth + tokens, dtype=kind, device=x.device)
        v[:, :, depth:] = x[at].transpose(1, 2).to(kind)
        if past is not None:
            read = rows.continued[group]
            chosen = group[read]
            found = past[rows.slot[chosen, None], :, rows.columns[chosen]]
            v[read, :, :depth] = found.transpose(1, 2)
        taken = v[:, :, depth - width + 1 :]
        y[at] = causal_conv1d(
            taken, weight, bias, activation, compute_dtype=compute_dtype
        ).transpose(1, 2)
        if pool is not None:
            writes.append((group, tokens, v))
    for group, tokens, v in writes:
        assert pool is not None
        if rows.start is None:
            count = width - 2 + tokens if rows.appends else depth
            columns = torch.arange(count, device=x.device).expand(len(group), -1)
        else:
            assert rows.modulus is not None
            count = min(tokens, rows.modulus)
            last = torch.arange(tokens - count, tokens, device=x.device)
            columns = (rows.start[group, None] + last) % rows.modulus
        kept = rows.kept[group]
        where = rows.target[group][kept, None]
        values = v[kept, :, v.shape[2] - count :].transpose(1, 2)
        pool[where, :, columns[kept]] = values.to(pool.dtype)
    return y


def _give(
    y: Tensor, x: Tensor, out: Tensor | None, rows: Rows | None, channels_first: bool
) -> Tensor:
    """`y` in `out`, only the tokens of `rows` if they are given."""
    if out is None:
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    view = out.transpose(-1, -2) if channels_first else out
    if rows is None:
        view.copy_(y.view(view.shape))
    else:
        for begin, length in zip(rows.begin.tolist(), rows.length.tolist()):
            view[begin : begin + length] = y[begin : begin + length].to(out.dtype)
    return out


def read_rows(
    x: Tensor,
    conv_state: Tensor | None,
    width: int,
    pad_slot_id: int,
    *,
    conv_state_indices: Tensor | None = None,
    dst_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    alignment: str | None = None,
    whole: bool = False,
) -> Rows:
    """What the tables say of each row of x: (batch, dim), (batch, tokens, dim), or (tokens, dim)
    with `query_start_loc`; `whole`: as `causal_conv1d_fn` takes them. What `SSMGEN_CHECK` reads
    before a launch.

    Raises `ArgumentValueError` for the first value outside of what it may be.
    """
    device = x.device
    batch = x.shape[0] if query_start_loc is None else len(query_start_loc) - 1
    slot = torch.arange(batch, device=device)
    live = torch.ones(batch, dtype=torch.bool, device=device)
    if conv_state_indices is not None:
        slot = _column(conv_state_indices)
        live = named(slot, pad_slot_id)
    if query_start_loc is None:
        tokens = x.shape[1] if x.dim() == 3 else 1
        begin = torch.arange(batch, device=device) * tokens
        length = torch.full_like(begin, tokens)
    else:
        begin, length = sequences("query_start_loc", query_start_loc, x.shape[0], ~live)
    some = length > 0
    target, kept = slot, live & some
    if dst_state_indices is not None:
        target = _column(dst_state_indices)
        kept = kept & named(target, pad_slot_id)
    state_len = width - 1 if conv_state is None else conv_state.shape[2]
    if conv_state is not None:
        within("conv_state_indices", "slot", slot[live & some], len(conv_state))
        within("dst_state_indices", "slot", target[kept], len(conv_state))
    columns = torch.arange(state_len if alignment == "right" else width - 1, device=device)
    columns = columns.expand(batch, -1)
    start = None
    if num_accepted_tokens is not None:
        accepted = num_accepted_tokens.to(torch.int64).clamp(min=1)
        most = state_len - width + 2
        # A whole sequence leaves only its last inputs.
        bounded = {"num_accepted_tokens": accepted} | ({} if whole else {"query_start_loc": length})
        for name, found in bounded.items():
            over = found[(found > most) & live & some]
            if over.numel():
                what = "" if found is accepted else "a row of "
                raise ArgumentValueError(
                    f"{name}: found {what}{int(over[0])}; allowed: at most {most}, state_len - "
                    f"width + 2, with num_accepted_tokens"
                )
        columns = columns + torch.where(live, accepted - 1, 0)[:, None]
    elif cache_seqlens is not None:
        start = cache_seqlens.to(torch.int64)
        below = start[(start < 0) & live & some]
        if below.numel():
            raise ArgumentValueError(
                f"cache_seqlens: found {int(below[0])}; allowed: no negative number"
            )
        columns = (start[:, None] - (width - 1) + columns) % state_len
    return Rows(
        begin=begin,
        length=length,
        slot=slot,
        live=live,
        continued=live,
        columns=columns,
        target=target,
        kept=kept,
        start=start,
        modulus=None if start is None else state_len,
        appends=num_accepted_tokens is not None and not whole,
    )


def _column(table: Tensor) -> Tensor:
    table = table.to(torch.int64)
    return table[:, 0] if table.dim() == 2 else table
