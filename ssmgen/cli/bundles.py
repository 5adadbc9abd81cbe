"""``ssmgen cache export`` and ``import``: kernels in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import StoreError
from ..store import bundle, evict, stores
from .entries import entries, fail, only, own_store, print_json, say, size_text
from .inputs import Archs, Families, Json
from .selection import chosen

__all__ = ["export", "import_"]


def export(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", dir_okay=False, help="Ends in .tar or .tar.gz.")
    ],
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="First digits of keys. Left out: every kernel."),
    ] = None,
    arch: Archs = None,
    family: Families = None,
    sign: Annotated[
        Path | None,
        typer.Option(metavar="KEYFILE", help="Sign with this SSH key; the signature is FILE.sig."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write kernels of the trusted stores to one file, to be imported elsewhere.

    The same kernels give the same bytes. Of a kernel that several stores have, the first one's is
    taken. Exits with 1 if nothing matches, or if a bad entry had to be left out.

        ssmgen cache export h200.tar --arch sm_90

        ssmgen cache export kernels.tar.gz --sign ~/.ssh/id_ed25519
    """
    if not file.name.endswith((".tar", ".tar.gz")):
        raise typer.BadParameter(f"{file}: name it .tar or .tar.gz")
    found = entries(stores())
    if keys:
        wanted = {only(prefix, (e.key for e in found), "the stores") for prefix in keys}
        found = [entry for entry in found if entry.key in wanted]
    bad = [entry for entry in found if entry.fault]
    artifacts = {
        (entry.key, entry.toolchain): entry.artifact
        for entry in reversed(chosen(found, arch, family))
        if entry.artifact
    }
    if not artifacts:
        fail("no kernel in the stores matches")
    try:
        count = bundle.export(artifacts.values(), file, sign=sign)
    except StoreError as error:
        fail(str(error))
    bad = [entry for entry in bad if (entry.key, entry.toolchain) not in artifacts]
    signature = str(bundle.signature_of(file)) if sign else None
    if as_json:
        print_json({"file": str(file), "entries": count, "signature": signature,
                    "left_out": [str(entry.path) for entry in bad]})  # fmt: skip
    else:
        size = size_text(file.stat().st_size)
        say(f"{file}: {count} kernels, {size}" + (f", {signature}" if sign else ""))
    for entry in bad:
        say(f"left out, bad entry {entry.path}: {entry.fault}", err=True)
    if bad:
        raise typer.Exit(1)


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Made by `ssmgen cache export`.")],
    signers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Whose signature is accepted: an allowed_signers file of OpenSSH.",
        ),
    ] = None,
    signer: Annotated[
        str | None,
        typer.Option(metavar="IDENTITY", help="Accept this one of the signers only."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put the kernels of a bundle into the user store.

    The whole bundle is verified before anything is published: one bad member, and nothing is
    imported. With --signers a bundle that none of them signed is refused. Without it, anyone may
    have made the bundle: see docs/security.md.

        ssmgen cache import kernels.tar.gz --signers allowed_signers
    """
    if signer is not None and signers is None:
        raise typer.BadParameter("--signer needs --signers")
    own = own_store()
    new, known = 0, 0
    try:
        with bundle.opened(file, signers=signers, signer=signer) as (artifacts, by):
            for artifact in artifacts:
                there = own.get(artifact.manifest["key"], artifact.manifest["toolchain"])
                new, known = new + (there is None), known + (there is not None)
                if there is None:
                    own.put(artifact)
    except StoreError as error:
        fail(str(error) + (f" ({new} imported before that)" if new else ""))
    evict.keep_small(own)
    if as_json:
        print_json({"file": str(file), "store": str(own.root), "imported": new,
                    "already_there": known, "signature_checked": by is not None,
                    "signer": by})  # fmt: skip
    else:
        say(f"{own.root}: {new} kernels imported, {known} were there already")
        say(f"signed by {by}" if by else
                   "the signature was NOT checked; give --signers to accept known signers only"
        )  # fmt: skip
