"""The remote root: read-through, verified, an outage costs nothing but a warning."""

from __future__ import annotations

import functools
import http.server
import threading
import time

import pytest
from artifacts import artifact, compiled, snapshot

from ssmgen import Arch, KernelConfig, compiler, kernel
from ssmgen.artifact import FILES
from ssmgen.errors import ConfigError, JitDeniedError
from ssmgen.plan import dispatch
from ssmgen.store import Store, evict, find, local, remote
from ssmgen.store.remote import Remote

fsspec = pytest.importorskip("fsspec")

ONE, TWO = artifact("one"), artifact("two")
KEY, TOOLCHAIN = ONE.manifest["key"], ONE.manifest["toolchain"]
OLDER = artifact("one", toolchain="ancient")


@pytest.fixture(autouse=True)
def _anew(store_dir):
    local.report.cache_clear()
    Remote.at.cache_clear()
    yield
    Remote.at.cache_clear()


@pytest.fixture
def far(tmp_path):
    """A store that is published as a remote."""
    store = Store(tmp_path / "far")
    store.put(ONE)
    return store


@pytest.fixture
def serve(far):
    """A web server on the folder of `far`; counts what it is asked."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(far.root))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.fixture
def memory(far):
    """`far`, in fsspec's memory."""
    files = fsspec.filesystem("memory")
    files.put(str(far.root), "/kernels", recursive=True)
    yield files
    files.rm("/kernels", recursive=True)


@pytest.fixture(params=["file", "memory", "http"])
def named(request, far, monkeypatch):
    """``SSMGEN_CACHE_REMOTE`` naming `far`, in every way that needs no network."""
    if request.param == "http":
        pytest.importorskip("aiohttp")
        url = request.getfixturevalue("serve")[0]
    elif request.param == "memory":
        request.getfixturevalue("memory")
        url = "memory://kernels"
    else:
        url = f"file://{far.root}"
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", url)
    return url


@pytest.fixture
def broken(monkeypatch):
    """A remote that raises `broken.error` whatever it is asked; `broken.calls` counts."""

    class Files:
        calls, error = 0, OSError("no route to host")

        def ls(self, *args, **kwargs):
            Files.calls += 1
            raise Files.error

        cat_file = ls

        def invalidate_cache(self):
            pass

    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", "memory://kernels")
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (Files(), "kernels"))
    return Files


def same(found, wanted):
    return found is not None and found.contents() == wanted.contents()


def test_a_hit_is_published_to_the_user_store_and_the_remote_is_not_asked_again(
    named, store_dir, far, monkeypatch, caplog
):
    before = snapshot(far.root)
    assert same(find(KEY, TOOLCHAIN), ONE)
    assert same(Store(store_dir).get(KEY, TOOLCHAIN), ONE)
    monkeypatch.setattr(Remote, "fetch", lambda *args: pytest.fail("asked again"))
    assert same(find(KEY, TOOLCHAIN), ONE)
    assert snapshot(far.root) == before
    assert not caplog.records


def test_without_a_toolchain_the_remote_is_listed(named, far, store_dir, caplog):
    assert find(KEY, "triton-99") is None
    far.put(OLDER)
    assert same(find(KEY, None), ONE)
    assert find(TWO.manifest["key"], None) is None
    assert find(TWO.manifest["key"], TOOLCHAIN) is None
    assert not caplog.records


def test_a_refused_or_missing_user_store_costs_the_copy_only(named, store_dir, monkeypatch):
    Store(store_dir).put(TWO)
    store_dir.chmod(0o777)
    assert same(find(KEY, TOOLCHAIN), ONE)
    assert len(list(store_dir.glob("v1/??/*/*"))) == 1


def test_a_user_store_that_cannot_be_written_costs_the_copy_only(named, store_dir, caplog):
    store_dir.write_text("no folder")
    assert same(find(KEY, TOOLCHAIN), ONE)
    assert "used from memory" in caplog.text


@pytest.mark.parametrize("name", ["manifest.json", *FILES])
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone", "folder"])
def test_bad_data_is_refused_reported_once_and_not_published(
    far, store_dir, monkeypatch, name, how, caplog
):
    path = far.entry(KEY, TOOLCHAIN) / name
    data = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        text = {"flip": bytes([data[0] ^ 1]) + data[1:], "cut": data[:-2], "empty": b""}[how]
        path.write_bytes(text)
    far.put(TWO)
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", f"file://{far.root}")
    for _ in range(2):
        assert find(KEY, TOOLCHAIN) is None
    assert len(caplog.records) == (how != "gone")
    assert not store_dir.exists()
    assert not (far.base / "bad").exists()
    # One bad entry is no outage.
    assert same(find(TWO.manifest["key"], TOOLCHAIN), TWO)


def test_an_entry_of_another_key_is_refused(far, store_dir, monkeypatch, caplog):
    far.entry(TWO.manifest["key"], "x").parent.mkdir(parents=True)
    far.entry(KEY, TOOLCHAIN).rename(far.entry(TWO.manifest["key"], TOOLCHAIN))
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", f"file://{far.root}")
    assert find(TWO.manifest["key"], TOOLCHAIN) is None
    assert "another key" in caplog.text
    assert not store_dir.exists()


@pytest.mark.parametrize("error", [OSError("no route"), TimeoutError(), RuntimeError("odd"), KeyError("x")])  # fmt: skip  # noqa: E501
def test_an_outage_is_reported_once_and_not_met_again_for_a_while(
    broken, error, caplog, monkeypatch
):
    broken.error = error
    clock = [1000.0]
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
    for one in (ONE, TWO, artifact("three")):
        assert find(one.manifest["key"], TOOLCHAIN) is None
    assert broken.calls == 1
    assert len(caplog.records) == 1
    assert type(error).__name__ in caplog.text
    clock[0] += remote.PAUSE_SECONDS + 1
    assert find(KEY, TOOLCHAIN) is None
    assert broken.calls == 2
    assert len(caplog.records) == 1


def test_a_host_that_cannot_be_reached_is_an_outage(monkeypatch, caplog, store_dir):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", "http://127.0.0.1:9/kernels")
    far = Remote.at("http://127.0.0.1:9/kernels")
    for _ in range(2):
        assert find(KEY, TOOLCHAIN) is None
    assert far._silent_until > time.monotonic()
    assert len(caplog.records) == 1


def test_a_bucket_that_refuses_what_is_not_there_is_no_outage(broken, caplog):
    broken.error = PermissionError("Access Denied")
    for _ in range(3):
        assert find(KEY, TOOLCHAIN) is None
    assert broken.calls == 3
    assert len(caplog.records) == 1
    assert "Access Denied" in caplog.text


def test_a_filesystem_that_cannot_connect_is_an_outage(monkeypatch, caplog):
    def refuse(url):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", "memory://kernels")
    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    assert find(KEY, TOOLCHAIN) is None
    assert "Connection refused" in caplog.text


@pytest.mark.parametrize("url", ["nonsense://x", "sftp_://x"])
def test_a_url_that_fsspec_does_not_know_says_so(url, monkeypatch):
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", url)
    with pytest.raises(ConfigError, match="SSMGEN_CACHE_REMOTE"):
        find(KEY, TOOLCHAIN)


def test_the_copies_of_a_remote_are_kept_under_the_cap(far, store_dir, monkeypatch):
    names = [f"copy {n}" for n in range(5)]
    for name in names:
        far.put(artifact(name))
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", f"file://{far.root}")
    monkeypatch.setenv("SSMGEN_CACHE_SIZE", "12kB")
    monkeypatch.setattr(evict, "_published", 0)
    monkeypatch.setattr(evict, "_held", frozenset)
    monkeypatch.setattr(evict, "SCAN_EVERY", 2)
    for name in names:
        assert find(artifact(name).manifest["key"], TOOLCHAIN)
    assert len(list(Store(store_dir).names())) == 2


def test_a_kernel_that_may_not_be_compiled_comes_from_the_remote(far, monkeypatch):
    config, arch = KernelConfig(), Arch.of("sm_90")
    plan = dispatch(config, arch)[-1].plan
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", f"file://{far.root}")
    monkeypatch.setenv("SSMGEN_JIT", "deny")
    monkeypatch.setattr(compiler, "toolchain", lambda: TOOLCHAIN)
    with pytest.raises(JitDeniedError):
        kernel.build(config, plan, arch)
    wanted = compiled(config, plan, arch, "triton-older")
    far.put(wanted)
    assert same(kernel.build(config, plan, arch), wanted)
