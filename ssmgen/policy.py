"""May this process compile? ``SSMGEN_JIT`` says so at first, `freeze` says no for good."""

from __future__ import annotations

import shlex

from .arch import Arch
from .config import KernelConfig
from .errors import JitDeniedError
from .settings import settings

__all__ = ["allowed", "freeze", "prewarm_command", "refuse", "refuse_if_frozen"]

_frozen = False


def freeze() -> None:
    """Make every later compilation in this process an error (`JitDeniedError`).

    For a server to call once it is warm: kernels in memory and in the stores still serve. There
    is no way back.
    """
    global _frozen
    _frozen = True


def allowed() -> bool:
    """Whether a kernel that is in no store may be compiled."""
    return settings().jit and not _frozen


def prewarm_command(config: KernelConfig, arch: Arch) -> str:
    """The shell command that puts the kernels of `config` for `arch` into the user store."""
    command = f"ssmgen prewarm --config {shlex.quote(config.to_json())} --arch {arch}"
    return f"SSMGEN_BATCH_INVARIANT=1 {command}" if settings().batch_invariant else command


def refuse(config: KernelConfig, arch: Arch) -> JitDeniedError:
    """The error that says what is missing and how to get it."""
    why = "ssmgen.freeze() was called" if _frozen else "SSMGEN_JIT=deny"
    return JitDeniedError(
        f"{config.family} kernel for {arch} is in no store and may not be compiled ({why}). "
        f"Put it there with\n    {prewarm_command(config, arch)}"
    )


def refuse_if_frozen(config: KernelConfig, arch: Arch) -> None:
    """Raise after `freeze`, whatever asks for a compilation."""
    if _frozen:
        raise refuse(config, arch)
