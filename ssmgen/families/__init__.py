"""The families of kernels. A family is one package here, found by its name."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from .base import Family

__all__ = ["Family", "names", "spec"]


@functools.cache
def names() -> tuple[str, ...]:
    """Names of all families."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg))


@functools.cache
def spec(name: str) -> Family:
    """The family called `name` (its module's ``FAMILY``)."""
    return importlib.import_module(f"{__name__}.{name}").FAMILY
