"""selective_state_update: the public op.

One path from the user's tensors to a launch: the *layout* of a call (dtypes, shapes, strides,
switches) is checked once against the contract (`ssmgen.families.ssu.contract`) and remembered;
after that a call packs addresses and launches. The op is registered as
``torch.ops.ssmgen.selective_state_update``; plain eager tensors take the same path without the
dispatcher.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from ..errors import ArgumentTypeError, ArgumentValueError, DeviceError, UnsupportedError
from ..families.ssu.contract import ABI_TENSORS, check_dtypes, layout, normalise
from ..reference.ssu import selective_state_update as reference
from ..reference.tables import read_tables
from ..settings import settings

__all__ = ["selective_state_update"]

Tensor = torch.Tensor

try:
    from torch._C import _cuda_getCurrentRawStream as _current_stream
except ImportError:  # a torch built without CUDA

    def _current_stream(device: int) -> int:
        raise RuntimeError("this torch has no CUDA")


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    intermediate_state_scales: Tensor | None = None,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    cache_steps: int = 0,
    algorithm: str = "auto",
    dst_state_batch_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    backend: str = "auto",
    *,
    pdl: bool = False,
    parent_tokens: Tensor | None = None,
    precision: str = "fast",
) -> Tensor:
    """One or more decode steps of Mamba2 (Dao and Gu 2024, "Transformers are SSMs") or Mamba1.

    In fp32, per head::

        dt' = softplus(dt + dt_bias)          softplus only if dt_softplus
        h'  = exp(A dt') h + dt' B x
        y   = <h', C> + D x                   times silu(z) if z is given

    ``state`` is updated in place (rounded; y comes from the unrounded h') and ``out`` is written
    and returned. Same signature as FlashInfer 0.7's function of that name, plus ``pdl``,
    ``parent_tokens`` and ``precision``. The state stays in fp32 from the first token of a row to
    the last.

    Args:
        state: (slots, nheads, dim, dstate) fp32, bf16, fp16, int16, int8 or float8_e4m3fn; slot
            pitch is free, the rest packed. dim and dstate are multiples of 8 up to 512. Headless
            (Mamba1) layouts drop nheads here and in every argument; dim is then unlimited.
        x: (batch, nheads, dim) fp32, bf16 or fp16; or (batch, tokens, nheads, dim); or (tokens,
            nheads, dim) with ``cu_seqlens``. Every per-row argument has the same leading axes.
        dt: (batch, nheads, dim), any float dtype.
        A: (nheads, dim, dstate). A, dt, D and dt_bias expanded from one value per head (stride 0)
            take the Mamba2 kernel, otherwise the Mamba1 one.
        B, C: (batch, ngroups, dstate), dtype of x; ngroups divides nheads.
        D, dt_bias: (nheads, dim), of one dtype, or None.
        z: (batch, nheads, dim), dtype of x, or None.
        state_batch_indices: (batch,) or (batch, n) int32/int64, of which column 0 is used, or
            ``max(accepted - 1, 0)`` with ``num_accepted_tokens``; None: row i has slot i. Values
            other than ``pad_slot_id`` must be slots, each at most once.
        pad_slot_id: a row of this slot touches no state; its output is that of a zero state.
        dst_state_batch_indices: where h' goes instead of the source slot; ``pad_slot_id``: nowhere.
            (batch,) or (batch, 1): after the last token; (batch, at least tokens): after each.
        state_scale: (slots, nheads, dim) or (..., 1) fp32 decode scales of an integer or fp8 state.
        out: like x; allocated if None.
        disable_state_update: write no state; the intermediate states are written all the same.
        intermediate_states_buffer: (entries, at least tokens, nheads, dim, dstate), dtype of the
            state: takes the state after each token, besides what is written to ``state``.
        intermediate_state_indices: (batch,) entries of the buffer, ``pad_slot_id``: nowhere; None:
            the source slots.
        intermediate_state_scales: (entries, at least tokens, nheads, dim) fp32, with block-scaled
            states.
        cu_seqlens: (sequences + 1,): sequence i is the tokens ``cu_seqlens[i]`` to
            ``cu_seqlens[i + 1]`` of x, at most ``cache_steps`` of them, or none.
        cache_steps: the most tokens of a sequence of ``cu_seqlens``; otherwise 0, or at least the
            tokens of x.
        num_accepted_tokens: (batch,): which column of ``state_batch_indices`` a row starts from.
        parent_tokens: (batch, tokens): the earlier token of its row that each token follows, -1:
            the slot; None: the one before it.
        rand_seed: one int64 on the device: round stochastically (docs/random-bits.md).
        philox_rounds: rounds of the generator, 1 to 16.
        algorithm: auto, simple, vertical, horizontal or matrix (several tokens; docs/semantics.md
            says which calls it serves).
        pdl: launch with programmatic dependent launch: the state, the index tables are read before
            the kernel ahead of this one has finished (docs/semantics.md).
        precision: exact: the bits of one token after the other, for an fp32 state; fast: the sums
            may have another order, where that is faster.

    Returns:
        out, of the shape of x.

    Raises:
        ArgumentValueError, ArgumentTypeError, ConfigError, DeviceError: before anything is
            written; the message names argument, what was found and what is allowed.
        UnsupportedError: for another ``backend``.

    A sequence whose tables cannot be followed (more than ``cache_steps`` tokens, a parent that is
    no earlier token) has NaN in all its outputs and writes no state (docs/semantics.md).
    """
    if backend != "auto":
        raise UnsupportedError(f"backend: {backend!r}; allowed: 'auto'")
    if out is None:
        _require_tensor("x", x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tensors: tuple[Tensor | None, ...] = (
        state, state_scale, x, dt, A, B, C, D, z, dt_bias, out, state_batch_indices,
        dst_state_batch_indices, rand_seed,
    )  # fmt: skip
    if (
        cu_seqlens is not None
        or intermediate_states_buffer is not None
        or intermediate_state_indices is not None
        or intermediate_state_scales is not None
        or num_accepted_tokens is not None
        or parent_tokens is not None
    ):
        tensors += (
            intermediate_states_buffer, intermediate_state_indices, intermediate_state_scales,
            cu_seqlens, num_accepted_tokens, parent_tokens,
        )  # fmt: skip
    switches = (dt_softplus, pad_slot_id, disable_state_update, philox_rounds, algorithm, pdl,
                cache_steps, precision)  # fmt: skip
    # The dispatcher is there for tracing, modes and subclasses; plain tensors do without.
    if (
        is_compiling()
        or type(x) is not Tensor
        or type(state) is not Tensor
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
    ):
        for name, tensor in zip(ABI_TENSORS, tensors):
            _require_tensor(name, tensor)
        absent = (None,) * (len(ABI_TENSORS) - len(tensors))
        torch.ops.ssmgen.selective_state_update(*tensors, *absent, *switches)
    else:
        _run(tensors, switches)
    return out


_SCHEMA = (
    "selective_state_update(Tensor(a!) state, Tensor(b!)? state_scale, Tensor x, Tensor dt, "
    "Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor(c!) out, "
    "Tensor? state_batch_indices, Tensor? dst_state_batch_indices, Tensor? rand_seed, "
    "Tensor(d!)? intermediate_states_buffer, Tensor? intermediate_state_indices, "
    "Tensor(e!)? intermediate_state_scales, Tensor? cu_seqlens, Tensor? num_accepted_tokens, "
    "Tensor? parent_tokens, bool dt_softplus, SymInt pad_slot_id, bool disable_state_update, "
    "int philox_rounds, str algorithm, bool pdl, int cache_steps, str precision) -> ()"
)

_local = threading.local()


def _run(tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...]) -> None:
    x = tensors[2]
    if x.is_cuda:  # type: ignore[union-attr]
        _run_cuda(tensors, switches)
    elif x.is_cpu:  # type: ignore[union-attr]
        with torch.no_grad():
            _run_cpu(tensors, switches)
    else:
        raise DeviceError(f"x: on {x.device}; allowed: cuda, cpu")  # type: ignore[union-attr]


def _run_cuda(tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...]) -> None:
    name: list[Any] = [switches]
    for tensor in tensors:
        if tensor is None:
            name.append(None)
        else:
            # A lazily negated view has the address of what it negates.
            name += (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(),
                     tensor.is_neg())  # fmt: skip
    pointers = [t.data_ptr() for t in tensors if t is not None]
    name += (tensors[i].data_ptr() & 15 for i in _ALIGNED)  # type: ignore[union-attr]
    if len(tensors) > _BUFFER and (buffer := tensors[_BUFFER]) is not None:
        name.append(buffer.data_ptr() & 15)
    key = tuple(name)
    try:
        launch, device, keep, checked = _local.launches[key]
    except (KeyError, AttributeError):
        launch, device, keep, checked = _prepare(key, tensors, switches)
    if checked and not torch.cuda.is_current_stream_capturing():
        _check_tables(tensors, switches)
    if keep is not None:
        pointers = [pointers[i] for i in keep]
    if device == torch._C._cuda_getDevice():
        launch(_current_stream(device), *pointers)
    else:
        with torch.cuda.device(device):
            launch(_current_stream(device), *pointers)


_ALIGNED = tuple(ABI_TENSORS.index(n) for n in ("state", "x", "A", "B", "C"))
_BUFFER = ABI_TENSORS.index("intermediate_states_buffer")

# Layouts kept per thread; beyond it all are forgotten, which costs a check each to come back.
MAX_LAYOUTS = 4096


def _prepare(
    key: Any, tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...]
) -> tuple[Any, int, list[int] | None, bool]:
    from ..kernel import get_kernel

    described = layout(**_arguments(tensors, switches))
    device = tensors[0].device.index  # type: ignore[union-attr]
    kernel = get_kernel(described.config, device=device)
    launch = kernel.launch_for(described)
    given = [n for n, t in zip(ABI_TENSORS, tensors) if t is not None]
    keep = None
    if len(given) != len(described.tensors):
        keep = [given.index(n) for n in described.tensors]
    launches = _local.__dict__.setdefault("launches", {})
    if len(launches) >= MAX_LAYOUTS:
        launches.clear()
    launches[key] = found = (launch, device, keep, settings().check)
    return found


def _check_tables(tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...]) -> None:
    """Under SSMGEN_CHECK: read the index tables back and raise for what no kernel can tell."""
    arguments = _arguments(tensors, switches)
    views = normalise({n: t for n, t in zip(ABI_TENSORS, tensors) if t is not None})
    tables = {n: views[n] for n in _TABLES if n in views}
    if arguments["disable_state_update"]:
        tables.pop("dst_state_batch_indices", None)
    read_tables(
        views["x"],
        len(views["state"]),
        arguments["pad_slot_id"],
        cache_steps=arguments["cache_steps"],
        **tables,  # type: ignore[arg-type]
    )


_TABLES = (
    "state_batch_indices",
    "dst_state_batch_indices",
    "intermediate_states_buffer",
    "intermediate_state_indices",
    "cu_seqlens",
    "num_accepted_tokens",
    "parent_tokens",
)


def _run_cpu(tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...]) -> None:
    arguments = _arguments(tensors, switches)
    described = layout(**arguments)
    if 0 in tensors[2].shape:  # type: ignore[union-attr]
        return
    if settings().interpret:
        from ..interpreter import interpret

        if settings().check:
            _check_tables(tensors, switches)

        interpret(described, arguments)
        return
    views = normalise({n: t for n, t in zip(ABI_TENSORS, tensors) if t is not None})
    config: Any = described.config
    reference(
        **{n: t for n, t in views.items() if n != "rand_seed"},  # type: ignore[arg-type]
        dt_softplus=arguments["dt_softplus"],
        pad_slot_id=arguments["pad_slot_id"],
        disable_state_update=arguments["disable_state_update"],
        rand_seed=views.get("rand_seed") if config.rounding == "stochastic" else None,
        philox_rounds=config.philox_rounds or 10,
        cache_steps=arguments["cache_steps"],
    )


def _arguments(tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...]) -> dict[str, Any]:
    names = ("dt_softplus", "pad_slot_id", "disable_state_update", "philox_rounds", "algorithm",
             "pdl", "cache_steps", "precision")  # fmt: skip
    for name, tensor in zip(ABI_TENSORS, tensors):
        _require_tensor(name, tensor)
    return {**dict(zip(ABI_TENSORS, tensors)), **dict(zip(names, switches))}


def _require_tensor(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name}: found {type(value).__name__}; allowed: a tensor")


def _dispatched(*arguments: Any) -> None:
    count = len(ABI_TENSORS)
    _run(arguments[:count], arguments[count:])


def _fake(*arguments: Any) -> None:
    count = len(ABI_TENSORS)
    tensors = {n: t for n, t in zip(ABI_TENSORS, arguments[:count]) if t is not None}
    views = normalise(tensors)
    if views["x"].shape != views["out"].shape:
        raise ArgumentValueError("out: not of the shape of x")
    check_dtypes(views)


_library = torch.library.Library("ssmgen", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
_library.impl("selective_state_update", _dispatched, "CPU")
_library.impl("selective_state_update", _dispatched, "CUDA")
torch.library.register_fake("ssmgen::selective_state_update", _fake, lib=_library)
