"""get_kernel: the road end to end."""

from __future__ import annotations

import functools
import logging
import threading
import time
from typing import Any

from . import compiler, policy
from .arch import Arch, gpu_name
from .artifact import Artifact
from .config import KernelConfig
from .errors import ArgumentValueError, ConfigTypeError, DeviceError, StoreError
from .families import spec
from .families.base import Layout
from .launcher import Function, Launch, enter, load
from .plan import Choice, Plan, dispatch
from .settings import held, settings
from .store import find, user_store
from .template import key

__all__ = ["Kernel", "Variant", "build", "get_kernel"]

log = logging.getLogger("ssmgen")

_lock = threading.Lock()
_kernels: dict[Any, Kernel] = {}
_building: dict[Any, threading.Lock] = {}


def build(config: KernelConfig, plan: Plan, arch: Arch) -> Artifact:
    """The artifact of one plan: from the first store that has it, else compiled and published.

    Where nothing can or may be compiled, an artifact of another toolchain serves too.
    """
    wanted = key(config, plan, arch)
    toolchain = compiler.toolchain()
    may_compile = policy.allowed()
    if toolchain is not None and (found := find(wanted, toolchain)):
        return found
    if (toolchain is None or not may_compile) and (found := find(wanted, None)):
        if toolchain is not None:
            built_by = found.manifest["toolchain"]
            log.warning("kernel %s: built by %s, %s is here", wanted[:12], built_by, toolchain)
        return found
    if not may_compile:
        raise policy.refuse(config, arch)
    if toolchain is None:
        raise StoreError(
            f"kernel {wanted[:12]} is in no store and there is no Triton here to compile it. Where "
            f"there is one, run\n    {policy.prewarm_command(config, arch)}"
        )
    own = user_store()
    if own is None:
        return _compile(config, plan, arch)
    from .store import evict

    with own.claim(f"{wanted}.{toolchain}"):
        if found := own.get(wanted, toolchain):
            return found
        artifact = _compile(config, plan, arch)
        try:
            own.put(artifact)
        except StoreError as error:
            log.warning("%s; the kernel is used from memory", error)
        else:
            evict.keep_small(own)
    return artifact


def _compile(config: KernelConfig, plan: Plan, arch: Arch) -> Artifact:
    start = time.perf_counter()
    artifact = compiler.compile(config, plan, arch)
    log.info("compiled %s %s for %s in %.2f s", config.family, plan, arch,
             time.perf_counter() - start)  # fmt: skip
    return artifact


class Variant:
    """One binary of a kernel, and the problem sizes it serves."""

    def __init__(
        self, choice: Choice, arch: Arch, artifact: Artifact, function: Function | None
    ) -> None:
        self.limit = choice.limit
        self.plan = choice.plan
        self.why = choice.why
        self.arch = arch
        self.artifact = artifact
        self.function = function

    @property
    def source(self) -> str:
        """The generated Triton source."""
        return self.artifact.source

    def explain(self) -> str:
        """Why this variant, and what it became."""
        manifest = self.artifact.manifest
        serves = "any batch x heads" if self.limit is None else f"batch x heads <= {self.limit}"
        return (
            f"{self.plan} on {self.arch} serves {serves} ({self.why}); "
            f"{manifest['registers']} registers, {manifest['spills']} bytes spilled, "
            f"{manifest['shared']} bytes shared; key {manifest['key'][:12]}"
        )


class Kernel:
    """The variants that serve one config on one architecture.

    ``kernel(**arguments)`` checks the arguments, picks the variant by batch x heads and launches
    on the current stream; ``bind`` does all but the launch once. ``plan``, ``source`` and
    ``artifact`` are those of the variant for the largest sizes; `select` gives the others.
    """

    def __init__(self, config: KernelConfig, arch: Arch, device: int | None) -> None:
        self.config = config
        self.arch = arch
        self.device = device
        choices = dispatch(config, arch, None if device is None else gpu_name(device))
        artifacts = {
            plan: build(config, plan, arch) for plan in dict.fromkeys(c.plan for c in choices)
        }
        functions: dict[Plan, Function | None] = {
            plan: None if device is None else load(artifact, device)
            for plan, artifact in artifacts.items()
        }
        self.variants = tuple(
            Variant(choice, arch, artifacts[choice.plan], functions[choice.plan])
            for choice in choices
        )

    @property
    def plan(self) -> Plan:
        return self.variants[-1].plan

    @property
    def source(self) -> str:
        return self.variants[-1].source

    @property
    def artifact(self) -> Artifact:
        return self.variants[-1].artifact

    def select(self, batch: int, nheads: int) -> Variant:
        """The variant for a problem size."""
        work = batch * nheads
        return next(v for v in self.variants if v.limit is None or work <= v.limit)

    def explain(self) -> str:
        """Why these variants: one line each."""
        return "\n".join(variant.explain() for variant in self.variants)

    def launch_for(self, layout: Layout) -> Launch:
        """The launch of one layout. It belongs to the calling thread."""
        if layout.config.key_fields() != self.config.key_fields():
            theirs = layout.config.key_fields()
            differ = "; ".join(
                f"{name}: the arguments have {theirs[name]!r}, the kernel {value!r}"
                for name, value in self.config.key_fields().items()
                if theirs[name] != value
            )
            raise ArgumentValueError(f"arguments of another config: {differ}")
        if self.device is not None:
            enter(self.device)
        variant = self.select(layout.batch, layout.nheads)
        if variant.function is None:
            raise DeviceError(
                f"kernel: compiled for {self.arch} only, not loaded; call get_kernel(config) on a "
                "machine with that GPU"
            )
        family = spec(self.config.family)
        grid = family.grid(self.config, variant.plan, layout.batch, layout.nheads)
        pdl = self.config.pdl and self.arch.pdl
        return Launch(variant.function, grid, layout.scalars, pdl)

    def bind(self, **arguments: Any) -> Any:
        """Check the arguments once; returns a function that launches on the current stream.

        The function keeps the tensors alive, and belongs to the thread that made it.
        """
        import torch

        described = {**self._switches(), **arguments}
        layout = spec(self.config.family).layout(**described)
        launch = self.launch_for(layout)
        device = self._device_of(arguments[layout.tensors[0]])
        tensors = [arguments[name] for name in layout.tensors]
        launch.fill(*(tensor.data_ptr() for tensor in tensors))
        start = launch.start
        from torch._C import _cuda_getCurrentRawStream as current_stream
        from torch._C import _cuda_getDevice as current_device

        def bound(_keep: Any = (launch, tensors)) -> None:
            if device == current_device():
                start(current_stream(device))
            else:
                with torch.cuda.device(device):
                    start(current_stream(device))

        return bound

    def __call__(self, **arguments: Any) -> None:
        """Check, select, launch. Arguments as in the family's op; ``out`` is required."""
        self.bind(**arguments)()

    def _switches(self) -> dict[str, Any]:
        return spec(self.config.family).switches(self.config)

    def _device_of(self, tensor: Any) -> int:
        if tensor.device.type != "cuda" or tensor.device.index != self.device:
            raise DeviceError(f"kernel: loaded on cuda:{self.device}, tensors on {tensor.device}")
        return tensor.device.index


def get_kernel(
    config: KernelConfig, arch: Arch | str | None = None, *, device: int | None = None
) -> Kernel:
    """The kernel of a config, compiled or from the store.

    Without `arch` it is for the current CUDA device (or `device`), loaded and ready to launch, its
    plans those measured on that GPU if any were. With `arch` (``"sm_90"``) it is compiled only,
    which needs no GPU. The same call gives the same
    object. Raises `ConfigError`, `CompileError`, `DeviceError`, `StoreError`.
    """
    if not isinstance(config, KernelConfig):
        raise ConfigTypeError(f"config: {type(config).__name__} found; allowed: KernelConfig")
    if arch is not None:
        device, target = None, Arch.of(arch)
    else:
        if device is None:
            device = _current_device()
        elif isinstance(device, bool) or not isinstance(device, int) or device < 0:
            raise ConfigTypeError(f"device: {device!r} found; allowed: the index of a CUDA device")
        target = Arch.detect(device)
    now = settings()
    name = (config, target, device, now)
    kernel = _kernels.get(name)
    if kernel is None:
        with _lock:
            gate = _building.setdefault(name, threading.Lock())
        with gate, held(now):
            kernel = _kernels.get(name)
            if kernel is None:
                kernel = _kernels[name] = Kernel(config, target, device)
    return kernel


@functools.cache
def _cuda_ready() -> bool:
    import torch

    return torch.cuda.is_available()


def _current_device() -> int:
    if not _cuda_ready():
        raise DeviceError(
            "get_kernel: no CUDA device is visible; name an architecture to compile for, "
            "e.g. get_kernel(config, arch='sm_90')"
        )
    import torch

    return torch.cuda.current_device()
