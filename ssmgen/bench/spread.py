"""A pass that writes more than it reads: the limit of what keeps the state after each token."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["ALIGNED", "spread"]

# Elements of a program of one warp.
BLOCK = 1024
# Rows of a multiple of so many elements are moved 16 bytes at a time.
ALIGNED = 16


@triton.jit
def _rows(source, out, count, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + row * count + at, mask=at < count)
    for turn in tl.static_range(TIMES):
        place = out + (row * TIMES + turn) * count + at
        tl.store(place, values, mask=at < count, eviction_policy="evict_first")


def spread(source: torch.Tensor, *, out: torch.Tensor) -> None:
    """Write each row of `source` (rows, count) `times` times, to its part of `out` (rows, times,
    count). Both are contiguous and fp32."""
    rows, times, count = out.shape
    if source.is_cuda:
        kernel: Any = _rows[(-(-count // BLOCK), rows)]
        kernel(source, out, count, times, BLOCK, num_warps=1)
    else:
        out.copy_(source.unsqueeze(1).expand_as(out))
