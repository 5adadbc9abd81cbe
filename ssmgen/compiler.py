"""Source -> Artifact, for any architecture, on a machine with or without a GPU.

Triton is the compiler. Its cache is pointed at a folder that is thrown away: its entries hold
absolute paths and no digests. Line information is off, so the same source gives the same bytes
everywhere.
"""

from __future__ import annotations

import atexit
import builtins
import functools
import hashlib
import importlib.metadata
import linecache
import logging
import os
import re
import subprocess
import tempfile
import threading
import types
from typing import Any

from . import policy
from .arch import Arch
from .artifact import Artifact
from .config import KernelConfig
from .errors import CompileError
from .families import spec
from .plan import Plan
from .template import TRITON_TYPES, entry_name, factors, key, options, render

__all__ = ["compile", "load_source", "ptx", "toolchain", "triton_lock"]

log = logging.getLogger("ssmgen")

# Triton's knobs, and what its interpreter patches, are process-wide: one of us at a time.
triton_lock = threading.RLock()


@functools.cache
def _scratch() -> str:
    """Where Triton's own cache goes until this process ends; other threads may see it too."""
    folder = tempfile.TemporaryDirectory(prefix="ssmgen-")
    atexit.register(folder.cleanup)
    return folder.name


def _triton_version() -> str | None:
    try:
        triton = importlib.metadata.distribution("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    # `version` parses the whole text as e-mail.
    _, _, stated = (triton.read_text("METADATA") or "").partition("\nVersion: ")
    return stated.partition("\n")[0].strip() or triton.version


# Found here: the search takes a tenth of what the first `get_kernel` of a process may.
_INSTALLED = _triton_version()


@functools.cache
def toolchain() -> str | None:
    """Name of the compiler installed here (``triton-3.6.0``); None without one.

    Triton's version fixes the ptxas it brings; a ptxas named by the environment is told apart by
    its bytes.
    """
    if _INSTALLED is None:
        return None
    name = f"triton-{_INSTALLED}"
    for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        if path := os.environ.get(variable):
            try:
                with open(path, "rb") as file:
                    name += f"-ptxas-{hashlib.sha256(file.read()).hexdigest()[:12]}"
            except OSError as error:
                raise CompileError(f"{variable}: cannot read {path}: {error}") from None
    return name


def load_source(source: str, entry: str, decorate: Any) -> Any:
    """Run a generated module with `decorate` for ``triton.jit`` or ``gluon.jit``; its kernel."""
    name = f"ssmgen_{hashlib.sha256(source.encode()).hexdigest()[:16]}.py"
    lines = source.splitlines(keepends=True)
    # Triton reads a function's text through linecache; an entry without mtime is never dropped.
    linecache.cache[name] = (len(source), None, lines, name)
    # The module's ``triton`` is ours, so that no other thread sees another ``triton.jit``.
    ours = types.SimpleNamespace(jit=decorate)
    namespace: dict[str, Any] = {
        "__name__": name.removesuffix(".py"),
        "triton": ours,
        "gluon": ours,
    }
    code = source.replace("\nimport triton\n", "\n\n", 1).replace(f"\n{_GLUON}\n", "\n\n", 1)
    exec(builtins.compile(code, name, "exec"), namespace)
    return namespace[entry]


def compile(config: KernelConfig, plan: Plan, arch: Arch) -> Artifact:
    """Render and compile one kernel. Raises `CompileError` with the config and the cause, and
    `JitDeniedError` after `policy.freeze`."""
    policy.refuse_if_frozen(config, arch)
    source = render(config, plan, arch)
    entry = entry_name(config, plan)
    with triton_lock:
        binary = _triton(source, entry, config, plan, arch)
    return Artifact.build(
        {
            "key": key(config, plan, arch),
            "factors": factors(config, plan, arch),
            "toolchain": toolchain(),
            "entry": entry,
            "arguments": [[a.name, a.type] for a in spec(config.family).arguments(config)],
            "scratch_pointers": 2,
            "num_warps": binary.metadata.num_warps,
            "shared": binary.metadata.shared,
            **_resources(binary.asm["cubin"]),
        },
        binary.asm["cubin"],
        source,
    )


def ptx(config: KernelConfig, plan: Plan, arch: Arch) -> str:
    """The PTX of one kernel, for reading."""
    with triton_lock:
        source = render(config, plan, arch)
        entry = entry_name(config, plan)
        return _triton(source, entry, config, plan, arch, stages=True).asm["ptx"]


def _triton(
    source: str, entry: str, config: KernelConfig, plan: Plan, arch: Arch, stages: bool = False
) -> Any:
    """Triton's kernel; with `stages` its ``asm`` has more than the binary."""
    import triton
    from triton.backends.compiler import GPUTarget

    arguments = spec(config.family).arguments(config)
    signature = {a.name: _triton_type(a.type) for a in arguments}
    attrs = {(i,): [["tt.divisibility", a.align]] for i, a in enumerate(arguments) if a.align > 1}
    decorate, ast_source = _dialect(source)
    function = load_source(source, entry, decorate)
    if triton.knobs.runtime.interpret:
        raise CompileError(
            "TRITON_INTERPRET is set: Triton interprets and cannot compile; unset it"
        )
    with (
        triton.knobs.cache.scope(),
        triton.knobs.compilation.scope(),
        triton.knobs.nvidia.scope(),
    ):
        triton.knobs.cache.dir = _scratch()
        triton.knobs.compilation.disable_line_info = True
        triton.knobs.compilation.override = False
        triton.knobs.compilation.always_compile = True
        triton.knobs.compilation.store_binary_only = not stages
        triton.knobs.nvidia.disable_ptxas_opt = False
        try:
            binary = triton.compile(
                ast_source(function, signature, {}, attrs),
                target=GPUTarget("cuda", arch.cc, 32),
                options=options(config, plan, arch),
            )
        except Exception as error:
            raise CompileError(
                f"{entry} for {arch} ({plan}): {error}\nconfig: {config.to_json()}"
            ) from error
    metadata = binary.metadata
    for field in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, field, 0):
            raise CompileError(f"{entry}: needs {field}, which the ABI does not provide")
    return binary


# The line that makes a source Gluon, in which layouts are written out.
_GLUON = "from triton.experimental import gluon"


def _dialect(source: str) -> tuple[Any, Any]:
    """The classes of a function and of a source, by the dialect the source is written in."""
    if f"\n{_GLUON}\n" in source:
        from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

        return GluonJITFunction, GluonASTSource
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    return JITFunction, ASTSource


def _triton_type(type: str) -> str:
    return f"*{TRITON_TYPES[type[1:]]}" if type.startswith("*") else type


def _resources(cubin: bytes) -> dict[str, int | None]:
    """Registers a thread and spilled bytes, as cuobjdump reports them; None if it is missing."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            tool = triton.knobs.nvidia.cuobjdump.path
            text = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError, AttributeError, RuntimeError) as error:
            log.warning("no resource report: %s", error)
            return {"registers": None, "spills": None}
    report = text.stdout + text.stderr
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return {"registers": found.get("REG"), "spills": found.get("STACK", 0) + found.get("LOCAL", 0)}
