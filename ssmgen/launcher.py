"""Artifact -> CUDA function; one launch.

All loading happens in `load`; a launch allocates nothing on the device, loads nothing and waits
for nothing, so it is safe under CUDA-graph capture.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import sys
from typing import Any

from .artifact import Artifact
from .errors import DeviceError

__all__ = ["Function", "Launch", "enter", "load"]


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(
            "launcher: the CUDA bindings are missing; pip install 'ssmgen[cuda]'"
        ) from error
    return driver


# A process that has a torch for CUDA will launch: its first `get_kernel` need not wait for this.
if getattr(getattr(sys.modules.get("torch"), "version", None), "cuda", None):
    with contextlib.suppress(Exception):  # `load` says what is wrong with them
        _driver()


def _check(result: tuple[Any, ...], what: str) -> Any:
    if int(result[0]):
        raise DeviceError(f"{what}: {result[0].name}")
    return result[1] if len(result) > 1 else None


class Function:
    """A kernel loaded on one device."""

    def __init__(self, artifact: Artifact, device: int, handle: Any, module: Any) -> None:
        manifest = artifact.manifest
        self.device = device
        self.handle = handle
        self.threads = 32 * manifest["num_warps"]
        self.shared = manifest["shared"]
        self.arguments = [type for _, type in manifest["arguments"]]
        self.scratch = manifest["scratch_pointers"]
        self._module = module


@functools.cache
def _primary_context(device: int) -> Any:
    driver = _driver()
    _check(driver.cuInit(0), "cuInit")
    handle = _check(driver.cuDeviceGet(device), f"device {device}")
    return _check(driver.cuDevicePrimaryCtxRetain(handle), f"context of device {device}")


def enter(device: int) -> None:
    """Give a thread that has touched no GPU yet the context torch uses."""
    driver = _driver()
    context = _primary_context(device)
    if not int(_check(driver.cuCtxGetCurrent(), "current context")):
        _check(driver.cuCtxSetCurrent(context), f"context of device {device}")


def load(artifact: Artifact, device: int) -> Function:
    """Load an artifact into the primary context of `device`. Raises `DeviceError`."""
    import torch

    driver = _driver()
    name = artifact.manifest["entry"]
    torch.cuda.init()
    enter(device)
    with torch.cuda.device(device):
        module = _check(driver.cuModuleLoadData(artifact.cubin), f"loading {name}")
        handle = _check(driver.cuModuleGetFunction(module, name.encode()), f"finding {name}")
        shared = artifact.manifest["shared"]
        if shared > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(handle, attribute, shared), f"shared memory of {name}")
    return Function(artifact, device, handle, module)


class Launch:
    """A function with its grid and integer arguments fixed; only addresses vary.

    ``fill(*addresses)`` sets them, ``start(stream)`` launches with those set last, on the CUDA
    stream with this handle, and a call does both. One thread's at a time: the parameter block is
    reused from call to call.
    """

    def __init__(
        self, function: Function, grid: tuple[int, ...], scalars: tuple[int, ...], pdl: bool
    ) -> None:
        driver = _driver()
        count = len(function.arguments) + function.scratch
        pointers = len(function.arguments) - len(scalars)
        self._block = (ctypes.c_int64 * count)(*([0] * pointers), *scalars)
        first = ctypes.addressof(self._block)
        self._table = (ctypes.c_void_p * count)(*(first + 8 * i for i in range(count)))
        self.fill = functools.partial(struct.Struct(f"{pointers}P").pack_into, self._block, 0)
        self._function = function
        handle, params = function.handle, ctypes.addressof(self._table)
        if 0 in grid:

            def start(stream: int) -> None:
                pass

        elif pdl:
            config = driver.CUlaunchConfig()
            (config.gridDimX, config.gridDimY, config.gridDimZ) = grid
            (config.blockDimX, config.blockDimY, config.blockDimZ) = function.threads, 1, 1
            config.sharedMemBytes = function.shared
            attribute = driver.CUlaunchAttribute()
            attribute.id = (
                driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1

            start_dependent = driver.cuLaunchKernelEx

            def start(stream: int) -> None:
                config.hStream = stream
                (result,) = start_dependent(config, handle, params, 0)
                if result:
                    raise DeviceError(f"launch: {result.name}")

        else:
            start_kernel = driver.cuLaunchKernel
            x, y, z = grid
            threads, shared = function.threads, function.shared

            def start(stream: int) -> None:
                (result,) = start_kernel(
                    handle, x, y, z, threads, 1, 1, shared, stream, params, 0
                )  # fmt: skip
                if result:
                    raise DeviceError(f"launch: {result.name}")

        self.start = start

    def __call__(self, stream: int, *addresses: int) -> None:
        self.fill(*addresses)
        self.start(stream)
