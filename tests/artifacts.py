"""Artifacts that nothing had to compile, and a look at what is on disk."""

from __future__ import annotations

import hashlib

from ssmgen.artifact import Artifact
from ssmgen.config import canonical_json
from ssmgen.template import ABI_VERSION, factors


def artifact(name="one", size=5000, toolchain="triton-0", **described):
    """An artifact with a true key; `name` makes it differ from others."""
    what = described.pop("factors", {"abi": ABI_VERSION, "name": name})
    cubin = b"\x7fELF" + hashlib.shake_256(name.encode()).digest(size - 4)
    return Artifact.build(
        {
            "key": hashlib.sha256(canonical_json(what).encode()).hexdigest(),
            "factors": what,
            "toolchain": toolchain,
            "entry": f"kernel_{name}",
            "arguments": [["state", "*fp32"], ["state_slot_stride", "i64"]],
            "scratch_pointers": 2,
            "num_warps": 2,
            "shared": 256,
            "registers": 78,
            "spills": 0,
            **described,
        },
        cubin,
        f"# source of {name}\n",
    )


def compiled(config, plan, arch, toolchain="triton-0"):
    """In the place of `compiler.compile`."""
    return artifact(factors=factors(config, plan, arch), toolchain=toolchain)


def snapshot(root):
    """Path, mode, time and bytes of all that is below `root`."""
    return {
        str(path.relative_to(root)): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(root.rglob("*"))
    }
