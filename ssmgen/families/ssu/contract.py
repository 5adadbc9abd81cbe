"""The tensor contract of selective_state_update, stated once for the op, its fake, the kernel
handle and the reference.
"""

from __future__ import annotations

from typing import Any

import torch

from ...config import dtype_name
from ...errors import ArgumentTypeError, ArgumentValueError, DeviceError
from ..base import Layout
from .config import FLOATS, SCALED, SsuConfig

__all__ = ["ABI_TENSORS", "check", "check_dtypes", "layout", "normalise"]

# Tensor arguments in ABI order; absent ones are left out.
ABI_TENSORS = (
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

MAX_BATCH = 65535


def _fail(name: str, found: Any, allowed: str) -> None:
    raise ArgumentValueError(f"{name}: found {found}; allowed: {allowed}")


def normalise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views of the arguments with heads, one token and one index column.

    A headless (Mamba1) state ``(slots, dim, dstate)`` becomes heads of up to 64 rows; a token axis
    of one and the trailing one of a scale are dropped; a 2-D index table becomes its column 0.
    No address changes.
    """
    views = dict(tensors)
    state = tensors["state"]
    if state.dim() not in (3, 4):
        _fail("state", f"{state.dim()} dimensions", "(slots, nheads, dim, dstate) or (slots, dim, "
              "dstate)")  # fmt: skip
    headless = state.dim() == 3
    scale = views.get("state_scale")
    if scale is not None and scale.dim() == state.dim() and scale.shape[-1] == 1:
        views["state_scale"] = scale[..., 0]
    for name in ("state_batch_indices", "dst_state_batch_indices"):
        table = views.get(name)
        if table is not None and table.dim() == 2 and table.shape[1]:
            views[name] = table[:, 0]
    lead = 2 if headless else 3
    for name in ("x", "dt", "B", "C", "z", "out"):
        with_tokens = 4 if name in ("B", "C") else lead + 1
        if name in views and views[name].dim() == with_tokens:
            if views[name].shape[1] != 1:
                _fail(name, f"{views[name].shape[1]} tokens", "one token, (batch, 1, ...)")
            views[name] = views[name][:, 0]
    if not headless:
        return views
    dim = state.shape[1]
    rows = min(64, dim & -dim)
    if dim <= 0 or rows < 8:
        _fail("state", f"dim {dim}", "a dim that is a multiple of 8")
    axis = {"state": 1, "state_scale": 1, "x": 1, "dt": 1, "z": 1, "out": 1, "A": 0, "D": 0,
            "dt_bias": 0}  # fmt: skip
    for name, at in axis.items():
        if name not in views:
            continue
        tensor = views[name]
        if tensor.dim() <= at or tensor.shape[at] != dim:
            _fail(name, f"shape {tuple(tensor.shape)}", f"{dim} along axis {at}, as in state")
        views[name] = tensor.unflatten(at, (dim // rows, rows))
    for name in ("B", "C"):
        if views[name].dim() == lead:
            views[name] = views[name].unsqueeze(1)
    return views


def check(
    tensors: dict[str, torch.Tensor],
    *,
    dt_softplus: bool,
    disable_state_update: bool,
    philox_rounds: int,
    algorithm: str,
    pdl: bool,
) -> SsuConfig:
    """Check normalised arguments; the config they ask for. Reads no tensor data."""
    state, x, dt, A, B = (tensors[n] for n in ("state", "x", "dt", "A", "B"))
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise ArgumentTypeError(f"{name}: found layout {tensor.layout}; allowed: strided")
        if tensor.is_neg() or tensor.is_conj():
            _fail(name, "a lazily negated view", "a tensor whose memory holds its values; use "
                  ".resolve_neg()")  # fmt: skip
    slots, nheads, dim, dstate = state.shape
    if nheads == 0:
        _fail("state", "0 heads", "at least one")
    if x.dim() != 3:
        _fail("x", f"shape {tuple(x.shape)}", "(batch, nheads, dim)")
    batch = x.shape[0]
    for name, size in (("dim", dim), ("dstate", dstate)):
        if size % 8 or not 8 <= size <= 512:
            _fail("state", f"{name} {size}", "8 to 512 in multiples of 8")
    if B.dim() != 3:
        _fail("B", f"shape {tuple(B.shape)}", "(batch, ngroups, dstate)")
    ngroups = B.shape[1]
    if ngroups == 0 or nheads % ngroups:
        _fail("B", f"{ngroups} groups", f"a divisor of the {nheads} heads")
    row = (batch, nheads, dim)
    shapes: dict[str, tuple[int, ...]] = {
        "x": row,
        "dt": row,
        "A": (nheads, dim, dstate),
        "B": (batch, ngroups, dstate),
        "C": (batch, ngroups, dstate),
        "D": (nheads, dim),
        "z": row,
        "dt_bias": (nheads, dim),
        "out": row,
        "state_scale": (slots, nheads, dim),
        "state_batch_indices": (batch,),
        "dst_state_batch_indices": (batch,),
    }
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            _fail(name, f"shape {tuple(tensors[name].shape)}", str(shape))
    seed = tensors.get("rand_seed")
    if seed is not None and (seed.numel() != 1 or seed.dtype != torch.int64):
        kind = ArgumentTypeError if seed.dtype != torch.int64 else ArgumentValueError
        raise kind(
            f"rand_seed: found {seed.dtype} of shape {tuple(seed.shape)}; allowed: one int64"
        )
    if batch > MAX_BATCH:
        _fail("x", f"batch {batch}", f"at most {MAX_BATCH}")
    if 2 * nheads * (nheads // ngroups) >= 2**31:
        # Where the kernel's reciprocal finds the group of a head exactly.
        _fail("state", f"{nheads} heads in {ngroups} groups", "2 heads^2 / groups below 2^31")
    if nheads * dim * dstate >= 2**31:
        _fail("state", f"{nheads * dim * dstate} elements a slot", "less than 2^31")
    indices = tensors.get("state_batch_indices")
    if indices is None:
        if "dst_state_batch_indices" in tensors:
            _fail("dst_state_batch_indices", "a tensor", "None without state_batch_indices")
        if slots < batch:
            _fail("state", f"{slots} slots", f"at least {batch}, one a row, without indices")
    check_dtypes(tensors)
    _check_strides(tensors, dim, dstate)
    for name, tensor in tensors.items():
        if tensor.device != state.device:
            raise DeviceError(f"{name}: on {tensor.device}; allowed: {state.device}, as state")

    stochastic = seed is not None and not disable_state_update
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
        algorithm=algorithm,
        index_dtype=None if indices is None else dtype_name(indices.dtype),
        has_z="z" in tensors,
        has_d="D" in tensors,
        has_dt_bias="dt_bias" in tensors,
        has_dst="dst_state_batch_indices" in tensors and not disable_state_update,
        dt_softplus=dt_softplus,
        tie_hdim=_tied(tensors),
        update_state=not disable_state_update,
        aligned=_strides_aligned(tensors) and _addresses_aligned(tensors),
        pdl=pdl,
    )


def check_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    def allow(name: str, allowed: tuple[str, ...], why: str = "") -> None:
        if name in tensors:
            found = str(tensors[name].dtype).removeprefix("torch.")
            try:
                known = dtype_name(found) in allowed
            except ValueError:
                known = False
            if not known:
                names = ", ".join(allowed)
                raise ArgumentTypeError(f"{name}: found dtype {found}; allowed: {names}{why}")

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
            f"state_scale: missing; a {tensors['state'].dtype} state needs one fp32 decode scale "
            "per (slot, head, row)"
        )
    if not scaled and "state_scale" in tensors:
        raise ArgumentTypeError(
            f"state_scale: given with a {tensors['state'].dtype} state; allowed: None"
        )
    allow("state_scale", ("fp32",))
    allow("state_batch_indices", ("int32", "int64"))
    if "dst_state_batch_indices" in tensors:
        index = dtype_name(tensors["state_batch_indices"].dtype)
        allow("dst_state_batch_indices", (index,), " (that of state_batch_indices)")
    if "rand_seed" in tensors and tensors["state"].dtype == torch.float32:
        raise ArgumentTypeError("rand_seed: given with an fp32 state, which is not rounded")


def _check_strides(tensors: dict[str, torch.Tensor], dim: int, dstate: int) -> None:
    def packed(name: str, strides: tuple[int, ...], what: str) -> None:
        tensor = tensors.get(name)
        if tensor is None:
            return
        count = len(strides)
        for axis in range(1, count + 1):
            if tensor.shape[-axis] > 1 and tensor.stride(-axis) != strides[-axis]:
                _fail(name, f"strides {tensor.stride()}", what)

    packed("state", (dim * dstate, dstate, 1), f"inner strides ({dim * dstate}, {dstate}, 1); the "
           "slot stride is free")  # fmt: skip
    packed("state_scale", (dim, 1), f"inner strides ({dim}, 1); the slot stride is free")
    for name in ("x", "z", "out", "B", "C"):
        packed(name, (1,), "a last stride of 1; the others are free")
    for name, tensor in tensors.items():
        span = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape) if n)
        if name not in ("state", "state_scale") and span >= 2**31:
            _fail(name, f"strides {tensor.stride()}", "a span below 2^31 elements")
        if any(s < 0 for s in tensor.stride()):
            _fail(name, f"strides {tensor.stride()}", "no negative stride")
        if name in ("state", "out", "state_scale") and _overlaps_itself(tensor):
            _fail(name, f"strides {tensor.stride()}", "elements that share no memory")


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie at one address, by the axes from the innermost out."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _tied(tensors: dict[str, torch.Tensor]) -> bool:
    inner = [tensors[n].stride(-1) for n in ("dt", "D", "dt_bias") if n in tensors]
    return not any((*inner, *tensors["A"].stride()[-2:]))


def _aligned_tensors(tensors: dict[str, torch.Tensor]) -> tuple[str, ...]:
    return ("state", "x", "B", "C") if _tied(tensors) else ("state", "x", "B", "C", "A")


def _strides_aligned(tensors: dict[str, torch.Tensor]) -> bool:
    for name in _aligned_tensors(tensors):
        tensor = tensors[name]
        strides = tensor.stride()
        outer = 1 if name == "state" else tensor.dim() - 1
        if any(
            s * tensor.element_size() % 16 for s, n in zip(strides[:outer], tensor.shape) if n > 1
        ):
            return False
        if name == "A" and strides[-1] != 1:
            return False
    return True


def _addresses_aligned(tensors: dict[str, torch.Tensor]) -> bool:
    return not any(tensors[name].data_ptr() % 16 for name in _aligned_tensors(tensors))


def layout(
    *,
    dt_softplus: bool = False,
    pad_slot_id: int = -1,
    disable_state_update: bool = False,
    philox_rounds: int = 10,
    algorithm: str = "auto",
    pdl: bool = False,
    **arguments: torch.Tensor | None,
) -> Layout:
    """Check the arguments of one call and describe them for a launch. ``out`` is required."""
    for name in arguments:
        if name not in ABI_TENSORS:
            raise ArgumentTypeError(f"{name}: not an argument; allowed: {', '.join(ABI_TENSORS)}")
    given = {n: t for n, t in arguments.items() if t is not None}
    for name in ("state", "x", "dt", "A", "B", "C", "out"):
        if name not in given:
            raise ArgumentTypeError(f"{name}: missing")
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise ArgumentTypeError(f"{name}: found {type(value).__name__}; allowed: a tensor")
    for name, switch in (("dt_softplus", dt_softplus), ("pdl", pdl),
                         ("disable_state_update", disable_state_update)):  # fmt: skip
        if not isinstance(switch, bool):
            raise ArgumentTypeError(f"{name}: found {switch!r}; allowed: True, False")
    if isinstance(pad_slot_id, bool) or not isinstance(pad_slot_id, int):
        raise ArgumentTypeError(f"pad_slot_id: found {pad_slot_id!r}; allowed: an int")
    if not -(2**63) <= pad_slot_id < 2**63:
        _fail("pad_slot_id", pad_slot_id, "an int64")
    views = normalise(given)
    config = check(
        views,
        dt_softplus=dt_softplus,
        disable_state_update=disable_state_update,
        philox_rounds=philox_rounds,
        algorithm=algorithm,
        pdl=pdl,
    )
    used = set(given)
    if config.rounding != "stochastic":
        used.discard("rand_seed")
    if not config.has_dst:
        used.discard("dst_state_batch_indices")
    return Layout(
        config=config,
        tensors=tuple(name for name in ABI_TENSORS if name in used),
        scalars=_scalars(config, views, pad_slot_id),
        batch=views["x"].shape[0],
        nheads=views["x"].shape[1],
    )


def _scalars(
    config: SsuConfig, views: dict[str, torch.Tensor], pad_slot_id: int
) -> tuple[int, ...]:
    """The integer arguments, in the order of `Ssu.arguments`, which names them."""
    from . import FAMILY

    short = {"slots": "state_batch_indices", "dst_slots": "dst_state_batch_indices",
             "scale": "state_scale"}  # fmt: skip
    axes = {"slot": 0, "row": 0, "group": 1, "dim": -2, "dstate": -1}
    heads_a_group = views["x"].shape[1] // views["B"].shape[1]
    values = {
        "pad_slot_id": pad_slot_id,
        "group_recip": -(-(2**31) // heads_a_group),
        "slots_stride": 0,
        "dst_slots_stride": 0,
    }
    for argument in FAMILY.arguments(config):
        if argument.pointer or argument.name in ("pad_slot_id", "group_recip"):
            continue
        name, _, axis = argument.name.removesuffix("_stride").rpartition("_")
        if argument.name in ("slots_stride", "dst_slots_stride"):
            table = views[short[argument.name.removesuffix("_stride")]]
            values[argument.name] = table.stride(0)
            continue
        tensor = views[short.get(name, name)]
        if axis == "head":
            at = 0 if name in ("A", "D", "dt_bias") else 1
        elif axis == "dim" and name != "A":
            at = -1
        else:
            at = axes[axis]
        values[argument.name] = tensor.stride(at) if tensor.shape[at] > 1 else 0
    return tuple(values[a.name] for a in FAMILY.arguments(config) if not a.pointer)
