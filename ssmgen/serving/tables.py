"""Integer tables in one allocation: filled on the host, uploaded in one copy.

Each table has a place of its own, sized for the largest step, so its address never changes: a CUDA
graph that has captured it reads what the last upload brought.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

__all__ = ["Ring", "Staging", "Tables"]

_NUMPY = {torch.int64: np.int64, torch.int32: np.int32, torch.bool: np.bool_}
_ALIGNMENT = 16


class Tables:
    """Named tables of fixed capacity, one behind the other in the order they are given.

    Args:
        capacity: by name, the largest shape, the dtype (int64, int32 or bool) and what an entry
            holds that was not filled.
        device: where the tables are.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        capacity: dict[str, tuple[tuple[int, ...], torch.dtype, int]],
        device: torch.device,
    ) -> None:
        self._places: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        end = 0
        for name, (shape, dtype, _) in capacity.items():
            self._places[name] = (end, shape, dtype)
            nbytes = math.prod(shape) * dtype.itemsize
            end += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._device = device
        self._unfilled = np.zeros(end, np.uint8)
        for name, table in self._arrays(self._unfilled).items():
            table[...] = capacity[name][2]
        self._memory = torch.from_numpy(self._unfilled.copy()).to(device)
        self._whole = {
            name: self._memory[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (at, shape, dtype) in self._places.items()
        }
        self._ring = Ring(self._stage)

    def _arrays(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: memory[at : at + math.prod(shape) * dtype.itemsize]
            .view(_NUMPY[dtype])
            .reshape(shape)
            for name, (at, shape, dtype) in self._places.items()
        }

    @torch.inference_mode(False)
    def _stage(self) -> Staging:
        on_gpu = self._device.type == "cuda"
        memory = torch.empty(len(self._memory), dtype=torch.uint8, pin_memory=on_gpu)
        return Staging(memory, self._arrays, torch.cuda.Event() if on_gpu else None)

    def begin(self, last: str) -> Staging:
        """Host memory to fill, whose tables up to `last` hold what is not filled so far."""
        staging = self._ring.take()
        at, shape, dtype = self._places[last]
        end = at + math.prod(shape) * dtype.itemsize
        staging.bytes[:end] = self._unfilled[:end]
        return staging

    def upload(self, staging: Staging, first: str, last: str, count: int) -> None:
        """One asynchronous copy: the tables from `first` to `last`, of which `count` entries."""
        begin = self._places[first][0]
        at, shape, dtype = self._places[last]
        end = at + count * math.prod(shape[1:]) * dtype.itemsize
        self._memory[begin:end].copy_(staging.memory[begin:end], non_blocking=True)
        if staging.event is not None:
            staging.event.record(torch.cuda.current_stream(self._device))

    def get(self, name: str, begin: int, count: int) -> torch.Tensor:
        """`count` entries of a table on the device."""
        return self._whole[name][begin : begin + count]


class Staging:
    """Host memory of all tables, `arrays` by name, and the event of its upload; None: it is done
    when it is asked for, as on a CPU."""

    def __init__(
        self,
        memory: torch.Tensor,
        arrays: Callable[[np.ndarray], dict[str, np.ndarray]],
        event: torch.cuda.Event | None,
    ) -> None:
        self.memory, self.event = memory, event
        self.bytes = memory.numpy()
        self.arrays = arrays(self.bytes)

    def sent(self) -> bool:
        """Whether it may be filled again; asks, and does not wait."""
        return self.event is None or self.event.query()


class Ring:
    """Host memory in turn: what has been uploaded is filled again.

    It grows when the host gets further ahead of the device than it ever was. So a server in its
    steady state allocates none, which for pinned memory may wait for the device.
    """

    def __init__(self, make: Callable[[], Staging]) -> None:
        self._make = make
        # Two: one is on its way while the next is filled.
        self._ring = deque([make(), make()])

    def __len__(self) -> int:
        return len(self._ring)

    def take(self) -> Staging:
        """The memory whose upload was enqueued before that of all other; new if it still runs."""
        if self._ring[0].sent():
            self._ring.rotate(-1)
        else:
            self._ring.append(self._make())
        return self._ring[-1]
