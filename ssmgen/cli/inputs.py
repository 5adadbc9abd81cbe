"""What several commands read from their command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ..config import KernelConfig

__all__ = ["read_config"]


def read_config(text: str) -> KernelConfig:
    """The config in a JSON text, in a file, or on standard input (``-``)."""
    from ..config import KernelConfig

    if text == "-":
        return KernelConfig.from_json(sys.stdin.read())
    if text.lstrip().startswith("{"):
        return KernelConfig.from_json(text)
    try:
        return KernelConfig.from_json(Path(text).read_bytes())
    except OSError as error:
        raise typer.BadParameter(f"config {text}: {error.strerror}") from None
