"""Which roots are asked, in which order, and which of them are trusted.

The user store; then ``SSMGEN_CACHE_PATH``; then the stores inside installed wheels (entry points
``ssmgen.stores``); then the remote. Each later one is looked at only when those before it miss.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..settings import settings
from .local import Store, report

if TYPE_CHECKING:
    from ..artifact import Artifact
    from .remote import Remote

__all__ = ["find", "layers", "named", "refusal", "remote", "stores", "user_store"]


def user_store() -> Store | None:
    """The store that is written to; None if there is no place for one, or it is refused."""
    store = _user()
    return store if store is not None and _trusted(store) else None


def stores() -> list[Store]:
    """Every trusted root on this machine, in the order they are asked."""
    return list(layers())


def layers() -> Iterator[Store]:
    """`stores`, one at a time: a hit in an early one never looks for the later ones."""
    return (store for store in named() if _trusted(store))


def named() -> Iterator[Store]:
    """Every root on this machine that is named, trusted or not, in the order they are asked."""
    if own := _user():
        yield own
    for root in settings().cache_path:
        yield Store(root, writable=False, origin="path")
    for root in _wheels():
        yield Store(root, writable=False, origin="wheel")


def _user() -> Store | None:
    root = settings().cache_dir
    return Store(root) if root else None


def remote() -> Remote | None:
    """The remote root, if ``SSMGEN_CACHE_REMOTE`` names one."""
    url = settings().cache_remote
    if url is None:
        return None
    from .remote import Remote

    return Remote.at(url)


def find(key: str, toolchain: str | None) -> Artifact | None:
    """The first verified artifact of all layers; without a toolchain, of any toolchain.

    What the remote has is published to the user store.
    """
    for store in layers():
        if found := store.get(key, toolchain):
            return found
    far = remote()
    return far.fetch(key, toolchain, user_store()) if far else None


def refusal(store: Store) -> str | None:
    """Why a root is not trusted; None if it is (or is not there yet).

    A root is refused if users other than its owner may write to it, unless it lies on a read-only
    mount or ``SSMGEN_CACHE_TRUST`` names it. The default place of the user store must be ours:
    nobody has named it, so nobody has trusted its owner.
    """
    now = settings()
    if store.root in now.cache_trust:
        return None
    if store.origin == "user" and not now.cache_dir_named:
        with contextlib.suppress(OSError):
            owner = store.root.stat().st_uid
            if owner not in (0, os.geteuid()):
                return (
                    f"it belongs to user {owner}; name it in SSMGEN_CACHE_DIR or "
                    "SSMGEN_CACHE_TRUST, or choose another place"
                )
    for folder in (store.root, store.base):
        try:
            mode = folder.stat().st_mode
        except OSError:
            return None
        if mode & 0o022 and not _read_only(folder):
            who = "everyone" if mode & 0o002 else "its group"
            return (
                f"{who} may write to {folder} (mode {stat.S_IMODE(mode):o}); chmod -R go-w "
                f"{shlex.quote(str(store.root))}, or list {store.root} in SSMGEN_CACHE_TRUST"
            )
    return None


def _read_only(folder: Path) -> bool:
    try:
        return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _trusted(store: Store) -> bool:
    why = refusal(store)
    if why is not None:
        report(f"store {store.root} is not used: {why}")
    return why is None


@functools.cache
def _wheels() -> tuple[Path, ...]:
    """Folders of the packages that the entry points name (``package.folder:folder``); no package
    is imported, and none that is broken costs more than a warning."""
    roots = []
    try:
        points = list(importlib.metadata.entry_points(group="ssmgen.stores"))
    except Exception as error:  # any distribution on the path may be damaged
        report(f"entry points of ssmgen.stores cannot be read: {type(error).__name__}: {error}")
        points = []
    for point in points:
        try:
            package, *below = f"{point.module}.{point.attr or ''}".strip(".").split(".")
            found = importlib.util.find_spec(package)
            places = list(found.submodule_search_locations or ()) if found else []
        except Exception:  # no valid name, or whatever a finder may raise
            places = []
        if not places:
            report(f"entry point {point.name} of ssmgen.stores: no package at {point.value!r}")
        roots += [Path(place, *below) for place in places]
    return tuple(sorted(roots))
