"""DecodeMetadata: what every layer of a step has to know of slots, made once for all of them.

Each row goes to one of three partitions, and everything a partition holds, accepted counts
included, is taken by the same row numbers. So no row loses its count by the way it is batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import ArgumentTypeError, ArgumentValueError
from .allocator import integer
from .memory import one_device
from .partition import Partition
from .pool import StatePool
from .rows import KINDS, StepRows, step_rows
from .tables import Tables

__all__ = ["DecodeMetadata"]

Tensor = torch.Tensor
_COUNTS = (torch.int32, torch.int64)
_OF_ROWS = ("slots", "read_slots", "write_slots", "num_accepted_tokens", "has_initial_state")


class DecodeMetadata:
    """The tables of one step: made from host lists, uploaded in one copy, read by all layers.

    A row of a step is one request with the tokens it has in this step. It is

    - **plain**: one token. It keeps the kernels of one token, whatever it accepted before.
    - **verify**: one token and its drafts. The state after token t goes to column t of its slots.
    - **prefill**: a prompt chunk, even of one token.

    Every row starts from the last token it accepted: from the state in column n - 1 of its slots,
    and from the conv history in the slot of column 0, at history column n - 1 on; n is the count of
    tokens that its step before accepted. Writing begins at slot and history column 0 again.

    `build` waits for no device, and makes one upload, from pinned memory. The tables are at the
    same addresses in every step. A layer only reads them: see `Partition`.

    Args:
        pool: whose device and padding to use, and which under ``SSMGEN_DEBUG=1`` looks at the slots
            of every step. Prompts that begin in it start from zeros, see `build`. None: `device`
            and `pad_slot_id` say it.
        max_rows: the most rows of a partition, padded ones included.
        max_tokens: the most tokens of the prompt chunks of a step.
        drafts: the most draft tokens of a row, S. A request that drafts has S + 1 slots.

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument that cannot be, such as more drafts than
            a conv history of the pool has columns for.

    Attributes:
        plain, verify, prefill: the `Partition`s of the step.
        num_tokens: tokens of the step.
        padded_tokens: the same with padding: so many tokens x must have.
        first_slots: (rows,) int64: the first slot of every row, in the order of the rows: where an
            engine that keeps accepted counts in a side table writes them after sampling.
        begun_slots: (prompts that begin,) int64: the first slots of the rows that `first` names.
            `build` has zeroed their states in the pool. Without a pool they must be zero before a
            recurrent op has them: ``state.index_fill_(0, metadata.begun_slots, 0)``.
    """

    plain: Partition
    verify: Partition
    prefill: Partition
    first_slots: Tensor
    begun_slots: Tensor
    num_tokens: int
    padded_tokens: int
    _rows: StepRows

    def __init__(
        self,
        pool: StatePool | None = None,
        *,
        max_rows: int,
        max_tokens: int,
        drafts: int = 0,
        device: torch.device | str = "cpu",
        pad_slot_id: int = -1,
    ) -> None:
        self.max_rows = integer("max_rows", max_rows, 1)
        self.max_tokens = integer("max_tokens", max_tokens, 1)
        self.columns = integer("drafts", drafts, 0) + 1
        self.pool = pool
        if pool is not None:
            if not isinstance(pool, StatePool):
                raise ArgumentTypeError(f"pool: found {type(pool).__name__}; allowed: a StatePool")
            self.device, self.pad_slot_id = pool.device, pool.pad_slot_id
            pool.require_columns("drafts", self.columns)
        else:
            self.device = one_device(device)
            self.pad_slot_id = integer("pad_slot_id", pad_slot_id)
            if not -(2**31) <= self.pad_slot_id < 2**31:
                raise ArgumentValueError(
                    f"pad_slot_id: found {self.pad_slot_id}; allowed: an int32"
                )
        # Where the tokens of each kind begin in their table.
        rows = self.max_rows
        self._token_places = [0, rows, rows + rows * self.columns]
        self._token_places.append(self._token_places[-1] + self.max_tokens)
        self._tables = Tables(self._capacity(), self.device)
        self._views: dict[str, tuple[tuple[int, int], dict[str, Tensor]]] = {}

    def _capacity(self) -> dict[str, tuple[tuple[int, ...], torch.dtype, int]]:
        # In order: what few steps need, what all steps do, and last what is largest.
        rows, columns, pad = len(KINDS) * self.max_rows, self.columns, self.pad_slot_id
        return {
            "begun_slots": ((rows,), torch.int64, 0),
            "track_slots": ((rows, columns), torch.int32, pad),
            "track_rows": ((rows,), torch.int64, 0),
            "track_most": ((rows,), torch.int64, 1),
            "first_slots": ((rows,), torch.int64, 0),
            "slots": ((rows, columns), torch.int32, pad),
            "read_slots": ((rows,), torch.int32, pad),
            "write_slots": ((rows,), torch.int32, pad),
            "num_accepted_tokens": ((rows,), torch.int32, 1),
            "cu_seqlens": ((rows + len(KINDS),), torch.int32, 0),
            "has_initial_state": ((rows,), torch.bool, 0),
            "tokens": ((self._token_places[-1],), torch.int64, 0),
        }

    def build(
        self,
        slots: Any,
        tokens: Any,
        *,
        accepted: Any = None,
        prefill: Any = None,
        first: Any = None,
        track: Any = None,
        plain_rows: int | None = None,
        verify_rows: int | None = None,
    ) -> DecodeMetadata:
        """Make the tables of a step. The arguments are on the host, lists or (faster) numpy arrays
        with one entry for each row, in the order in which x has the rows; `accepted` may be on the
        device.

        Args:
            slots: (rows, up to S + 1) or (rows,): the slots of each row. Column t takes the state
                after token t. Rows may be of different lengths, or end in padding.
            tokens: tokens of each row in this step: one and its drafts, or its prompt chunk.
            accepted: how many tokens of each row the step before accepted, the one it began with
                included: so 1 to S + 1, and 1 for a row that was plain, prefill or not there. None:
                all 1. Or a tensor on the device with the count for each *slot* of the pool, such as
                a side table, of which a row has the value of its first slot; the host does not see
                it, and a value outside 1 to the slots of the row is clamped to that.
            prefill: which rows are prompt chunks; None: none.
            first: which of those begin a prompt. They start from nothing, whatever their slot and
                their count say: the states of their first slots are zeroed here, all of them and of
                all layers by one kernel. Without a pool that is left to the engine: `begun_slots`.
                None: none.
            track: for each row a slot that `checkpoint` fills after the step, or `pad_slot_id`;
                None: none.
            plain_rows, verify_rows: pad these partitions to so many rows, a verify row having S + 1
                tokens, so that a step of any rows has the shapes of a captured graph. None: not.

        Returns:
            itself.

        Raises:
            ArgumentValueError, ArgumentTypeError: an argument that cannot be, such as a count of 0.
            PoolError: a prompt begins in a slot that is not allocated.
                Nothing is changed or uploaded then; the step before stays.
        """
        counts = accepted if isinstance(accepted, Tensor) else None
        rows = step_rows(slots, tokens, None if counts is not None else accepted, prefill, first,
                         track, columns=self.columns, pad_slot_id=self.pad_slot_id,
                         end=None if self.pool is None else self.pool.slots)  # fmt: skip
        sizes = self._sizes(rows, (plain_rows, verify_rows, None))
        if counts is not None:
            self._check_counts(counts, rows)
        if self.pool is not None:
            self.pool.require("slots", rows.begun.tolist())

        self._upload(rows, sizes)
        self.first_slots = self._tables.get("first_slots", 0, len(rows.tokens))
        self.begun_slots = self._tables.get("begun_slots", 0, len(rows.begun))
        if self.pool is not None and len(rows.begun):
            self.pool.zero_states(self.begun_slots)
        self._rows = rows
        self.plain, self.verify, self.prefill = partitions = [
            self._partition(at, rows, sizes) for at in range(len(KINDS))
        ]
        if counts is not None:
            for partition in partitions:
                if partition:
                    self._look_up(partition, counts)
        if self.pool is not None and self.pool.validator is not None:
            self.pool.validator.look_at(partitions, self.columns)
        return self

    def _check_counts(self, counts: Tensor, rows: StepRows) -> None:
        """A table of counts on the device has one for the first slot of each row."""
        least = int(rows.slots[:, 0].max(initial=-1)) + 1
        wrong = counts.dim() != 1 or counts.dtype not in _COUNTS or counts.device != self.device
        if wrong or len(counts) < least:
            raise ArgumentValueError(
                f"accepted: found {counts.dtype} of shape {tuple(counts.shape)} on "
                f"{counts.device}; allowed: (slots,) int32 or int64 on {self.device}, of at least "
                f"{least} slots"
            )

    def _sizes(self, rows: StepRows, padded: tuple[int | None, ...]) -> list[tuple[int, int, int]]:
        """(rows, tokens, tokens without padding) of each partition."""
        sizes = []
        for at, (kind, real, wanted) in enumerate(zip(KINDS, rows.ntokens(), padded)):
            batch, ntokens = rows.bounds[at + 1] - rows.bounds[at], real
            if wanted is not None:
                if not batch <= wanted <= self.max_rows:
                    raise ArgumentValueError(
                        f"{kind}_rows: found {wanted}; allowed: {batch}, the {kind} rows of this "
                        f"step, to {self.max_rows}, max_rows"
                    )
                batch = wanted
                ntokens = batch * (self.columns if kind == "verify" else 1)
            if batch > self.max_rows:
                raise ArgumentValueError(
                    f"tokens: found {batch} {kind} rows; allowed: {self.max_rows}, max_rows"
                )
            if kind == "prefill" and ntokens > self.max_tokens:
                raise ArgumentValueError(
                    f"tokens: found {ntokens} of prefill rows; allowed: {self.max_tokens}, "
                    "max_tokens"
                )
            sizes.append((batch, ntokens, real))
        return sizes

    def _upload(self, rows: StepRows, sizes: list[tuple[int, int, int]]) -> None:
        """Fill the tables, those of all partitions together, and upload what is filled."""
        staging = self._tables.begin("has_initial_state")
        host = staging.arrays
        count, order, ends, tracked = len(rows.tokens), rows.order, rows.ends, rows.tracked
        host["first_slots"][:count] = rows.slots[:, 0]
        host["begun_slots"][: len(rows.begun)] = rows.begun
        if len(tracked):
            host["track_slots"][: len(tracked)] = rows.slots[tracked]
            host["track_rows"][: len(tracked)] = tracked
            host["track_most"][: len(tracked)] = rows.most_accepted(tracked)

        slots, accepted = rows.slots.take(order, 0), rows.accepted.take(order)
        of_rows = {
            "slots": slots,
            "read_slots": slots[np.arange(count), accepted - 1],
            "write_slots": slots[:, 0],
            "num_accepted_tokens": accepted,
            "has_initial_state": ~rows.first.take(order),
        }
        # Where each token is in x: a row begins where the rows before it end.
        begins = rows.tokens.cumsum().take(order) - ends
        places = np.repeat(begins, rows.tokens.take(order))
        places += np.arange(len(places))
        self.num_tokens = spare = len(places)
        taken = last = 0
        for at, (batch, ntokens, real) in enumerate(sizes):
            begin, end = rows.bounds[at : at + 2]
            row, place = at * self.max_rows, self._token_places[at]
            if begin < end:
                for name, values in of_rows.items():
                    host[name][row : row + end - begin] = values[begin:end]
                bounds = host["cu_seqlens"][row + at + 1 : row + at + 1 + batch]
                bounds[: end - begin] = ends[begin:end] - taken
                bounds[end - begin :] = real
                host["tokens"][place : place + real] = places[taken : taken + real]
            if real < ntokens:
                padding = np.arange(spare, spare + ntokens - real)
                host["tokens"][place + real : place + ntokens] = padding
            taken, spare = taken + real, spare + ntokens - real
            last = place + ntokens if ntokens else last
        self.padded_tokens = spare
        rare = len(rows.begun) or len(tracked)
        self._tables.upload(staging, "begun_slots" if rare else "first_slots", "tokens", last)

    def _partition(self, at: int, rows: StepRows, sizes: list[tuple[int, int, int]]) -> Partition:
        kind, (batch, ntokens, _) = KINDS[at], sizes[at]
        members = slice(rows.bounds[at], rows.bounds[at + 1])
        numbers = rows.order[members]
        return Partition(
            kind=kind,
            rows=numbers,
            batch=batch,
            ntokens=ntokens,
            longest=(1, self.columns, self.max_tokens)[at],
            whole=all(other == at or not size[0] for other, size in enumerate(sizes)),
            pad_slot_id=self.pad_slot_id,
            **self._tables_of(at, batch, ntokens),
        )

    def _tables_of(self, at: int, batch: int, ntokens: int) -> dict[str, Tensor]:
        """The tables of a partition on the device; a step of the size of the last has its views."""
        kind = KINDS[at]
        size, views = self._views.get(kind, (None, {}))
        if size != (batch, ntokens):
            get, row = self._tables.get, at * self.max_rows
            views = {
                "tokens": get("tokens", self._token_places[at], ntokens),
                "cu_seqlens": get("cu_seqlens", row + at, batch + 1),
                **{name: get(name, row, batch) for name in _OF_ROWS},
            }
            self._views[kind] = (batch, ntokens), views
        return views

    def _look_up(self, partition: Partition, accepted: Tensor) -> None:
        """Take counts, and the slots that follow from them, from a table on the device."""
        counts = accepted.index_select(0, partition.write_slots.clamp(min=0))
        counts = torch.where(partition.has_initial_state, counts, 1)
        # Padded rows have no column, and count 1 all the same.
        columns = (partition.slots != self.pad_slot_id).sum(1)
        if self.pool is not None and self.pool.validator is not None:
            self.pool.validator.look_at_counts(partition, counts, columns)
        counts = torch.minimum(counts, columns).clamp(min=1)
        partition.num_accepted_tokens.copy_(counts)
        partition.read_slots.copy_(partition.slots.gather(1, counts.long()[:, None] - 1)[:, 0])

    def checkpoint(self, accepted: Sequence[int] | Tensor | None = None) -> None:
        """Put what each tracked row has come to in this step into its track slot, ready to be read
        with a count of 1: `StatePool.checkpoint`. Call it after the last layer.

        Args:
            accepted: what each row of the step has accepted in it, (rows,): a list, or a tensor on
                the device, which is not read back and of which a count is clamped to the tokens of
                its row. Rows that are not verify count as 1, whatever it says. None: there is no
                verify row among the tracked.

        Raises:
            PoolError: a slot is not allocated, or both in a row and tracked.
            ArgumentValueError: counts are missing, of another length, or more than a row has
                tokens; or there is no pool.
        """
        if self.pool is None:
            raise ArgumentValueError("pool: found None; allowed: the pool of the slots")
        rows, tracked = self._rows, self._rows.tracked
        if accepted is not None and len(accepted) != len(rows.tokens):
            raise ArgumentValueError(
                f"accepted: found {len(accepted)}; allowed: {len(rows.tokens)}, one for each row"
            )
        if isinstance(accepted, Tensor):
            numbers, most = (
                self._tables.get(name, 0, len(tracked)) for name in ("track_rows", "track_most")
            )
            counts: Any = torch.minimum(accepted.index_select(0, numbers), most)
        else:
            most = rows.most_accepted(tracked).tolist()
            counts = [self._accepted(accepted, i, n) for i, n in zip(tracked.tolist(), most)]
        self.pool.checkpoint(
            [[s for s in row if s != self.pad_slot_id] for row in rows.slots[tracked].tolist()],
            rows.track[tracked].tolist(),
            counts,
            device_tables=self._tables.get("track_slots", 0, len(tracked)),
        )

    @staticmethod
    def _accepted(accepted: Sequence[int] | None, row: int, most: int) -> int:
        """What a row has accepted of its step, 1 if it was one that cannot accept more."""
        if most == 1:
            return 1
        if accepted is None:
            raise ArgumentValueError(
                f"accepted: found None; allowed: counts, as row {row} has drafts"
            )
        count = integer("accepted", accepted[row])
        if not 1 <= count <= most:
            raise ArgumentValueError(
                f"accepted: found {count} in row {row}; allowed: 1 to {most}, its tokens"
            )
        return count
