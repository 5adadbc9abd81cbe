"""What the tests of DecodeMetadata share: one of a small size, a step, and the ops that run."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ssmgen

DRAFTS = 3
ROWS, TOKENS = 8, 64
TABLES = ("tokens", "slots", "read_slots", "write_slots", "num_accepted_tokens", "cu_seqlens",
          "has_initial_state")  # fmt: skip


def metadata(**options):
    options = {"max_rows": ROWS, "max_tokens": TOKENS, "drafts": DRAFTS} | options
    return ssmgen.DecodeMetadata(**options)


def whole_memory(meta):
    """All bytes of the tables on the device."""
    storage = meta.plain.slots.untyped_storage()
    return torch.tensor([], dtype=torch.uint8, device=meta.device).set_(storage)


def parts(meta):
    return {"plain": meta.plain, "verify": meta.verify, "prefill": meta.prefill}


class Ops(TorchDispatchMode):
    """Every op that runs, by name; of copies, what they copy into."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "unique", "equal", "is_nonzero",
             "masked_select", "bincount", "repeat_interleave", "_to_copy")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.names, self.copies = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.names.append(name)
        if name == "copy_":
            self.copies.append(args[0].untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


VIEWS = {"view", "slice", "select", "as_strided", "unsqueeze", "alias", "detach"}
STEP = {
    "slots": [[1, 2, 3, 4], [5, 6, 7, 8], [9], [10]],
    "tokens": [1, 4, 6, 1],
    "accepted": [3, 2, 1, 1],
    "prefill": [False, False, True, False],
    "first": [False, False, True, False],
    "track": [-1, -1, 11, -1],
}
