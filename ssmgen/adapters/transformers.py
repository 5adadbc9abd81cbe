"""transformers' gated delta nets (Qwen3-Next and its kin) on ssmgen's kernels.

    from transformers.models.qwen3_next import modeling_qwen3_next
    from ssmgen.adapters.transformers import use

    use(modeling_qwen3_next)

Decoding then takes `ssmgen.causal_conv1d_update` and `ssmgen.gated_delta_rule_decode`, and updates
the states of transformers' cache in place; prefill takes `ssmgen.causal_conv1d_fn` and keeps
transformers' chunked rule. Names and arguments are those of transformers 5.17.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from ..errors import UnsupportedError
from ..ops import conv1d
from .fla import fused_recurrent_gated_delta_rule

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "torch_recurrent_gated_delta_rule", "use"]

Tensor = torch.Tensor


def use(modeling: ModuleType) -> list[str]:
    """Have a modeling module of transformers call the functions of this one; returns their names.

    Raises `UnsupportedError` if the module calls none of them.
    """
    here = (causal_conv1d_update, causal_conv1d_fn, torch_recurrent_gated_delta_rule)
    found = [function for function in here if hasattr(modeling, function.__name__)]
    if not found:
        names = ", ".join(function.__name__ for function in here)
        raise UnsupportedError(f"{modeling.__name__}: has none of {names}")
    for function in found:
        setattr(modeling, function.__name__, function)
    return [function.__name__ for function in found]


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """(batch, dim, tokens) convolved with the past in conv_state (batch, dim, state_len), whose
    last columns are the newest; updated in place."""
    return conv1d.causal_conv1d_update(
        hidden_states, conv_state, weight, bias, activation, alignment="right"
    )


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """(batch, dim, tokens) convolved from zeros. Raises `UnsupportedError` for packed sequences.

    kwargs are all those of the model's call, as transformers hands them on; none is read.
    """
    if seq_idx is not None:
        raise UnsupportedError("seq_idx: given; allowed: None")
    return conv1d.causal_conv1d_fn(hidden_states, weight, bias, activation=activation)


def torch_recurrent_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule token by token; the final state is `initial_state`, updated in place.

    kwargs are all those of the model's call, as transformers hands them on; none is read.
    """
    return fused_recurrent_gated_delta_rule(
        query,
        key,
        value,
        g=g,
        beta=beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        inplace_final_state=output_final_state and initial_state is not None,
    )
