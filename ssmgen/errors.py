"""Every error ssmgen raises on purpose; each is also the built-in a caller would expect."""

from __future__ import annotations

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "CompileError",
    "ConfigError",
    "ConfigTypeError",
    "DeviceError",
    "JitDeniedError",
    "PoolError",
    "PoolExhaustedError",
    "SsmgenError",
    "StoreError",
    "UnsupportedError",
]


class SsmgenError(Exception):
    """Base of all errors raised by ssmgen."""


class ConfigError(SsmgenError, ValueError):
    """A config field has a value that is not allowed."""


class ConfigTypeError(SsmgenError, TypeError):
    """A config field is unknown or of the wrong type."""


class ArgumentValueError(SsmgenError, ValueError):
    """A tensor argument has a shape, stride or value outside the contract."""


class ArgumentTypeError(SsmgenError, TypeError):
    """A tensor argument has the wrong dtype or is not a tensor."""


class DeviceError(SsmgenError, RuntimeError):
    """A device is missing, wrong, or refused a call."""


class UnsupportedError(SsmgenError, NotImplementedError):
    """A known feature of a compatible API that this version does not have."""


class CompileError(SsmgenError, RuntimeError):
    """The compiler refused a generated source."""


class StoreError(SsmgenError, RuntimeError):
    """The on-disk store cannot do what was asked."""


class JitDeniedError(StoreError):
    """A kernel is in no store, and compiling is forbidden."""


class PoolError(SsmgenError, RuntimeError):
    """A slot is used against its life: freed twice, copied when free, written by two rows."""


class PoolExhaustedError(PoolError):
    """A pool has fewer free slots than were asked for."""
