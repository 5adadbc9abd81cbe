"""Artifact: a compiled kernel and the manifest that says how to launch it.

The manifest's ABI, version 1: the arguments in order, each in its natural size, then
``scratch_pointers`` null pointers; ``32 * num_warps`` threads; ``shared`` bytes of dynamic shared
memory. An artifact is plain data: the cubin, the source it came from, JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from .config import canonical_json
from .errors import StoreError

__all__ = ["Artifact"]

FILES = ("kernel.cubin", "source.py")

# A toolchain's name is a folder's name.
_TOOLCHAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


@dataclass(frozen=True)
class Artifact:
    """``manifest`` holds key, factors, toolchain, entry, arguments, scratch_pointers, num_warps,
    shared, registers, spills, size and sha256 of each file, and its own sha256."""

    manifest: dict[str, Any]
    cubin: bytes
    source: str
    # What keeps the entry it was read from in the store while the artifact lives.
    hold: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def build(cls, description: dict[str, Any], cubin: bytes, source: str) -> Artifact:
        """Complete `description` with sizes and digests of the files."""
        files = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            for name, data in zip(FILES, (cubin, source.encode()))
        }
        manifest = {**description, "files": files}
        return cls({**manifest, "sha256": _digest(manifest)}, cubin, source)

    def contents(self) -> dict[str, bytes]:
        """The files of a store entry, the manifest last."""
        return {
            FILES[0]: self.cubin,
            FILES[1]: self.source.encode(),
            "manifest.json": (canonical_json(self.manifest) + "\n").encode(),
        }

    @classmethod
    def verify(
        cls, key: str, toolchain: str, contents: dict[str, bytes], abi: int, *, hold: Any = None
    ) -> Artifact:
        """Rebuild from the files of the entry of `key` and `toolchain`.

        Raises `StoreError` saying what is wrong with them.
        """
        try:
            text = contents["manifest.json"]
            manifest = json.loads(text)
            # It is hashed as it was written: to write it again takes longer than all else here.
            own = f'"sha256":"{manifest["sha256"]}",'.encode()
            body = text.removesuffix(b"\n").replace(own, b"", 1)
            if manifest["sha256"] != hashlib.sha256(body).hexdigest():
                raise StoreError("manifest.json: its digest differs from what it says")
            for name in FILES:
                found = contents[name]
                claimed = manifest["files"][name]
                if len(found) != claimed["size"]:
                    raise StoreError(f"{name}: {len(found)} bytes, manifest says {claimed['size']}")
                if hashlib.sha256(found).hexdigest() != claimed["sha256"]:
                    raise StoreError(f"{name}: digest differs from the manifest's")
            if manifest["key"] != key:
                raise StoreError(f"manifest.json: entry of another key, {manifest['key']}")
            if manifest["toolchain"] != toolchain or not _TOOLCHAIN.fullmatch(toolchain):
                raise StoreError(f"manifest.json: of toolchain {manifest['toolchain']!r}")
            # These too as they were written: nothing else has this digest.
            _, _, rest = text.partition(b'"factors":')
            if hashlib.sha256(rest.partition(b',"files":')[0]).hexdigest() != key:
                raise StoreError("manifest.json: its factors do not hash to its key")
            if manifest["factors"]["abi"] != abi:
                raise StoreError(f"manifest.json: ABI {manifest['factors']['abi']}, not {abi}")
            if not _launchable(manifest):
                raise StoreError("manifest.json: does not say how to launch the kernel")
            if not contents[FILES[0]].startswith(b"\x7fELF"):
                raise StoreError("kernel.cubin: not an ELF file")
            return cls(manifest, contents[FILES[0]], contents[FILES[1]].decode(), hold)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise StoreError(f"manifest.json: malformed ({error!r})") from None


def _launchable(manifest: dict[str, Any]) -> bool:
    """Whether the facts a launch needs are there and of the right kind."""
    numbers = [manifest[name] for name in ("num_warps", "shared", "scratch_pointers")]
    return (
        type(manifest["entry"]) is str
        and all(type(number) is int and number >= 0 for number in numbers)
        and type(manifest["arguments"]) is list
        and all(
            type(one) is list and [type(part) for part in one] == [str, str]
            for one in manifest["arguments"]
        )
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
