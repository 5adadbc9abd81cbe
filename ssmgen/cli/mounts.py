"""Which mount a path lies on, from /proc/self/mountinfo."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Mount", "mount_of", "nearest"]

NETWORK = (
    "9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4",
    "ocfs2", "orangefs", "panfs", "smb3", "smbfs", "virtiofs", "wekafs",
)  # fmt: skip
LOCAL_FUSE = ("fuse.fuse-overlayfs", "fuse.overlayfs", "fuse.bindfs", "fuse.mergerfs")


@dataclass(frozen=True)
class Mount:
    """``kind`` is the filesystem's type, ``options`` those of the mount and of its filesystem."""

    point: str
    kind: str
    options: frozenset[str]

    @property
    def read_only(self) -> bool:
        return "ro" in self.options

    @property
    def noatime(self) -> bool:
        return "noatime" in self.options

    @property
    def network(self) -> bool:
        """Whether other hosts may see it too."""
        fuse = self.kind.startswith("fuse.") and self.kind not in LOCAL_FUSE
        return self.kind in NETWORK or fuse

    @property
    def memory(self) -> bool:
        """Whether it is gone after a restart."""
        return self.kind in ("tmpfs", "ramfs")


def mount_of(path: Path, mountinfo: str | None = None) -> Mount | None:
    """The mount of a path that exists; None where there is no such list."""
    if mountinfo is None:
        try:
            mountinfo = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
        except OSError:
            return None
        path = Path(os.path.realpath(path))
    best = None
    for line in mountinfo.splitlines():
        mount, _, filesystem = line.partition(" - ")
        fields, (kind, *rest) = mount.split(" "), filesystem.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
        options = frozenset(f"{fields[5]},{rest[-1] if rest else ''}".split(",")) - {"rw", ""}
        # Of several on one point the last hides the others.
        if path.is_relative_to(point) and (best is None or len(point) >= len(best.point)):
            best = Mount(point, kind, options)
    return best


def nearest(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())
