"""The rows of a step that take one path through a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Partition"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Partition:
    """The tables of these rows, on the device. The layers read them and nothing else.

    All of them are slices of the buffers of a `DecodeMetadata`: valid until its next `build`, which
    puts those of a step of the same size at the same addresses.

    Attributes:
        kind: "plain", "verify" or "prefill".
        rows: which rows of the step these are, in order, on the host; padded ones are not there.
        batch: how many rows the tables have, padded ones included.
        ntokens: tokens of these rows, padded ones included.
        longest: no row has more tokens: a bound that is the same in every step, so that one kernel
            serves prompt chunks of any length.
        whole: the step has no other rows, so these have all the tokens of x, in order.
        tokens: (ntokens,) int64: the tokens' places in x.
        slots: (batch, columns) int32: the slots of each row.
        read_slots: (batch,) int32: where the state is read: column n - 1 of `slots`.
        write_slots: (batch,) int32: column 0 of `slots`: the slot of the conv history, and of what
            a row without drafts writes.
        num_accepted_tokens: (batch,) int32: n, the tokens the step before accepted, 1 or more.
        cu_seqlens: (batch + 1,) int32: row i has the tokens ``cu_seqlens[i]`` to
            ``cu_seqlens[i + 1]`` of these; a padded row has none.
        has_initial_state: (batch,) bool: false where a prompt begins, whatever the slot holds, and
            in padded rows.
        pad_slot_id: what the tables hold for a padded row.
    """

    kind: str
    rows: np.ndarray
    batch: int
    ntokens: int
    longest: int
    whole: bool
    tokens: Tensor
    slots: Tensor
    read_slots: Tensor
    write_slots: Tensor
    num_accepted_tokens: Tensor
    cu_seqlens: Tensor
    has_initial_state: Tensor
    pad_slot_id: int

    def __bool__(self) -> bool:
        return self.batch > 0

    @property
    def recurrent(self) -> dict[str, Any]:
        """Arguments of `ssmgen.selective_state_update`, and of any op with its tables.

        Plain rows: one token, from `read_slots` to `write_slots`. Verify rows: from column n - 1 of
        `slots`, and the state after token t to column t. Prefill rows: all tokens of the chunk,
        from `read_slots`, and the state after the last to `write_slots`; such an op knows no
        `has_initial_state`, and reads zeros where a prompt begins because
        `DecodeMetadata.build` has put them there.
        """
        if self.kind == "verify":
            return {
                "state_batch_indices": self.slots,
                "dst_state_batch_indices": self.slots,
                "num_accepted_tokens": self.num_accepted_tokens,
                "cu_seqlens": self.cu_seqlens,
                "cache_steps": self.longest,
                "pad_slot_id": self.pad_slot_id,
            }
        arguments = {
            "state_batch_indices": self.read_slots,
            "dst_state_batch_indices": self.write_slots,
            "pad_slot_id": self.pad_slot_id,
        }
        if self.kind == "prefill":
            arguments |= {"cu_seqlens": self.cu_seqlens, "cache_steps": self.longest}
        return arguments

    def conv(self, conv_state: Tensor) -> dict[str, Any]:
        """Arguments of `causal_conv1d_update` (plain, verify) or `causal_conv1d_fn` (prefill), the
        histories of a layer, `conv_state` (slots, channels, length), among them.

        The history of row i is in slot ``write_slots[i]``, in the columns from
        ``num_accepted_tokens[i] - 1`` on; what is written begins at column 0.
        """
        arguments = {
            "num_accepted_tokens": self.num_accepted_tokens,
            "pad_slot_id": self.pad_slot_id,
            "alignment": "left",
        }
        if self.kind == "prefill":
            return arguments | {
                "conv_states": conv_state,
                "query_start_loc": self.cu_seqlens,
                "cache_indices": self.write_slots,
                "has_initial_state": self.has_initial_state,
            }
        arguments |= {"conv_state": conv_state, "conv_state_indices": self.write_slots}
        verify = self.kind == "verify"
        return arguments | ({"query_start_loc": self.cu_seqlens} if verify else {})

    def take(self, x: Tensor) -> Tensor:
        """The tokens of these rows, (ntokens, ...), of the tokens of the step, (tokens, ...): a
        slice if there are no other rows, else one gather. Which of the two depends on the sizes of
        the step alone, so a CUDA graph may hold it."""
        return x[: self.ntokens] if self.whole else x.index_select(0, self.tokens)

    def put(self, out: Tensor, y: Tensor) -> None:
        """Write what `take` takes. Padded tokens have places of their own, after the others."""
        if self.whole:
            out[: self.ntokens].copy_(y)
        else:
            out.index_copy_(0, self.tokens, y)
