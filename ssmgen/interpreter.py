"""Run a generated kernel on the CPU, in Triton's interpreter.

The interpreter normally has to be chosen before Triton is imported. Here Triton's own device
functions are swapped for interpreted ones while a kernel runs, so that one process can compile and
interpret.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .arch import Arch
from .compiler import load_source, triton_lock
from .config import KernelConfig
from .families import spec
from .families.base import Layout
from .plan import Plan, dispatch
from .template import entry_name, render

__all__ = ["interpret"]


def interpret(
    layout: Layout,
    tensors: dict[str, torch.Tensor],
    *,
    plan: Plan | None = None,
    arch: Arch | str = "sm_90",
) -> None:
    """Run the kernel `layout` asks for on CPU tensors, as `arch` would run it.

    Slow: for numerics and tests, not for work.
    """
    config = layout.config
    arch = Arch.of(arch)
    family = spec(config.family)
    if plan is None:
        plan = next(
            c.plan
            for c in dispatch(config, arch)
            if c.limit is None or layout.batch * layout.nheads <= c.limit
        )
    grid = family.grid(config, plan, layout.batch, layout.nheads)
    if 0 in grid:
        return
    pointers = [tensors[name] for name in layout.tensors]
    pointers = [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in pointers]
    types = [a.type for a in family.arguments(config) if not a.pointer]
    scalars = [_integer(type, value) for type, value in zip(types, layout.scalars)]
    with triton_lock, _interpreting(), np.errstate(all="ignore"):
        _kernel(config, plan, arch)[grid](*pointers, *scalars)


def _integer(type: str, value: int) -> Any:
    """An integer of the type in the ABI; the interpreter would go by its value."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    data = np.array([value], dtype=f"{type[0]}{int(type[1:]) // 8}")
    type_ = tl.str_to_ty(type, None)
    return tl.tensor(TensorHandle(data, type_), type_)


def _kernel(config: KernelConfig, plan: Plan, arch: Arch) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    source = render(config, plan, arch, interpret=True)
    return load_source(source, entry_name(config, plan), InterpretedFunction)


def _reduce(operation: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """``tl.reduce`` of one tensor along an axis with a function of the kernel's, halves at a time:
    Triton's interpreter goes element by element."""
    (found,) = inputs
    axis = operation.axis
    while found.shape[axis] > 1:
        halves = np.split(found.handle.data, 2, axis)
        found = operation.combine_fn.fn(
            *(operation.to_tensor(half, found.dtype) for half in halves)
        )
    data = found.handle.data
    data = data if operation.keep_dims else data.squeeze(axis)
    return [operation.to_tensor(data, found.dtype)]


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    import triton.experimental.gluon  # takes copies of these functions when imported  # noqa: F401
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder
    from triton.runtime.jit import JITFunction

    # Triton does not undo what it patches when a kernel calls a device function, so that no kernel
    # could be compiled afterwards: all of it is put back from here.
    patched = (tl, tl.core, tl.math, tl.standard, tl.random, tl.tensor, tl.dtype,
               tl.core.tensor_descriptor_base)  # fmt: skip
    saved = [(namespace, dict(vars(namespace))) for namespace in patched]
    memo: dict[int, Any] = {}
    for module in (tl, tl.standard, tl.random):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, memo.setdefault(id(value), InterpretedFunction(value.fn)))
    original = interpreter_builder.cast_impl
    floats = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
    }

    def cast(source: Any, type: Any, rounding: Any = None) -> Any:
        # Triton's interpreter truncates where the GPU rounds to nearest even; torch rounds.
        before, after = floats.get(source.dtype.scalar), floats.get(type.scalar)
        if before is None or after is None:
            return original(source, type)
        data = torch.from_numpy(np.ascontiguousarray(source.data)).view(before).to(torch.float32)
        if after is torch.float8_e4m3fn:
            data = data.clamp(-448.0, 448.0)
        rounded = data.to(after)
        raw = {2: torch.uint16, 1: torch.uint8}.get(after.itemsize, torch.float32)
        raw = after if after in (torch.float32, torch.float16) else raw
        return TensorHandle(rounded.view(raw).numpy().reshape(source.data.shape), type.scalar)

    masked_load, masked_store = (
        interpreter_builder.create_masked_load,
        interpreter_builder.create_masked_store,
    )

    def as_mask(handle: Any) -> Any:
        # Triton 3.9 keeps a comparison in the type of what it compared.
        return TensorHandle(handle.data.astype(bool), tl.int1)

    # Triton patches the language anew for every call of a device function; once a launch is enough.
    patch, languages = interpreter._patch_lang, set[int]()

    def patch_once(function: Any) -> Any:
        modules = {id(m) for m in function.__globals__.values() if m is tl or m is tl.core}
        if modules <= languages:
            return interpreter._LangPatchScope()
        languages.update(modules)
        return patch(function)

    def bounded(*bounds: Any) -> range:
        # A loop's bound is an array of one element, which newer numpy takes for no int.
        return range(*(b.handle.data.item() if isinstance(b, tl.tensor) else b for b in bounds))

    options = interpreter_builder.options  # the default looks for overflow at every operation
    interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    generic_reduce = interpreter.ReduceOps.generic_reduce
    interpreter.ReduceOps.generic_reduce = _reduce  # type: ignore[method-assign]
    interpreter._patch_lang = patch_once
    interpreter.range = bounded  # type: ignore[attr-defined]
    interpreter_builder.cast_impl = cast
    interpreter_builder.create_fp_to_fp = cast
    interpreter_builder.create_masked_load = lambda p, m, *a: masked_load(p, as_mask(m), *a)
    interpreter_builder.create_masked_store = lambda p, v, m, *a: masked_store(p, v, as_mask(m), *a)
    try:
        yield
    finally:
        for name in ("cast_impl", "create_fp_to_fp", "create_masked_load", "create_masked_store"):
            delattr(interpreter_builder, name)
        del interpreter.range  # type: ignore[attr-defined]
        interpreter._patch_lang = patch
        interpreter_builder.options = options
        interpreter.ReduceOps.generic_reduce = generic_reduce  # type: ignore[method-assign]
        for namespace, before in saved:
            for name, value in list(vars(namespace).items()):
                if name not in before:
                    # What rewritten functions find among their globals stays: they are kept.
                    if vars(interpreter).get(name) is not value:
                        delattr(namespace, name)
                elif before[name] is not value:
                    setattr(namespace, name, before[name])
