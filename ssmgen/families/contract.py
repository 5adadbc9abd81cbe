"""What the tensor contracts of all families share: each check stated once, with its message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..config import dtype_name
from ..errors import ArgumentTypeError, ArgumentValueError, DeviceError

__all__ = [
    "MAX_BATCH",
    "allow_dtypes",
    "check_columns",
    "check_devices",
    "check_given",
    "check_heads",
    "check_memory",
    "check_pad",
    "check_plain",
    "check_seed",
    "check_switches",
    "dtype_of",
    "fail",
    "overlaps_itself",
    "sequences",
    "share_memory",
    "tokens_of",
]

Tensors = Mapping[str, torch.Tensor]

# Programs along y.
MAX_BATCH = 65535


def fail(name: str, found: Any, allowed: str) -> None:
    """Raise the `ArgumentValueError` all arguments share."""
    raise ArgumentValueError(f"{name}: found {found}; allowed: {allowed}")


def check_given(
    arguments: Mapping[str, Any], known: Iterable[str], required: Iterable[str]
) -> dict[str, torch.Tensor]:
    """The arguments that are not None; all are known tensors, none that is required is missing."""
    known = tuple(known)
    for name in arguments:
        if name not in known:
            raise ArgumentTypeError(f"{name}: not an argument; allowed: {', '.join(known)}")
    given = {n: t for n, t in arguments.items() if t is not None}
    for name in required:
        if name not in given:
            raise ArgumentTypeError(f"{name}: missing")
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise ArgumentTypeError(f"{name}: found {type(value).__name__}; allowed: a tensor")
    return given


def check_switches(**switches: Any) -> None:
    """Each is a bool."""
    for name, switch in switches.items():
        if not isinstance(switch, bool):
            raise ArgumentTypeError(f"{name}: found {switch!r}; allowed: True, False")


def check_pad(pad_slot_id: Any) -> None:
    """It is an int64."""
    if isinstance(pad_slot_id, bool) or not isinstance(pad_slot_id, int):
        raise ArgumentTypeError(f"pad_slot_id: found {pad_slot_id!r}; allowed: an int")
    if not -(2**63) <= pad_slot_id < 2**63:
        fail("pad_slot_id", pad_slot_id, "an int64")


def check_plain(tensors: Tensors) -> None:
    """Memory holds the values of every tensor, at its strides."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise ArgumentTypeError(f"{name}: found layout {tensor.layout}; allowed: strided")
        if tensor.is_neg() or tensor.is_conj():
            fail(name, "a lazily negated view", "a tensor whose memory holds its values; use "
                 ".resolve_neg()")  # fmt: skip


def check_devices(tensors: Tensors, leader: str) -> None:
    """All are where `leader` is."""
    device = tensors[leader].device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise DeviceError(f"{name}: on {tensor.device}; allowed: {device}, as {leader}")


def tokens_of(name: str, tensors: Tensors, cache_steps: Any, axes: str) -> tuple[int, ...]:
    """The leading axes of `name`, whose own axes are the two called `axes`, checked."""
    tensor = tensors[name]
    if isinstance(cache_steps, bool) or not isinstance(cache_steps, int):
        raise ArgumentTypeError(f"cache_steps: found {cache_steps!r}; allowed: an int")
    shape = tuple(tensor.shape)
    if "cu_seqlens" in tensors:
        if tensor.dim() != 3:
            fail(name, f"shape {shape}", f"(tokens, {axes}) with cu_seqlens")
        if cache_steps < 1:
            fail("cache_steps", cache_steps, "at least 1, the most tokens of a sequence, with "
                 "cu_seqlens")  # fmt: skip
        return (shape[0],)
    if tensor.dim() not in (3, 4):
        fail(name, f"shape {shape}", f"(batch, {axes}) or (batch, tokens, {axes})")
    lead = shape[:-2]
    ntokens = lead[1] if len(lead) == 2 else 1
    if ntokens < 1:
        fail(name, "0 tokens", "at least one")
    if cache_steps and cache_steps < ntokens:
        fail("cache_steps", cache_steps, f"0, or at least the {ntokens} tokens of {name}")
    return lead


def sequences(seqlens: torch.Tensor) -> int:
    """How many sequences `cu_seqlens` holds."""
    if seqlens.dim() != 1 or not seqlens.shape[0]:
        fail("cu_seqlens", f"shape {tuple(seqlens.shape)}", "(sequences + 1,)")
    return seqlens.shape[0] - 1


def check_columns(
    tensors: Tensors, shapes: dict[str, tuple[int, ...]], batch: int, ntokens: int
) -> None:
    """2-D index tables: one more column is no harm, one too few is. Their shapes go to `shapes`."""
    source = tensors.get("state_batch_indices")
    if "num_accepted_tokens" in tensors and source is not None:
        if source.dim() != 2 or not source.shape[1]:
            fail("state_batch_indices", f"shape {tuple(source.shape)}", f"({batch}, columns), the "
                 "slot after each token, with num_accepted_tokens")  # fmt: skip
        shapes["state_batch_indices"] = (batch, source.shape[1])
    target = tensors.get("dst_state_batch_indices")
    if target is not None and target.dim() == 2:
        if target.shape[1] < ntokens:
            fail("dst_state_batch_indices", f"shape {tuple(target.shape)}", f"({batch},), "
                 f"({batch}, 1) or ({batch}, at least {ntokens})")  # fmt: skip
        shapes["dst_state_batch_indices"] = (batch, target.shape[1])
    if "intermediate_states_buffer" not in tensors:
        for name in ("intermediate_state_indices", "intermediate_state_scales"):
            if name in tensors:
                fail(name, "a tensor", "None without intermediate_states_buffer")


def check_seed(seed: torch.Tensor | None) -> None:
    """`rand_seed` is one int64."""
    if seed is not None and (seed.numel() != 1 or seed.dtype != torch.int64):
        kind = ArgumentTypeError if seed.dtype != torch.int64 else ArgumentValueError
        raise kind(
            f"rand_seed: found {seed.dtype} of shape {tuple(seed.shape)}; allowed: one int64"
        )


def check_heads(name: str, nheads: int, ngroups: int) -> None:
    """The heads are few enough for the reciprocal that finds the group of a head exactly."""
    if 2 * nheads * (nheads // ngroups) >= 2**31:
        fail(name, f"{nheads} heads in {ngroups} groups", "2 heads^2 / groups below 2^31")


def dtype_of(tensors: Tensors, name: str) -> str | None:
    """The short name of an argument's dtype; None without the argument."""
    return dtype_name(tensors[name].dtype) if name in tensors else None


def allow_dtypes(tensors: Tensors, name: str, allowed: tuple[str, ...], why: str = "") -> None:
    """The argument, if given, has one of these dtypes."""
    if name in tensors:
        found = str(tensors[name].dtype).removeprefix("torch.")
        try:
            known = dtype_name(found) in allowed
        except ValueError:
            known = False
        if not known:
            names = ", ".join(allowed)
            raise ArgumentTypeError(f"{name}: found dtype {found}; allowed: {names}{why}")


def check_memory(tensors: Tensors, pools: Iterable[str], written: Iterable[str]) -> None:
    """Spans fit the kernel's integers (those of `pools` are free), and nothing is written twice."""
    pools, written = tuple(pools), tuple(written)
    for name, tensor in tensors.items():
        span = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape) if n)
        if name not in pools and span >= 2**31:
            fail(name, f"strides {tensor.stride()}", "a span below 2^31 elements")
        if any(s < 0 for s in tensor.stride()):
            fail(name, f"strides {tensor.stride()}", "no negative stride")
        if name in written and overlaps_itself(tensor):
            fail(name, f"strides {tensor.stride()}", "elements that share no memory")


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie at one address, by the axes from the innermost out."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether elements of two tensors lie at one address.

    Exact where both have the same strides, as two views of one buffer have; where they differ, two
    tensors whose ranges meet are taken to share some.
    """
    if a.is_meta or b.is_meta or not a.numel() or not b.numel():
        return False
    axes = [(t.stride(), t.shape) for t in (a, b)]
    first, last = (
        sum(s * (n - 1) for s, n in zip(*of)) * t.element_size() for t, of in zip((a, b), axes)
    )
    apart = b.data_ptr() - a.data_ptr()
    if apart > first or -apart > last:
        return False
    steps = [{s: n for s, n in zip(*of) if n > 1} for of in axes]
    if steps[0].keys() != steps[1].keys() or apart % a.element_size():
        return True
    # From the outermost axis in: what is left must be within reach of the axes that are left.
    left = {apart // a.element_size()}
    reach = sum(s * (max(o[s] for o in steps) - 1) for s in steps[0])
    for step in sorted(steps[0], reverse=True):
        reach -= step * (max(o[step] for o in steps) - 1)
        low, high = 1 - steps[1][step], steps[0][step] - 1
        left = {
            rest - k * step
            for rest in left
            for k in {rest // step, rest // step + 1}
            if low <= k <= high and abs(rest - k * step) <= reach
        }
    return 0 in left
