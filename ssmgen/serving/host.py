"""Slots that were copied to the host."""

from __future__ import annotations

import torch

__all__ = ["HostSlots"]


class HostSlots:
    """Whole slots in host memory, from `StatePool.offload`; `StatePool.reload` brings them back.

    On CUDA the memory is pinned and the copy may still be under way. `reload` waits for it on the
    device; call `wait` before anything else on the host reads `memory`.

    Attributes:
        memory: (slots, bytes of a slot) uint8.
    """

    def __init__(
        self, memory: torch.Tensor, layout: object, event: torch.cuda.Event | None
    ) -> None:
        self.memory = memory
        self.layout = layout
        self.event = event

    def __len__(self) -> int:
        return len(self.memory)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return self.memory.numel()

    def ready(self) -> bool:
        """Whether the copy has finished; asks, and does not wait."""
        return self.event is None or self.event.query()

    def wait(self) -> None:
        """Wait on the host until the copy has finished."""
        if self.event is not None:
            self.event.synchronize()
