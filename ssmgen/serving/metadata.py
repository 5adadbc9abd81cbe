"""DecodeMetadata: what every layer of a step has to know of slots, made once for all of them.

Each row goes to one of three partitions, and everything a partition holds, accepted counts
included, is taken by the same row numbers. So no row loses its count by the way it is batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import ArgumentValueError
from .allocator import integer
from .partition import Partition
from .pool import StatePool
from .rows import KINDS, StepRows, step_rows
from .tables import Tables
from .validator import Validator

__all__ = ["DecodeMetadata"]

Tensor = torch.Tensor
_COUNTS = (torch.int32, torch.int64)


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
            of every step. None: `device` and `pad_slot_id` say it.
        max_rows: the most rows of a partition, padded ones included.
        max_tokens: the most tokens of the prompt chunks of a step.
        drafts: the most draft tokens of a row, S. A request that drafts has S + 1 slots.

    Attributes:
        plain, verify, prefill: the `Partition`s of the step.
        num_tokens: tokens of the step.
        padded_tokens: the same with padding: so many tokens x must have.
        first_slots: (rows,) int64: the first slot of every row, in the order of the rows: where an
            engine that keeps accepted counts in a side table writes them after sampling.
    """

    plain: Partition
    verify: Partition
    prefill: Partition
    first_slots: Tensor
    num_tokens: int
    padded_tokens: int
    _rows: StepRows
    _tracked: np.ndarray

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
        self.device = torch.device(device) if pool is None else pool.device
        self.pad_slot_id = integer("pad_slot_id", pad_slot_id) if pool is None else pool.pad_slot_id
        self._tables = Tables(self._capacity(), self.device)

    def _capacity(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = self.max_rows, self.columns
        tokens = {"plain": rows, "verify": rows * columns, "prefill": self.max_tokens}
        capacity: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "first_slots": ((len(KINDS) * rows,), torch.int64),
            "track_slots": ((len(KINDS) * rows, columns), torch.int32),
            "track_rows": ((len(KINDS) * rows,), torch.int64),
        }
        for kind in KINDS:
            capacity |= {
                f"{kind}.slots": ((rows, columns), torch.int32),
                f"{kind}.read_slots": ((rows,), torch.int32),
                f"{kind}.write_slots": ((rows,), torch.int32),
                f"{kind}.num_accepted_tokens": ((rows,), torch.int32),
                f"{kind}.cu_seqlens": ((rows + 1,), torch.int32),
                f"{kind}.has_initial_state": ((rows,), torch.bool),
                f"{kind}.tokens": ((tokens[kind],), torch.int64),
            }
        return capacity

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
        """Make the tables of a step. The arguments are on the host, lists or numpy arrays with one
        entry for each row, in the order in which x has the rows; `accepted` may be on the device.

        Args:
            slots: (rows, up to S + 1) or (rows,): the slots of each row. Column t takes the state
                after token t. Rows may be of different lengths.
            tokens: tokens of each row in this step: one and its drafts, or its prompt chunk.
            accepted: how many tokens of each row the step before accepted, the one it began with
                included: so 1 to S + 1, and 1 for a row that was plain, prefill or not there. None:
                all 1. Or a tensor on the device with the count for each *slot* of the pool, such as
                a side table, of which a row has the value of its first slot; the host does not see
                it, and a value outside 1 to S + 1 is clamped to it.
            prefill: which rows are prompt chunks; None: none.
            first: which of those begin a prompt. They start from nothing, whatever their slot and
                their count say. None: none.
            track: for each row a slot that `checkpoint` fills after the step, or `pad_slot_id`;
                None: none.
            plain_rows, verify_rows: pad these partitions to so many rows, a verify row having S + 1
                tokens, so that a step of any rows has the shapes of a captured graph. None: not.

        Returns:
            itself.

        Raises:
            ArgumentValueError, ArgumentTypeError: an argument that cannot be, such as a count of 0.
                The step before is untouched.
        """
        on_device = isinstance(accepted, Tensor)
        if on_device and (accepted.dim() != 1 or accepted.dtype not in _COUNTS):
            raise ArgumentValueError(
                f"accepted: found {accepted.dtype} of shape {tuple(accepted.shape)}; allowed: "
                "(slots,) int32 or int64"
            )
        rows = step_rows(slots, tokens, None if on_device else accepted, prefill, first, track,
                         columns=self.columns, pad_slot_id=self.pad_slot_id)  # fmt: skip
        sizes = self._sizes(rows, {"plain": plain_rows, "verify": verify_rows})

        self._tables.begin()
        count, spare = len(rows.tokens), int(rows.tokens.sum())
        self.num_tokens = spare
        self._tables.fill("first_slots", count)[:] = rows.slots[:, 0]
        tracked = np.flatnonzero(rows.track != self.pad_slot_id)
        self._tables.fill("track_slots", len(tracked))[:] = rows.slots[tracked]
        self._tables.fill("track_rows", len(tracked))[:] = tracked
        for kind, (batch, ntokens) in sizes.items():
            if batch:
                self._fill(kind, rows, batch, ntokens, spare)
            spare += ntokens - rows.ntokens(kind)
        self.padded_tokens = spare
        self._tables.upload()

        self.first_slots = self._tables.get("first_slots", count)
        self._rows, self._tracked = rows, tracked
        for kind, (batch, ntokens) in sizes.items():
            alone = all(not other for name, (other, _) in sizes.items() if name != kind)
            partition = self._partition(kind, rows, batch, ntokens, alone, on_device)
            setattr(self, kind, partition)
            if on_device and batch:
                self._look_up(partition, accepted)
        if self.pool is not None and self.pool.validator is not None:
            self._show(self.pool.validator)
        return self

    def _sizes(self, rows: StepRows, padded: dict[str, int | None]) -> dict[str, tuple[int, int]]:
        """(rows, tokens) of each partition, padding included."""
        sizes = {}
        for kind in KINDS:
            batch, ntokens = len(rows.members[kind]), rows.ntokens(kind)
            wanted = padded.get(kind)
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
            sizes[kind] = batch, ntokens
        return sizes

    def _fill(self, kind: str, rows: StepRows, batch: int, ntokens: int, spare: int) -> None:
        """The tables of a partition; its padded tokens are those of x from `spare` on."""
        members = rows.members[kind]
        count = len(members)
        slots, accepted, lengths = rows.slots[members], rows.accepted[members], rows.tokens[members]

        def fill(name: str, values: Any, padding: int) -> None:
            place = self._tables.fill(f"{kind}.{name}", batch)
            place[:count] = values
            place[count:] = padding

        fill("slots", slots, self.pad_slot_id)
        fill("read_slots", slots[np.arange(count), accepted - 1], self.pad_slot_id)
        fill("write_slots", slots[:, 0], self.pad_slot_id)
        fill("num_accepted_tokens", accepted, 1)
        fill("has_initial_state", ~rows.first[members], False)
        ends = np.cumsum(lengths)
        real = int(ends[-1]) if count else 0
        bounds = self._tables.fill(f"{kind}.cu_seqlens", batch + 1)
        bounds[0] = 0
        bounds[1 : count + 1] = ends
        bounds[count + 1 :] = real
        places = self._tables.fill(f"{kind}.tokens", ntokens)
        places[:real] = np.repeat(rows.starts[members] - ends + lengths, lengths) + np.arange(real)
        places[real:] = np.arange(spare, spare + ntokens - real)

    def _partition(
        self, kind: str, rows: StepRows, batch: int, ntokens: int, alone: bool, on_device: bool
    ) -> Partition:
        longest = {"plain": 1, "verify": self.columns}.get(kind)
        if longest is None:
            longest = int(rows.tokens[rows.members[kind]].max(initial=1))

        def get(name: str, count: int = batch) -> Tensor:
            return self._tables.get(f"{kind}.{name}", count)

        return Partition(
            kind=kind,
            rows=rows.members[kind],
            batch=batch,
            ntokens=ntokens,
            longest=longest,
            shifted=(on_device and self.columns > 1)
            or bool((rows.accepted[rows.members[kind]] > 1).any()),
            whole=alone,
            tokens=get("tokens", ntokens),
            slots=get("slots"),
            read_slots=get("read_slots"),
            write_slots=get("write_slots"),
            num_accepted_tokens=get("num_accepted_tokens"),
            cu_seqlens=get("cu_seqlens", batch + 1),
            has_initial_state=get("has_initial_state"),
            pad_slot_id=self.pad_slot_id,
        )

    def _look_up(self, partition: Partition, accepted: Tensor) -> None:
        """Take counts, and the slots that follow from them, from a table on the device."""
        counts = accepted.index_select(0, partition.write_slots.clamp(min=0))
        counts = torch.where(partition.has_initial_state, counts, 1)
        # Padded rows have no column, and count 1 all the same.
        columns = (partition.slots != self.pad_slot_id).sum(1)
        if self.pool is not None and self.pool.validator is not None:
            self.pool.validator.look_at_counts(
                self._numbers(partition), partition.write_slots, counts, columns
            )
        counts = torch.minimum(counts, columns).clamp(min=1)
        partition.num_accepted_tokens.copy_(counts)
        partition.read_slots.copy_(partition.slots.gather(1, counts.long()[:, None] - 1)[:, 0])

    def checkpoint(self, accepted: Sequence[int] | Tensor | None = None) -> None:
        """Put what each tracked row has come to in this step into its track slot, ready to be read
        with a count of 1: `StatePool.checkpoint`. Call it after the last layer.

        Args:
            accepted: what each row of the step has accepted in it, (rows,): a list, or a tensor on
                the device, which is not read back. Rows that are not verify count as 1. None: there
                is no verify row among the tracked.

        Raises:
            PoolError: a slot is not allocated, or both in a row and tracked.
            ArgumentValueError: counts are missing, or of another length; or there is no pool.
        """
        if self.pool is None:
            raise ArgumentValueError("pool: found None; allowed: the pool of the slots")
        rows, tracked = self._rows, self._tracked
        if accepted is None:
            if unknown := set(tracked.tolist()) & set(self.verify.rows.tolist()):
                raise ArgumentValueError(
                    f"accepted: found None; allowed: counts, as row {min(unknown)} has drafts"
                )
            accepted = [1] * len(rows.tokens)
        if len(accepted) != len(rows.tokens):
            raise ArgumentValueError(
                f"accepted: found {len(accepted)}; allowed: {len(rows.tokens)}, one for each row"
            )
        plain = ~np.isin(tracked, self.verify.rows)
        if isinstance(accepted, Tensor):
            counts: Any = accepted.index_select(0, self._tables.get("track_rows", len(tracked)))
        else:
            counts = [1 if one else accepted[i] for i, one in zip(tracked.tolist(), plain)]
        self.pool.checkpoint(
            [[s for s in row if s != self.pad_slot_id] for row in rows.slots[tracked].tolist()],
            rows.track[tracked].tolist(),
            counts,
            device_tables=self._tables.get("track_slots", len(tracked)),
        )

    # SSMGEN_DEBUG

    def _show(self, validator: Validator) -> None:
        """Let the validator look at the slots of the step."""
        validator.step()
        each = torch.arange(self.columns, device=self.device)
        numbers, reads, writes = [], [], []
        for partition in (self.plain, self.verify, self.prefill):
            if not partition:
                continue
            count = 1 if partition.kind != "verify" else partition.cu_seqlens.diff()[:, None]
            numbers.append(self._numbers(partition))
            reads.append(partition.read_slots)
            writes.append(torch.where(each < count, partition.slots, self.pad_slot_id))
        if numbers:
            validator.look(torch.cat(numbers), torch.cat(reads), torch.cat(writes))

    def _numbers(self, partition: Partition) -> Tensor:
        """The row of the step that each row of a partition is; -1: padding."""
        padding = partition.batch - len(partition.rows)
        host = torch.tensor([*partition.rows.tolist(), *[-1] * padding], dtype=torch.int64)
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)
