"""Calls for the matrix form, and how far from fp64 it may be.

The loop's sums run over the state after each token; those of the matrix form run over the state
before the first and over every token's share. Their bound is that of the loop for the call of
absolute values, where nothing cancels, four times over. Of what a 16-bit state takes in, two bf16
terms are used: 2^-17 of it may be missing.
"""

from __future__ import annotations

from typing import Any

import torch
from ssu_calls import Call, Expected, expected
from ssu_tokens import make_tokens

# Calls by name; sizes are the test's own.
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "z": {"z": True},
    "bare": {"D": False, "dt_bias": False, "softplus": False},
    "no table": {"indices": None},
    "padded rows": {"indices": [-1, 4, -1], "z": True},
    "another pad": {"indices": [4, 9, 0], "pad": 9},
    "destinations": {"indices": [4, -1, 2], "dst": [3, 5, -1]},
    "int32": {"index_dtype": "int32"},
    "no update": {"update": False},
    # Eight heads: the projection's rows, which hold a dt for each, are then multiples of 16 bytes.
    "views of a projection": {"packed": True, "z": True, "lead": 8, "nheads": 8, "ngroups": 2},
    "slots apart": {"pitch": 64, "offset": 16},
    "16-bit weights": {"weight_dtype": "bf16", "dt_dtype": "fp16", "a_dtype": "bf16"},
}


def make_matrix(state: str, *, tokens: int, **options: Any) -> Call:
    """A call that the matrix form serves."""
    return make_tokens(
        state, tokens=tokens, **{"algorithm": "matrix", "precision": "fast", **options}
    )


def bounded(call: Call) -> Expected:
    """What the matrix form must give, and how far it may be off."""
    want, upper, fresh = expected(call), call.copy(), call.copy()
    for name in ("state", "x", "B", "C", "D"):
        for other in (upper, fresh):
            if name in other.tensors:
                other.tensors[name] = other[name].abs()
    fresh["state"].zero_()
    most = expected(upper)
    want.y_error = 4 * most.y_error
    want.h_error = 4 * most.h_error
    if call["state"].dtype != torch.float32:
        want.h_error += 2.0**-17 * expected(fresh).h
    return want
