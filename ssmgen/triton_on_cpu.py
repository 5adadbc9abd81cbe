"""Triton's interpreter beside its compiler in one process, rounding as a GPU does, and faster.

Triton wants the choice made before it is imported, and does not undo all that it patches.
`interpreting` swaps in what an interpreted kernel needs, and puts everything back.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.experimental.gluon  # takes copies of what is swapped when imported  # noqa: F401
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    InterpretedFunction,
    ReduceOps,
    TensorHandle,
    interpreter_builder,
)
from triton.runtime.jit import JITFunction

__all__ = ["interpreting", "scalar"]

# What the interpreter, or what it calls, patches.
PATCHED = (tl, tl.core, tl.math, tl.standard, tl.random, tl.tensor, tl.dtype,
           tl.core.tensor_descriptor_base)  # fmt: skip
FLOATS = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}


def scalar(type: str, value: int) -> Any:
    """An integer argument of that type; the interpreter would go by its value."""
    data = np.array([value], dtype=f"{type[0]}{int(type[1:]) // 8}")
    type_ = tl.str_to_ty(type, None)
    return tl.tensor(TensorHandle(data, type_), type_)


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Kernels may be interpreted inside, one at a time; none may be compiled."""
    builder = interpreter_builder
    with contextlib.ExitStack() as stack:
        stack.enter_context(_restored())
        for target, values in (
            (interpreter, {"range": _range, "_patch_lang": _patch_once(interpreter._patch_lang)}),
            (ReduceOps, {"generic_reduce": _reduce(ReduceOps.generic_reduce)}),
            (
                builder,
                {
                    # The default looks for overflow at every operation.
                    "options": dataclasses.replace(builder.options, sanitize_overflow=False),
                    "cast_impl": (cast := _cast(builder.cast_impl)),
                    "create_fp_to_fp": cast,
                    "create_masked_load": _masked(builder.create_masked_load, 1),
                    "create_masked_store": _masked(builder.create_masked_store, 2),
                },
            ),
        ):
            stack.enter_context(_replaced(target, values))
        yield


@contextlib.contextmanager
def _replaced(target: Any, values: dict[str, Any]) -> Iterator[None]:
    own = {name: vars(target)[name] for name in values if name in vars(target)}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in own:
                setattr(target, name, own[name])
            else:
                delattr(target, name)


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Triton's own device functions as interpreted ones. What Triton patches when a kernel calls
    one it leaves patched, so that no kernel could be compiled afterwards: all is put back here."""
    saved = [(namespace, dict(vars(namespace))) for namespace in PATCHED]
    memo: dict[int, Any] = {}
    for module in (tl, tl.standard, tl.random):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, memo.setdefault(id(value), InterpretedFunction(value.fn)))
    try:
        yield
    finally:
        for namespace, before in saved:
            for name, value in list(vars(namespace).items()):
                if name not in before:
                    # What rewritten functions find among their globals stays: they are kept.
                    if vars(interpreter).get(name) is not value:
                        delattr(namespace, name)
                elif before[name] is not value:
                    setattr(namespace, name, before[name])


def _patch_once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton patches the language anew for every call of a device function; a launch needs once."""
    patched = set[int]()

    def patch_once(function: Any) -> Any:
        languages = {id(m) for m in function.__globals__.values() if m is tl or m is tl.core}
        if languages <= patched:
            return interpreter._LangPatchScope()
        patched.update(languages)
        return patch(function)

    return patch_once


def _range(*bounds: Any) -> range:
    # A loop's bound is an array of one element, which newer numpy takes for no int.
    return range(*(b.handle.data.item() if isinstance(b, tl.tensor) else b for b in bounds))


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's interpreter truncates where the GPU rounds to nearest even; torch rounds."""

    def cast(source: Any, type: Any, rounding: Any = None) -> Any:
        before, after = FLOATS.get(source.dtype.scalar), FLOATS.get(type.scalar)
        if before is None or after is None:
            return original(source, type)
        data = torch.from_numpy(np.ascontiguousarray(source.data)).view(before).to(torch.float32)
        if after is torch.float8_e4m3fn:
            data = data.clamp(-448.0, 448.0)
        rounded = data.to(after)
        raw = {2: torch.uint16, 1: torch.uint8}.get(after.itemsize, torch.float32)
        raw = after if after in (torch.float32, torch.float16) else raw
        return TensorHandle(rounded.view(raw).numpy().reshape(source.data.shape), type.scalar)

    return cast


def _masked(original: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Argument `at` as a mask: Triton 3.9 keeps a comparison in the type of what it compared."""

    def masked(*arguments: Any) -> Any:
        mask = TensorHandle(arguments[at].data.astype(bool), tl.int1)
        return original(*arguments[:at], mask, *arguments[at + 1 :])

    return masked


def _reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    """``tl.reduce`` along an axis with a function of the kernel's, halves at a time: Triton's
    interpreter goes element by element."""

    def reduce(operation: Any, inputs: tuple[Any, ...]) -> Any:
        axis = operation.axis
        if axis is None or len(inputs) > 1:
            return original(operation, inputs)
        (tensor,) = inputs
        while tensor.shape[axis] > 1:
            halves = np.split(tensor.handle.data, 2, axis)
            halves = [operation.to_tensor(half, tensor.dtype) for half in halves]
            tensor = operation.combine_fn.fn(*halves)
        data = tensor.handle.data
        data = data if operation.keep_dims else data.squeeze(axis)
        return [operation.to_tensor(data, tensor.dtype)]

    return reduce
