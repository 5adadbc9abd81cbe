"""Which roots are asked, in which order, and which are trusted."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import sys

import pytest
from artifacts import artifact, compiled, snapshot
from processes import can_mount, mounted, python

from ssmgen import Arch, KernelConfig, compiler, kernel
from ssmgen.errors import ConfigError
from ssmgen.plan import dispatch
from ssmgen.store import Store, evict, find, layers, local, stores, user_store

ONE = artifact("one")
KEY, TOOLCHAIN = ONE.manifest["key"], ONE.manifest["toolchain"]


@pytest.fixture(autouse=True)
def _anew():
    local.report.cache_clear()
    layers._wheels.cache_clear()
    yield
    layers._wheels.cache_clear()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site folder in which distributions can be installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def install(site, package, value, *, files=("",), metadata=True):
    """A distribution whose entry point `value` names stores; its package must not be imported."""
    for below in files:
        (site / package / below).mkdir(parents=True, exist_ok=True)
        (site / package / below / "__init__.py").write_text("raise RuntimeError('imported')\n")
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    if metadata:
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ssmgen.stores]\n{package} = {value}\n")
    importlib.invalidate_caches()
    return site / package


# Order


def test_roots_are_asked_in_the_order_that_is_promised(site, tmp_path, monkeypatch):
    package = install(site, "kernels_a", "kernels_a:store")
    roots = [tmp_path / "own", tmp_path / "b", tmp_path / "a", package / "store"]
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(roots[0]))
    monkeypatch.setenv("SSMGEN_CACHE_PATH", f"{roots[1]}{os.pathsep}{roots[2]}")
    assert [store.root for store in stores()] == roots
    assert [store.origin for store in stores()] == ["user", "path", "path", "wheel"]
    assert [store.writable for store in stores()] == [True, False, False, False]
    for number, root in reversed(list(enumerate(roots))):
        Store(root).put(artifact("one", num_warps=number + 1))
        assert find(KEY, TOOLCHAIN).manifest["num_warps"] == number + 1


def test_a_hit_in_the_user_store_looks_at_no_other(store_dir, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("looked for other stores")

    Store(store_dir).put(ONE)
    monkeypatch.setenv("SSMGEN_CACHE_PATH", str(tmp_path / "other"))
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", "memory://kernels")
    monkeypatch.setattr(importlib.metadata, "entry_points", fail)
    monkeypatch.setattr(layers, "remote", fail)
    seen = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **k: (seen.append(str(path)), stat(path, **k))[1])
    assert find(KEY, TOOLCHAIN)
    assert str(store_dir) in seen
    assert str(tmp_path / "other") not in seen
    with pytest.raises(AssertionError, match="looked for other"):
        find(artifact("absent").manifest["key"], TOOLCHAIN)


def test_a_bad_entry_in_one_layer_is_served_by_the_next(store_dir, tmp_path, monkeypatch):
    for root in (store_dir, tmp_path / "other"):
        Store(root).put(ONE)
    (Store(store_dir).entry(KEY, TOOLCHAIN) / "kernel.cubin").write_bytes(b"")
    monkeypatch.setenv("SSMGEN_CACHE_PATH", str(tmp_path / "other"))
    before = snapshot(tmp_path / "other")
    assert find(KEY, TOOLCHAIN).cubin == ONE.cubin
    assert snapshot(tmp_path / "other") == before


# Wheels


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ("kernels", ""),
        ("kernels:store", "store"),
        ("kernels:deep.store", "deep/store"),
        ("kernels.deep:store", "deep/store"),
        ("kernels.deep", "deep"),
    ],
)
def test_a_wheel_brings_a_store_and_its_package_is_not_imported(
    site, store_dir, value, place, caplog
):
    package = install(site, "kernels", value, files=("", "deep"))
    Store(package / place).put(ONE)
    before = snapshot(site)
    assert find(KEY, TOOLCHAIN).cubin == ONE.cubin
    assert "kernels" not in sys.modules
    assert snapshot(site) == before
    assert not caplog.records
    assert not store_dir.exists()


def test_a_fresh_process_is_served_by_a_wheel(site, store_dir, monkeypatch):
    monkeypatch.setattr(compiler, "compile", lambda *a: compiled(*a, compiler.toolchain()))
    config, arch = KernelConfig(batch_invariant=True), Arch.of("sm_90")
    package = install(site, "kernels", "kernels:store")
    with monkeypatch.context() as patch:
        patch.setenv("SSMGEN_CACHE_DIR", str(package / "store"))
        wanted = kernel.build(config, dispatch(config, arch)[-1].plan, arch)
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from ssmgen import KernelConfig, get_kernel
        found = get_kernel(KernelConfig(batch_invariant=True), arch="sm_90")
        print(found.artifact.manifest["sha256"])
    """
    assert python(code, site, SSMGEN_JIT="deny").strip() == wanted.manifest["sha256"]


@pytest.mark.parametrize("value", ["absent:store", "absent.deep", "not a name!", ":", "os:x", ""])
def test_an_entry_point_that_leads_nowhere_is_reported_once(site, store_dir, value, caplog):
    good = install(site, "kernels", "kernels:store")
    install(site, "broken", value)
    Store(good / "store").put(ONE)
    assert find(KEY, TOOLCHAIN)
    assert find(KEY, TOOLCHAIN)
    assert len(caplog.records) <= 1
    if value:
        assert "entry point broken of ssmgen.stores" in caplog.text


@pytest.mark.parametrize("text", ["\xff\xfe", "[ssmgen.stores\nx", "x = y", "[ssmgen.stores]\nx"])
def test_damaged_distributions_break_nothing(site, store_dir, text):
    install(site, "kernels", "kernels:store")
    install(site, "damaged", "damaged:store", metadata=False)
    (site / "damaged-1.0.dist-info" / "entry_points.txt").write_bytes(text.encode("latin-1"))
    Store(store_dir).put(ONE)
    assert find(KEY, TOOLCHAIN)
    assert find(artifact("absent").manifest["key"], TOOLCHAIN) is None


def test_a_finder_that_raises_breaks_nothing(site, store_dir, monkeypatch, caplog):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "kernels":
                raise RuntimeError("a finder of someone else")

    install(site, "kernels", "kernels:store")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert find(KEY, TOOLCHAIN) is None
    assert "entry point kernels of ssmgen.stores" in caplog.text


# Trust


@pytest.fixture
def other(tmp_path, monkeypatch):
    """A filled root of ``SSMGEN_CACHE_PATH``."""
    root = tmp_path / "other root"
    Store(root).put(ONE)
    monkeypatch.setenv("SSMGEN_CACHE_PATH", str(root))
    return root


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777, 0o2775])
@pytest.mark.parametrize("below", ["", "v1"])
def test_a_root_that_others_can_write_is_not_read(store_dir, other, mode, below, caplog):
    assert find(KEY, TOOLCHAIN)
    (other / below).chmod(mode)
    assert find(KEY, TOOLCHAIN) is None
    assert find(KEY, None) is None
    assert len(caplog.records) == 1
    assert f"chmod -R go-w '{other}'" in caplog.text
    assert ("everyone" if mode & 2 else "its group") in caplog.text
    (other / below).chmod(0o755)
    assert find(KEY, TOOLCHAIN)


def test_the_command_in_the_warning_makes_the_root_trusted(store_dir, other, caplog):
    for path in (other, *other.rglob("*")):
        path.chmod(0o777)
    assert find(KEY, TOOLCHAIN) is None
    command = caplog.text.partition("; ")[2].partition(", or list")[0]
    assert os.system(command) == 0
    assert find(KEY, TOOLCHAIN)
    assert not [path for path in other.rglob("*") if path.stat().st_mode & 0o022]


def test_a_root_that_is_named_is_trusted(store_dir, other, monkeypatch, caplog):
    (other / "v1").chmod(0o777)
    other.chmod(0o777)
    monkeypatch.setenv("SSMGEN_CACHE_TRUST", f"/nowhere{os.pathsep}{other}/")
    assert find(KEY, TOOLCHAIN)
    assert not caplog.records
    monkeypatch.setenv("SSMGEN_CACHE_TRUST", str(other.parent))
    assert find(KEY, TOOLCHAIN) is None


@pytest.mark.parametrize("mode", [0o775, 0o777])
def test_a_user_store_that_others_can_write_is_neither_read_nor_written(
    store_dir, mode, caplog, monkeypatch
):
    monkeypatch.setattr(compiler, "compile", lambda *a: compiled(*a, compiler.toolchain()))
    Store(store_dir).put(ONE)
    store_dir.chmod(mode)
    before = snapshot(store_dir)
    assert user_store() is None
    config, arch = KernelConfig(), Arch.of("sm_90")
    for dim in (8, 16):
        kernel.build(config.replace(dim=dim), dispatch(config, arch)[-1].plan, arch)
    assert find(KEY, TOOLCHAIN) is None
    assert snapshot(store_dir) == before
    assert len(caplog.records) == 1
    assert "is not used" in caplog.text
    assert "SSMGEN_CACHE_TRUST" in caplog.text


def test_when_the_mount_cannot_be_asked_modes_decide(store_dir, other, monkeypatch):
    def refuse(path):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "statvfs", refuse)
    assert find(KEY, TOOLCHAIN)
    other.chmod(0o777)
    assert find(KEY, TOOLCHAIN) is None


@pytest.mark.skipif(not can_mount(), reason="no user name spaces with mounts here")
def test_a_read_only_mount_of_a_root_that_others_can_write_is_trusted(other, tmp_path):
    ro = tmp_path / "ro"
    ro.mkdir()
    for path in (other, other / "v1"):
        path.chmod(0o777)
    code = "import sys; from ssmgen.store import find; print(find(*sys.argv[1:]) is not None)"
    wrap = mounted(f"mount --bind '{other}' {ro} && mount -o remount,bind,ro {ro}")
    assert python(code, KEY, TOOLCHAIN, wrap=wrap, SSMGEN_CACHE_PATH=str(ro)) == "True\n"
    assert python(code, KEY, TOOLCHAIN, SSMGEN_CACHE_PATH=str(other)) == "False\n"


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_what_we_make_is_writable_for_its_owner_only_whatever_the_umask(
    tmp_path, monkeypatch, umask, caplog
):
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(tmp_path / "new" / "cache" / "ssmgen"))
    old = os.umask(umask)
    try:
        store = user_store()
        store.put(ONE)
        with store.claim(KEY):
            evict.pin(store, KEY)
        evict.sweep(store)
        (store.entry(KEY, TOOLCHAIN) / "source.py").write_bytes(b"")
        assert find(KEY, TOOLCHAIN) is None
        store.put(ONE)
        store.put(artifact("two"))
        shutil.rmtree(store.base / "stage")
        evict.remove(store, artifact("two").manifest["key"], TOOLCHAIN)
        again = Store(tmp_path / "newer" / "store")
        evict.pin(again, KEY)
        assert find(KEY, TOOLCHAIN)
    finally:
        os.umask(old)
    made = [path for name in ("new", "newer") for path in (tmp_path / name).rglob("*")]
    made += [tmp_path / "new", tmp_path / "newer"]
    bad = [p for p in made if p.stat().st_mode & 0o022 and "bad" not in p.parts]
    assert not bad
    assert {path.name for path in store.base.iterdir()} >= {"stage", "bad", "locks", "pins"}
    assert [r for r in caplog.records if "not used" in r.getMessage()] == []


# Remote, off unless it is named


def test_without_a_remote_fsspec_is_not_imported(store_dir):
    code = """
        import sys
        from ssmgen.store import find, layers
        assert layers.remote() is None
        assert find("0" * 64, "triton-0") is None
        assert find("0" * 64, None) is None
        print([name for name in sys.modules if name.partition(".")[0] == "fsspec"],
              "ssmgen.store.remote" in sys.modules)
    """
    assert python(code) == "[] False\n"


def test_a_remote_without_fsspec_says_what_to_install(store_dir, monkeypatch):
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", "memory://without")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"SSMGEN_CACHE_REMOTE: .*pip install 'ssmgen\[remote\]'"):
        find(KEY, TOOLCHAIN)
    Store(store_dir).put(ONE)
    assert find(KEY, TOOLCHAIN)


def test_logging_of_layers_is_quiet_when_all_is_well(store_dir, caplog):
    Store(store_dir).put(ONE)
    with caplog.at_level(logging.DEBUG, "ssmgen"):
        assert find(KEY, TOOLCHAIN)
    assert not caplog.records


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("named", [False, True])
def test_the_default_place_of_another_user_is_refused_unless_it_is_named(
    tmp_path, monkeypatch, named
):
    root = tmp_path / "ssmgen"
    Store(root).put(artifact("theirs"))
    os.chown(root, 4321, 4321)
    monkeypatch.delenv("SSMGEN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if named:
        monkeypatch.setenv("SSMGEN_CACHE_TRUST", str(root))
    assert [store.root for store in stores()] == [root] * named
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(root))
    assert [store.root for store in stores()] == [root]
