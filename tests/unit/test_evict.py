"""The size of a store: what goes, what stays."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import textwrap
import uuid

import pytest
from artifacts import artifact, compiled
from processes import ROOT, forked

from ssmgen import Arch, KernelConfig, compiler, kernel
from ssmgen.plan import dispatch
from ssmgen.store import Store, evict, local

DAY = 24 * 3600


@pytest.fixture(autouse=True)
def _anew(monkeypatch):
    local.report.cache_clear()
    monkeypatch.setattr(evict, "_published", 0)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


@pytest.fixture
def aged(store):
    """Five entries that no other process has, the first used longest ago."""
    found = [artifact(uuid.uuid4().hex) for _ in range(5)]
    for age, one in enumerate(found):
        store.put(one)
        use(store, one, 1e9 + age)
    return found


def use(store, one, when):
    """As if it had been read then."""
    for path in place(store, one).iterdir():
        os.utime(path, (when, 5e8))


def place(store, one):
    return store.entry(one.manifest["key"], one.manifest["toolchain"])


def size(one):
    return sum(map(len, one.contents().values()))


def keys(entries):
    return [entry.key for entry in entries]


def names(artifacts):
    return [one.manifest["key"] for one in artifacts]


def stay(store):
    return {entry.key: entry.stays for entry in evict.usage(store) if entry.stays}


def there(store):
    return {key for key, _ in store.names()}


def test_entries_are_listed_by_last_use(store, aged):
    use(store, aged[0], 2e9)
    wanted = [*aged[1:], aged[0]]
    assert keys(evict.usage(store)) == names(wanted)
    assert [entry.size for entry in evict.usage(store)] == [size(one) for one in wanted]
    assert {entry.stays for entry in evict.usage(store)} == {None}


@pytest.mark.parametrize("over", range(6))
def test_what_goes_is_the_least_recently_used_and_no_more_than_needed(store, aged, over):
    total = sum(map(size, aged))
    cap = total - sum(map(size, aged[:over]))
    assert keys(evict.surplus(evict.usage(store), cap)) == names(aged[:over])
    if over:
        assert keys(evict.surplus(evict.usage(store), cap + 1)) == names(aged[:over])
    assert evict.surplus(evict.usage(store), None) == []


def test_a_read_makes_an_entry_recent(store, aged):
    probe = place(store, aged[0]) / "kernel.cubin"
    probe.read_bytes()
    if probe.stat().st_atime < 1.1e9:
        pytest.skip("this filesystem keeps no access times")
    assert store.get(aged[0].manifest["key"], "triton-0")
    assert keys(evict.usage(store))[-1] == aged[0].manifest["key"]


def test_pinned_entries_stay_and_are_counted(store, aged):
    evict.pin(store, aged[0].manifest["key"])
    assert keys(evict.surplus(evict.usage(store), 1)) == names(aged[1:])
    cap = sum(map(size, aged)) - 1
    assert keys(evict.surplus(evict.usage(store), cap)) == names(aged[1:2])
    evict.unpin(store, aged[0].manifest["key"])
    evict.unpin(store, aged[0].manifest["key"])
    assert keys(evict.surplus(evict.usage(store), cap)) == names(aged[:1])


def test_a_pin_covers_every_toolchain(store):
    one = artifact(uuid.uuid4().hex)
    store.put(one)
    other = artifact("x", factors=one.manifest["factors"], toolchain="triton-1")
    store.put(other)
    evict.pin(store, one.manifest["key"])
    assert [entry.stays for entry in evict.usage(store)] == ["pinned", "pinned"]


def test_what_a_running_process_holds_stays_until_it_ends(store, aged):
    code = """
        import sys
        from pathlib import Path
        from ssmgen.store import Store
        found = Store(Path(sys.argv[1])).get(sys.argv[2], "triton-0")
        print(found is not None, flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(store.root), aged[0].manifest["key"]],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "True\n"
        assert stay(store) == {aged[0].manifest["key"]: "in use"}
        assert keys(evict.surplus(evict.usage(store), 1)) == names(aged[1:])
        process.kill()
    assert stay(store) == {}


def test_a_kernel_that_was_dropped_is_held_no_more(store, aged):
    found = store.get(aged[2].manifest["key"], "triton-0")
    assert stay(store) == {aged[2].manifest["key"]: "in use"}
    del found
    assert stay(store) == {}


def test_handles_are_held_up_to_a_quarter_of_what_there_may_be(store, aged):
    def many():
        import resource

        before = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        found = [store.get(aged[0].manifest["key"], "triton-0") for _ in range(300)]
        return None not in found and len(os.listdir("/proc/self/fd")) <= before + 50

    assert forked(many) == 0


def test_a_removed_entry_is_gone_for_new_readers_and_whole_for_present_ones(
    store, aged, monkeypatch
):
    one, real = aged[0], shutil.rmtree

    def look(path, *args, **kwargs):
        assert store.get(one.manifest["key"], "triton-0") is None
        assert (path / "kernel.cubin").read_bytes() == one.cubin
        real(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", look)
    evict.remove(store, one.manifest["key"], "triton-0")
    assert not place(store, one).parent.parent.exists()
    assert not list((store.base / "stage").iterdir())
    assert there(store) == set(names(aged[1:]))


def test_removing_one_toolchain_leaves_the_other(store):
    for toolchain in ("triton-0", "triton-1"):
        store.put(artifact("one", toolchain=toolchain))
    key = artifact("one").manifest["key"]
    evict.remove(store, key, "triton-0")
    assert store.toolchains(key) == ["triton-1"]
    with pytest.raises(FileNotFoundError):
        evict.remove(store, key, "triton-0")


# After publishes


@pytest.fixture
def publish(store_dir, monkeypatch):
    """Build the kernel of a new config, with a compiler that costs nothing."""
    monkeypatch.setattr(compiler, "toolchain", lambda: "triton-0")
    monkeypatch.setattr(compiler, "compile", lambda *a: compiled(*a, "triton-0"))
    config, arch = KernelConfig(), Arch.of("sm_90")
    plan = dispatch(config, arch)[-1].plan
    monkeypatch.setattr(evict, "_held", frozenset)
    dims = iter(range(8, 513, 8))
    return lambda: kernel.build(config.replace(dim=next(dims)), plan, arch)


def test_the_store_is_brought_under_its_cap_at_the_first_publish_of_a_process(
    publish, store_dir, monkeypatch
):
    built = [publish() for _ in range(4)]
    for age, one in enumerate(built):
        use(Store(store_dir), one, 1e9 + age)
    monkeypatch.setattr(evict, "_published", 0)
    monkeypatch.setenv("SSMGEN_CACHE_SIZE", str(2 * size(built[0]) + 100))
    last = publish()
    assert there(Store(store_dir)) == {built[3].manifest["key"], last.manifest["key"]}


def test_a_process_that_publishes_much_looks_again(publish, store_dir, monkeypatch):
    monkeypatch.setattr(evict, "SCAN_EVERY", 4)
    monkeypatch.setenv("SSMGEN_CACHE_SIZE", "15kB")
    sizes = []
    for _ in range(9):
        publish()
        sizes.append(len(there(Store(store_dir))))
    assert sizes == [1, 2, 3, 4, 2, 3, 4, 5, 2]


def test_without_a_cap_nothing_goes(publish, store_dir, monkeypatch):
    monkeypatch.setattr(evict, "SCAN_EVERY", 2)
    monkeypatch.setenv("SSMGEN_CACHE_SIZE", "0")
    for _ in range(6):
        publish()
    assert len(there(Store(store_dir))) == 6


@pytest.mark.parametrize("where", ["rename", "glob"])
def test_trouble_with_eviction_is_reported_and_the_kernel_is_there(
    publish, store_dir, monkeypatch, caplog, where
):
    publish()
    monkeypatch.setenv("SSMGEN_CACHE_SIZE", "1kB")
    monkeypatch.setattr(evict, "_published", 0)

    def fail(*args):
        raise PermissionError(13, "Permission denied")

    if where == "rename":
        monkeypatch.setattr(evict, "remove", fail)
    else:
        monkeypatch.setattr(Store, "names", fail)
    assert publish().cubin.startswith(b"\x7fELF")
    assert "cannot evict" in caplog.text


def test_two_evictors_at_once_are_no_trouble(publish, store_dir, monkeypatch, caplog):
    built = [publish() for _ in range(4)]
    monkeypatch.setenv("SSMGEN_CACHE_SIZE", "1kB")
    monkeypatch.setattr(evict, "_published", 0)
    remove = evict.remove

    def slower(store, key, toolchain):
        if key == built[1].manifest["key"]:
            remove(store, key, toolchain)
        remove(store, key, toolchain)

    monkeypatch.setattr(evict, "remove", slower)
    publish()
    assert not there(Store(store_dir))
    assert not caplog.records


# Leftovers


def test_leftovers_are_swept_after_a_day_and_not_before(store, aged):
    (store.base / "stage" / "left").mkdir()
    with store.claim("lock"):
        pass
    (place(store, aged[0]) / "source.py").write_bytes(b"")
    old = 1e9
    os.utime(place(store, aged[0]), (old, old))
    assert store.get(aged[0].manifest["key"], "triton-0") is None
    (aside,) = (store.base / "bad").iterdir()
    (store.base / "bad.0123").mkdir()
    left = [store.base / "stage" / "left", aside, store.base / "bad.0123", store.base / "locks" / "lock.lock"]  # fmt: skip  # noqa: E501
    assert evict.sweep(store) == []  # also what was set aside now and is old itself
    for path in left:
        os.utime(path, (old, old))
    assert evict.sweep(store) == left
    assert all(path.exists() for path in left)
    assert not list((store.base / "stage").glob("*.now"))


def test_age_is_measured_by_the_clock_of_the_disk(store, monkeypatch):
    store.put(artifact("one"))
    (store.base / "stage" / "left").mkdir()
    monkeypatch.setattr("time.time", lambda: 9e9)
    assert evict.sweep(store) == []


def test_an_empty_store_has_nothing_to_sweep_or_list(store):
    assert evict.sweep(store) == []
    assert evict.usage(store) == []
    assert not store.root.exists()


def test_a_file_in_the_place_of_stage_is_swept_around(store, caplog):
    store.put(artifact("one"))
    shutil.rmtree(store.base / "stage")
    (store.base / "stage").write_text("x")
    with caplog.at_level(logging.WARNING, "ssmgen"):
        assert evict.sweep(store) == []
    assert "set aside" in caplog.text
    evict.remove(store, artifact("one").manifest["key"], "triton-0")
    assert not there(store)
