"""How the tensors of a call must lie in memory."""

from __future__ import annotations

import torch

from ..contract import check_memory, fail

__all__ = ["POOLS", "aligned", "check_strides"]

POOLS = ("state", "intermediate_states_buffer")


def check_strides(tensors: dict[str, torch.Tensor]) -> str:
    """Packed inner axes, spans that fit the kernel's integers, nothing written twice; the layout
    of a head's state."""
    v_dim, k_dim = tensors["state"].shape[-2:]
    layouts: dict[tuple[int, ...], str] = {(k_dim, 1): "VK", (1, v_dim): "KV"}
    order = layouts.get(tensors["state"].stride()[-2:])
    if order is None:
        fail("state", f"strides {tensors['state'].stride()}", f"inner strides ({k_dim}, 1), or of "
             f"a transposed (K, V) pool (1, {v_dim}); the others are free")  # fmt: skip
    buffer = tensors.get("intermediate_states_buffer")
    if buffer is not None and layouts.get(buffer.stride()[-2:]) != order:
        fail("intermediate_states_buffer", f"strides {buffer.stride()}",
             f"inner strides {tensors['state'].stride()[-2:]}, those of state")  # fmt: skip
    for name in ("q", "k", "v", "out"):
        if tensors[name].stride(-1) != 1:
            fail(name, f"strides {tensors[name].stride()}", "a last stride of 1; the others are "
                 "free")  # fmt: skip
    seqlens = tensors.get("cu_seqlens")
    if seqlens is not None and len(seqlens) > 1 and seqlens.stride(0) != 1:
        fail("cu_seqlens", f"strides {seqlens.stride()}", "a stride of 1")
    check_memory(tensors, POOLS, ("out", *POOLS))
    return order  # type: ignore[return-value]


def aligned(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether what a kernel loads or stores 16 bytes at a time starts and steps so."""
    for name in (*POOLS, "q", "k"):
        if name in tensors:
            tensor = tensors[name]
            outer = tensor.dim() - (2 if name in POOLS else 1)
            steps = zip(tensor.stride()[:outer], tensor.shape)
            size = tensor.element_size()
            if tensor.data_ptr() % 16 or any(s * size % 16 for s, n in steps if n > 1):
                return False
    return True
