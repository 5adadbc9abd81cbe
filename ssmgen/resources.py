"""Where the data files are: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

import functools
from pathlib import Path

__all__ = ["root"]


@functools.cache
def root() -> Path:
    """The folder that holds ``templates/`` and ``cache/``."""
    package = Path(__file__).resolve().parent
    return package if (package / "templates").is_dir() else package.parent
