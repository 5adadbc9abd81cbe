"""The size of a store: a cap, what goes first, what stays.

Use is read from the files' access times, which the kernel keeps (at day resolution under the usual
``relatime``): a hit writes nothing. Pinned entries stay, and so do those that a process on this
machine holds open.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..settings import settings
from .local import Store, move, report

__all__ = ["Usage", "keep_small", "pin", "pinned", "remove", "surplus", "sweep", "unpin", "usage"]

# What a process that was killed left behind may go after so many seconds.
STALE_SECONDS = 24 * 3600
# A scan of the store after every so many kernels that a process publishes, and after the first.
SCAN_EVERY = 32


@dataclass(frozen=True)
class Usage:
    """One entry: bytes on disk, last use (seconds since the epoch), why it stays if it must."""

    key: str
    toolchain: str
    size: int
    used: float
    stays: str | None

    @property
    def folder(self) -> str:
        return f"{self.key}/{self.toolchain}"


def usage(store: Store) -> list[Usage]:
    """Every entry of a store, the least recently used first."""
    pins = pinned(store)
    held = _held()
    found = []
    for key, toolchain in store.names():
        folder = store.entry(key, toolchain)
        with contextlib.suppress(OSError):  # it may go while we look
            stats = [path.stat() for path in folder.iterdir()]
            name = f"{key}/{toolchain}"
            stays = "pinned" if key in pins else "in use" if name in held else None
            used = max((max(s.st_atime, s.st_mtime) for s in stats), default=0.0)
            found.append(Usage(key, toolchain, sum(s.st_size for s in stats), used, stays))
    return sorted(found, key=lambda entry: (entry.used, entry.folder))


def surplus(entries: list[Usage], cap: int | None) -> list[Usage]:
    """What has to go, least recently used first, so that the rest fits into `cap` bytes."""
    over = sum(entry.size for entry in entries) - cap if cap is not None else 0
    gone = []
    for entry in entries:
        if over <= 0:
            break
        if entry.stays is None:
            gone.append(entry)
            over -= entry.size
    return gone


def remove(store: Store, key: str, toolchain: str) -> None:
    """Take one entry out: gone at once for new readers, whole to the end for present ones."""
    away = store.base / "stage" / uuid.uuid4().hex
    store.make(away.parent)
    move(store.entry(key, toolchain), away)
    shutil.rmtree(away)
    for empty in (store.entry(key, toolchain).parent, store.base / key[:2]):
        with contextlib.suppress(OSError):
            empty.rmdir()


def sweep(store: Store) -> list[Path]:
    """What killed processes left behind and what was set aside, older than a day: for `gc` to
    delete. Age is measured against the clock of the filesystem, not against ours."""
    if not store.base.is_dir():
        return []
    probe = store.base / "stage" / f"{uuid.uuid4().hex}.now"
    store.make(probe.parent)
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    stale = []
    for pattern in ("stage/*", "bad/*", "bad.*", "locks/*"):
        for path in sorted(store.base.glob(pattern)):
            with contextlib.suppress(OSError):
                if now - path.lstat().st_mtime > STALE_SECONDS:
                    stale.append(path)
    return stale


_published = 0


def keep_small(store: Store) -> None:
    """Evict down to ``SSMGEN_CACHE_SIZE`` now and then; trouble is reported, not raised."""
    global _published
    _published += 1
    cap = settings().cache_size
    if cap is None or _published % SCAN_EVERY != 1:
        return
    try:
        for entry in surplus(usage(store), cap):
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                remove(store, entry.key, entry.toolchain)
    except OSError as error:
        report(f"cannot evict from {store.root}: {error}")


def pinned(store: Store) -> Collection[str]:
    """Keys that are pinned."""
    try:
        return frozenset(os.listdir(store.base / "pins"))
    except OSError:
        return frozenset()


def pin(store: Store, key: str) -> None:
    """Never evict the entries of `key`."""
    folder = store.base / "pins"
    store.make(folder)
    (folder / key).touch(mode=0o644)


def unpin(store: Store, key: str) -> None:
    """Undo `pin`; nothing happens if it was not pinned."""
    (store.base / "pins" / key).unlink(missing_ok=True)


def _held() -> Collection[str]:
    """``key/toolchain`` of every entry that a process we may look into holds open."""
    return frozenset(_handles())


def _handles() -> Iterator[str]:
    entry = re.compile(r"/v1/[0-9a-f]{2}/([0-9a-f]{64}/[^/ ]+)(?: \(deleted\))?$")
    for process in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for handle in os.listdir(process):
                with contextlib.suppress(OSError):
                    if found := entry.search(os.readlink(process / handle)):
                        yield found[1]
