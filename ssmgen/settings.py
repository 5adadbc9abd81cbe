"""Every SSMGEN_* variable, in one table.

Settings are read when they are needed, never at import, so a test or a server may change the
environment before its first call.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError

__all__ = ["VARIABLES", "Settings", "held", "parse_size", "settings"]

log = logging.getLogger("ssmgen")

VARIABLES = {
    "SSMGEN_CACHE_DIR": "The user store, read and written (default: $XDG_CACHE_HOME/ssmgen, "
    "else ~/.cache/ssmgen).",
    "SSMGEN_CACHE_PATH": "More stores, read-only, searched after the user store; "
    "separated like PATH.",
    "SSMGEN_CACHE_REMOTE": "A store behind any URL that fsspec can read (s3://, gs://, https://, "
    "file://): asked last, verified, never written to. Off unless set.",
    "SSMGEN_CACHE_TRUST": "Roots that are used although others than their owner may write to them; "
    "separated like PATH.",
    "SSMGEN_CACHE_SIZE": "The most the user store may grow to, like 500MB or 8GiB (default: 8GiB; "
    "0: no limit). What was used least recently goes first.",
    "SSMGEN_JIT": "deny: a kernel that is in no store is an error, not a compilation "
    "(default: allow).",
    "SSMGEN_INTERPRET": "1: on CPU tensors run the generated kernel in Triton's interpreter "
    "instead of the PyTorch reference.",
    "SSMGEN_BATCH_INVARIANT": "1: one plan for every batch size, so that results never depend on "
    "the batch.",
    "SSMGEN_TUNED_PATH": "Folders of dispatch tables that `ssmgen tune` wrote, looked at before "
    "those that ship; separated like PATH.",
    "SSMGEN_CHECK": "1: read the index tables back before every launch and raise an error for a "
    "value that is not allowed. Waits for the GPU: for finding faults, not for serving.",
    "SSMGEN_DEBUG": "1: a StatePool fills freed slots with NaN, and notes on the device, without "
    "waiting for it, every slot that a step uses wrongly; StatePool.check() raises it.",
}


@dataclass(frozen=True)
class Settings:
    """The parsed environment."""

    cache_dir: Path | None
    cache_dir_named: bool
    cache_path: tuple[Path, ...]
    cache_remote: str | None
    cache_trust: tuple[Path, ...]
    cache_size: int | None
    jit: bool
    interpret: bool
    batch_invariant: bool
    tuned_path: tuple[Path, ...]
    check: bool
    debug: bool


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise ConfigError(f"{name}: {os.environ[name]!r} is not a switch; allowed: 0, 1")


def _expanded(name: str, path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{name}: {path!r}: {error}") from None


def _paths(name: str) -> tuple[Path, ...]:
    return tuple(_expanded(name, p) for p in os.environ.get(name, "").split(os.pathsep) if p)


def parse_size(name: str, text: str) -> int | None:
    """Bytes of ``500MB`` or ``8GiB``; None of ``0``. `name` stands in the `ConfigError`."""
    text = text.strip()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kMGT])(i?)B?|B)?", text)
    if found is None:
        raise ConfigError(f"{name}: {text!r} is not a size; allowed: like 500MB, 8GiB, or 0")
    number, prefix, binary = found.groups()
    unit = (1024 if binary else 1000) ** ("kMGT".index(prefix) + 1) if prefix else 1
    return int(float(number) * unit) or None


def _size(name: str, default: int) -> int | None:
    text = os.environ.get(name)
    return parse_size(name, text) if text else default


def _jit() -> bool:
    value = os.environ.get("SSMGEN_JIT", "").strip().lower() or "allow"
    if value not in ("allow", "deny"):
        raise ConfigError(f"SSMGEN_JIT: {value!r} is not known; allowed: allow, deny")
    return value == "allow"


def _user_store() -> Path | None:
    if named := os.environ.get("SSMGEN_CACHE_DIR"):
        return _expanded("SSMGEN_CACHE_DIR", named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "ssmgen"
    try:
        return Path.home() / ".cache" / "ssmgen"
    except RuntimeError:
        return None


_memo: tuple[tuple[str | None, ...], Settings] | None = None
_held = threading.local()


@contextlib.contextmanager
def held(found: Settings) -> Iterator[None]:
    """For this thread the settings are these inside."""
    outer = getattr(_held, "value", None)
    _held.value = found
    try:
        yield
    finally:
        _held.value = outer


def settings() -> Settings:
    """The settings now; parsed again only when a variable has changed."""
    global _memo
    found: Settings | None = getattr(_held, "value", None)
    if found is not None:
        return found
    stamp = tuple(map(os.environ.get, (*VARIABLES, "XDG_CACHE_HOME", "HOME")))
    memo = _memo
    if memo is None or memo[0] != stamp:
        for name in os.environ:
            if name.startswith("SSMGEN_") and name not in VARIABLES:
                log.warning("%s is set but ssmgen knows no such variable", name)
        parsed = Settings(
            cache_dir=_user_store(),
            cache_dir_named=bool(os.environ.get("SSMGEN_CACHE_DIR")),
            cache_path=_paths("SSMGEN_CACHE_PATH"),
            cache_remote=os.environ.get("SSMGEN_CACHE_REMOTE") or None,
            cache_trust=_paths("SSMGEN_CACHE_TRUST"),
            cache_size=_size("SSMGEN_CACHE_SIZE", 8 << 30),
            jit=_jit(),
            interpret=_flag("SSMGEN_INTERPRET"),
            batch_invariant=_flag("SSMGEN_BATCH_INVARIANT"),
            tuned_path=_paths("SSMGEN_TUNED_PATH"),
            check=_flag("SSMGEN_CHECK"),
            debug=_flag("SSMGEN_DEBUG"),
        )
        _memo = memo = (stamp, parsed)
    return memo[1]
