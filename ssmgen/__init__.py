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
    from .ops.gdn import gated_delta_rule_decode, split_qkv
    from .ops.ssu import selective_state_update
    from .plan import Plan
    from .policy import freeze

__all__ = [
    "Arch",
    "Kernel",
    "KernelConfig",
    "Plan",
    "__version__",
    "freeze",
    "gated_delta_rule_decode",
    "get_kernel",
    "selective_state_update",
    "split_qkv",
]

logging.getLogger("ssmgen").addHandler(logging.NullHandler())

_WHERE = {
    "Arch": "arch",
    "Kernel": "kernel",
    "KernelConfig": "config",
    "Plan": "plan",
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
