"""GPU architectures: what each can do, and which one is here."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .config import plain, shown
from .errors import ConfigError, DeviceError

__all__ = ["KNOWN", "Arch", "gpu_name"]

KNOWN = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")


@dataclass(frozen=True, order=True)
class Arch:
    """One compute capability, by its name (``sm_90``). ``cc`` is the number (90)."""

    cc: int

    def __post_init__(self) -> None:
        if type(self.cc) is not int or self.cc not in {int(name[3:]) for name in KNOWN}:
            raise ConfigError(f"arch: {shown(self.cc)} is not known; allowed: {', '.join(KNOWN)}")

    @classmethod
    def of(cls, value: Arch | str | int) -> Arch:
        """Parse ``sm_90``, ``90``, ``"9.0"`` or an `Arch`. Raises `ConfigError` if unknown."""
        if isinstance(value, Arch):
            return value
        value = plain(value)
        known = isinstance(value, str) or (isinstance(value, (int, float)) and value < 1000)
        text = str(value).removeprefix("sm_").removesuffix("a").replace(".", "") if known else ""
        name = f"sm_{text}"
        if name not in KNOWN:
            raise ConfigError(f"arch: {shown(value)} is not known; allowed: {', '.join(KNOWN)}")
        return cls(int(text))

    @classmethod
    def detect(cls, device: int | None = None) -> Arch:
        """The architecture of a CUDA device (default: the current one)."""
        found = _capability(-1 if device is None else device)
        if found is None:
            raise DeviceError(
                "arch: no CUDA device is visible; name one, e.g. get_kernel(config, arch='sm_90')"
            )
        # Of the 8.x generation any minor runs the cubins of a lower one; from 9.0 on a cubin is
        # for one member.
        major, minor = found
        for cc in (10 * major + minor, 80 if major == 8 else 0):
            if f"sm_{cc}" in KNOWN:
                return cls(cc)
        raise DeviceError(
            f"arch: compute capability {major}.{minor} is not supported; known: {', '.join(KNOWN)}"
        )

    def __str__(self) -> str:
        return f"sm_{self.cc}"

    @property
    def pdl(self) -> bool:
        """Programmatic dependent launch (griddepcontrol)."""
        return self.cc >= 90

    @property
    def bulk_prefetch(self) -> bool:
        """``cp.async.bulk.prefetch.L2``: one instruction asks for any number of bytes."""
        return self.cc >= 90

    @property
    def cvt_rs(self) -> bool:
        """``cvt.rs``: stochastic rounding of fp32 pairs to fp16/bf16 in hardware."""
        return self.cc in (100, 103)

    @property
    def fp8(self) -> bool:
        """Conversions to and from fp8_e4m3fn in hardware."""
        return self.cc >= 89

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory one program may have."""
        return {80: 163, 86: 99, 89: 99, 120: 99, 121: 99}.get(self.cc, 227) * 1024


@functools.cache
def gpu_name(device: int | None) -> str:
    """What the driver calls a CUDA device (None: the current one): ``NVIDIA H200``."""
    import torch

    return torch.cuda.get_device_name(device)


@functools.cache
def _capability(device: int) -> tuple[int, int] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(None if device < 0 else device)
