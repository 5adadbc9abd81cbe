"""The oracle: every op in plain PyTorch, in any float dtype up to fp64.

It runs on any device, is what the ops run on CPU tensors, and is what kernels are tested against.
"""

from __future__ import annotations

from .conv1d import causal_conv1d, causal_conv1d_fn, causal_conv1d_update
from .gdn import delta_gates, delta_step, gated_delta_rule_decode
from .philox import philox4x32, random_bits
from .rounding import PEAK, QMAX, dequantise, quantise, round_to
from .ssu import selective_state_update, ssu_step

__all__ = [
    "PEAK",
    "QMAX",
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "delta_gates",
    "delta_step",
    "dequantise",
    "gated_delta_rule_decode",
    "philox4x32",
    "quantise",
    "random_bits",
    "round_to",
    "selective_state_update",
    "ssu_step",
]
