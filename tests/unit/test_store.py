"""The store: an entry is whole or absent, verified on every read, and never a crash."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from artifacts import artifact, compiled, snapshot
from hypothesis import given
from hypothesis import strategies as st

from ssmgen import Arch, KernelConfig, compiler, kernel
from ssmgen.artifact import FILES, Artifact
from ssmgen.errors import StoreError
from ssmgen.plan import dispatch
from ssmgen.store import Store, stores
from ssmgen.template import ABI_VERSION

TESTS = Path(__file__).parents[1]
EVERY_FILE = ("manifest.json", *FILES)
ONE = artifact("one")
KEY, TOOLCHAIN = ONE.manifest["key"], ONE.manifest["toolchain"]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


@pytest.fixture
def filled(store):
    store.put(ONE)
    return store


def entry(store):
    return store.entry(KEY, TOOLCHAIN)


def equal(found, wanted):
    return (found.manifest, found.cubin, found.source) == (
        wanted.manifest,
        wanted.cubin,
        wanted.source,
    )


# Publish and read


def test_what_was_published_is_read(filled):
    assert equal(filled.get(KEY, TOOLCHAIN), ONE)
    assert entry(filled) == filled.root / "v1" / KEY[:2] / KEY / TOOLCHAIN
    assert {path.name for path in entry(filled).iterdir()} == set(EVERY_FILE)


def test_an_absent_entry_is_a_miss_without_a_word(store, caplog):
    assert store.get(KEY, TOOLCHAIN) is None
    assert store.get(KEY, None) is None
    assert not store.root.exists()
    assert not caplog.records


def test_a_published_entry_leaves_nothing_staged(filled):
    assert [p.name for p in (filled.root / "v1" / "stage").iterdir()] == []


def test_without_a_toolchain_any_toolchains_entry_will_do(store):
    for name in ("triton-3.6.0", "triton-3.5.0"):
        store.put(artifact("one", toolchain=name))
    assert store.get(KEY, "triton-3.7.0") is None
    assert store.get(KEY, None).manifest["toolchain"] == "triton-3.6.0"


def test_entries_are_all_good_entries_by_key(store, caplog):
    wanted = [artifact(name) for name in "abcdef"]
    for one in wanted:
        store.put(one)
    spoilt = wanted.pop()
    (store.entry(spoilt.manifest["key"], TOOLCHAIN) / "kernel.cubin").write_bytes(b"")
    found = [one.manifest["key"] for one in store.entries()]
    assert found == sorted(one.manifest["key"] for one in wanted)
    assert [one.manifest["key"] for one in store.entries()] == found


def test_the_manifest_holds_no_path_time_or_pickle(filled, tmp_path):
    text = (entry(filled) / "manifest.json").read_text()
    assert str(tmp_path) not in text
    again = artifact("one").contents()["manifest.json"].decode()
    assert text == again
    assert list(json.loads(text)) == sorted(json.loads(text))


# Verify on read


def bad_entry(store, caplog, why=""):
    """Assert that the entry is a miss, reported, and out of the way."""
    with caplog.at_level(logging.WARNING, "ssmgen"):
        assert store.get(KEY, TOOLCHAIN) is None
    assert str(entry(store)) in caplog.text
    assert why in caplog.text
    assert not entry(store).exists()
    assert len(list((store.root / "v1" / "bad").iterdir())) == 1
    caplog.clear()
    assert store.get(KEY, TOOLCHAIN) is None
    assert not caplog.records
    store.put(ONE)
    assert equal(store.get(KEY, TOOLCHAIN), ONE)


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_a_miss_set_aside(filled, caplog, name, keep):
    path = entry(filled) / name
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data) - (keep > 0.9))])
    bad_entry(filled, caplog, name)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_missing_file_is_a_miss_set_aside(filled, caplog, name):
    (entry(filled) / name).unlink()
    bad_entry(filled, caplog, "missing")


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_grown_file_is_a_miss_set_aside(filled, caplog, name):
    with open(entry(filled) / name, "ab") as file:
        file.write(b"x")
    bad_entry(filled, caplog, name)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_folder_in_the_place_of_a_file_is_a_miss_set_aside(filled, caplog, name):
    (entry(filled) / name).unlink()
    (entry(filled) / name).mkdir()
    bad_entry(filled, caplog)


@given(st.sampled_from(EVERY_FILE), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_is_never_read_as_something_else(name, where, bit):
    contents = ONE.contents()
    data = bytearray(contents[name])
    data[int(where * len(data))] ^= 1 << bit
    contents[name] = bytes(data)
    try:
        found = Artifact.verify(KEY, TOOLCHAIN, contents, ABI_VERSION)
    except StoreError as error:
        assert str(error).startswith((name, "manifest.json"))  # noqa: PT017
    else:
        # Only white space around the manifest says nothing.
        assert name == "manifest.json"
        assert equal(found, ONE)


def test_every_bit_of_the_manifest_counts():
    contents = ONE.contents()
    text = contents["manifest.json"].rstrip()
    for at in range(len(text)):
        for bit in range(8):
            data = bytearray(text)
            data[at] ^= 1 << bit
            with pytest.raises(StoreError):
                Artifact.verify(
                    KEY, TOOLCHAIN, {**contents, "manifest.json": bytes(data)}, ABI_VERSION
                )


def test_an_entry_under_another_key_is_a_miss_set_aside(store, caplog):
    other = artifact("two")
    store.put(other)
    moved = store.entry(other.manifest["key"], TOOLCHAIN)
    entry(store).parent.mkdir(parents=True)
    moved.rename(entry(store))
    bad_entry(store, caplog, "another key")


def test_a_manifest_whose_factors_do_not_make_its_key_is_refused():
    forged = artifact("one", key=artifact("two").manifest["key"])
    with pytest.raises(StoreError, match="factors"):
        Artifact.verify(forged.manifest["key"], TOOLCHAIN, forged.contents(), ABI_VERSION)


def test_an_abi_this_version_does_not_know_is_refused():
    newer = artifact(factors={"abi": ABI_VERSION + 1})
    with pytest.raises(StoreError, match=f"ABI {ABI_VERSION + 1}"):
        Artifact.verify(newer.manifest["key"], TOOLCHAIN, newer.contents(), ABI_VERSION)


def test_what_is_no_cubin_is_refused():
    text = Artifact.build(
        {k: v for k, v in ONE.manifest.items() if k not in ("files", "sha256")}, b"", "source\n"
    )
    with pytest.raises(StoreError, match="ELF"):
        Artifact.verify(KEY, TOOLCHAIN, text.contents(), ABI_VERSION)


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"{}", b'{"files": 3}', b"\xff\xfe", b"1e999"]
)
def test_a_manifest_of_any_other_shape_is_refused(text):
    with pytest.raises(StoreError, match=r"manifest\.json"):
        Artifact.verify(KEY, TOOLCHAIN, {**ONE.contents(), "manifest.json": text}, ABI_VERSION)


# Read-only roots


@pytest.mark.parametrize("spoil", [False, True])
def test_a_read_only_root_is_never_written(filled, spoil, caplog):
    if spoil:
        (entry(filled) / "kernel.cubin").write_bytes(b"")
    reader = Store(filled.root, writable=False)
    before = snapshot(filled.root)
    found = reader.get(KEY, TOOLCHAIN)
    assert found is None if spoil else equal(found, ONE)
    assert len(list(reader.entries())) == (not spoil)
    assert bool(caplog.records) == spoil
    assert snapshot(filled.root) == before


def _as_nobody(work):
    """Run `work` in a child process that owns no file; its verdict."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def others_store(tmp_path):
    """A store that belongs to another user and that no one may write."""
    root = tmp_path / "theirs"
    Store(root).put(ONE)
    folders = [root, *(p for p in root.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    parents = [p for p in tmp_path.parents if p.owner() == tmp_path.owner() and p != Path("/")]
    modes = {p: p.stat().st_mode for p in (tmp_path, *parents)}
    for folder, mode in modes.items():
        folder.chmod(mode | 0o055)
    yield Store(root)
    for folder, mode in modes.items():
        folder.chmod(mode)
    for folder in folders:
        folder.chmod(0o755)


def test_a_store_of_another_user_that_cannot_be_written_serves(others_store):
    def refused():
        try:
            (others_store.root / "v1" / "mine").mkdir()
        except OSError:
            return True
        return False

    assert _as_nobody(refused) == 0
    assert _as_nobody(lambda: equal(others_store.get(KEY, TOOLCHAIN), ONE)) == 0


def test_a_bad_entry_that_cannot_be_set_aside_is_still_a_miss(others_store):
    (entry(others_store) / "source.py").write_bytes(b"")
    assert _as_nobody(lambda: others_store.get(KEY, TOOLCHAIN) is None) == 0


def test_publishing_where_writing_is_refused_is_a_store_error(others_store):
    def refused():
        try:
            others_store.put(artifact("two"))
        except StoreError as error:
            return "cannot publish" in str(error)
        return False

    assert _as_nobody(refused) == 0


def test_roots_are_the_user_store_then_the_read_only_ones(monkeypatch, tmp_path):
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv(
        "SSMGEN_CACHE_PATH", os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")])
    )
    found = [(store.root.name, store.writable) for store in stores()]
    assert found == [("own", True), ("a", False), ("b", False)]


# Races and crashes


def test_the_loser_of_a_publish_race_changes_nothing(filled):
    before = snapshot(entry(filled))
    filled.put(ONE)
    assert snapshot(entry(filled)) == before
    assert list((filled.root / "v1" / "stage").iterdir()) == []


def test_many_publishers_of_one_key_leave_one_whole_entry(store):
    barrier = threading.Barrier(16)
    errors = []

    def publish():
        barrier.wait()
        try:
            store.put(ONE)
        except StoreError as error:
            errors.append(error)

    threads = [threading.Thread(target=publish) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert equal(store.get(KEY, TOOLCHAIN), ONE)
    assert list((store.root / "v1" / "stage").iterdir()) == []


def _python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_publisher_killed_at_any_moment_leaves_an_entry_whole_or_absent(store, caplog):
    publish = """
        import sys
        from pathlib import Path
        from artifacts import artifact
        from ssmgen.store import Store
        store = Store(Path(sys.argv[1]))
        names = [artifact(str(i), size=300_000) for i in range(200)]
        print("ready", flush=True)
        for one in names:
            store.put(one)
    """
    wanted = [artifact(str(i), size=300_000) for i in range(200)]
    published = 0
    for delay in (0.001, 0.003, 0.01, 0.02, 0.04, 0.05, 0.07, 0.11):
        root = Store(store.root / str(delay))
        process = _python(publish, root.root)
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for one in wanted:
            found = root.get(one.manifest["key"], TOOLCHAIN)
            assert found is None or equal(found, one)
            published += found is not None
        root.put(wanted[0])
        assert equal(root.get(wanted[0].manifest["key"], TOOLCHAIN), wanted[0])
    assert published > 0
    assert not caplog.records


def test_a_killed_holder_of_the_lock_blocks_nobody(store):
    hold = """
        import sys, time
        from pathlib import Path
        from ssmgen.store import Store
        with Store(Path(sys.argv[1])).claim(sys.argv[2]):
            print("held", flush=True)
            time.sleep(60)
    """
    process = _python(hold, store.root, KEY)
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    start = time.monotonic()
    with store.claim(KEY):
        assert time.monotonic() - start < 10


def test_a_claim_keeps_a_second_one_waiting(store):
    order = []

    def second():
        with store.claim(KEY):
            order.append("second")

    with store.claim(KEY):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


# Building on top of it

CONFIG, SM_90 = KernelConfig(), Arch.of("sm_90")
PLAN = dispatch(CONFIG, SM_90)[-1].plan


@pytest.fixture
def compilations(monkeypatch, store_dir):
    """Compilations of `kernel.build`, with a compiler that costs nothing."""
    done = []

    def compile(config, plan, arch):
        done.append(plan)
        return compiled(config, plan, arch, compiler.toolchain())

    monkeypatch.setattr(compiler, "toolchain", lambda: TOOLCHAIN)
    monkeypatch.setattr(compiler, "compile", compile)
    return done


def _cubin(root):
    (path,) = root.glob("v1/??/*/*/kernel.cubin")
    return path


def test_a_kernel_is_compiled_once_then_read(compilations, store_dir):
    built = kernel.build(CONFIG, PLAN, SM_90)
    assert equal(kernel.build(CONFIG, PLAN, SM_90), built)
    assert len(compilations) == 1


@pytest.mark.parametrize("spoil", ["truncate", "flip", "remove"])
def test_a_bad_entry_is_set_aside_reported_and_compiled_again(
    compilations, store_dir, caplog, spoil
):
    built = kernel.build(CONFIG, PLAN, SM_90)
    path = _cubin(store_dir)
    data = bytearray(path.read_bytes())
    if spoil == "truncate":
        path.write_bytes(data[:100])
    elif spoil == "flip":
        data[1000] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING, "ssmgen"):
        again = kernel.build(CONFIG, PLAN, SM_90)
    assert equal(again, built)
    assert len(compilations) == 2
    assert "bad entry" in caplog.text
    assert len(list((store_dir / "v1" / "bad").iterdir())) == 1
    assert equal(kernel.build(CONFIG, PLAN, SM_90), built)
    assert len(compilations) == 2


def test_a_bad_entry_of_a_read_only_root_is_passed_over(compilations, tmp_path, monkeypatch):
    theirs, own = tmp_path / "theirs", tmp_path / "own"
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(theirs))
    kernel.build(CONFIG, PLAN, SM_90)
    _cubin(theirs).write_bytes(b"")
    before = snapshot(theirs)
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(own))
    monkeypatch.setenv("SSMGEN_CACHE_PATH", str(theirs))
    built = kernel.build(CONFIG, PLAN, SM_90)
    assert len(compilations) == 2
    assert _cubin(own).read_bytes() == built.cubin
    assert snapshot(theirs) == before


def test_a_read_only_root_is_searched_and_not_copied(compilations, tmp_path, monkeypatch):
    theirs, own = tmp_path / "theirs", tmp_path / "own"
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(theirs))
    built = kernel.build(CONFIG, PLAN, SM_90)
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(own))
    monkeypatch.setenv("SSMGEN_CACHE_PATH", str(theirs))
    assert equal(kernel.build(CONFIG, PLAN, SM_90), built)
    assert len(compilations) == 1
    assert not own.exists()


def test_a_full_disk_costs_the_store_not_the_kernel(compilations, store_dir, caplog, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING, "ssmgen"):
        built = kernel.build(CONFIG, PLAN, SM_90)
    assert built.cubin.startswith(b"\x7fELF")
    assert "No space left" in caplog.text
    assert "from memory" in caplog.text
    assert not list(store_dir.glob("v1/??/*/*"))
    assert list((store_dir / "v1" / "stage").iterdir()) == []


def test_a_store_that_is_no_folder_costs_the_store_not_the_kernel(compilations, store_dir, caplog):
    store_dir.write_text("not a folder")
    with caplog.at_level(logging.WARNING, "ssmgen"):
        built = kernel.build(CONFIG, PLAN, SM_90)
    assert built.cubin.startswith(b"\x7fELF")
    assert "no lock" in caplog.text
    assert "from memory" in caplog.text


def test_without_a_user_store_kernels_live_in_memory(compilations, monkeypatch):
    monkeypatch.delenv("SSMGEN_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert stores() == []
    assert kernel.build(CONFIG, PLAN, SM_90).cubin.startswith(b"\x7fELF")


def test_without_a_compiler_the_store_serves_and_a_miss_says_so(compilations, monkeypatch):
    built = kernel.build(CONFIG, PLAN, SM_90)
    monkeypatch.setattr(compiler, "toolchain", lambda: None)
    assert equal(kernel.build(CONFIG, PLAN, SM_90), built)
    missing = CONFIG.replace(has_z=True)
    with pytest.raises(StoreError, match=r"(?s)in no store .* no Triton .*\"has_z\":true"):
        kernel.build(missing, PLAN, SM_90)


def test_another_toolchain_compiles_its_own(compilations, store_dir, monkeypatch):
    kernel.build(CONFIG, PLAN, SM_90)
    monkeypatch.setattr(compiler, "toolchain", lambda: "triton-99")
    assert kernel.build(CONFIG, PLAN, SM_90).manifest["toolchain"] == "triton-99"
    assert len(compilations) == 2
    (folder,) = store_dir.glob("v1/??/*")
    assert {p.name for p in folder.iterdir()} == {TOOLCHAIN, "triton-99"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"arguments": 3},
        {"arguments": [["state", "*fp32", 1]]},
        {"arguments": [["state", 3]]},
        {"arguments": ["ab"]},
        {"num_warps": "two"},
        {"num_warps": True},
        {"shared": -1},
        {"entry": None},
        {"scratch_pointers": "x"},
    ],
)
def test_a_manifest_that_does_not_say_how_to_launch_is_refused(wrong):
    odd = artifact("odd", **wrong)
    with pytest.raises(StoreError, match="launch"):
        Artifact.verify(odd.manifest["key"], TOOLCHAIN, odd.contents(), ABI_VERSION)
