"""Calls of selective_state_update with several tokens a row, built on `ssu_calls.make`."""

from __future__ import annotations

from typing import Any

import torch
from ssu_calls import SCALED, Call, make, raw

# One of each kind of call; what differs is the tables and where states go.
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"tokens": 3, "z": True},
    "dense without table": {"tokens": 2, "indices": None},
    "one destination": {"tokens": 2, "indices": [4, -1, 2], "dst": [3, 5, -1]},
    "a destination a token": {
        "tokens": 3, "indices": [0, -1, 2], "dst": [[3, -1, 4], [5, 6, 7], [8, 9, 1]],
    },
    "intermediate": {"tokens": 3, "buffer": 4, "entries": [2, -1, 0], "update": False},
    "intermediate and final": {"tokens": 2, "buffer": 2, "indices": [1, -1, 0]},
    "one token, intermediate": {"tokens": 1, "buffer": 1, "entries": [0, 2, 1]},
    "accepted": {
        "tokens": 2, "accepted": [0, 1, 3], "indices": [[0, 1, 2], [-1, 3, 4], [5, 6, 7]],
    },
    "varlen": {"lengths": [2, 0, 1, 4], "steps": 4, "indices": [3, 1, -1, 0]},
    "varlen, accepted": {
        "lengths": [3, 1, 0], "steps": 3, "accepted": [2, 1, 9], "dst": "source",
        "indices": [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
    },
    "varlen, intermediate": {
        "lengths": [1, 3], "steps": 3, "buffer": 5, "entries": [4, 1], "indices": [6, 2],
    },
    "chain": {"tokens": 3, "parents": [[-1, 0, 1]] * 3},
    "tree": {"tokens": 5, "parents": [[-1, 0, 0, 1, -1], [-1, 0, 1, 0, 3], [-1, -1, -1, 2, 2]]},
    "tree, all else": {
        "lengths": [4, 0, 2, 3], "steps": 5, "buffer": 5, "entries": [1, 2, -1, 0],
        "parents": [[-1, 0, 0, 1, 9], [9] * 5, [-1, -1, 9, 9, 9], [-1, 0, -1, 7, 7]],
        "accepted": [2, 0, 1, 1], "indices": [[0, 1], [2, 3], [4, 5], [-1, 6]],
        "dst": [[7, 8, 0, 1, 1], [9] * 5, [4, -1, 9, 9, 9], [3, 3, 3, 3, 3]], "z": True,
    },
    "mamba1": {"tokens": 3, "headless": True, "dim": 24, "dstate": 16, "buffer": 3},
    "mamba1, varlen tree": {
        "lengths": [3, 1], "steps": 3, "headless": True, "dim": 16, "dstate": 24, "packed": True,
        "parents": [[-1, 0, 0], [-1, 9, 9]], "indices": [3, 1],
    },
    "views": {"tokens": 3, "packed": True, "z": True, "lead": 3, "pitch": 5, "buffer": 4,
              "buffer_pitch": 3, "offset": 3},
}  # fmt: skip


def make_tokens(
    state: str = "fp32",
    rounding: str = "nearest",
    *,
    tokens: int = 1,
    batch: int = 3,
    lengths: list[int] | None = None,
    steps: int = 0,
    spare: int = 2,
    indices: Any = "random",
    dst: Any = None,
    accepted: list[int] | None = None,
    parents: list[list[int]] | None = None,
    buffer: int = 0,
    entries: list[int] | None = None,
    buffer_pitch: int = 0,
    index_dtype: str = "int64",
    table_dtype: str = "int32",
    slots: int = 10,
    random: int = 0,
    precision: str = "exact",
    **options: Any,
) -> Call:
    """One call of rows of `tokens`, or of sequences of `lengths` of at most `steps`.

    `dst`: a column, a table, or "source" for the very table of sources. `buffer`: tokens the
    intermediate buffer has room for, 0: none. `spare`: tokens of x that belong to no sequence.
    """
    rows = batch if lengths is None else len(lengths)
    count = rows * tokens if lengths is None else sum(lengths) + spare
    call = make(
        state, rounding, batch=count, slots=slots, indices=None, random=random, **options
    )  # fmt: skip
    t = call.tensors
    if lengths is None:
        for name in ("x", "dt", "B", "C", "z", "out"):
            if name in t:
                t[name] = t[name].unflatten(0, (rows, tokens))
    else:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        t["cu_seqlens"] = ends.to(getattr(torch, table_dtype))
        call.switches["cache_steps"] = steps
    if indices == "random":
        gen = torch.Generator().manual_seed(random)
        indices = torch.randperm(slots, generator=gen)[:rows].tolist()
    tables = {
        "state_batch_indices": (indices, index_dtype),
        "dst_state_batch_indices": (indices if dst == "source" else dst, index_dtype),
        "intermediate_state_indices": (entries, index_dtype),
        "num_accepted_tokens": (accepted, table_dtype),
        "parent_tokens": (parents, table_dtype),
    }
    for name, (values, dtype) in tables.items():
        if values is not None:
            t[name] = torch.tensor(values, dtype=getattr(torch, dtype))
    call.switches["precision"] = precision
    if buffer:
        shape = (slots, buffer, *t["state"].shape[1:])
        memory = torch.zeros(slots, buffer, t["state"][0].numel() + buffer_pitch)
        whole = memory.to(t["state"].dtype)[..., : t["state"][0].numel()]
        t["intermediate_states_buffer"] = whole.unflatten(-1, shape[2:])
        raw(whole).fill_(0x7F)
        if state in SCALED:
            t["intermediate_state_scales"] = torch.full(shape[:-1], torch.nan)
    return call


def row_of(call: Call, row: int) -> Call:
    """The call with one row of the batch alone; for dense calls."""
    alone = call.copy()
    for name in ("x", "dt", "B", "C", "z", "out", "state_batch_indices", "parent_tokens",
                 "dst_state_batch_indices", "intermediate_state_indices",
                 "num_accepted_tokens"):  # fmt: skip
        if name in alone.tensors:
            alone.tensors[name] = alone[name][row : row + 1]
    return alone


def path_of(call: Call, path: list[int]) -> Call:
    """The dense call of some tokens alone, one after the other, without a tree."""
    alone = call.copy()
    for name in ("x", "dt", "B", "C", "z", "out"):
        if name in alone.tensors:
            alone.tensors[name] = alone[name][:, path]
    if not call["dt"].stride(-1):
        alone.tensors["dt"] = alone["dt"][..., :1].expand(alone["x"].shape)
    alone.tensors.pop("parent_tokens", None)
    return alone


def token_of(call: Call, token: int) -> Call:
    """The single-token call of one token of a dense call, on the same pool."""
    one = Call(dict(call.tensors), call.switches)
    for name in ("x", "dt", "B", "C", "z", "out"):
        if name in one.tensors:
            one.tensors[name] = one[name][:, token]
    return one
