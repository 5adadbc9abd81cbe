"""The index tables of a call: what they say, and whether they may.

A kernel does not see most of these errors, or shows them only as NaN (docs/semantics.md); this is
what the reference, and `SSMGEN_CHECK`, read before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ArgumentValueError

__all__ = ["Rows", "check_apart", "read_tables", "refuse_races"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Rows:
    """Each row of a batch: its tokens, where its state comes from, where states go.

    Token t of row i is row ``begin[i] + t`` of x with its leading axes flattened. A row that is
    not `live` starts from zero and writes nothing.
    """

    begin: Tensor
    length: Tensor
    source: Tensor
    live: Tensor
    parents: Tensor | None
    _target: Tensor
    _entry: Tensor | None
    _pad: int | None
    _entry_pad: int | None

    def at(self, token: int) -> Tensor:
        """The rows that have this token."""
        return (self.length > token).nonzero()[:, 0]

    def parent(self, token: int) -> Tensor:
        """The token before this one, -1 for the slot, for each row of `at`."""
        rows = self.at(token)
        if self.parents is None:
            return torch.full_like(rows, token - 1)
        return self.parents[rows, token]

    def targets(self, token: int) -> tuple[Tensor, Tensor]:
        """(rows, slots) that take the state after this token."""
        each = self._target.shape[1] > 1
        slots = self._target[:, token if each else 0]
        rows = self.length > token if each else self.length == token + 1
        return _written(rows & self.live, slots, self._pad)

    def entries(self, token: int) -> tuple[Tensor, Tensor]:
        """(rows, entries of the intermediate buffer) that take the state after this token."""
        assert self._entry is not None
        return _written((self.length > token) & self.live, self._entry, self._entry_pad)


def _written(rows: Tensor, slots: Tensor, pad: int | None) -> tuple[Tensor, Tensor]:
    chosen = (rows if pad is None else rows & (slots != pad)).nonzero()[:, 0]
    return chosen, slots[chosen]


def read_tables(
    x: Tensor,
    nslots: int,
    pad_slot_id: int,
    *,
    state_batch_indices: Tensor | None = None,
    dst_state_batch_indices: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache_steps: int = 0,
    num_accepted_tokens: Tensor | None = None,
    parent_tokens: Tensor | None = None,
    entries_are_rows: bool = False,
) -> Rows:
    """What the tables say of each row; arguments as in `selective_state_update`.

    `x` is any input with a row for each token. `entries_are_rows`: without
    `intermediate_state_indices`, row i has entry i of the buffer, not the one of its source slot.

    Raises `ArgumentValueError` for the first value that is outside of what it may be.
    """
    device = x.device
    if cu_seqlens is None:
        batch, ntokens = x.shape[0], x.shape[1] if x.dim() == 4 else 1
        begin = torch.arange(batch, device=device) * ntokens
        length = torch.full_like(begin, ntokens)
    else:
        batch, ntokens = len(cu_seqlens) - 1, cache_steps
        begin, length = _sequences(cu_seqlens.to(torch.int64), x.shape[0], cache_steps)
    some = length > 0

    live = torch.ones(batch, dtype=torch.bool, device=device)
    if state_batch_indices is None:
        source = torch.arange(batch, device=device)
    else:
        source = _source(state_batch_indices, num_accepted_tokens, some)
        live = source != pad_slot_id
    _check("state_batch_indices", "slot", source[live & some], nslots)

    target = source[:, None]
    if dst_state_batch_indices is not None:
        target = dst_state_batch_indices.to(torch.int64)
        target = target[:, None] if target.dim() == 1 else target[:, :ntokens]
    entry = torch.arange(batch, device=device) if entries_are_rows else source
    if intermediate_state_indices is not None:
        entry = intermediate_state_indices.to(torch.int64)
    rows = Rows(
        begin=begin,
        length=length,
        source=source,
        live=live,
        parents=None if parent_tokens is None else parent_tokens.to(torch.int64),
        _target=target,
        _entry=entry,
        _pad=None if dst_state_batch_indices is None else pad_slot_id,
        _entry_pad=None if intermediate_state_indices is None else pad_slot_id,
    )
    for token in range(int(length.max()) if batch else 0):
        if dst_state_batch_indices is not None:
            _check("dst_state_batch_indices", "slot", rows.targets(token)[1], nslots)
        if intermediate_states_buffer is not None:
            entries = len(intermediate_states_buffer)
            _check("intermediate_state_indices", "entry", rows.entries(token)[1], entries)
        if parent_tokens is not None:
            found = rows.parent(token)
            astray = found[(found < -1) | (found >= token)]
            if astray.numel():
                raise ArgumentValueError(
                    f"parent_tokens: found {int(astray[0])} for token {token}; allowed: -1 (the "
                    f"slot) to {token - 1}"
                )
    return rows


def check_apart(rows: Rows, nslots: int, nentries: int) -> None:
    """Raise `ArgumentValueError` if two rows, which run at once, write one slot or entry, or one
    reads the slot another writes. `nslots`, `nentries`: how many may be written, 0 for none.
    """
    tokens = range(int(rows.length.max()) if len(rows.length) else 0)
    if tokens and nslots:
        names = "state_batch_indices", "dst_state_batch_indices"
        reader = (rows.live & (rows.length > 0)).nonzero()[:, 0]
        written = [rows.targets(t) for t in tokens]
        refuse_races(names, nslots, (reader, rows.source[reader]), written, rows._pad is not None)
    if tokens and nentries:
        name = "state_batch_indices" if rows._entry_pad is None else "intermediate_state_indices"
        _writers(f"{name}: found entry", nentries, [rows.entries(t) for t in tokens])


def refuse_races(
    names: tuple[str, str],
    nslots: int,
    read: tuple[Tensor, Tensor],
    written: list[tuple[Tensor, Tensor]],
    has_dst: bool,
) -> None:
    """Raise `ArgumentValueError` if two rows write one slot or one reads the slot another writes,
    of (rows, slots) that are `read` and `written`; `names` are those of the tables of sources and
    destinations."""
    writer = _writers(f"{names[has_dst]}: found slot", nslots, written)
    reader, slots = read
    another = (writer[slots] >= 0) & (writer[slots] != reader)
    _refuse(f"{names[0]}: found slot", slots[another], "that another row writes")


def _writers(found: str, count: int, written: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The row that writes each of `count` places, -1 for none."""
    rows, places = (torch.cat(parts) for parts in zip(*written))
    writer = torch.full((count,), -1, device=rows.device)
    writer[places] = rows
    _refuse(found, places[writer[places] != rows], "that two rows write")
    return writer


def _refuse(found: str, shared: Tensor, how: str) -> None:
    if shared.numel():
        raise ArgumentValueError(
            f"{found} {int(shared[0])}, {how}; allowed: what a row writes belongs to it alone"
        )


def _sequences(cu_seqlens: Tensor, total: int, most: int) -> tuple[Tensor, Tensor]:
    begin, length = cu_seqlens[:-1], cu_seqlens.diff()
    outside = cu_seqlens[(cu_seqlens < 0) | (cu_seqlens > total)]
    if outside.numel():
        raise ArgumentValueError(
            f"cu_seqlens: found {int(outside[0])}; allowed: 0 to {total}, the tokens of x"
        )
    if (length < 0).any():
        at = int((length < 0).nonzero()[0])
        raise ArgumentValueError(
            f"cu_seqlens: found {cu_seqlens[at : at + 2].tolist()}; allowed: no decrease"
        )
    if (length > most).any():
        raise ArgumentValueError(
            f"cu_seqlens: found a sequence of {int(length.max())} tokens; allowed: cache_steps, "
            f"{most}"
        )
    return begin, length


def _source(table: Tensor, accepted: Tensor | None, some: Tensor) -> Tensor:
    table = table.to(torch.int64)
    if accepted is None:
        return table[:, 0] if table.dim() == 2 else table
    column = (accepted.to(torch.int64) - 1).clamp(min=0)
    beyond = column[some & (column >= table.shape[1])]
    if beyond.numel():
        raise ArgumentValueError(
            f"num_accepted_tokens: found {int(beyond[0]) + 1}; allowed: at most "
            f"{table.shape[1]}, the columns of state_batch_indices"
        )
    column = column.clamp(max=table.shape[1] - 1)
    return table.gather(1, column[:, None])[:, 0]


def _check(name: str, what: str, found: Tensor, count: int) -> None:
    outside = found[(found < 0) | (found >= count)]
    if outside.numel():
        where = "a pool" if what == "slot" else "a buffer"
        plural = "slots" if what == "slot" else "entries"
        raise ArgumentValueError(
            f"{name}: {what} {int(outside[0])} lies outside {where} of {count} {plural}"
        )
