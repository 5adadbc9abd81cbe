"""q, k and v as views of one tensor, as a convolution leaves them."""

from __future__ import annotations

import torch

from ...errors import ArgumentTypeError
from ..contract import fail

__all__ = ["split_qkv"]


def split_qkv(
    packed: torch.Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    packing: str = "flat",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of a packed ``q | k | v`` for `gated_delta_rule_decode`; nothing is copied.

    Args:
        packed: (..., width), any strides with a last one of 1.
        num_k_heads, num_v_heads: H of q and k, HV of v; H divides HV.
        head_k_dim, head_v_dim: K and V.
        packing: ``flat``: all of q, all of k, all of v, heads in order, and what follows is left
            alone. ``interleaved``: for each of the H key heads its q, its k and its HV / H value
            heads, and what follows in the share of that head (such as z) is left alone.

    Returns:
        q and k (..., H, K), and v (..., HV, V), or with ``interleaved`` (..., H, HV / H, V).

    Raises:
        ArgumentTypeError, ArgumentValueError: the width cannot hold the heads, or `packing` is
            another.
    """
    if not isinstance(packed, torch.Tensor):
        raise ArgumentTypeError(f"packed: found {type(packed).__name__}; allowed: a tensor")
    for name, count in (("num_k_heads", num_k_heads), ("num_v_heads", num_v_heads)):
        if count < 1:
            fail(name, count, "1 or more")
    if num_v_heads % num_k_heads:
        fail("num_v_heads", num_v_heads, f"a multiple of num_k_heads, {num_k_heads}")
    ratio, width = num_v_heads // num_k_heads, packed.shape[-1]
    if packing == "interleaved":
        least = 2 * head_k_dim + ratio * head_v_dim
        if width % num_k_heads or width // num_k_heads < least:
            fail("packed", f"width {width}", f"a multiple of {num_k_heads} heads of at least "
                 f"{least}")  # fmt: skip
        heads = packed.unflatten(-1, (num_k_heads, width // num_k_heads))
        q, k, v, _ = heads.split(
            (head_k_dim, head_k_dim, ratio * head_v_dim, heads.shape[-1] - least), dim=-1
        )
        return q, k, v.unflatten(-1, (ratio, head_v_dim))
    if packing != "flat":
        fail("packing", repr(packing), "'flat', 'interleaved'")
    keys, values = num_k_heads * head_k_dim, num_v_heads * head_v_dim
    if width < 2 * keys + values:
        fail("packed", f"width {width}", f"at least {2 * keys + values}")
    q, k, v, _ = packed.split((keys, keys, values, width - 2 * keys - values), dim=-1)
    return (
        q.unflatten(-1, (num_k_heads, head_k_dim)),
        k.unflatten(-1, (num_k_heads, head_k_dim)),
        v.unflatten(-1, (num_v_heads, head_v_dim)),
    )
