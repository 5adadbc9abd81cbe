"""One root of the on-disk store.

    <root>/v1/<first two of key>/<key>/<toolchain>/{manifest.json, kernel.cubin, source.py}

A hit reads files and nothing else: no lock, no write, no compiler. Publishing stages a folder on
the same filesystem and renames it into place, so an entry is whole or absent; a lock only saves
double work. A bad entry is a miss: reported once, set aside, compiled again. What another process
published is never deleted or replaced.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import resource
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..artifact import FILES, Artifact
from ..errors import StoreError
from ..template import ABI_VERSION

__all__ = ["MAX_FILE", "Store", "move", "newest_first", "report"]

log = logging.getLogger("ssmgen")

# A kernel is some 30 kB; nothing that is read or unpacked may be larger than this.
MAX_FILE = 64 << 20

# A lock that is held for longer is not waited for.
LOCK_SECONDS = 30.0

# What renaming a folder onto something that is there can say.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
# What opening something that is no file can say.
_NO_FILE = (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENODEV)
# What a filesystem says that cannot sync a folder.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


@functools.cache
def report(text: str) -> None:
    """Warn, once in a process about one thing."""
    log.warning(text)


class Store:
    """One root. ``writable=False`` never writes, not even to set a bad entry aside.

    `origin` says where the root was named: ``user``, ``path`` or ``wheel``.
    """

    def __init__(self, root: Path, *, writable: bool = True, origin: str = "user") -> None:
        self.root = root
        self.writable = writable
        self.origin = origin

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r}, writable={self.writable}, origin={self.origin!r})"

    @property
    def base(self) -> Path:
        """Where this version of the layout lives."""
        return self.root / "v1"

    def entry(self, key: str, toolchain: str) -> Path:
        """The folder of one entry."""
        return self.base / key[:2] / key / toolchain

    def toolchains(self, key: str) -> list[str]:
        """Names of the toolchains that have an entry for `key`, the newest first."""
        try:
            names = os.listdir(self.base / key[:2] / key)
        except OSError:
            return []
        return newest_first(name for name in names if not name.startswith("."))

    def get(self, key: str, toolchain: str | None) -> Artifact | None:
        """The verified artifact, or None. Without a toolchain any toolchain's will do."""
        for name in self.toolchains(key) if toolchain is None else (toolchain,):
            folder = self.entry(key, name)
            try:
                return _load(folder)
            except FileNotFoundError:
                pass
            except StoreError as error:
                self._set_aside(folder, str(error))
            except OSError as error:  # not the entry's fault: no right, no handles, a stale mount
                report(f"cannot read {folder}: {error}; passed over, and left as it is")
        return None

    def fault(self, key: str, toolchain: str) -> str | None:
        """What is wrong with an entry, None if nothing is. Changes nothing."""
        return _fault(self.entry(key, toolchain))

    def names(self) -> Iterator[tuple[str, str]]:
        """(key, toolchain) of every entry, good or bad, by key."""
        for folder in sorted(self.base.glob("??/*/*")):
            if re.fullmatch(r"[0-9a-f]{64}", folder.parent.name):
                yield folder.parent.name, folder.name

    def entries(self) -> Iterator[Artifact]:
        """Every good entry, by key."""
        for key, toolchain in self.names():
            if found := self.get(key, toolchain):
                yield found

    def put(self, artifact: Artifact) -> None:
        """Publish. Raises `StoreError` if the disk refuses; a good entry that is there stays."""
        key, toolchain = artifact.manifest["key"], artifact.manifest["toolchain"]
        target = self.entry(key, toolchain)
        stage = self.base / "stage" / uuid.uuid4().hex
        try:
            self.make(stage)
            for name, data in artifact.contents().items():
                with open(stage / name, "xb", opener=_ours) as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            _sync(stage)
            # Twice: what stood there may have been bad, and `get` has set it aside then.
            if self._publish(stage, target) or (
                self.get(key, toolchain) is None and self._publish(stage, target)
            ):
                with contextlib.suppress(FileNotFoundError):  # evicted meanwhile, folder and all
                    _sync(target.parent)
        except OSError as error:
            raise self._refused(error) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _publish(self, stage: Path, target: Path) -> bool:
        """Rename into place; False if something is there already, seen from this host or not."""
        patience = 8
        while True:
            try:
                self.make(target.parent)
                stage.rename(target)
                return True
            except FileNotFoundError:  # an evictor took the empty parent in between
                patience -= 1
                if not patience or not stage.is_dir():
                    raise
            except OSError as error:
                if error.errno in _TAKEN:
                    return False
                raise

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Hold the lock of `name`, to save a second compilation. Never needed to be correct."""
        import filelock

        path = self.base / "locks" / f"{name}.lock"
        lock = None
        try:
            self.make(path.parent)
            # No soft lock where the filesystem has no flock: a marker left behind would block.
            lock = filelock.FileLock(path, LOCK_SECONDS, mode=0o644, fallback_to_soft=False)
            lock.acquire()
        except (OSError, NotImplementedError) as error:  # Timeout is an OSError
            report(f"no lock at {path} ({error}); another process may compile the same")
            lock = None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def _set_aside(self, thing: Path, why: str) -> None:
        report(f"bad entry {thing}: {why}")
        if self.writable:
            with contextlib.suppress(OSError):
                self._move_away(thing, lambda aside: _fault(aside, thing) is None)

    def _move_away(self, thing: Path, good: Callable[[Path], bool]) -> None:
        """Rename a thing that must not be where it is; nothing is deleted.

        Another process may have put a good one there before our rename: that goes back.
        """
        bad = self.base / "bad"
        if not bad.is_dir() and os.path.lexists(bad):
            bad.rename(self.base / f"bad.{uuid.uuid4().hex}")
        self.make(bad)
        aside = bad / f"{thing.parent.name}.{thing.name}.{uuid.uuid4().hex}"
        move(thing, aside)
        with contextlib.suppress(OSError):
            if good(aside):
                aside.rename(thing)
            else:
                os.utime(aside, follow_symlinks=False)  # `sweep` counts from now

    def require_writable(self) -> None:
        """Make the folder of the entries; a `StoreError` if nothing can be published to it."""
        try:
            self.make(self.base)
            if not os.access(self.base, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> StoreError:
        why = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
        return StoreError(
            f"cannot publish to {self.root}: {why or error}; make room there, or the right to "
            "write, or name another store in SSMGEN_CACHE_DIR"
        )

    def make(self, folder: Path) -> None:
        """Make a folder, and those above it, that none but its owner may write to.

        Something else in its way, below `base`, is set aside.
        """
        if folder.is_dir():
            return
        self.make(folder.parent)
        if self.base in folder.parents and os.path.lexists(folder) and not folder.is_dir():
            report(f"{folder}: not a folder; set aside")
            with contextlib.suppress(FileNotFoundError):
                self._move_away(folder, Path.is_dir)
        folder.mkdir(mode=0o755, exist_ok=True)


class Hold:
    """An open handle on an entry's folder, by which `evict` sees that a process uses it.

    A process keeps at most a quarter of the handles it may have; artifacts beyond are not held.
    """

    open = 0

    def __init__(self, handle: int) -> None:
        self.handle = handle
        Hold.open += handle >= 0

    def settle(self) -> None:
        """Let go if too many are held."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and Hold.open > soft // 4:
            self.release()

    def release(self) -> None:
        """Close the handle."""
        handle, self.handle = self.handle, -1
        if handle >= 0:
            Hold.open -= 1
            os.close(handle)

    def __del__(self) -> None:
        self.release()

    def __reduce__(self) -> tuple[type[Hold], tuple[int]]:
        return Hold, (-1,)


def move(thing: Path, to: Path) -> None:
    """Rename; file by file where an overlay (a container over its image) renames no folder."""
    try:
        thing.rename(to)
    except OSError as error:
        if error.errno != errno.EXDEV or not thing.is_dir():
            raise
        to.mkdir(mode=0o755)
        for path in sorted(
            thing.iterdir(), reverse=True
        ):  # what is left is no entry from the first
            path.rename(to / path.name)
        thing.rmdir()


def newest_first(toolchains: Iterable[str]) -> list[str]:
    """Toolchain names by the numbers in them: ``triton-3.10.0`` before ``triton-3.9.0``."""
    return sorted(
        toolchains,
        key=lambda name: ([int(n) for n in re.findall(r"\d+", name.split("-ptxas-")[0])], name),
        reverse=True,
    )


def _load(folder: Path, entry: Path | None = None) -> Artifact:
    """What `folder` holds, as the entry that belongs at `entry` (default: there).

    Raises FileNotFoundError if it is absent, `StoreError` if it is bad, OSError if this host
    refuses to read it.
    """
    entry = entry or folder
    try:
        hold = Hold(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
    except OSError as error:
        if error.errno in (errno.ENOTDIR, *_NO_FILE):
            if os.path.lexists(folder) and not folder.is_dir():
                raise StoreError("not a folder") from None
            raise FileNotFoundError(folder) from None
        raise
    try:
        contents = {name: _read(name, hold.handle) for name in ("manifest.json", *FILES)}
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        if not _same(folder, hold.handle):  # it was replaced or evicted while we read
            raise FileNotFoundError(folder) from None
        raise StoreError(f"{error.filename}: {error.strerror}") from None
    hold.settle()
    return Artifact.verify(entry.parent.name, entry.name, contents, ABI_VERSION, hold=hold)


def _read(name: str, folder: int) -> bytes:
    """A regular file of sane size; a pipe or a device does not block us."""
    handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=folder)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{name}: not a regular file")
        if found.st_size > MAX_FILE:
            raise StoreError(f"{name}: {found.st_size} bytes, more than any kernel has")
        with open(handle, "rb", closefd=False) as file:
            return file.read(found.st_size + 1)
    finally:
        os.close(handle)


def _ours(path: str, flags: int) -> int:
    """Open a new file that none but its owner may write to, whatever the umask."""
    return os.open(path, flags, 0o644)


def _same(folder: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(handle))
    except OSError:
        return False


def _fault(folder: Path, entry: Path | None = None) -> str | None:
    try:
        _load(folder, entry)
    except FileNotFoundError:
        return "absent"
    except (StoreError, OSError) as error:
        return str(error)
    return None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)
