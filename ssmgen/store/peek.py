"""Looking at entries without using them: what is read here counts as no use to `evict`, sets
nothing aside and holds nothing open."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..artifact import FILES, Artifact
from ..errors import StoreError
from ..template import ABI_VERSION
from .local import MAX_FILE, Store

__all__ = ["fault", "peek"]


def peek(store: Store, key: str, toolchain: str) -> Artifact:
    """The verified entry. Raises `StoreError` saying what is wrong with it."""
    folder = store.entry(key, toolchain)
    contents = {}
    for name in ("manifest.json", *FILES):
        try:
            contents[name] = _read(folder / name)
        except OSError as error:
            what = name if folder.is_dir() else "entry"
            raise StoreError(f"{what}: {error.strerror}") from None
    return Artifact.verify(key, toolchain, contents, ABI_VERSION)


def fault(store: Store, key: str, toolchain: str) -> str | None:
    """What is wrong with an entry; None if nothing is."""
    try:
        peek(store, key, toolchain)
    except StoreError as error:
        return str(error)
    return None


def _read(path: Path) -> bytes:
    flags = os.O_RDONLY | os.O_NONBLOCK
    try:
        handle = os.open(path, flags | os.O_NOATIME)
    except PermissionError:  # only its owner may look at a file and leave no trace
        handle = os.open(path, flags)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{path.name}: not a regular file")
        if found.st_size > MAX_FILE:
            raise StoreError(f"{path.name}: {found.st_size} bytes, more than any kernel has")
        with open(handle, "rb", closefd=False) as file:
            return file.read(found.st_size + 1)
    finally:
        os.close(handle)
