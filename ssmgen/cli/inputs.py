"""What several commands read from their command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DeviceError, SsmgenError

if TYPE_CHECKING:
    from ..arch import Arch
    from ..config import KernelConfig

__all__ = [
    "KEY_OR_CONFIG",
    "ArchOf",
    "Archs",
    "Families",
    "Json",
    "Yes",
    "is_key",
    "read_arch",
    "read_config",
]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
ArchOf = Annotated[
    str | None,
    typer.Option(metavar="ARCH", help="Architecture of a CONFIG. Left out: that of the GPU here."),
]
Archs = Annotated[
    list[str] | None, typer.Option("--arch", help="Only of this architecture; repeat it for more.")
]
Families = Annotated[
    list[str] | None, typer.Option("--family", help="Only of this family; repeat it for more.")
]
KEY_OR_CONFIG = (
    "The first digits of a key; or a config: JSON, a file, or - for standard input. Give a file "
    "whose name could be a key as ./NAME."
)


def is_key(text: str) -> bool:
    """Whether an argument is a key or the beginning of one, and no config."""
    return re.fullmatch(r"[0-9a-f]{1,64}", text) is not None


def read_config(text: str) -> KernelConfig:
    """The config in a JSON text, in a file, or on standard input (``-``)."""
    from ..config import KernelConfig

    if text == "-":
        return KernelConfig.from_json(sys.stdin.read())
    if text.lstrip().startswith("{"):
        return KernelConfig.from_json(text)
    try:
        # An empty Path would be the folder here.
        found = Path(text).read_bytes() if text else b""
    except OSError as error:
        raise typer.BadParameter(
            f"config {text}: {error.strerror}; allowed: a file, a JSON object, or - for standard "
            "input"
        ) from None
    return KernelConfig.from_json(found)


def read_arch(name: str | None) -> Arch:
    """The architecture named, else that of the GPU here."""
    from ..arch import Arch

    try:
        return Arch.of(name) if name is not None else Arch.detect()
    except DeviceError:
        raise typer.BadParameter(
            "there is no GPU here that ssmgen knows; name an architecture, e.g. --arch sm_90"
        ) from None
    except SsmgenError as error:
        raise typer.BadParameter(str(error)) from None
