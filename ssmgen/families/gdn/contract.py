"""The tensor contract of gated_delta_rule_decode, stated once for the op, its fake, the kernel
handle and the reference.
"""

from __future__ import annotations

import math
import struct
from functools import partial
from typing import Any

import torch

from ...config import dtype_name
from ...errors import ArgumentTypeError
from ..base import Layout
from ..contract import (
    MAX_BATCH,
    allow_dtypes,
    check_columns,
    check_devices,
    check_given,
    check_heads,
    check_pad,
    check_plain,
    check_seed,
    check_switches,
    dtype_of,
    fail,
    sequences,
    tokens_of,
)
from .config import FLOATS, GdnConfig
from .strides import POOLS, aligned, check_strides

__all__ = ["ABI_TENSORS", "check", "check_dtypes", "layout", "normalise", "number"]

# Tensor arguments in ABI order; absent ones are left out.
ABI_TENSORS = (
    "state",
    "q",
    "k",
    "v",
    "A_log",
    "a",
    "dt_bias",
    "b",
    "g",
    "beta",
    "out",
    "state_batch_indices",
    "dst_state_batch_indices",
    "rand_seed",
    "intermediate_states_buffer",
    "intermediate_state_indices",
    "cu_seqlens",
    "num_accepted_tokens",
)
PER_ROW = ("q", "k", "v", "a", "b", "g", "beta", "out")


def normalise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views of the arguments with one axis of value heads, and tokens where a row has several.

    Heads in groups, (..., H, HV / H, ...), become one axis of HV where strides allow it. A call of
    one token a row loses its token axis, and its 2-D index tables become their column 0. No
    address changes.
    """
    views = dict(tensors)
    state, q = tensors["state"], tensors["q"]
    if state.dim() != 4:
        fail("state", f"{state.dim()} dimensions", "(slots, HV, V, K)")
    if q.dim() not in (3, 4):
        fail("q", f"shape {tuple(q.shape)}", "(batch, H, K), (batch, tokens, H, K), or with "
             "cu_seqlens (tokens, H, K)")  # fmt: skip
    heads, value_heads, lead = q.shape[-2], state.shape[1], q.dim() - 2
    if not heads or value_heads % heads:
        fail("q", f"{heads} heads", f"a divisor of the {value_heads} value heads of state")
    groups = (heads, value_heads // heads)
    for name, own in (("v", 1), ("a", 0), ("b", 0), ("g", 0), ("beta", 0)):
        if name in views:
            views[name] = _ungrouped(name, views[name], lead, own, groups, state.shape[-1])
    many = "cu_seqlens" in tensors or (lead == 2 and q.shape[1] != 1)
    if lead == 2 and not many:
        for name in PER_ROW:
            if name in views:
                if views[name].dim() < 3 or views[name].shape[1] != 1:
                    fail(name, f"shape {tuple(views[name].shape)}", "one token, as in q")
                views[name] = views[name][:, 0]
    for name in ("state_batch_indices", "dst_state_batch_indices"):
        table = views.get(name)
        if table is None or table.dim() != 2 or not table.shape[1]:
            continue
        keep = "num_accepted_tokens" in tensors if name[0] == "s" else many and table.shape[1] > 1
        if not keep:
            views[name] = table[:, 0]
    return views


def _ungrouped(
    name: str, tensor: torch.Tensor, lead: int, own: int, groups: tuple[int, int], k_dim: int
) -> torch.Tensor:
    """`tensor` with its heads along one axis, if they are along two that step alike."""
    if name in ("a", "g") and tensor.dim() > lead + 1:
        own = int(tensor.shape[-1] == k_dim and tuple(tensor.shape[lead:]) != groups)
    if tensor.dim() != lead + 2 + own or tuple(tensor.shape[lead : lead + 2]) != groups:
        return tensor
    group, head = tensor.stride()[lead : lead + 2]
    alike = 1 in groups or group == groups[1] * head
    return tensor.flatten(lead, lead + 1) if alike else tensor


def check(
    tensors: dict[str, torch.Tensor],
    *,
    lower_bound: float | None,
    use_qk_l2norm: bool,
    disable_state_update: bool,
    philox_rounds: int,
    algorithm: str,
    pdl: bool,
    cache_steps: int = 0,
) -> GdnConfig:
    """Check normalised arguments; the config they ask for. Reads no tensor data."""
    state, q = tensors["state"], tensors["q"]
    check_plain(tensors)
    slots, value_heads, v_dim, k_dim = state.shape
    for axis, size in (("V", v_dim), ("K", k_dim)):
        if size % 8 or not 8 <= size <= 256:
            fail("state", f"{axis} {size}", "8 to 256 in multiples of 8")
    lead = tokens_of("q", tensors, cache_steps, "H, K")
    heads = q.shape[-2]
    batch, ntokens = lead[0], lead[1] if len(lead) == 2 else 1
    seqlens = tensors.get("cu_seqlens")
    if seqlens is not None:
        batch, ntokens = sequences(seqlens), cache_steps
    given = "g" in tensors
    decay, beta = ("g", "beta") if given else ("a", "b")
    groups = (heads, value_heads // heads)
    own = {"v": 1, decay: 0, beta: 0}
    grouped = [n for n in own if _is_grouped(tensors[n], len(lead), own[n], groups)]
    kda = tensors[decay].dim() == len(lead) + 2 + (decay in grouped)

    def row(name: str, *own: int) -> tuple[int, ...]:
        at = groups if name in grouped else (value_heads,)
        return (*lead, *at, *own)

    channels = (k_dim,) if kda else ()
    shapes: dict[str, tuple[int, ...]] = {
        "q": (*lead, heads, k_dim),
        "k": (*lead, heads, k_dim),
        "v": row("v", v_dim),
        "A_log": (value_heads,),
        decay: row(decay, *channels),
        "dt_bias": (value_heads, *channels),
        beta: row(beta),
        "out": (*lead, value_heads, v_dim),
        "state_batch_indices": (batch,),
        "dst_state_batch_indices": (batch,),
        "intermediate_state_indices": (batch,),
        "num_accepted_tokens": (batch,),
    }
    buffer = tensors.get("intermediate_states_buffer")
    if buffer is not None:
        shapes["intermediate_states_buffer"] = _buffer_shape(tensors, batch, ntokens)
    check_columns(tensors, shapes, batch, ntokens)
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            fail(name, f"shape {tuple(tensors[name].shape)}", str(shape))
    check_seed(tensors.get("rand_seed"))
    if batch > MAX_BATCH:
        fail("q" if seqlens is None else "cu_seqlens", f"batch {batch}", f"at most {MAX_BATCH}")
    check_heads("state", value_heads, heads)
    if "state_batch_indices" not in tensors:
        for name in ("dst_state_batch_indices", "num_accepted_tokens"):
            if name in tensors:
                fail(name, "a tensor", "None without state_batch_indices")
        if slots < batch:
            fail("state", f"{slots} slots", f"at least {batch}, one a row, without indices")
    check_dtypes(tensors)
    order = check_strides(tensors)
    check_devices(tensors, "state")

    dtype = partial(dtype_of, tensors)
    has_dst = "dst_state_batch_indices" in tensors and not disable_state_update
    stochastic = "rand_seed" in tensors and not (disable_state_update and buffer is None)
    return GdnConfig(
        dtype=dtype_name(q.dtype),
        state_dtype=dtype_name(state.dtype),
        state_layout=order,
        rounding="stochastic" if stochastic else "nearest",
        philox_rounds=philox_rounds if stochastic else 0,
        head_k_dim=k_dim,
        head_v_dim=v_dim,
        gate="given" if given else "softplus" if lower_bound is None else "bounded",
        kda=kda,
        a_dtype=dtype_name(tensors[decay].dtype),
        b_dtype=dtype_name(tensors[beta].dtype),
        a_log_dtype=dtype("A_log") or "fp32",
        has_dt_bias="dt_bias" in tensors,
        dt_bias_dtype=dtype("dt_bias") or "fp32",
        use_qk_l2norm=use_qk_l2norm,
        grouped=bool(grouped),
        ntokens=ntokens,
        algorithm=algorithm,
        index_dtype=dtype("state_batch_indices"),
        has_dst=has_dst,
        update_state=not disable_state_update,
        aligned=aligned(tensors),
        pdl=pdl,
        seqlens_dtype=dtype("cu_seqlens"),
        accepted_dtype=dtype("num_accepted_tokens"),
        dst_tokens=has_dst and ntokens > 1 and tensors["dst_state_batch_indices"].dim() == 2,
        has_intermediate=buffer is not None,
        entry_dtype=dtype("intermediate_state_indices"),
    )


def _is_grouped(tensor: torch.Tensor, lead: int, own: int, groups: tuple[int, int]) -> bool:
    """Whether a normalised tensor has its heads along two axes."""
    return tensor.dim() >= lead + 2 + own and tuple(tensor.shape[lead : lead + 2]) == groups


def _buffer_shape(tensors: dict[str, torch.Tensor], batch: int, ntokens: int) -> tuple[int, ...]:
    buffer, state = tensors["intermediate_states_buffer"], tensors["state"]
    wanted = f"(entries, at least {ntokens}, {', '.join(map(str, state.shape[1:]))})"
    if buffer.dim() != 5 or buffer.shape[1] < ntokens:
        fail("intermediate_states_buffer", f"shape {tuple(buffer.shape)}", wanted)
    if "intermediate_state_indices" not in tensors and buffer.shape[0] < batch:
        fail("intermediate_states_buffer", f"{buffer.shape[0]} entries", f"at least {batch}, one a "
             "row, without intermediate_state_indices")  # fmt: skip
    return (*buffer.shape[:2], *state.shape[1:])


def check_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    """Each argument has a dtype that the kernels have."""
    allow = partial(allow_dtypes, tensors)
    allow("q", FLOATS)
    for name in ("k", "v", "out"):
        allow(name, (dtype_name(tensors["q"].dtype),), " (that of q)")
    for name in ("state", "A_log", "a", "dt_bias", "b", "g", "beta"):
        allow(name, FLOATS)
    allow("intermediate_states_buffer", (dtype_name(tensors["state"].dtype),), " (that of state)")
    allow("state_batch_indices", ("int32", "int64"))
    if "dst_state_batch_indices" in tensors:
        index = dtype_name(tensors["state_batch_indices"].dtype)
        allow("dst_state_batch_indices", (index,), " (that of state_batch_indices)")
    for name in ("intermediate_state_indices", "cu_seqlens", "num_accepted_tokens"):
        allow(name, ("int32", "int64"))
    if "rand_seed" in tensors and tensors["state"].dtype == torch.float32:
        raise ArgumentTypeError("rand_seed: given with an fp32 state, which is not rounded")


def number(name: str, value: Any, allowed: str = "a finite number") -> float:
    """A real number that fp32 holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name}: found {value!r}; allowed: {allowed}")
    if not math.isfinite(value) or abs(value) > torch.finfo(torch.float32).max:
        fail(name, value, allowed)
    return float(value)


def layout(
    *,
    scale: float | None = None,
    lower_bound: float | None = None,
    use_qk_l2norm: bool = True,
    pad_slot_id: int = -1,
    disable_state_update: bool = False,
    philox_rounds: int = 10,
    algorithm: str = "auto",
    pdl: bool = False,
    cache_steps: int = 0,
    **arguments: torch.Tensor | None,
) -> Layout:
    """Check the arguments of one call and describe them for a launch. ``out`` is required."""
    gates = ("A_log", "a", "dt_bias", "b")
    ready = any(arguments.get(n) is not None for n in ("g", "beta"))
    needed = ("g", "beta") if ready else ("A_log", "a", "b")
    given = check_given(arguments, ABI_TENSORS, ("state", "q", "k", "v", *needed, "out"))
    if ready:
        for name in gates:
            if name in given:
                fail(name, "a tensor", "None with g and beta")
    check_switches(use_qk_l2norm=use_qk_l2norm, pdl=pdl, disable_state_update=disable_state_update)
    check_pad(pad_slot_id)
    if lower_bound is not None:
        if ready:
            fail("lower_bound", lower_bound, "None with g and beta")
        if number("lower_bound", lower_bound, "a negative number") >= 0:
            fail("lower_bound", lower_bound, "a negative number")
    views = normalise(given)
    config = check(
        views,
        lower_bound=lower_bound,
        use_qk_l2norm=use_qk_l2norm,
        disable_state_update=disable_state_update,
        philox_rounds=philox_rounds,
        algorithm=algorithm,
        pdl=pdl,
        cache_steps=cache_steps,
    )
    used = set(given)
    if config.rounding != "stochastic":
        used.discard("rand_seed")
    if not config.has_dst:
        used.discard("dst_state_batch_indices")
    seqlens = views.get("cu_seqlens")
    values = {
        "pad_slot_id": pad_slot_id,
        "scale_bits": _bits(config.head_k_dim**-0.5 if scale is None else number("scale", scale)),
    }
    if lower_bound is not None:
        values["lower_bound_bits"] = _bits(lower_bound)
    return Layout(
        config=config,
        tensors=tuple(name for name in ABI_TENSORS if name in used),
        scalars=_scalars(config, views, values),
        batch=views["q"].shape[0] if seqlens is None else seqlens.shape[0] - 1,
        nheads=views["state"].shape[1],
    )


def _bits(value: float) -> int:
    """fp32 as the integer of its bits: a kernel's scalars are integers."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


# Which tensor an integer argument speaks of, by its name without axis and "stride".
_STRIDED = {
    "slots": "state_batch_indices",
    "dst_slots": "dst_state_batch_indices",
    "buffer": "intermediate_states_buffer",
    "entries": "intermediate_state_indices",
    "accepted": "num_accepted_tokens",
}


def _scalars(
    config: GdnConfig, views: dict[str, torch.Tensor], values: dict[str, int]
) -> tuple[int, ...]:
    """The integer arguments, in the order of `Gdn.arguments`, which names them."""
    from . import FAMILY

    heads, value_heads = views["q"].shape[-2], views["state"].shape[1]
    axes = {"slot": 0, "row": 0, "entry": 0, "token": 1, "column": 1, "channel": -1}
    # The axis of heads, from behind; with groups of them it is the inner one of two.
    head_axes = {"state": 1, "intermediate_states_buffer": 2, "dt_bias": 0, "q": -2, "k": -2,
                 "v": -2, "out": -2, "a": -1 - config.kda, "g": -1 - config.kda, "b": -1,
                 "beta": -1}  # fmt: skip

    def stride(argument: str) -> int:
        name = argument.removesuffix("_stride")
        if name in _STRIDED or name == "A_log":
            return views[_STRIDED.get(name, name)].stride(0)
        name, _, axis = name.rpartition("_")
        name = _STRIDED.get(name, name)
        tensor = views[name]
        at = head_axes[name] if axis == "head" else axes[axis]
        if axis == "token" and config.seqlens_dtype and name not in POOLS:
            at = 0
        return tensor.stride(at) if tensor.shape[at] > 1 else 0

    def group_step(name: str) -> int:
        tensor, at = views[name], head_axes[name]
        lead = 1 if config.seqlens_dtype or config.ntokens == 1 else 2
        if not _is_grouped(tensor, lead, int(at < -1), (heads, value_heads // heads)):
            return 0
        return tensor.stride(at - 1) - tensor.shape[at] * tensor.stride(at)

    values["group_recip"] = -(-(2**31) // (value_heads // heads))
    if config.accepted_dtype:
        values["slots_width"] = views["state_batch_indices"].shape[1]
    if config.seqlens_dtype:
        values["total"] = views["q"].shape[0]
    integers = [a.name for a in FAMILY.arguments(config) if not a.pointer]
    return tuple(
        values[a]
        if a in values
        else group_step(a.removesuffix("_group_step"))
        if a.endswith("_group_step")
        else stride(a)
        for a in integers
    )
