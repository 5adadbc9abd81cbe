"""ssmgen: decode kernels for state-space models, generated, compiled anywhere, cached on disk.

Importing this loads neither torch nor Triton nor Jinja; the first use of a name does what it needs.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .arch import Arch
    from .config import KernelConfig
    from .kernel import Kernel, get_kernel
    from .ops.conv1d import causal_conv1d_fn, causal_conv1d_update
    from .ops.gdn import gated_delta_rule_decode, split_qkv
    from .ops.ssu import selective_state_update
    from .plan import Plan
    from .policy import freeze
    from .serving.metadata import DecodeMetadata
    from .serving.pool import StatePool
    from .serving.record import LayerSpec

__all__ = [
    "Arch",
    "DecodeMetadata",
    "Kernel",
    "KernelConfig",
    "LayerSpec",
    "Plan",
    "StatePool",
    "__version__",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "freeze",
    "gated_delta_rule_decode",
    "get_kernel",
    "selective_state_update",
    "split_qkv",
]

logging.getLogger("ssmgen").addHandler(logging.NullHandler())

_WHERE = {
    "Arch": "arch",
    "DecodeMetadata": "serving.metadata",
    "Kernel": "kernel",
    "KernelConfig": "config",
    "LayerSpec": "serving.record",
    "Plan": "plan",
    "StatePool": "serving.pool",
    "causal_conv1d_fn": "ops.conv1d",
    "causal_conv1d_update": "ops.conv1d",
    "freeze": "policy",
    "gated_delta_rule_decode": "ops.gdn",
    "get_kernel": "kernel",
    "selective_state_update": "ops.ssu",
    "split_qkv": "ops.gdn",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
