"""How the tensors of a call must lie in memory, and what their strides say of the kernel."""

from __future__ import annotations

import torch

from ..contract import check_memory, fail

__all__ = ["addresses_aligned", "check_strides", "strides_aligned", "tied"]


POOLS = ("state", "state_scale", "intermediate_states_buffer", "intermediate_state_scales")


def check_strides(tensors: dict[str, torch.Tensor], dim: int, dstate: int) -> None:
    """Packed inner axes, spans that fit the kernel's integers, nothing written twice."""

    def packed(name: str, strides: tuple[int, ...], what: str) -> None:
        tensor = tensors.get(name)
        if tensor is None:
            return
        count = len(strides)
        for axis in range(1, count + 1):
            if tensor.shape[-axis] > 1 and tensor.stride(-axis) != strides[-axis]:
                fail(name, f"strides {tensor.stride()}", what)

    packed("state", (dim * dstate, dstate, 1), f"inner strides ({dim * dstate}, {dstate}, 1); the "
           "slot stride is free")  # fmt: skip
    packed("state_scale", (dim, 1), f"inner strides ({dim}, 1); the slot stride is free")
    packed("intermediate_states_buffer", (dim * dstate, dstate, 1), f"inner strides "
           f"({dim * dstate}, {dstate}, 1); those of entries and tokens are free")  # fmt: skip
    packed("intermediate_state_scales", (dim, 1), f"inner strides ({dim}, 1); those of entries and "
           "tokens are free")  # fmt: skip
    for name in ("x", "z", "out", "B", "C", "cu_seqlens", "parent_tokens"):
        packed(name, (1,), "a last stride of 1; the others are free")
    check_memory(tensors, POOLS, ("out", *POOLS))


def tied(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether dt, A, D and dt_bias hold one value per head."""
    inner = [tensors[n].stride(-1) for n in ("dt", "D", "dt_bias") if n in tensors]
    return not any((*inner, *tensors["A"].stride()[-2:]))


def _aligned_tensors(tensors: dict[str, torch.Tensor]) -> tuple[str, ...]:
    names = ("state", "x", "B", "C", "intermediate_states_buffer", "A")
    return tuple(n for n in names if n in tensors and not (n == "A" and tied(tensors)))


def strides_aligned(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether what a kernel loads or stores 16 bytes at a time steps by multiples of 16."""
    for name in _aligned_tensors(tensors):
        tensor = tensors[name]
        strides = tensor.stride()
        outer = {"state": 1, "intermediate_states_buffer": 2}.get(name, tensor.dim() - 1)
        if any(
            s * tensor.element_size() % 16 for s, n in zip(strides[:outer], tensor.shape) if n > 1
        ):
            return False
        if name == "A" and strides[-1] != 1:
            return False
    return True


def addresses_aligned(tensors: dict[str, torch.Tensor]) -> bool:
    """The same of where they start."""
    return not any(tensors[name].data_ptr() % 16 for name in _aligned_tensors(tensors))
