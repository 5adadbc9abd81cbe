"""A bundle has one spelling; nothing else is read, and nothing of a bad one is imported."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import subprocess
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import pytest
from artifacts import artifact, snapshot

from ssmgen.artifact import Artifact
from ssmgen.errors import StoreError
from ssmgen.store import bundle

THREE = sorted((artifact(name, size=700) for name in "abc"), key=lambda a: a.manifest["key"])
ONE = THREE[0]
KEY = ONE.manifest["key"]
HERE = f"v1/{KEY[:2]}/{KEY}/triton-0"
MEMBERS = ("kernel.cubin", "manifest.json", "source.py")


def equal(found, wanted):
    return [(a.manifest, a.cubin, a.source) for a in found] == [
        (a.manifest, a.cubin, a.source) for a in wanted
    ]


def tar(*artifacts):
    """The members that a bundle of these has: (name, bytes)."""
    for one in artifacts:
        where = f"v1/{one.manifest['key'][:2]}/{one.manifest['key']}/{one.manifest['toolchain']}"
        contents = one.contents()
        for name in MEMBERS:
            yield f"{where}/{name}", contents[name]


def pack(members):
    """Members as a bundle has them, whatever they are."""
    body = b"".join(
        bundle._header(name, len(data)) + data + bytes(-len(data) % 512) for name, data in members
    )
    return body + bytes(1024)


def refused(data, why, tmp_path):
    """Assert that a file of these bytes is refused before any artifact is given."""
    file = tmp_path / "hostile.tar"
    file.write_bytes(data)
    given = []
    with pytest.raises(StoreError, match=why), bundle.opened(file) as (artifacts, _):
        given += artifacts
    assert given == []


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "kernels.tar"
    assert bundle.export(THREE, path) == 3
    return path


# One spelling


@pytest.mark.parametrize("name", ["kernels.tar", "kernels.tar.gz"])
def test_what_was_exported_is_read(name, tmp_path):
    bundle.export(THREE, tmp_path / name)
    with bundle.opened(tmp_path / name) as (artifacts, signer):
        assert equal(artifacts, THREE)
        assert signer is None
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["kernels.tar", "kernels.tar.gz"])
def test_the_same_entries_give_the_same_bytes(name, tmp_path):
    files = []
    for i, order in enumerate(itertools.permutations(THREE)):
        path = tmp_path / str(i) / name
        path.parent.mkdir()
        bundle.export([*order, order[0]], path)
        os.utime(path, (i, i))
        files.append(path.read_bytes())
    assert len(set(files)) == 1
    if name.endswith(".gz"):
        assert files[0][3:8] == bytes(5)  # neither a file's name nor a time


def test_any_tar_lists_a_bundle(exported):
    with tarfile.open(exported) as found:
        members = found.getmembers()
    assert [(m.name, m.size) for m in members] == [(n, len(d)) for n, d in tar(*THREE)]
    assert {(m.mode, m.uid, m.gid, m.mtime, m.uname, m.gname) for m in members} == {
        (0o644, 0, 0, 0, "", "")
    }


def test_what_is_read_and_written_again_has_the_same_bytes(exported, tmp_path):
    with bundle.opened(exported) as (artifacts, _):
        bundle.export(artifacts, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == exported.read_bytes()


def test_an_export_that_fails_leaves_what_was_there(exported, tmp_path):
    before = exported.read_bytes()
    endless = "t" * 99
    with pytest.raises(StoreError, match="too long"):
        bundle.export([*THREE, artifact("d", toolchain=endless)], exported)
    assert exported.read_bytes() == before
    assert list(tmp_path.iterdir()) == [exported]
    with pytest.raises(StoreError, match="cannot write"):
        bundle.export(THREE, tmp_path / "no" / "folder.tar")


def test_a_signature_that_cannot_be_written_leaves_no_bundle(tmp_path, keys):
    path = tmp_path / "kernels.tar"
    bundle.signature_of(path).mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        bundle.export(THREE, path, sign=keys / "bob")
    assert list(tmp_path.iterdir()) == [bundle.signature_of(path)]


def test_what_is_too_large_to_be_imported_is_not_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "MAX_BUNDLE", 5000)
    with pytest.raises(StoreError, match="export fewer"):
        bundle.export(THREE, tmp_path / "kernels.tar")


# Nothing else is read


@pytest.mark.parametrize("packed", [False, True])
def test_a_truncated_bundle_is_refused_wherever_it_ends(exported, packed, tmp_path):
    whole = exported.read_bytes()
    if packed:
        whole = gzip.compress(whole, mtime=0)
    ends = {0, 1, 2, 10, 511, 512, 513, len(whole) - 1, len(whole) - 8, len(whole) - 512,
            len(whole) - 1024, *range(0, len(whole), len(whole) // 40)}  # fmt: skip
    for end in sorted(ends):
        refused(whole[:end], "cut short|not a header", tmp_path)


def test_a_flipped_bit_is_refused(exported, tmp_path):
    whole = exported.read_bytes()
    for at in range(0, len(whole), 53):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        refused(bytes(data), "bundle", tmp_path)


@pytest.mark.parametrize("extra", [b"\0", b"x", bytes(512), b"\x1f\x8b"])
@pytest.mark.parametrize("packed", ["no", "inside", "outside"])
def test_bytes_after_the_end_are_refused(exported, extra, packed, tmp_path):
    whole = exported.read_bytes()
    if packed == "no":
        data = whole + extra
    elif packed == "inside":
        data = gzip.compress(whole + extra)
    else:
        data = gzip.compress(whole) + extra
    refused(data, "after the end", tmp_path)


def test_bytes_after_the_end_are_refused_wherever_a_read_ends(exported, tmp_path, monkeypatch):
    data = gzip.compress(exported.read_bytes())
    for size in (1, 7, len(data) - 1, len(data)):
        monkeypatch.setattr(bundle, "_CHUNK", size)
        assert equal(bundle.read(io.BytesIO(data)), THREE)
        refused(data + b"x", "after the end", tmp_path)


def test_a_second_gzip_stream_is_refused(exported, tmp_path):
    whole = exported.read_bytes()
    refused(gzip.compress(whole[:-700]) + gzip.compress(whole[-700:]), "cut short", tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/cron.d/job",
        "/etc/passwd",
        f"v1/{KEY[:2]}/{KEY}/../kernel.cubin",
        f"v1/{KEY[:2]}/{KEY}/../x/kernel.cubin",
        f"v1/{KEY[:2]}/{KEY}/.hidden/kernel.cubin",
        f"v1/{KEY[:2]}/{KEY}/triton-0/../../kernel.cubin",
        f"v1/ff/{KEY}/triton-0/kernel.cubin",
        f"v1/{KEY[:2]}/{KEY.upper()}/triton-0/kernel.cubin",
        f"./{HERE}/kernel.cubin",
        f"/{HERE}/kernel.cubin",
        f"v2/{KEY[:2]}/{KEY}/triton-0/kernel.cubin",
        f"{HERE}/kernel.so",
        f"{HERE}/kernel.cubin\n",
        f"{HERE}/manifest.json",
    ],
)
def test_a_name_of_another_pattern_is_refused(name, tmp_path):
    (_, cubin), *rest = tar(ONE)
    refused(pack([(name, cubin), *rest]), "member", tmp_path)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("name", ["../x", f"{HERE}/other", f"{HERE[:-1]}9/manifest.json"])
def test_a_later_file_of_another_name_is_refused(name, at, tmp_path):
    members = list(tar(ONE))
    members[at] = (name, members[at][1])
    refused(pack(members), "belongs there", tmp_path)


def _tarred(kind, format=tarfile.USTAR_FORMAT):
    """A bundle whose last entry has one member of another kind, by Python's tarfile."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as file:
        for name, data in tar(ONE):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            if name.endswith("source.py"):
                member.type, member.linkname = kind, "/etc/passwd"
                if kind != tarfile.REGTYPE:
                    member.size, data = 0, b""
            file.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
     tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE],
)  # fmt: skip
def test_what_is_no_regular_file_is_refused(kind, tmp_path):
    refused(_tarred(kind), "not a plain file", tmp_path)


def _with(block, start, field):
    """A header with one field replaced and its checksum made anew."""
    block = block[:start] + field + block[start + len(field) :]
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


@pytest.mark.parametrize(
    ("start", "field"),
    [
        (100, b"0004755"),  # set-uid
        (108, b"0001750"),  # owner
        (136, b"00000000001"),  # time
        (157, b"target"),  # link
        (257, b"ustar  \0"),  # GNU
        (265, b"root"),
        (329, b"0000001"),
        (500, b"x"),
        (124, b"0" * 8 + b"1274"),  # a size without its terminator
    ],
)
def test_a_second_spelling_of_a_header_is_refused(start, field, tmp_path):
    data = pack(tar(ONE))
    refused(_with(data[:512], start, field) + data[512:], "not a plain file", tmp_path)


def test_extended_headers_are_refused(tmp_path):
    for format, name in ((tarfile.PAX_FORMAT, "é"), (tarfile.GNU_FORMAT, "x" * 120)):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=format) as file:
            file.addfile(tarfile.TarInfo(name))
        refused(out.getvalue() + pack(tar(ONE)), "header|not a plain file", tmp_path)


@pytest.mark.parametrize("size", [b"77777777777", b"-0000000001", b"\x80" + bytes(10), b"12x"])
def test_a_lying_size_is_refused_before_memory_is_taken(size, tmp_path):
    data = pack(tar(ONE))
    tracemalloc.start()
    refused(_with(data[:512], 124, size.ljust(12, b"\0")) + data[512:], "bundle", tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("more", [-1, 1, 512, 5000])
def test_a_size_that_is_not_the_datas_is_refused(more, tmp_path):
    (name, data), *rest = tar(ONE)
    whole = pack([(name, data), *rest])
    refused(bundle._header(name, len(data) + more) + whole[512:], "bundle", tmp_path)


def test_bytes_hidden_behind_a_file_are_refused(tmp_path):
    data = bytearray(pack(tar(ONE)))
    data[512 + 700 + 3] = 1
    refused(bytes(data), "more bytes than its size", tmp_path)


def test_an_oversized_member_is_refused_though_its_digest_is_right(tmp_path, monkeypatch):
    big = artifact("big", size=3000)
    monkeypatch.setattr(bundle, "MAX_FILE", 2999)
    refused(pack(tar(big)), "3000 bytes, more than any kernel", tmp_path)


def test_a_gzip_bomb_costs_neither_memory_nor_time(tmp_path):
    # A member of 60 MiB of zeros, then zeros for as long as one reads.
    packer = zlib.compressobj(9, wbits=31)
    bomb = packer.compress(bundle._header(f"{HERE}/kernel.cubin", 60 << 20))
    block = bytes(1 << 20)
    bomb += b"".join(packer.compress(block) for _ in range(70)) + packer.flush()
    assert len(bomb) < 200_000
    tracemalloc.start()
    refused(bomb, "belongs there|not a header", tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 << 20


@pytest.mark.parametrize("packed", [False, True])
def test_many_good_members_may_not_exceed_the_total(exported, packed, tmp_path, monkeypatch):
    data = exported.read_bytes()
    monkeypatch.setattr(bundle, "MAX_BUNDLE", len(data) - 600)
    refused(gzip.compress(data) if packed else data, "more than", tmp_path)


def test_a_file_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(bundle, "MAX_BUNDLE", 1 << 20)
    with pytest.raises(StoreError, match="more than 1 MiB"), bundle.opened(Path("/dev/zero")):
        pass


@pytest.mark.parametrize(
    "order", [(0, 0), (1, 0), (0, 1, 1), (0, 2, 1), (2, 0, 1)], ids=lambda o: "".join(map(str, o))
)
def test_entries_twice_or_out_of_order_are_refused(order, tmp_path):
    refused(pack(tar(*(THREE[i] for i in order))), "twice, or not in order", tmp_path)


@pytest.mark.parametrize("drop", [0, 1, 2])
def test_an_entry_without_one_of_its_files_is_refused(drop, tmp_path):
    members = list(tar(*THREE))
    del members[3 + drop]
    refused(pack(members), "member", tmp_path)


def test_an_entry_under_another_key_is_refused(tmp_path):
    other = dict(zip(MEMBERS, (data for _, data in tar(THREE[1]))))
    members = [(f"{HERE}/{name}", other[name]) for name in MEMBERS]
    refused(pack(members), "entry of another key", tmp_path)


def test_a_toolchain_that_is_a_path_is_refused(tmp_path):
    moved = artifact("a", toolchain="../x")
    refused(pack(tar(moved)), "not the first file of an entry", tmp_path)
    data = [(f"{HERE}/{name}", moved.contents()[name]) for name in MEMBERS]
    refused(pack(data), "toolchain|another key", tmp_path)


def test_one_bad_byte_at_the_end_and_nothing_is_given(tmp_path):
    members = list(tar(*THREE))
    members[-1] = (members[-1][0], b"#" + members[-1][1][1:-1] + b"!")
    refused(pack(members), "digest", tmp_path)


def test_a_manifest_in_another_spelling_is_refused(tmp_path):
    members = list(tar(ONE))
    name, text = members[1]
    for other, why in ((b" " + text, "digest differs"), (text[:-1], "canonical")):
        members[1] = (name, other)
        refused(pack(members), why, tmp_path)


def test_what_is_no_archive_is_refused(tmp_path):
    for data in (b"", b"PK\3\4" + bytes(2000), b"\x1f\x8b" + bytes(2000), b"x" * 4096):
        refused(data, "bundle", tmp_path)
    with pytest.raises(StoreError, match="No such file"), bundle.opened(tmp_path / "none.tar"):
        pass
    with pytest.raises(StoreError, match="directory"), bundle.opened(tmp_path):
        pass


def test_an_empty_bundle_has_no_entries(tmp_path):
    bundle.export([], tmp_path / "none.tar")
    with bundle.opened(tmp_path / "none.tar") as (artifacts, _):
        assert list(artifacts) == []


def test_reading_makes_no_path(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    with bundle.opened(exported) as (artifacts, _):
        assert equal(artifacts, THREE)
    assert snapshot(tmp_path) == before


def test_a_bundle_that_changes_after_it_was_verified_is_read_as_verified(exported):
    with bundle.opened(exported) as (artifacts, _):
        exported.write_bytes(pack(tar(artifact("evil"))))
        assert equal(artifacts, THREE)


# Signatures: OpenSSH's


def keygen(path):
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)],
        check=True,
    )
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Keys of three people, and the file that trusts the first two."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("alice", "bob", "mallory"):
        keygen(folder / name)
    (folder / "signers").write_text(
        "".join(f"{n}@example.com {(folder / n).with_suffix('.pub').read_text()}"
                for n in ("alice", "bob"))
    )  # fmt: skip
    return folder


def signed_by(path, keys, signer=None):
    with bundle.opened(path, signers=keys / "signers", signer=signer) as (artifacts, by):
        assert equal(artifacts, THREE)
        return by


@pytest.fixture
def signed(tmp_path, keys):
    path = tmp_path / "kernels.tar.gz"
    bundle.export(THREE, path, sign=keys / "bob")
    return path


def test_a_signature_of_a_known_signer_is_accepted(signed, keys):
    assert signed_by(signed, keys) == "bob@example.com"
    assert signed_by(signed, keys, "bob@example.com") == "bob@example.com"
    names = {path.name for path in signed.parent.iterdir()}
    assert names == {"kernels.tar.gz", "kernels.tar.gz.sig"}


def test_a_key_of_two_names_is_known_by_the_one_that_verifies(signed, keys, tmp_path):
    public = (keys / "bob.pub").read_text()
    signers = tmp_path / "signers"
    signers.write_text(
        f'old@example.com valid-before="20000101" {public}bob@example.com,b@example.com {public}'
    )
    with bundle.opened(signed, signers=signers) as (artifacts, by):
        assert equal(artifacts, THREE)
        assert by == "bob@example.com"
    with bundle.opened(signed, signers=signers, signer="b@example.com") as (artifacts, by):
        assert by == "b@example.com"


def test_a_signature_of_another_of_the_signers_is_refused_if_one_is_named(signed, keys):
    with pytest.raises(StoreError, match=r"no signature .* by alice@example\.com"):
        signed_by(signed, keys, "alice@example.com")


def test_a_signature_of_other_bytes_is_refused(signed, keys):
    data = bytearray(signed.read_bytes())
    data[4] ^= 1  # the time in the gzip header: nothing else would notice
    signed.write_bytes(data)
    with bundle.opened(signed) as (artifacts, _):
        assert equal(artifacts, THREE)
    with pytest.raises(StoreError, match="is no signature of these bytes"):
        signed_by(signed, keys)


def test_a_signature_of_an_unknown_signer_is_refused(tmp_path, keys):
    bundle.export(THREE, tmp_path / "kernels.tar", sign=keys / "mallory")
    with pytest.raises(StoreError, match=r"ssh-keygen|no signature"):
        signed_by(tmp_path / "kernels.tar", keys)


def test_a_signature_made_for_another_purpose_is_refused(exported, keys):
    subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-n", "file", "-f", keys / "bob", exported],
        check=True,
        capture_output=True,
    )
    with pytest.raises(StoreError, match="is no signature of these bytes"):
        signed_by(exported, keys)


def test_an_unsigned_bundle_is_refused_if_signers_are_named(exported, keys):
    with pytest.raises(StoreError, match=r"there is no file .*kernels\.tar\.sig"):
        signed_by(exported, keys)


def test_a_missing_file_of_signers_is_refused(signed):
    with (
        pytest.raises(StoreError, match="there is no file /none"),
        bundle.opened(signed, signers=Path("/none")),
    ):
        pass


def test_garbage_in_the_place_of_a_signature_is_refused(signed, keys):
    bundle.signature_of(signed).write_bytes(b"-----BEGIN SSH SIGNATURE-----\nx\n")
    with pytest.raises(StoreError, match="ssh-keygen"):
        signed_by(signed, keys)


def test_the_signature_is_checked_before_the_bundle_is_read(signed, keys, monkeypatch):
    signed.write_bytes(b"\x1f\x8b garbage")
    with pytest.raises(StoreError, match="signature"):
        signed_by(signed, keys)


def test_what_is_signed_is_what_is_read(signed, keys, monkeypatch):
    """A bundle that is swapped as soon as its signature was checked."""
    check = bundle._signed_by

    def swap(*arguments):
        found = check(*arguments)
        signed.write_bytes(pack(tar(artifact("evil"))))
        return found

    monkeypatch.setattr(bundle, "_signed_by", swap)
    assert signed_by(signed, keys) == "bob@example.com"


def test_a_key_that_cannot_sign_leaves_no_bundle(tmp_path, keys):
    with pytest.raises(StoreError, match="ssh-keygen -Y sign"):
        bundle.export(THREE, tmp_path / "kernels.tar", sign=keys / "signers")
    assert list(tmp_path.iterdir()) == []


def test_without_ssh_keygen_the_error_says_so(signed, keys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StoreError, match="install OpenSSH"):
        signed_by(signed, keys)
    with pytest.raises(StoreError, match="install OpenSSH"):
        bundle.export(THREE, tmp_path / "other.tar", sign=keys / "bob")
    with bundle.opened(signed) as (artifacts, _):
        assert equal(artifacts, THREE)


def test_artifacts_of_a_bundle_are_plain(exported):
    with bundle.opened(exported) as (artifacts, _):
        assert all(type(one) is Artifact and one.hold is None for one in artifacts)
