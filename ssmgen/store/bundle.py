"""Bundles: entries of a store in one file, to be carried to another machine.

A bundle is a plain ustar archive (``.tar``, or ``.tar.gz``) in one spelling: sorted, no times, no
owners, so the same entries give the same bytes. A reader accepts that spelling and no other, and
never makes a path from a member's name. Signatures are OpenSSH's (``ssh-keygen -Y``).
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import struct
import subprocess
import tempfile
import uuid
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

from ..artifact import Artifact
from ..errors import StoreError
from ..template import ABI_VERSION
from .local import MAX_FILE

__all__ = ["NAMESPACE", "export", "opened", "read", "signature_of"]

# What a signature is for, so that none made for another purpose passes.
NAMESPACE = "ssmgen-bundle"
# The most a bundle may hold, unpacked: tens of thousands of kernels.
MAX_BUNDLE = 2 << 30

# The members of one entry, in their order.
_MEMBERS = ("kernel.cubin", "manifest.json", "source.py")
_FIRST = re.compile(r"v1/[0-9a-f]{2}/([0-9a-f]{64})/([A-Za-z0-9][A-Za-z0-9._+-]*)/kernel\.cubin")
# name, mode, uid, gid, size, mtime, checksum, type, link, magic, version, owner, group, device,
# folder.
_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x")
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_CHUNK = 1 << 16


def export(artifacts: Iterable[Artifact], path: Path, *, sign: Path | None = None) -> int:
    """Write a bundle, gzipped if `path` ends in ``.gz``; how many entries it has.

    With `sign`, a private key of OpenSSH (or a public one whose private half is in the agent), its
    signature stands beside it. Nothing is at `path` unless all went well.
    """
    entries = {_name(artifact): artifact for artifact in artifacts}
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    signature = signature_of(part)
    try:
        with open(part, "xb") as file:
            with _packed(file, path.suffix == ".gz") as out:
                _write(out, (entries[name] for name in sorted(entries)))
            file.flush()
            os.fsync(file.fileno())
        if sign is not None:
            signature.write_bytes(_sign(part, sign))
            signature.replace(signature_of(path))
        part.replace(path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
        signature.unlink(missing_ok=True)
    return len(entries)


def signature_of(path: Path) -> Path:
    """Where the signature of a bundle stands."""
    return path.with_name(f"{path.name}.sig")


@contextlib.contextmanager
def opened(
    path: Path, *, signers: Path | None = None, signer: str | None = None
) -> Iterator[tuple[Iterator[Artifact], str | None]]:
    """The artifacts of a bundle and the identity that signed it.

    All of it is verified before the first artifact is given, so a bundle with one bad member gives
    none. `signers` is an allowed_signers file of OpenSSH: without it no signature is asked for and
    the identity is None; with it one of them, or `signer` alone, must have signed.
    """
    # Unbuffered: ssh-keygen moves the position of the handle it is given.
    with tempfile.TemporaryFile(buffering=0) as own:
        # What is verified and what is read later are the same bytes, whoever writes to `path`.
        try:
            with open(path, "rb") as file, open(own.fileno(), "wb", closefd=False) as copy:
                _copy(file, copy)
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from error
        try:
            by = _signed_by(own, signature_of(path), signers, signer) if signers else None
            for _ in read(own):
                pass
        except StoreError as error:
            raise StoreError(f"bundle {path}: {error}") from None
        yield read(own), by


def read(file: IO[bytes]) -> Iterator[Artifact]:
    """Every artifact of a bundle, each verified. Raises `StoreError` at what is wrong."""
    file.seek(0)
    take = _Taker(file)
    previous = ("", "")
    while (block := take(_BLOCK)) != _ZEROS:
        name, size = _parse(block)
        found = _FIRST.fullmatch(name)
        if found is None:
            raise StoreError(f"member {name!r}: not the first file of an entry")
        key, toolchain = found.groups()
        if (key, toolchain) <= previous:
            raise StoreError(f"member {name!r}: twice, or not in order")
        previous = key, toolchain
        contents = {}
        for wanted in _MEMBERS:
            if wanted != _MEMBERS[0]:
                name, size = _parse(take(_BLOCK))
            if name != f"v1/{key[:2]}/{key}/{toolchain}/{wanted}":
                raise StoreError(f"member {name!r}: {wanted} of {key}/{toolchain} belongs there")
            contents[wanted] = take(size)
            if any(take(-size % _BLOCK)):
                raise StoreError(f"member {name!r}: more bytes than its size")
        try:
            artifact = Artifact.verify(key, toolchain, contents, ABI_VERSION)
        except StoreError as error:
            raise StoreError(f"entry {key}/{toolchain}: {error}") from None
        if artifact.contents() != contents:
            raise StoreError(f"entry {key}/{toolchain}: manifest.json: not in canonical form")
        yield artifact
    if take(_BLOCK) != _ZEROS:
        raise StoreError("not the end of a bundle")
    take.finish()


def _name(artifact: Artifact) -> tuple[str, str]:
    return artifact.manifest["key"], artifact.manifest["toolchain"]


@contextlib.contextmanager
def _packed(file: BinaryIO, compress: bool) -> Iterator[IO[bytes]]:
    if not compress:
        yield file
        return
    with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as out:
        yield cast("IO[bytes]", out)


def _write(out: IO[bytes], artifacts: Iterable[Artifact]) -> None:
    total = 0
    for artifact in artifacts:
        key, toolchain = _name(artifact)
        contents = artifact.contents()
        for member in _MEMBERS:
            data = contents[member]
            total += 3 * _BLOCK + len(data)
            if len(data) > MAX_FILE or total > MAX_BUNDLE:
                raise StoreError(
                    f"a bundle may hold {MAX_BUNDLE >> 20} MiB, a file of it {MAX_FILE >> 20} MiB; "
                    "export fewer kernels"
                )
            out.write(_header(f"v1/{key[:2]}/{key}/{toolchain}/{member}", len(data)))
            out.write(data + bytes(-len(data) % _BLOCK))
    out.write(2 * _ZEROS)


def _header(name: str, size: int) -> bytes:
    """The one ustar header of a member: mode 644, and no time, owner or link."""
    folder, _, file = name.encode("ascii").rpartition(b"/")
    if len(folder) > 155 or len(file) > 100:
        raise StoreError(f"member {name!r}: the name is too long")
    fields = (file, b"0000644", b"0000000", b"0000000", b"%011o" % size, b"0" * 11, b" " * 8,
              b"0", b"", b"ustar", b"00", b"", b"", b"0000000", b"0000000", folder)  # fmt: skip
    block = _HEADER.pack(*fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _parse(block: bytes) -> tuple[str, int]:
    """Name and size of a member whose header is to the bit what `_header` makes of them.

    So there is no link, device, mode, extension or second spelling of a number to consider.
    """
    fields = [field.rstrip(b"\0") for field in _HEADER.unpack(block)]
    try:
        name, size = b"/".join((fields[-1], fields[0])).decode("ascii"), int(fields[4], 8)
    except ValueError:
        raise StoreError("not a header as a bundle has it") from None
    if not 0 <= size <= MAX_FILE:
        raise StoreError(f"member {name!r}: {size} bytes, more than any kernel has")
    if _header(name, size) != block:
        raise StoreError(f"member {name!r}: not a plain file as a bundle has it")
    return name, size


class _Taker:
    """Takes exactly so many bytes at a time from a file, unzipped if it is a gzip file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._total = 0
        magic = file.read(2)
        file.seek(0)
        self._gzip = zlib.decompressobj(wbits=31) if magic == b"\x1f\x8b" else None
        self._packed = b""

    def __call__(self, size: int) -> bytes:
        self._total += size
        if self._total > MAX_BUNDLE:
            raise StoreError(f"more than {MAX_BUNDLE >> 20} MiB")
        parts = []
        while size:
            part = self._some(size)
            if not part:
                raise StoreError("cut short")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def finish(self) -> None:
        """Raise if there is anything more, packed or not."""
        more = self._some(1)
        if not more and self._gzip is not None:
            if not self._gzip.eof:
                raise StoreError("cut short")
            more = self._gzip.unused_data
        if more or self._file.read(1):
            raise StoreError("more bytes after the end")

    def _some(self, size: int) -> bytes:
        if self._gzip is None:
            return self._file.read(size)
        while not self._gzip.eof:
            packed = self._packed or self._file.read(_CHUNK)
            try:
                part = self._gzip.decompress(packed, size)
            except zlib.error as error:
                raise StoreError(f"not a gzip file: {error}") from None
            self._packed = self._gzip.unconsumed_tail
            if part or not packed:
                return part
        return b""


def _copy(file: BinaryIO, to: IO[bytes]) -> None:
    # A file that grows while we read it, or that is a device, ends somewhere.
    left = MAX_BUNDLE
    while part := file.read(min(1 << 20, left + 1)):
        left -= len(part)
        if left < 0:
            raise StoreError(f"bundle {file.name}: more than {MAX_BUNDLE >> 20} MiB")
        to.write(part)


def _sign(path: Path, key: Path) -> bytes:
    with open(path, "rb") as file:
        return _ssh_keygen("sign", "-n", NAMESPACE, "-f", str(key), stdin=file)


def _signed_by(file: IO[bytes], signature: Path, signers: Path, signer: str | None) -> str:
    """Who of `signers` signed the file. Raises `StoreError` if none did."""
    for needed in (signers, signature):
        if not needed.is_file():
            raise StoreError(f"the signature cannot be checked: there is no file {needed}")
    given = ("-s", str(signature), "-f", str(signers))
    if signer is None:
        try:
            known = _ssh_keygen("find-principals", *given).decode().splitlines()
        except _Refused as error:
            raise _Refused(f"{signature} is no signature by one of {signers}: {error}") from None
    else:
        known = [signer]
    for who in known:
        file.seek(0)
        with contextlib.suppress(_Refused):
            _ssh_keygen("verify", *given, "-n", NAMESPACE, "-I", who, stdin=file)
            return who
    raise _Refused(f"{signature} is no signature of these bytes by {signer or 'a signer'}")


class _Refused(StoreError):
    pass


def _ssh_keygen(task: str, *options: str, stdin: IO[bytes] | None = None) -> bytes:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise StoreError("signatures need ssh-keygen, which is not here; install OpenSSH (8.2+)")
    done = subprocess.run(
        [program, "-Y", task, *options],
        stdin=stdin if stdin is not None else subprocess.DEVNULL,
        capture_output=True,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise _Refused(f"ssh-keygen -Y {task}: {said or f'exit status {done.returncode}'}")
    return done.stdout
