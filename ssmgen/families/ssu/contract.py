"""The tensor contract of selective_state_update, stated once for the op, its fake, the kernel
handle and the reference.
"""

from __future__ import annotations

from functools import partial

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
from .config import FLOATS, SCALED, SsuConfig
from .strides import addresses_aligned, check_strides, strides_aligned, tied

__all__ = [
    "ABI_TENSORS",
    "STEP_TENSORS",
    "check",
    "check_dtypes",
    "check_out",
    "layout",
    "normalise",
]

# Tensor arguments in ABI order; absent ones are left out. Those of one token a row:
STEP_TENSORS = (
    "state",
    "state_scale",
    "x",
    "dt",
    "A",
    "B",
    "C",
    "D",
    "z",
    "dt_bias",
    "out",
    "state_batch_indices",
    "dst_state_batch_indices",
    "rand_seed",
)
# Those that only many tokens have; any of them makes a call one of many tokens.
TOKEN_TENSORS = (
    "intermediate_states_buffer",
    "intermediate_state_indices",
    "intermediate_state_scales",
    "cu_seqlens",
    "num_accepted_tokens",
    "parent_tokens",
)
ABI_TENSORS = STEP_TENSORS + TOKEN_TENSORS


def normalise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views of the arguments with heads, and with tokens where a call may have several.

    A headless (Mamba1) state ``(slots, dim, dstate)`` becomes heads of up to 64 rows; the trailing
    axis of a scale is dropped. A call of one token a row loses its token axis, and its 2-D index
    tables become their column 0; a call of many has a token axis, unless it has `cu_seqlens`. No
    address changes.
    """
    views = dict(tensors)
    state, x = tensors["state"], tensors["x"]
    if state.dim() not in (3, 4):
        fail("state", f"{state.dim()} dimensions", "(slots, nheads, dim, dstate) or (slots, dim, "
             "dstate)")  # fmt: skip
    headless = state.dim() == 3
    lead = 2 if headless else 3
    for name, axes in (("state_scale", 1), ("intermediate_state_scales", 2)):
        scale = views.get(name)
        if scale is not None and scale.dim() == axes + lead and scale.shape[-1] == 1:
            views[name] = scale[..., 0]
    varlen = "cu_seqlens" in tensors
    dense = x.dim() == lead + 1 and not varlen
    many = any(n in tensors for n in TOKEN_TENSORS) or (dense and x.shape[1] != 1)
    per_row = [n for n in ("x", "dt", "B", "C", "z", "out") if n in views]
    if headless:
        for name in ("B", "C"):
            if views[name].dim() == lead + dense:
                views[name] = views[name].unsqueeze(-2)
    for name in per_row:
        view = views[name]
        with_tokens = 4 if name in ("B", "C") else lead + 1
        if many and not dense and not varlen:
            views[name] = view.unsqueeze(1)
        elif not many and view.dim() == with_tokens:
            if view.shape[1] != 1:
                fail(name, f"{view.shape[1]} tokens", "one token, (batch, 1, ...), as in x")
            views[name] = view[:, 0]
    for name in ("state_batch_indices", "dst_state_batch_indices"):
        table = views.get(name)
        if table is None or table.dim() != 2 or not table.shape[1]:
            continue
        keep = "num_accepted_tokens" in tensors if name[0] == "s" else many and table.shape[1] > 1
        if not keep:
            views[name] = table[:, 0]
    if not headless:
        return views
    dim = state.shape[1]
    rows = min(64, dim & -dim)
    if dim <= 0 or rows < 8:
        fail("state", f"dim {dim}", "a dim that is a multiple of 8")
    inner = {"state": 2, "A": 2, "intermediate_states_buffer": 2}
    for name in ("state", "state_scale", "x", "dt", "z", "out", "A", "D", "dt_bias",
                 "intermediate_states_buffer", "intermediate_state_scales"):  # fmt: skip
        if name not in views:
            continue
        tensor, at = views[name], -inner.get(name, 1)
        if tensor.dim() < -at or tensor.shape[at] != dim:
            axis = at % max(tensor.dim(), 1)
            fail(name, f"shape {tuple(tensor.shape)}", f"{dim} along axis {axis}, as in state")
        views[name] = tensor.unflatten(at, (dim // rows, rows))
    return views


def check(
    tensors: dict[str, torch.Tensor],
    *,
    dt_softplus: bool,
    disable_state_update: bool,
    philox_rounds: int,
    algorithm: str,
    pdl: bool,
    cache_steps: int = 0,
    precision: str = "fast",
) -> SsuConfig:
    """Check normalised arguments; the config they ask for. Reads no tensor data."""
    state, x, dt, A, B = (tensors[n] for n in ("state", "x", "dt", "A", "B"))
    check_plain(tensors)
    slots, nheads, dim, dstate = state.shape
    if nheads == 0:
        fail("state", "0 heads", "at least one")
    for name, size in (("dim", dim), ("dstate", dstate)):
        if size % 8 or not 8 <= size <= 512:
            fail("state", f"{name} {size}", "8 to 512 in multiples of 8")
    lead = tokens_of("x", tensors, cache_steps, "nheads, dim")
    batch, ntokens = lead[0], lead[1] if len(lead) == 2 else 1
    seqlens = tensors.get("cu_seqlens")
    if seqlens is not None:
        batch, ntokens = sequences(seqlens), cache_steps
    if B.dim() != len(lead) + 2:
        fail("B", f"shape {tuple(B.shape)}", f"({_AXES[len(lead)]}, ngroups, dstate)")
    ngroups = B.shape[-2]
    if ngroups == 0 or nheads % ngroups:
        fail("B", f"{ngroups} groups", f"a divisor of the {nheads} heads")
    row = (*lead, nheads, dim)
    shapes: dict[str, tuple[int, ...]] = {
        "x": row,
        "dt": row,
        "A": (nheads, dim, dstate),
        "B": (*lead, ngroups, dstate),
        "C": (*lead, ngroups, dstate),
        "D": (nheads, dim),
        "z": row,
        "dt_bias": (nheads, dim),
        "out": row,
        "state_scale": (slots, nheads, dim),
        "state_batch_indices": (batch,),
        "dst_state_batch_indices": (batch,),
        "intermediate_state_indices": (batch,),
        "num_accepted_tokens": (batch,),
        "parent_tokens": (batch, ntokens),
    }
    buffer = tensors.get("intermediate_states_buffer")
    if buffer is not None:
        shapes |= _buffer_shapes(tensors, batch, ntokens)
    check_columns(tensors, shapes, batch, ntokens)
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            fail(name, f"shape {tuple(tensors[name].shape)}", str(shape))
    seed = tensors.get("rand_seed")
    check_seed(seed)
    if batch > MAX_BATCH:
        fail("x" if seqlens is None else "cu_seqlens", f"batch {batch}", f"at most {MAX_BATCH}")
    check_heads("state", nheads, ngroups)
    if nheads * dim * dstate >= 2**31:
        fail("state", f"{nheads * dim * dstate} elements a slot", "less than 2^31")
    indices = tensors.get("state_batch_indices")
    if indices is None:
        for name in ("dst_state_batch_indices", "num_accepted_tokens"):
            if name in tensors:
                fail(name, "a tensor", "None without state_batch_indices")
        if slots < batch:
            fail("state", f"{slots} slots", f"at least {batch}, one a row, without indices")
    check_dtypes(tensors)
    check_strides(tensors, dim, dstate)
    check_devices(tensors, "state")

    has_dst = "dst_state_batch_indices" in tensors and not disable_state_update
    stochastic = seed is not None and not (disable_state_update and buffer is None)
    bias = tensors.get("dt_bias", tensors.get("D"))
    return SsuConfig(
        dtype=dtype_name(x.dtype),
        dt_dtype=dtype_name(dt.dtype),
        weight_dtype="fp32" if bias is None else dtype_name(bias.dtype),
        a_dtype=dtype_name(A.dtype),
        state_dtype=dtype_name(state.dtype),
        rounding="stochastic" if stochastic else "nearest",
        philox_rounds=philox_rounds if stochastic else 0,
        dim=dim,
        dstate=dstate,
        ntokens=ntokens,
        algorithm=algorithm,
        index_dtype=dtype_of(tensors, "state_batch_indices"),
        has_z="z" in tensors,
        has_d="D" in tensors,
        has_dt_bias="dt_bias" in tensors,
        has_dst=has_dst,
        dt_softplus=dt_softplus,
        tie_hdim=tied(tensors),
        update_state=not disable_state_update,
        aligned=strides_aligned(tensors) and addresses_aligned(tensors),
        pdl=pdl,
        precision=precision,
        seqlens_dtype=dtype_of(tensors, "cu_seqlens"),
        accepted_dtype=dtype_of(tensors, "num_accepted_tokens"),
        parents_dtype=dtype_of(tensors, "parent_tokens"),
        dst_tokens=has_dst and ntokens > 1 and tensors["dst_state_batch_indices"].dim() == 2,
        has_intermediate=buffer is not None,
        entry_dtype=dtype_of(tensors, "intermediate_state_indices"),
    )


_AXES = {1: "batch", 2: "batch, tokens"}


def _buffer_shapes(
    tensors: dict[str, torch.Tensor], batch: int, ntokens: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the intermediate states and scales, whose entries and tokens the buffer says."""
    buffer, state = tensors["intermediate_states_buffer"], tensors["state"]
    wanted = f"(entries, at least {ntokens}, {', '.join(map(str, state.shape[1:]))})"
    if buffer.dim() != 5 or buffer.shape[1] < ntokens:
        fail("intermediate_states_buffer", f"shape {tuple(buffer.shape)}", wanted)
    if "intermediate_state_indices" not in tensors:
        least = state.shape[0] if "state_batch_indices" in tensors else batch
        if buffer.shape[0] < least:
            fail("intermediate_states_buffer", f"{buffer.shape[0]} entries", f"at least {least}, "
                 "one a slot, without intermediate_state_indices")  # fmt: skip
    return {
        "intermediate_states_buffer": (*buffer.shape[:2], *state.shape[1:]),
        "intermediate_state_scales": (*buffer.shape[:2], *state.shape[1:3]),
    }


def check_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    allow = partial(allow_dtypes, tensors)
    allow("x", FLOATS)
    io = dtype_name(tensors["x"].dtype)
    for name in ("B", "C", "z", "out"):
        allow(name, (io,), " (that of x)")
    for name in ("dt", "A", "D", "dt_bias"):
        allow(name, FLOATS)
    if "D" in tensors and "dt_bias" in tensors:
        allow("dt_bias", (dtype_name(tensors["D"].dtype),), " (that of D)")
    allow("state", (*FLOATS, *SCALED))
    scaled = dtype_name(tensors["state"].dtype) in SCALED
    if scaled and "state_scale" not in tensors:
        raise ArgumentTypeError(
            f"state_scale: missing; {dtype_name(tensors['state'].dtype)} states need one fp32 "
            "decode scale per (slot, head, row)"
        )
    if not scaled and "state_scale" in tensors:
        raise ArgumentTypeError(
            f"state_scale: given with {dtype_name(tensors['state'].dtype)} states; allowed: None"
        )
    allow("state_scale", ("fp32",))
    allow("state_batch_indices", ("int32", "int64"))
    if "dst_state_batch_indices" in tensors:
        index = dtype_name(tensors["state_batch_indices"].dtype)
        allow("dst_state_batch_indices", (index,), " (that of state_batch_indices)")
    for name in ("intermediate_state_indices", "cu_seqlens", "num_accepted_tokens",
                 "parent_tokens"):  # fmt: skip
        allow(name, ("int32", "int64"))
    if "intermediate_states_buffer" in tensors:
        state = dtype_name(tensors["state"].dtype)
        allow("intermediate_states_buffer", (state,), " (that of state)")
        if scaled != ("intermediate_state_scales" in tensors):
            raise ArgumentTypeError(
                f"intermediate_state_scales: {'missing' if scaled else 'given'} with a "
                f"{tensors['state'].dtype} state; allowed: "
                f"{'one fp32 decode scale per (entry, token, head, row)' if scaled else 'None'}"
            )
        allow("intermediate_state_scales", ("fp32",))
    if "rand_seed" in tensors and tensors["state"].dtype == torch.float32:
        raise ArgumentTypeError("rand_seed: given with an fp32 state, which is not rounded")


def check_out(out: torch.Tensor, x: torch.Tensor, parents: torch.Tensor | None) -> None:
    """A path of a tree reads x again after outputs were written."""
    if parents is not None and out is x:
        fail("out", "x itself", "other memory than that of x, with parent_tokens")


def layout(
    *,
    dt_softplus: bool = False,
    pad_slot_id: int = -1,
    disable_state_update: bool = False,
    philox_rounds: int = 10,
    algorithm: str = "auto",
    pdl: bool = False,
    cache_steps: int = 0,
    precision: str = "fast",
    **arguments: torch.Tensor | None,
) -> Layout:
    """Check the arguments of one call and describe them for a launch. ``out`` is required."""
    given = check_given(arguments, ABI_TENSORS, ("state", "x", "dt", "A", "B", "C", "out"))
    check_switches(dt_softplus=dt_softplus, pdl=pdl, disable_state_update=disable_state_update)
    check_pad(pad_slot_id)
    check_out(given["out"], given["x"], given.get("parent_tokens"))
    views = normalise(given)
    config = check(
        views,
        dt_softplus=dt_softplus,
        disable_state_update=disable_state_update,
        philox_rounds=philox_rounds,
        algorithm=algorithm,
        pdl=pdl,
        cache_steps=cache_steps,
        precision=precision,
    )
    used = set(given)
    if config.rounding != "stochastic":
        used.discard("rand_seed")
    if not config.has_dst:
        used.discard("dst_state_batch_indices")
    seqlens = views.get("cu_seqlens")
    return Layout(
        config=config,
        tensors=tuple(name for name in ABI_TENSORS if name in used),
        scalars=_scalars(config, views, pad_slot_id),
        batch=views["x"].shape[0] if seqlens is None else seqlens.shape[0] - 1,
        nheads=views["state"].shape[1],
    )


# Which tensor an integer argument speaks of, by its name without axis and "stride".
_STRIDED = {
    "slots": "state_batch_indices",
    "dst_slots": "dst_state_batch_indices",
    "scale": "state_scale",
    "buffer": "intermediate_states_buffer",
    "buffer_scale": "intermediate_state_scales",
    "entries": "intermediate_state_indices",
    "accepted": "num_accepted_tokens",
    "parents": "parent_tokens",
}


def _scalars(
    config: SsuConfig, views: dict[str, torch.Tensor], pad_slot_id: int
) -> tuple[int, ...]:
    """The integer arguments, in the order of `Ssu.arguments`, which names them."""
    from . import FAMILY

    axes = {"slot": 0, "row": 0, "entry": 0, "token": 1, "column": 1, "head": -2, "group": -2,
            "dim": -1, "dstate": -1}  # fmt: skip

    def stride(argument: str) -> int:
        name = argument.removesuffix("_stride")
        if name in _STRIDED:
            name += "_row"
        name, _, axis = name.rpartition("_")
        tensor, at = views[_STRIDED.get(name, name)], axes[axis]
        if name == "A" and axis != "dstate":
            at -= 1
        if axis == "token" and config.seqlens_dtype and not name.startswith("buffer"):
            at = 0
        return tensor.stride(at) if tensor.shape[at] > 1 else 0

    heads_a_group = views["state"].shape[1] // views["B"].shape[-2]
    values = {"pad_slot_id": pad_slot_id, "group_recip": -(-(2**31) // heads_a_group)}
    if config.accepted_dtype:
        values["slots_width"] = views["state_batch_indices"].shape[1]
    if config.seqlens_dtype:
        values["total"] = views["x"].shape[0]
    arguments = [a.name for a in FAMILY.arguments(config) if not a.pointer]
    return tuple(values[a] if a in values else stride(a) for a in arguments)
