"""Where compiled kernels live: layered roots, verified on every read."""

from __future__ import annotations

from .layers import find, stores, user_store
from .local import Store

__all__ = ["Store", "find", "stores", "user_store"]
