"""Operation: one path from a user's tensors to a launch, for any family.

The *layout* of a call (dtypes, shapes, strides, switches) is checked once against the family's
contract and remembered by thread; after that a call compares, packs addresses and launches. CPU
tensors take the reference, or the interpreter. Each operation is registered with
``torch.library``; plain eager tensors take the same path without the dispatcher.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._dynamo.guards import TensorGuards
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_dynamo_compiling

from ..errors import ArgumentTypeError, DeviceError
from ..families.base import Layout
from ..settings import settings

__all__ = ["Operation", "require_tensor"]

Tensor = torch.Tensor
Arguments = dict[str, Any]

try:
    from torch._C import _cuda_getCurrentRawStream as _current_stream
    from torch._C import _cuda_getDevice as _current_device
except ImportError:  # a torch built without CUDA

    def _current_device() -> int:
        raise RuntimeError("this torch has no CUDA")

    def _current_stream(device: int) -> int:
        raise RuntimeError("this torch has no CUDA")


_library = torch.library.Library("ssmgen", "DEF")

# Layouts kept per thread; beyond it all are forgotten, which costs a check each to come back.
MAX_LAYOUTS = 4096
# Of those, the last ones used are compared with a call in C++, without building its name.
RECENT = 4


class Operation:
    """An operation on tensors that are written in place.

    Args:
        schema: its `torch.library` schema: tensors, in the order of the family's ABI, then
            switches. It returns nothing.
        rows: the tensor whose device says where to run; there is nothing to do if it is empty.
        aligned: tensors whose address the layout tells apart by whether 16 divides it.
        layout: checks the arguments of a call and describes it; raises what users see.
        reference: runs a checked call on the CPU.
        fake: checks what can be checked of fake tensors.
        check: under ``SSMGEN_CHECK``, reads tensors' values and raises for what no kernel can tell.
    """

    def __init__(
        self,
        schema: str,
        *,
        rows: str,
        aligned: tuple[str, ...],
        layout: Callable[..., Layout],
        reference: Callable[[Arguments, Layout], None],
        fake: Callable[[dict[str, Tensor]], None],
        check: Callable[[Arguments], None] | None = None,
    ) -> None:
        name = _library.define(
            schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
        )
        arguments = torch._C.parse_schema(f"ssmgen::{schema}").arguments
        of_tensors = [a.name for a in arguments if "Tensor" in str(a.type)]
        self.tensors = tuple(of_tensors)
        self.switches = tuple(a.name for a in arguments[len(of_tensors) :])
        self.layout = layout
        self.reference = reference
        self._fake = fake
        self._check = check
        self._rows = self.tensors.index(rows)
        self._aligned = tuple(map(self.tensors.index, aligned))
        self._seen = _Seen()
        for device in ("CPU", "CUDA"):
            _library.impl(name, self._dispatched, device)
        torch.library.register_fake(f"ssmgen::{name}", self._on_fakes, lib=_library)
        self._registered = getattr(torch.ops.ssmgen, name)

    def apply(self, tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...]) -> None:
        """Run on the schema's tensors and switches, in its order."""
        # The dispatcher is there for tracing, modes and subclasses; plain tensors do without.
        # An export that does not trace Python has a mode, for its fake tensors.
        if is_dynamo_compiling() or _len_torch_dispatch_stack() or _len_torch_function_stack():
            self._dispatch(tensors, switches)
            return
        for call in self._seen.recent:
            if call.launched(tensors, switches):
                return
        for name, tensor in zip(self.tensors, tensors):
            require_tensor(name, tensor)
        # A transform of functorch adds a dispatch key to every tensor: no known call passes.
        functorch = peek_interpreter_stack() is not None
        if functorch or any(type(tensor) not in _PLAIN for tensor in tensors):
            self._dispatch(tensors, switches)
        else:
            self._run(tensors, switches)

    def _run(self, tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...]) -> None:
        rows = tensors[self._rows]
        assert rows is not None
        if rows.is_cuda:
            call = self._found(tensors, switches)
            recent = [c for c in self._seen.recent if c is not call]
            if call.guarded(tensors):
                self._seen.recent = [call, *recent[: RECENT - 1]]
            call.launch(tensors, switches)
        elif rows.is_cpu:
            with torch.no_grad():
                self._on_cpu(self._named(tensors, switches), 0 in rows.shape)
        else:
            name = self.tensors[self._rows]
            raise DeviceError(f"{name}: on {rows.device}; allowed: cuda, cpu")

    def _on_cpu(self, arguments: Arguments, empty: bool) -> None:
        described = self.layout(**arguments)
        if empty:
            return
        if not settings().interpret:
            self.reference(arguments, described)
            return
        from ..interpreter import interpret

        if self._check and settings().check:
            self._check(arguments)
        interpret(described, arguments)

    def _found(self, tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...]) -> _Call:
        """The call by its full name: from the layouts of this thread, or made."""
        name: list[Any] = [switches]
        low = 0
        for i, tensor in enumerate(tensors):
            if tensor is None:
                name.append(None)
                continue
            # A lazily negated view has the address of what it negates.
            name += (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(),
                     tensor.is_neg())  # fmt: skip
            if i in self._aligned:
                low |= tensor.data_ptr()
        aligned = low & 15 == 0
        key = (*name, aligned)
        calls = self._seen.calls
        if key not in calls:
            if len(calls) >= MAX_LAYOUTS:
                calls.clear()
            calls[key] = self._made(tensors, switches, aligned)
        return calls[key]

    def _made(
        self, tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...], aligned: bool
    ) -> _Call:
        from ..kernel import get_kernel

        described = self.layout(**self._named(tensors, switches))
        device = tensors[self._rows].device.index  # type: ignore[union-attr]
        launch = get_kernel(described.config, device=device).launch_for(described)
        at = [i for i, t in enumerate(tensors) if t is not None]
        return _Call(
            launch=launch,
            device=device,
            switches=switches,
            at=at,
            absent=[i for i, t in enumerate(tensors) if t is None],
            used=[self.tensors.index(name) for name in described.tensors],
            alignable=[i for i in self._aligned if i in at],
            aligned=aligned,
            check=self._read if self._check is not None and settings().check else None,
        )

    def _read(self, tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...]) -> None:
        """Check tensors' values, unless a graph is captured, which knows none."""
        if not torch.cuda.is_current_stream_capturing():
            assert self._check
            self._check(self._named(tensors, switches))

    def _named(self, tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...]) -> Arguments:
        return {**dict(zip(self.tensors, tensors)), **dict(zip(self.switches, switches))}

    def _dispatch(self, tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...]) -> None:
        for name, tensor in zip(self.tensors, tensors):
            require_tensor(name, tensor)
        self._registered(*tensors, *switches)

    def _dispatched(self, *arguments: Any) -> None:
        count = len(self.tensors)
        for name, tensor in zip(self.tensors, arguments):
            require_tensor(name, tensor)
        self._run(arguments[:count], arguments[count:])

    def _on_fakes(self, *arguments: Any) -> None:
        self._fake({n: t for n, t in zip(self.tensors, arguments) if t is not None})


class _Seen(threading.local):
    """The layouts that a thread has seen."""

    def __init__(self) -> None:
        self.recent: list[_Call] = []
        self.calls: dict[Any, _Call] = {}


class _Call:
    """A layout that was checked: what to launch for it, and how to know it again.

    Args:
        launch: a `Launch`, or what is like one.
        at, absent: the places of the tensors that are given, and of those that are not.
        used: the places of those whose addresses the kernel takes.
        alignable: the places of those of which an address counts: ``aligned`` or not.
        check: reads values, or raises, before each launch.
    """

    def __init__(
        self, launch: Any, device: int, switches: tuple[Any, ...], at: list[int],
        absent: list[int], used: list[int], alignable: list[int], aligned: bool,
        check: Callable[..., None] | None,
    ) -> None:  # fmt: skip
        self._code = _recall(tuple(at), tuple(absent), tuple(used), tuple(alignable))
        self._given = _chosen(at)
        self._same: Callable[..., bool] = lambda *tensors: False
        # Launches with tensors that are of this layout, after what may have to come before.
        self.launch = _with_care(launch, device, used, check)
        # Launches if the tensors and the switches are this layout; whether they are.
        self.launched: Callable[..., bool] = lambda tensors, switches: False
        # What `launched` has. None of it leads back here: this goes when nothing else holds it.
        self._names: dict[str, Any] = {
            "expected": switches, "aligned": aligned, "device": device if check is None else None,
            "current_device": _current_device, "current_stream": _current_stream,
            "fill": launch.fill, "start": launch.start, "launch": self.launch,
        }  # fmt: skip

    def guarded(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """Have `launched` know tensors like these; False if it cannot, for one given twice."""
        given = self._given(tensors)
        if len({*map(id, given)}) < len(given):
            return False
        if not self._same(*given):
            # Type, dispatch keys, device, dtype, shape and strides, compared in C++. It keeps no
            # tensor alive.
            self._same = TensorGuards(
                *given,
                dynamic_dims_sizes=[list(t.shape) for t in given],  # type: ignore[misc]
                dynamic_dims_strides=[list(t.stride()) for t in given],  # type: ignore[misc]
            ).check
            names = {**self._names, "same": self._same}
            exec(self._code, names)
            self.launched = names.pop("launched")
        return True


def _with_care(
    launch: Any, device: int, used: list[int], check: Callable[..., None] | None
) -> Callable[[tuple[Tensor | None, ...], tuple[Any, ...]], None]:
    def run(tensors: tuple[Tensor | None, ...], switches: tuple[Any, ...]) -> None:
        if check is not None:
            check(tensors, switches)
        addresses = [tensors[i].data_ptr() for i in used]  # type: ignore[union-attr]
        if device == _current_device():
            launch(_current_stream(device), *addresses)
        else:
            with torch.cuda.device(device):
                launch(_current_stream(device), *addresses)

    return run


@functools.cache
def _recall(
    at: tuple[int, ...], absent: tuple[int, ...], used: tuple[int, ...], alignable: tuple[int, ...]
) -> Any:
    """The code of ``launched(tensors, switches)``, by places as in `_Call`. Written out, as most of
    a call's time goes to it; compiled once for all layouts of such a call, as that takes a quarter
    of a millisecond."""
    low = " | ".join(f"p{i}" for i in alignable) or "0"
    lines = [
        "def launched(tensors, switches):",
        "    if switches != expected:",
        "        return False",
        f"    {', '.join(f't{i}' for i in range(len(at) + len(absent)))} = tensors",
        *(f"    if t{i} is not None:\n        return False" for i in absent),
        f"    if not same({', '.join(f't{i}' for i in at)}):",
        "        return False",
        *(f"    p{i} = t{i}.data_ptr()" for i in sorted({*used, *alignable})),
        f"    if (({low}) & 15 == 0) is not aligned:",
        "        return False",
        # Of a call that is checked `device` is none.
        "    if current_device() == device:",
        f"        fill({', '.join(f'p{i}' for i in used)})",
        "        start(current_stream(device))",
        "    else:",
        "        launch(tensors, switches)",
        "    return True",
    ]
    return compile("\n".join(lines), "<ssmgen layout>", "exec")


def _chosen(at: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    if len(at) > 1:
        return itemgetter(*at)
    return lambda values: tuple(values[i] for i in at)


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def require_tensor(name: str, value: Any, *, needed: bool = False) -> None:
    if value is None and needed:
        raise ArgumentTypeError(f"{name}: missing")
    if value is not None and not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name}: found {type(value).__name__}; allowed: a tensor")
