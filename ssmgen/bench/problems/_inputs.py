"""What the problems of all families draw their tensors with, and what those with slots share."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch

from ...reference.tables import Rows
from ..problem import Launch, Problem

__all__ = ["DTYPES", "Drawn", "SlotProblem", "integers_of", "states_written"]

Tensor = torch.Tensor

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int16": torch.int16,
    "int8": torch.int8,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}


def integers_of(name: str) -> torch.dtype:
    """int32 or int64 by name."""
    return getattr(torch, name)


def states_written(config: Any) -> int:
    """States that a row writes: for each token to its slot or to the buffer, or the last one."""
    updates = config.ntokens if config.dst_tokens else 1
    return updates * config.update_state + config.ntokens * config.has_intermediate


class Drawn(Problem):
    """A problem whose tensors come from one generator."""

    _generator: torch.Generator

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=self._generator, device=self.device)
        return low + (high - low) * drawn

    def _integers(self, dtype: str, least: int, count: Tensor) -> Tensor:
        """One of the `count` integers from `least` up, for each of `count`."""
        drawn = torch.rand(count.shape, generator=self._generator, device=self.device)
        return (least + (drawn * count.to(self.device)).floor()).to(integers_of(dtype))

    def _order(self, count: int) -> Tensor:
        """0 to ``count - 1`` in random order."""
        return torch.randperm(count, generator=self._generator, device=self.device)

    def _ends(self, dtype: str, ntokens: int) -> Tensor:
        """Where the rows of `ntokens` tokens begin, and the end of the last."""
        return (torch.arange(self.batch + 1, device=self.device) * ntokens).to(integers_of(dtype))

    def _placed(self, *shape: int) -> Tensor:
        """Memory of the input dtype, at a multiple of 16 bytes, or not if the config is not."""
        off = 0 if self.config.aligned else 1
        flat = torch.empty(math.prod(shape) + off, dtype=DTYPES[self.config.dtype],
                           device=self.device)  # fmt: skip
        return flat[off:].view(shape)


class SlotProblem(Drawn):
    """A problem whose op keeps a state for each row in a slot of a pool, and may keep those after
    each token in a buffer. Its arguments are called state, intermediate_states_buffer, and so on.
    """

    out: Tensor

    @property
    def times(self) -> int:
        return max(1, states_written(self.config))

    @abstractmethod
    def rows(self, arguments: dict[str, Any]) -> Rows:
        """What the tables of a call say."""

    @abstractmethod
    def step(self, keep: Tensor, token: int, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token of the rows `keep` in fp64: from their states the outputs, the states after
        it, and the magnitude of what was added up to those."""

    def verify(self, launch: Launch, which: int = 0, rows: int = 32, forgiven: float = 0.0) -> str:
        from ._check import Check

        return Check(self, which, rows, forgiven).run(launch)
