"""The tensor contract of causal_conv1d_update and causal_conv1d_fn, stated once for the ops, their
fakes, the kernel handle and the reference.
"""

from __future__ import annotations

import functools

import torch

from ...config import dtype_name
from ...errors import ArgumentTypeError
from ..base import Layout
from ..contract import (
    MAX_BATCH,
    allow_dtypes,
    check_devices,
    check_given,
    check_memory,
    check_pad,
    check_plain,
    check_switches,
    dtype_of,
    fail,
    share_memory,
)
from .config import FLOATS, MAX_DEPTH, Conv1dConfig

__all__ = ["ABI_TENSORS", "ALIGNABLE", "ALIGNMENTS", "check_dtypes", "layout", "normalise"]

# Tensor arguments in ABI order; absent ones are left out.
ABI_TENSORS = (
    "x",
    "conv_state",
    "initial_states",
    "weight",
    "bias",
    "out",
    "conv_state_indices",
    "dst_state_indices",
    "has_initial_state",
    "query_start_loc",
    "num_accepted_tokens",
    "cache_seqlens",
)
# Those whose address says, with that of all others, which kernel a call takes.
ALIGNABLE = ("x", "conv_state", "initial_states", "weight", "bias", "out")
ALIGNMENTS = ("left", "right", "circular")
ACTIVATIONS = {None: None, "silu": "silu", "swish": "silu"}

Tensors = dict[str, torch.Tensor]


def normalise(tensors: Tensors, *, prefill: bool) -> Tensors:
    """Views of the arguments: x and out as (batch, dim), (batch, tokens, dim) or, with
    query_start_loc, (tokens, dim); 2-D tables of slots as their column 0. No address changes.
    """
    views = dict(tensors)
    varlen = "query_start_loc" in tensors
    for name in ("x", "out"):
        if name not in views:
            continue
        view = views[name]
        if prefill:
            want = "(dim, tokens) with query_start_loc, or (batch, dim, tokens)"
            right = view.dim() == (2 if varlen else 3)
        else:
            want = "(tokens, dim)" if varlen else "(batch, dim) or (batch, dim, tokens)"
            right = view.dim() == 2 or (view.dim() == 3 and not varlen)
        if not right:
            fail(name, f"shape {tuple(view.shape)}", want)
        if view.dim() == 3 or prefill:
            view = view.transpose(-1, -2)
            # One token a row is a row; a kernel of its own serves it.
            views[name] = view[:, 0] if not prefill and view.shape[1] == 1 else view
    for name in ("conv_state_indices", "dst_state_indices"):
        table = views.get(name)
        if table is not None and table.dim() == 2 and table.shape[1]:
            views[name] = table[:, 0]
    return views


def check(
    tensors: Tensors,
    *,
    activation: str | None,
    alignment: str | None,
    pdl: bool,
    prefill: bool,
) -> Conv1dConfig:
    """Check normalised arguments; the config they ask for. Reads no tensor data."""
    x, weight = tensors["x"], tensors["weight"]
    check_plain(tensors)
    if weight.dim() != 2 or not 2 <= weight.shape[1] <= 6:
        fail("weight", f"shape {tuple(weight.shape)}", "(dim, width) with a width of 2 to 6")
    width, dim = weight.shape[1], x.shape[-1]
    if dim == 0:
        fail("x", "0 channels", "at least one")
    seqlens = tensors.get("query_start_loc")
    if seqlens is not None and (seqlens.dim() != 1 or not seqlens.shape[0]):
        fail("query_start_loc", f"shape {tuple(seqlens.shape)}", "(batch + 1,)")
    batch = x.shape[0] if seqlens is None else seqlens.shape[0] - 1
    if batch > MAX_BATCH and not prefill:
        fail("x" if seqlens is None else "query_start_loc", f"batch {batch}",
             f"at most {MAX_BATCH}")  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "weight": (dim, width),
        "bias": (dim,),
        "out": tuple(x.shape),
        "initial_states": (batch, dim, width - 1),
        **dict.fromkeys(("conv_state_indices", "dst_state_indices", "has_initial_state",
                         "num_accepted_tokens", "cache_seqlens"), (batch,)),
    }  # fmt: skip
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            fail(name, f"shape {tuple(tensors[name].shape)}", str(shape))
    depth = _window(tensors, batch, dim, width, alignment, prefill)
    check_dtypes(tensors)
    _check_strides(tensors)
    check_devices(tensors, "x")
    _check_apart(tensors, prefill or seqlens is not None or x.dim() == 3)
    initial = "initial_states" in tensors
    pool = "conv_state" in tensors
    past = not prefill or "has_initial_state" in tensors
    packed = _packed_channels(tensors)
    return Conv1dConfig(
        dtype=dtype_name(x.dtype),
        weight_dtype=dtype_name(weight.dtype),
        state_dtype=dtype_of(tensors, "initial_states" if initial else "conv_state"),
        index_dtype=dtype_of(tensors, "conv_state_indices"),
        width=width,
        depth=depth,
        has_bias="bias" in tensors,
        activation=ACTIVATIONS[activation],
        history="rows" if initial else "pool" if pool and past else None,
        update_state=pool,
        has_initial="has_initial_state" in tensors,
        has_dst="dst_state_indices" in tensors,
        many=prefill or seqlens is not None or x.dim() == 3,
        prefill=prefill,
        seqlens_dtype=dtype_of(tensors, "query_start_loc"),
        accepted_dtype=dtype_of(tensors, "num_accepted_tokens"),
        counts_dtype=dtype_of(tensors, "cache_seqlens"),
        packed_channels=packed,
        aligned=_aligned(tensors, packed),
        pdl=pdl,
    )


def _window(
    tensors: Tensors, batch: int, dim: int, width: int, alignment: str | None, prefill: bool
) -> int:
    """Columns of the window that move, after a check of everything that speaks of it."""
    state = tensors.get("conv_state")
    if alignment is not None and alignment not in ALIGNMENTS:
        fail("alignment", repr(alignment), ", ".join(ALIGNMENTS))
    if prefill:
        if "cache_seqlens" in tensors:
            fail("cache_seqlens", "a tensor", "None in causal_conv1d_fn")
        if "num_accepted_tokens" in tensors and "has_initial_state" not in tensors:
            fail("num_accepted_tokens", "a tensor", "None without has_initial_state")
        if alignment == "circular":
            fail("alignment", "'circular'", "left, right in causal_conv1d_fn")
        if "initial_states" in tensors and "has_initial_state" in tensors:
            fail("has_initial_state", "a tensor", "None with initial_states")
    else:
        for name in ("initial_states", "has_initial_state"):
            if name in tensors:
                fail(name, "a tensor", "None in causal_conv1d_update")
    if state is None:
        for name in ("conv_state_indices", "dst_state_indices", "has_initial_state"):
            if name in tensors:
                fail(name, "a tensor", "None without a conv_state")
        return width - 1
    if state.dim() != 3 or state.shape[1] != dim or state.shape[2] < width - 1:
        fail("conv_state", f"shape {tuple(state.shape)}", f"(slots, {dim}, at least {width - 1})")
    slots, _, state_len = state.shape
    if "conv_state_indices" not in tensors:
        if "dst_state_indices" in tensors:
            fail("dst_state_indices", "a tensor", "None without conv_state_indices")
        if slots < batch:
            fail("conv_state", f"{slots} slots", f"at least {batch}, one a row, without indices")
    if ("cache_seqlens" in tensors) != (alignment == "circular"):
        fail("alignment", repr(alignment), "'circular' with cache_seqlens, and only with it")
    if alignment is None and state_len > width - 1:
        fail("alignment", None, f"left, right or circular: a conv_state of {state_len} columns "
             f"says not which {width - 1} of them are the past")  # fmt: skip
    if alignment == "right" and state_len > MAX_DEPTH:
        fail("conv_state", f"{state_len} columns", f"at most {MAX_DEPTH} with alignment right")
    if alignment == "circular" and "dst_state_indices" in tensors:
        fail("dst_state_indices", "a tensor", "None with cache_seqlens: only new columns are "
             "written")  # fmt: skip
    if "num_accepted_tokens" in tensors:
        if alignment == "right":
            fail("alignment", "'right'", "left with num_accepted_tokens")
        if "cache_seqlens" in tensors:
            fail("cache_seqlens", "a tensor", "None with num_accepted_tokens")
        x = tensors["x"]
        if not prefill and x.dim() == 3 and x.shape[1] > state_len - width + 2:
            fail("x", f"{x.shape[1]} tokens a row", f"at most {state_len - width + 2} with "
                 f"num_accepted_tokens and a conv_state of {state_len} columns")  # fmt: skip
    return state_len if alignment == "right" else width - 1


def check_dtypes(tensors: Tensors) -> None:
    allow = functools.partial(allow_dtypes, tensors)
    allow("x", FLOATS)
    io = dtype_name(tensors["x"].dtype)
    allow("out", (io,), " (that of x)")
    allow("weight", FLOATS)
    allow("bias", (dtype_name(tensors["weight"].dtype),), " (that of weight)")
    for name in ("conv_state", "initial_states"):
        allow(name, tuple(dict.fromkeys((io, "fp32"))), ": what is stored must be the input itself")
    if "conv_state" in tensors:
        state = dtype_name(tensors["conv_state"].dtype)
        allow("initial_states", (state,), " (that of conv_state)")
    indices = ("int32", "int64")
    for name in ("conv_state_indices", "query_start_loc", "num_accepted_tokens", "cache_seqlens"):
        allow(name, indices)
    if "dst_state_indices" in tensors and "conv_state_indices" in tensors:
        index = dtype_name(tensors["conv_state_indices"].dtype)
        allow("dst_state_indices", (index,), " (that of conv_state_indices)")
    flags = tensors.get("has_initial_state")
    if flags is not None and flags.dtype != torch.bool:
        raise ArgumentTypeError(f"has_initial_state: found dtype {flags.dtype}; allowed: bool")


def _check_strides(tensors: Tensors) -> None:
    seqlens = tensors.get("query_start_loc")
    if seqlens is not None and len(seqlens) > 1 and seqlens.stride(0) != 1:
        fail("query_start_loc", f"strides {seqlens.stride()}", "a stride of 1")
    check_memory(tensors, ("conv_state",), ("out", "conv_state"))
    if (state := tensors.get("conv_state")) is not None:
        span = sum(s * (n - 1) for s, n in zip(state.stride()[1:], state.shape[1:]))
        if span >= 2**31:
            fail("conv_state", f"strides {state.stride()}", "slots that span below 2^31 elements")


def _check_apart(tensors: Tensors, many: bool) -> None:
    """No program reads of x what another one writes to out."""
    x, out = tensors["x"], tensors["out"]
    in_place = x.data_ptr() == out.data_ptr() and x.stride() == out.stride() and not many
    if not in_place and share_memory(x, out):
        fail("out", "memory of x", "memory of its own: a token is read for those after it"
             if many else "x itself, or memory of its own")  # fmt: skip


def _packed_channels(tensors: Tensors) -> bool:
    """Whether the channels of every window's column lie side by side."""
    windows = [tensors[n] for n in ("conv_state", "initial_states") if n in tensors]
    return all(w.stride(1) == 1 or w.shape[1] == 1 for w in windows)


def _aligned(tensors: Tensors, packed: bool) -> bool:
    """Whether everything that a kernel would load or store 16 bytes at a time lets it.

    Of the addresses all must, so that a layout is known by one bit (`ALIGNABLE`).
    """
    dim, width = tensors["weight"].shape
    if any(tensors[name].data_ptr() % 16 for name in ALIGNABLE if name in tensors):
        return False
    # Axis of the channels in each; the other axes step from one packed run to the next.
    lanes = {"x": -1, "out": -1, "bias": 0}
    if packed:
        lanes |= {"conv_state": 1, "initial_states": 1}
    for name, axis in lanes.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        axis %= tensor.dim()
        for i, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape)):
            if size > 1 and (stride != 1 if i == axis else stride * tensor.element_size() % 16):
                return False
    return dim % 8 == 0 and tensors["weight"].stride() == (width, 1)


def layout(
    *,
    activation: str | None = None,
    alignment: str | None = None,
    pad_slot_id: int = -1,
    pdl: bool = False,
    prefill: bool = False,
    **arguments: torch.Tensor | None,
) -> Layout:
    """Check the arguments of one call and describe them for a launch. ``out`` is required.

    With `prefill` they are those of `causal_conv1d_fn`, whose conv_states and cache_indices are
    called conv_state and conv_state_indices here as well.
    """
    required = ("x", "weight", "out", *(() if prefill else ("conv_state",)))
    found = check_given(arguments, ABI_TENSORS, required)
    given = {name: found[name] for name in ABI_TENSORS if name in found}
    check_switches(pdl=pdl, prefill=prefill)
    check_pad(pad_slot_id)
    if not isinstance(activation, (str, type(None))) or activation not in ACTIVATIONS:
        fail("activation", repr(activation), ", ".join(map(str, ACTIVATIONS)))
    views = normalise(given, prefill=prefill)
    config = check(views, activation=activation, alignment=alignment, pdl=pdl, prefill=prefill)
    x = views["x"]
    rows = len(views["query_start_loc"]) - 1 if config.seqlens_dtype else x.shape[0]
    tokens = x.shape[0] if config.seqlens_dtype else rows * (x.shape[1] if x.dim() == 3 else 1)
    work = tokens if config.prefill else rows
    return Layout(
        config=config,
        tensors=tuple(given),
        scalars=_scalars(config, views, rows, pad_slot_id),
        batch=work if rows and tokens else 0,
        nheads=x.shape[-1],
    )


# Which tensor a stride speaks of, by its name without axis and "stride".
_STRIDED = {
    "state": "conv_state",
    "initial": "initial_states",
    "slots": "conv_state_indices",
    "dst_slots": "dst_state_indices",
    "has_initial": "has_initial_state",
    "accepted": "num_accepted_tokens",
    "counts": "cache_seqlens",
}


def _scalars(config: Conv1dConfig, views: Tensors, rows: int, pad_slot_id: int) -> tuple[int, ...]:
    """The integer arguments, in the order of `Conv1d.arguments`, which names them."""
    from . import FAMILY

    x = views["x"]

    def stride(argument: str) -> int:
        name = argument.removesuffix("_stride")
        if name in _STRIDED or name == "bias":
            return views[_STRIDED.get(name, name)].stride(0)
        name, _, axis = name.rpartition("_")
        tensor = views[_STRIDED.get(name, name)]
        if name in ("x", "out"):
            at = {"row": 0, "token": -2, "dim": -1}[axis]
        else:
            at = {"slot": 0, "row": 0, "dim": -2, "column": -1, "tap": -1}[axis]
        return tensor.stride(at) if tensor.shape[at] > 1 else 0

    values = {"rows": rows, "dim": x.shape[-1], "pad_slot_id": pad_slot_id}
    if "conv_state" in views:
        values["state_len"] = views["conv_state"].shape[2]
    if config.seqlens_dtype:
        values["total"] = x.shape[0]
    elif config.many:
        values["length"] = x.shape[1]
    names = [a.name for a in FAMILY.arguments(config) if not a.pointer]
    return tuple(values[name] if name in values else stride(name) for name in names)
