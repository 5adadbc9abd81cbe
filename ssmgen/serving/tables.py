"""Integer tables in one allocation: filled on the host, uploaded in one copy.

Each table has a place of its own, sized for the largest step, so its address never changes: a CUDA
graph that has captured it reads what the last upload brought.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

__all__ = ["Tables"]

_NUMPY = {torch.int64: np.int64, torch.int32: np.int32, torch.bool: np.bool_}
_ALIGNMENT = 16


class Tables:
    """Named tables of fixed capacity. The ones a step fills least often should come last: what is
    uploaded is the run up to the last one that was filled.

    Args:
        capacity: by name, the largest shape and the dtype: int64, int32 or bool. The first axis may
            be filled in part, the others are whole.
        device: where the tables are.
    """

    @torch.inference_mode(False)
    def __init__(
        self, capacity: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device
    ) -> None:
        self._device = device
        self._places: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        end = 0
        for name, (shape, dtype) in capacity.items():
            self._places[name] = (end, shape, dtype)
            nbytes = math.prod(shape) * dtype.itemsize
            end += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        # Zeros: the bounds of a partition without rows are one 0.
        self._memory = torch.zeros(end, dtype=torch.uint8, device=device)
        self._whole = {
            name: self._memory[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (at, shape, dtype) in self._places.items()
        }
        self._staging: Any = None
        self._used = 0

    def begin(self) -> None:
        """Start to fill. The host memory is new each time: what was filled before may still be on
        its way. PyTorch's allocator of pinned memory gives it again once that copy is done."""
        pinned = self._device.type == "cuda"
        self._staging = torch.empty(len(self._memory), dtype=torch.uint8, pin_memory=pinned)
        self._used = 0

    def fill(self, name: str, count: int) -> Any:
        """The first `count` entries of a table as a numpy array to be written."""
        at, shape, dtype = self._places[name]
        nbytes = count * math.prod(shape[1:]) * dtype.itemsize
        self._used = max(self._used, at + nbytes)
        array = self._staging.numpy()[at : at + nbytes].view(_NUMPY[dtype])
        return array.reshape(count, *shape[1:])

    def upload(self) -> None:
        """One asynchronous copy of all that was filled."""
        if self._used:
            self._memory[: self._used].copy_(self._staging[: self._used], non_blocking=True)

    def get(self, name: str, count: int) -> torch.Tensor:
        """The first `count` entries of a table on the device."""
        return self._whole[name][:count]
