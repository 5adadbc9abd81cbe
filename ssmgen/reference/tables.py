"""The index tables of a call: what they say, and whether they may.

A kernel does not see most of these errors, or shows them only as NaN (docs/semantics.md); this is
what the reference, and `SSMGEN_CHECK`, read before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ArgumentValueError

__all__ = ["Rows", "check_apart", "named", "read_tables", "refuse_races", "sequences", "within"]

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
    chosen = (rows if pad is None else rows & named(slots, pad)).nonzero()[:, 0]
    return chosen, slots[chosen]


def named(slots: Tensor, pad: int) -> Tensor:
    """Where a table names a slot: neither `pad` nor a negative number."""
    return (slots >= 0) & (slots != pad)


def sequences(
    name: str, ends: Tensor, total: int, padded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """First token and length of each sequence of the table `name`: sequence i ends at
    ``ends[i + 1]`` and is empty unless that is beyond ``ends[i]``.

    Raises `ArgumentValueError` for one that is not within the `total` tokens of x, unless it is
    `padded`, and for tokens of two sequences.
    """
    ends = ends.to(torch.int64)
    begin, end = ends[:-1], ends[1:]
    followed = end > begin if padded is None else (end > begin) & ~padded
    outside = torch.stack([begin, end], 1)[followed].flatten()
    outside = outside[(outside < 0) | (outside > total)]
    if outside.numel():
        raise ArgumentValueError(
            f"{name}: found {int(outside[0])}; allowed: 0 to {total}, the tokens of x"
        )
    begin, end = begin.clamp(0, total), end.clamp(0, total)
    first, order = begin[end > begin].sort()
    last = end[end > begin][order]
    if (first[1:] < last[:-1]).any():
        at = int(first[1:][first[1:] < last[:-1]][0])
        raise ArgumentValueError(
            f"{name}: found token {at} in two sequences; allowed: sequences that share none"
        )
    return begin, (end - begin).clamp(min=0)


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
    strict_padding: bool = True,
) -> Rows:
    """What the tables say of each row; arguments as in `selective_state_update`.

    `x` is any input with a row for each token. `entries_are_rows`: without
    `intermediate_state_indices`, row i has entry i of the buffer, not the one of its source slot.
    `strict_padding`: a padded row must have a length and a count that can be followed, too.

    Raises `ArgumentValueError` for the first value that is outside of what it may be.
    """
    device = x.device
    batch = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    table = torch.arange(batch, device=device)
    if state_batch_indices is not None:
        table = state_batch_indices.to(torch.int64)
    table = table[:, None] if table.dim() == 1 else table
    column = torch.zeros(batch, dtype=torch.int64, device=device)
    if num_accepted_tokens is not None:
        column = (num_accepted_tokens.to(torch.int64) - 1).clamp(min=0)
    source = table.gather(1, column.clamp(max=table.shape[1] - 1)[:, None])[:, 0]
    everyone = torch.ones(batch, dtype=torch.bool, device=device)
    live = everyone if state_batch_indices is None else named(source, pad_slot_id)
    judged = everyone if strict_padding else live

    if cu_seqlens is None:
        ntokens = x.shape[1] if x.dim() == 4 else 1
        begin = torch.arange(batch, device=device) * ntokens
        length = torch.full_like(begin, ntokens)
    else:
        ntokens = cache_steps
        begin, length = sequences("cu_seqlens", cu_seqlens, x.shape[0], ~judged)
        longest = max(length[judged].tolist(), default=0)
        if longest > cache_steps:
            raise ArgumentValueError(
                f"cu_seqlens: found a sequence of {longest} tokens; allowed: cache_steps, "
                f"{cache_steps}"
            )
    some = length > 0
    beyond = column[some & judged & (column >= table.shape[1])]
    if beyond.numel():
        raise ArgumentValueError(
            f"num_accepted_tokens: found {int(beyond[0]) + 1}; allowed: at most "
            f"{table.shape[1]}, the columns of state_batch_indices"
        )
    within("state_batch_indices", "slot", source[live & some], nslots)

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
    for token in range(max(length[judged].tolist(), default=0)):
        if dst_state_batch_indices is not None:
            within("dst_state_batch_indices", "slot", rows.targets(token)[1], nslots)
        if intermediate_states_buffer is not None:
            entries = len(intermediate_states_buffer)
            within("intermediate_state_indices", "entry", rows.entries(token)[1], entries)
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
    tokens = range(max(rows.length[rows.live].tolist(), default=0))
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


def within(name: str, what: str, found: Tensor, count: int) -> None:
    outside = found[(found < 0) | (found >= count)]
    if outside.numel():
        where = "a pool" if what == "slot" else "a buffer"
        plural = "slots" if what == "slot" else "entries"
        raise ArgumentValueError(
            f"{name}: {what} {int(outside[0])} lies outside {where} of {count} {plural}"
        )
