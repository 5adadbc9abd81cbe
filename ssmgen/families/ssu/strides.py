"""How the tensors of a call must lie in memory, and what their strides say of the kernel."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ArgumentValueError

__all__ = ["addresses_aligned", "check_strides", "fail", "strides_aligned", "tied"]


def fail(name: str, found: Any, allowed: str) -> None:
    """Raise the `ArgumentValueError` all arguments share."""
    raise ArgumentValueError(f"{name}: found {found}; allowed: {allowed}")


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
    for name, tensor in tensors.items():
        span = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape) if n)
        if name not in POOLS and span >= 2**31:
            fail(name, f"strides {tensor.stride()}", "a span below 2^31 elements")
        if any(s < 0 for s in tensor.stride()):
            fail(name, f"strides {tensor.stride()}", "no negative stride")
        if name in ("out", *POOLS) and _overlaps_itself(tensor):
            fail(name, f"strides {tensor.stride()}", "elements that share no memory")


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie at one address, by the axes from the innermost out."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


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
