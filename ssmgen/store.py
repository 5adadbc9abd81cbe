"""The on-disk store of artifacts.

    <root>/v1/<first two of key>/<key>/<toolchain>/{manifest.json, kernel.cubin, source.py}

A hit reads files and nothing else: no lock, no write, no compiler. Publishing stages a folder on
the same filesystem and renames it into place, so an entry is whole or absent; a lock only saves
double work. A bad entry is a miss: reported, set aside, compiled again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from .artifact import FILES, Artifact
from .errors import StoreError
from .settings import settings
from .template import ABI_VERSION

__all__ = ["Store", "stores"]

log = logging.getLogger("ssmgen")


class Store:
    """One root. ``writable=False`` never writes, not even to set a bad entry aside."""

    def __init__(self, root: Path, *, writable: bool = True) -> None:
        self.root = root
        self.writable = writable

    def entry(self, key: str, toolchain: str) -> Path:
        """The folder of one entry."""
        return self.root / "v1" / key[:2] / key / toolchain

    def get(self, key: str, toolchain: str | None) -> Artifact | None:
        """The verified artifact, or None. Without a toolchain here, any toolchain's will do."""
        if toolchain is not None:
            return self._read(self.entry(key, toolchain), key)
        try:
            built_by = sorted(p.name for p in self.entry(key, "x").parent.iterdir())
        except OSError:
            return None
        for name in reversed(built_by):
            if not name.startswith(".") and (found := self._read(self.entry(key, name), key)):
                return found
        return None

    def _read(self, folder: Path, key: str, again: bool = False) -> Artifact | None:
        try:
            contents = {name: (folder / name).read_bytes() for name in ("manifest.json", *FILES)}
        except (FileNotFoundError, NotADirectoryError):
            if not folder.is_dir():
                return None
            if not again:  # it may have been published just now
                return self._read(folder, key, again=True)
            self._set_aside(folder, "a file is missing")
            return None
        except OSError as error:
            self._set_aside(folder, str(error))
            return None
        try:
            return Artifact.verify(key, contents, ABI_VERSION)
        except StoreError as error:
            self._set_aside(folder, str(error))
            return None

    def _set_aside(self, folder: Path, why: str) -> None:
        log.warning("bad entry %s: %s", folder, why)
        if self.writable:
            with contextlib.suppress(OSError):
                aside = self.root / "v1" / "bad" / f"{folder.parent.name}.{uuid.uuid4().hex}"
                aside.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(aside)

    def put(self, artifact: Artifact) -> None:
        """Publish. Raises `StoreError` if the disk refuses; an entry that is there stays."""
        key, toolchain = artifact.manifest["key"], artifact.manifest["toolchain"]
        target = self.entry(key, toolchain)
        stage = self.root / "v1" / "stage" / uuid.uuid4().hex
        try:
            stage.mkdir(parents=True)
            for name, data in artifact.contents().items():
                with open(stage / name, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            _sync(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                stage.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
            else:
                _sync(target.parent)
        except OSError as error:
            raise StoreError(f"cannot publish to {self.root}: {error}") from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Hold the lock of `key`, to save a second compilation. Never needed to be correct."""
        import filelock

        path = self.root / "v1" / "locks" / f"{key}.lock"
        lock = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path, timeout=120)
            lock.acquire()
        except (OSError, NotImplementedError, filelock.Timeout) as error:
            log.warning("no lock at %s (%s); another process may compile the same", path, error)
            lock = None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def entries(self) -> Iterator[Artifact]:
        """Every good entry, by key."""
        for folder in sorted((self.root / "v1").glob("??/*/*")):
            if found := self._read(folder, folder.parent.name):
                yield found


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def stores() -> list[Store]:
    """The user store (if there is a place for one), then the read-only roots."""
    now = settings()
    own = [Store(now.cache_dir)] if now.cache_dir else []
    return own + [Store(root, writable=False) for root in now.cache_path]
