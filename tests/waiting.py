"""An error for every operation that waits for the GPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

__all__ = ["no_waiting"]


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """What waits for the GPU is an error inside."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            # torch calls the mode a prototype, at its first use in a process.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
