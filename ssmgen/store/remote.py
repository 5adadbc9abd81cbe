"""A root reached through fsspec: read-through, verified, never written to.

Its layout is that of a local root, so any tool that copies a folder fills one.
"""

from __future__ import annotations

import functools
import time
from typing import Any

from ..artifact import FILES, Artifact
from ..errors import ConfigError, StoreError
from ..template import ABI_VERSION
from . import evict
from .local import MAX_FILE, Store, newest_first, report

__all__ = ["Remote"]

# After a failure the remote is left alone for so long: an outage must not slow every miss.
PAUSE_SECONDS = 60.0


class Remote:
    """The store below one URL (``s3://bucket/kernels``, ``https://host/kernels``, ``file:///…``)."""

    origin = "remote"

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ModuleNotFoundError:
            raise ConfigError(
                f"SSMGEN_CACHE_REMOTE: {url!r} needs fsspec; pip install 'ssmgen[remote]'"
            ) from None
        try:
            fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"SSMGEN_CACHE_REMOTE: {url!r}: {error}") from None
        self.url = url
        self._silent_until = 0.0

    @functools.cached_property
    def _place(self) -> tuple[Any, str]:
        """The filesystem and the root on it. It may connect."""
        import fsspec

        return fsspec.core.url_to_fs(self.url)

    @staticmethod
    @functools.cache
    def at(url: str) -> Remote:
        """One for each URL in a process."""
        return Remote(url)

    def fetch(self, key: str, toolchain: str | None, into: Store | None = None) -> Artifact | None:
        """The verified artifact, published to `into` on the way; None if it is not there.

        Trouble with the remote is a miss, reported once.
        """
        if time.monotonic() < self._silent_until:
            return None
        try:
            for name in self._toolchains(key) if toolchain is None else (toolchain,):
                if found := self._fetch(key, name):
                    if into is not None:
                        _keep(into, found)
                    return found
        except PermissionError as error:  # how a bucket that may not be listed says: not there
            report(f"remote store {self.url}: {error or 'no permission'}")
        except Exception as error:  # whatever the filesystem behind fsspec may raise
            self._silent_until = time.monotonic() + PAUSE_SECONDS
            report(f"remote store {self.url}: {type(error).__name__}: {error}")
        return None

    def _path(self, *parts: str) -> str:
        return "/".join((self._place[1].rstrip("/"), "v1", *parts))

    def _toolchains(self, key: str) -> list[str]:
        files, _ = self._place
        try:
            files.invalidate_cache()
            listed = files.ls(self._path(key[:2], key), detail=False)
        except FileNotFoundError:
            return []
        return newest_first(path.rstrip("/").rsplit("/", 1)[-1] for path in listed)

    def _fetch(self, key: str, toolchain: str) -> Artifact | None:
        where = self._path(key[:2], key, toolchain)
        try:
            contents = {name: self._read(f"{where}/{name}") for name in ("manifest.json", *FILES)}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError as error:
            report(f"bad entry {self.url} {key}/{toolchain}: {error}")
            return None
        try:
            return Artifact.verify(key, toolchain, contents, ABI_VERSION)
        except StoreError as error:
            report(f"bad entry {self.url} {key}/{toolchain}: {error}")
            return None

    def _read(self, path: str) -> bytes:
        # Not `open`, which takes a host that cannot be reached for a file that is not there.
        data: Any = self._place[0].cat_file(path, 0, MAX_FILE + 1)
        return bytes(data)


def _keep(store: Store, artifact: Artifact) -> None:
    try:
        store.put(artifact)
    except StoreError as error:
        report(f"{error}; the kernel is used from memory")
    else:
        evict.keep_small(store)
