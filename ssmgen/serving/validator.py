"""What SSMGEN_DEBUG sees of the slots of a step, on the device.

Every finding is added to one tensor by torch ops that wait for nothing; only `raise_faults` reads
it. So the validator may run in the middle of a stream, and says afterwards what was wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import PoolError
from .partition import Partition

__all__ = ["Validator"]

Tensor = torch.Tensor

_KINDS = (
    "row {row} reads slot {slot}, which lies outside the pool",
    "row {row} writes slot {slot}, which lies outside the pool",
    "row {row} reads slot {slot}, which is not allocated",
    "row {row} writes slot {slot}, which is not allocated",
    "row {row} writes slot {slot}, which another row writes too",
    "row {row} reads slot {slot}, which another row writes",
    "row {row} writes slot {slot} after two of its tokens",
    "row {row} of slot {slot} has an accepted count outside of 1 and the columns of its table",
)
_COUNT, _SLOT, _ROW, _STEP = range(4)


class Validator:
    """The live slots of a pool as the device sees them, and what was found so far."""

    @torch.inference_mode(False)
    def __init__(self, slots: int, pad_slot_id: int, device: torch.device) -> None:
        self.pad_slot_id = pad_slot_id
        self.live = torch.zeros(slots, dtype=torch.bool, device=device)
        self.faults = torch.zeros(len(_KINDS), 4, dtype=torch.int64, device=device)
        self.steps = 0

    def mark(self, slots: list[int], live: bool) -> None:
        for slot in slots:
            self.live[slot].fill_(live)

    @torch.inference_mode(False)
    def grow(self, slots: int) -> None:
        self.live = torch.cat([self.live, self.live.new_zeros(slots - len(self.live))])

    def look_at(self, partitions: Sequence[Partition], columns: int) -> None:
        """Note what is wrong with the slots of a step that has these partitions."""
        self.steps += 1
        each = torch.arange(columns, device=self.live.device)
        found = []
        for partition in partitions:
            if partition:
                count = 1 if partition.kind != "verify" else partition.cu_seqlens.diff()[:, None]
                writes = torch.where(each < count, partition.slots, self.pad_slot_id)
                found.append((self._numbers(partition), partition.read_slots, writes))
        if found:
            self.look(*map(torch.cat, zip(*found)))

    def _numbers(self, partition: Partition) -> Tensor:
        """The row of the step that each row of a partition is; -1: padding."""
        padding = partition.batch - len(partition.rows)
        host = torch.tensor([*partition.rows.tolist(), *[-1] * padding], dtype=torch.int64)
        if self.live.is_cuda:
            host = host.pin_memory()
        return host.to(self.live.device, non_blocking=True)

    def look(self, rows: Tensor, reads: Tensor, writes: Tensor) -> None:
        """Note what is wrong with a step whose row ``rows[i]`` reads slot ``reads[i]`` and writes
        the slots ``writes[i]``; padding is skipped. (rows,), (rows,) and (rows, columns)."""
        rows, reads, writes = rows.long(), reads.long()[:, None], writes.long()
        live_rows = reads != self.pad_slot_id
        seen = (live_rows, live_rows & (writes != self.pad_slot_id))
        slots = len(self.live)
        inside = []
        for kind, table, used in ((0, reads, seen[0]), (1, writes, seen[1])):
            within = (table >= 0) & (table < slots)
            self._note(kind, used & ~within, table, rows)
            inside.append(used & within)
            live = self.live[table.clamp(0, slots - 1)]
            self._note(kind + 2, inside[-1] & ~live, table, rows)
        # The first and the last row that writes each slot; one more place takes what is no write.
        each = rows[:, None].expand_as(writes)
        at = torch.where(inside[1], writes, slots).flatten()
        first = torch.full((slots + 1,), torch.iinfo(torch.int64).max, device=rows.device)
        first = first.scatter_reduce(0, at, each.flatten(), "amin")
        last = torch.full_like(first, -1).scatter_reduce(0, at, each.flatten(), "amax")
        mine = rows[:, None]
        for kind, table, used in ((4, writes, inside[1]), (5, reads, inside[0])):
            where = table.clamp(0, slots - 1)
            other = (last[where] > mine) | (first[where] < mine)
            self._note(kind, used & other, table, rows)
        times = torch.zeros_like(first).scatter_add(0, at, torch.ones_like(at))
        alone = inside[1] & (first[at.view_as(writes)] == mine) & (last[at.view_as(writes)] == mine)
        self._note(6, alone & (times[at].view_as(writes) > 1), writes, rows)

    def look_at_counts(self, partition: Partition, accepted: Tensor, most: Tensor) -> None:
        """Note accepted counts that name none of the `most` columns of their row; all (rows,)."""
        slots = partition.write_slots
        wrong = ((accepted < 1) | (accepted > most)) & (slots != self.pad_slot_id)
        self._note(7, wrong[:, None], slots.long()[:, None], self._numbers(partition))

    def _note(self, kind: int, wrong: Tensor, table: Tensor, rows: Tensor) -> None:
        if not wrong.numel():
            return
        # Never an index that is a tensor of no axis: PyTorch reads those back.
        flat = wrong.flatten()
        at = flat.to(torch.uint8).argmax().reshape(1)
        found = torch.cat([
            flat.sum().reshape(1),
            table.expand_as(wrong).flatten().index_select(0, at),
            rows[:, None].expand_as(wrong).flatten().index_select(0, at),
            torch.full((1,), self.steps, device=flat.device),
        ])  # fmt: skip
        so_far = self.faults[kind]
        is_first = (so_far[_COUNT] == 0) & (found[_COUNT] > 0)
        so_far[_SLOT:] = torch.where(is_first, found[_SLOT:], so_far[_SLOT:])
        so_far[_COUNT] += found[_COUNT]

    def raise_faults(self) -> int:
        """Wait for the device and raise a `PoolError` for what was noted since the last call.

        Returns the number of steps looked at since then.
        """
        found = self.faults.tolist()
        steps, self.steps = self.steps, 0
        self.faults.zero_()
        said = [
            f"{text.format(row=row, slot=slot)} (step {step}"
            + (f"; {count} in all)" if count > 1 else ")")
            for text, (count, slot, row, step) in zip(_KINDS, found)
            if count
        ]
        if said:
            raise PoolError(f"in {steps} steps: " + "; ".join(said))
        return steps
