"""`ssmgen doctor` says what is wrong, survives whatever is, and changes no store."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from artifacts import artifact, compiled, snapshot
from typer.testing import CliRunner

from ssmgen import compiler, policy
from ssmgen.arch import Arch
from ssmgen.cli import app, probes
from ssmgen.cli.doctor import PROBES, examine
from ssmgen.cli.mounts import mount_of, nearest
from ssmgen.errors import CompileError
from ssmgen.settings import VARIABLES
from ssmgen.store import Store


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, store_dir):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compiler, "compile", compiled)


def said(report, level, text):
    """What to do about the findings of a level that have `text`."""
    found = [f for f in report["findings"] if f["level"] == level and text in f["what"]]
    return [f["todo"] for f in found]


def problems(report):
    assert report["ok"] == (not [f for f in report["findings"] if f["level"] == "problem"])
    return [f["what"] for f in report["findings"] if f["level"] == "problem"]


def test_a_healthy_machine_has_no_problem_and_its_store_is_as_before(store_dir):
    Store(store_dir).put(artifact())
    before = snapshot(store_dir.parent)
    report = examine()
    assert snapshot(store_dir.parent) == before
    assert problems(report) == []
    (root,) = report["roots"]
    assert (root["root"], root["origin"], root["entries"]) == (str(store_dir), "user", 1)
    assert root["size"] == sum(p.stat().st_size for p in store_dir.rglob("*") if p.is_file())
    assert root["owner"] == store_dir.owner()
    assert root["mode"] == f"{store_dir.stat().st_mode & 0o7777:o}"
    assert root["mount"]["kind"]
    assert list(report["round_trip"]["milliseconds"]) == [
        "render", "compile", "publish", "read back",
    ]  # fmt: skip
    assert report["versions"]["triton"] == importlib.metadata.version("triton")
    assert report["versions"]["ptxas"]


def test_the_command_exits_by_the_verdict_and_prints_one_json_object(monkeypatch):
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["ok"] is True
    monkeypatch.setenv("SSMGEN_JIT", "maybe")
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False


def test_what_people_read_has_every_finding(monkeypatch, store_dir):
    monkeypatch.setenv("SSMGEN_CACHE_PATH", "/no/such/store")
    report = examine()
    text = CliRunner().invoke(app, ["doctor"]).stdout
    for finding in report["findings"]:
        if "round trip" not in finding["what"]:  # which has its times
            assert finding["what"] in text
            assert finding["todo"] in text
    assert all(name in text for name in VARIABLES)
    assert text.index(str(store_dir)) < text.index("/no/such/store")


def test_no_probe_stops_the_next(monkeypatch):
    def broken(facts, note):
        raise ZeroDivisionError("nothing works")

    for name in PROBES:
        with monkeypatch.context() as patch:
            patch.setitem(PROBES, name, broken)
            report = examine()
        assert f"{name.replace('_', ' ')}: ZeroDivisionError: nothing works" in problems(report)
        assert set(report) >= set(PROBES)
        assert CliRunner().invoke(app, ["doctor"]).exception is None
    with monkeypatch.context() as patch:
        for name in PROBES:
            patch.setitem(PROBES, name, broken)
        assert len(problems(examine())) >= 3
        result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)


def test_what_is_logged_or_warned_about_is_a_note_and_nothing_else(monkeypatch, caplog):
    def uneasy(facts, note):
        logging.getLogger("ssmgen").warning("entry point of %s is broken", "a wheel")
        warnings.warn("the driver is old", UserWarning, stacklevel=1)

    monkeypatch.setitem(PROBES, "policy", uneasy)
    monkeypatch.delitem(PROBES, "round_trip")
    report = examine()
    assert said(report, "note", "entry point of a wheel is broken")
    assert said(report, "note", "the driver is old")
    assert not caplog.records


# Settings


def test_a_setting_that_does_not_parse_is_a_problem_that_is_said_once(monkeypatch):
    monkeypatch.setenv("SSMGEN_CACHE_SIZE", "much")
    report = examine()
    (problem,) = problems(report)
    assert "SSMGEN_CACHE_SIZE: 'much' is not a size" in problem
    assert report["round_trip"] is None


def test_a_folder_of_tables_that_is_not_there_is_noted(monkeypatch, tmp_path):
    monkeypatch.setenv("SSMGEN_TUNED_PATH", f"{tmp_path}:{tmp_path}/none")
    found = said(examine(), "note", "none is no folder of tables")
    assert found == ["correct SSMGEN_TUNED_PATH"]


def test_an_unknown_variable_is_noted_with_the_one_that_was_meant(monkeypatch):
    monkeypatch.setenv("SSMGEN_CACHEDIR", "/elsewhere")
    monkeypatch.setenv("SSMGEN_ZZZ", "1")
    report = examine()
    assert said(report, "note", "SSMGEN_CACHEDIR is set") == ["did you mean SSMGEN_CACHE_DIR?"]
    assert said(report, "note", "SSMGEN_ZZZ is set") == ["unset it"]
    assert problems(report) == []


@pytest.mark.parametrize("scheme", ["memory", "nosuch", "http"])
def test_passwords_are_not_shown(monkeypatch, scheme):
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", f"{scheme}://user:secret@127.0.0.1:9/kernels")
    report = examine()
    assert report["settings"]["SSMGEN_CACHE_REMOTE"]["set"]
    assert "secret" not in json.dumps(report)


# Without this and that


def without(monkeypatch, package):
    real = importlib.metadata.version

    def version(name):
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_without_triton_kernels_come_from_the_stores(monkeypatch, store_dir):
    without(monkeypatch, "triton")
    report = examine()
    assert said(report, "note", "no Triton: nothing can be compiled here")
    assert problems(report) == ["there is no Triton, and no store has a kernel: none can be had"]
    Store(store_dir).put(artifact())
    report = examine()
    assert problems(report) == []
    assert said(report, "note", "no round trip was tried: there is no Triton")


def test_a_triton_that_does_not_start_is_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    report = examine()
    assert any("does not start" in problem for problem in problems(report))


def test_when_compiling_is_denied_nothing_is_compiled(monkeypatch, store_dir):
    monkeypatch.setenv("SSMGEN_JIT", "deny")
    monkeypatch.setattr(compiler, "compile", lambda *a: pytest.fail("it was"))
    assert any("none can be had" in problem for problem in problems(examine()))
    Store(store_dir).put(artifact())
    report = examine()
    assert problems(report) == []
    assert report["policy"] == {"may_compile": False}
    assert said(report, "note", "SSMGEN_JIT=deny")
    monkeypatch.delenv("SSMGEN_JIT")
    monkeypatch.setattr(policy, "_frozen", True)
    assert examine()["policy"] == {"may_compile": False}


def test_without_a_home_there_is_no_user_store(monkeypatch, tmp_path):
    for name in ("SSMGEN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    report = examine()
    assert said(report, "problem", "no user store") == ["name a folder in SSMGEN_CACHE_DIR"]
    assert report["round_trip"]["milliseconds"]  # in the temporary folder
    Store(tmp_path / "shipped").put(artifact())
    monkeypatch.setenv("SSMGEN_CACHE_PATH", str(tmp_path / "shipped"))
    report = examine()
    assert problems(report) == []
    assert said(report, "note", "no user store")


def test_a_gpu_that_torch_does_not_see_is_a_problem(monkeypatch):
    real = Path.glob
    monkeypatch.setattr(
        Path, "glob",
        lambda self, p: [Path("/dev/nvidia0")] if str(self) == "/dev" else real(self, p),
    )  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", None)
    report = examine()
    assert said(report, "problem", "/dev/nvidia0 is here") == ["install a CUDA build of torch"]


@pytest.fixture
def gpu(monkeypatch):
    class Properties:
        name, total_memory = "A GPU", 80 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.delitem(PROBES, "round_trip")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("arch", "level"), [("sm_90", "ok"), ("sm_120", "note")])
def test_a_gpu_is_told_whether_its_table_is_measured(monkeypatch, arch, level):
    monkeypatch.setattr(Arch, "detect", lambda index: Arch.of(arch))
    report = examine()
    assert report["gpus"][0]["measured"]["ssu"] == (level == "ok")
    assert said(report, level, "ssu has ")
    assert problems(report) == []


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_is_not_supported_is_a_problem(monkeypatch):
    monkeypatch.setattr("ssmgen.arch._capability", lambda device: (7, 5))
    (problem,) = problems(examine())
    assert "A GPU: arch: compute capability 7.5 is not supported" in problem


@pytest.mark.usefixtures("gpu")
def test_a_gpu_without_cuda_bindings_is_a_problem(monkeypatch):
    monkeypatch.setattr(Arch, "detect", lambda index: Arch.of("sm_90"))
    without(monkeypatch, "cuda-bindings")
    assert said(examine(), "problem", "no cuda-bindings") == ["pip install 'ssmgen[cuda]'"]


# Roots


def test_roots_stand_in_the_order_they_are_asked(monkeypatch, tmp_path, store_dir):
    Store(tmp_path / "a").put(artifact("one"))
    monkeypatch.setenv("SSMGEN_CACHE_PATH", f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'none'}")
    monkeypatch.setattr("ssmgen.store.layers._wheels", lambda: (tmp_path / "a",))
    report = examine()
    assert [(r["origin"], r["exists"]) for r in report["roots"]] == [
        ("user", False), ("path", True), ("path", False), ("wheel", True),
    ]  # fmt: skip
    assert said(report, "note", f"{tmp_path / 'none'} does not exist")
    assert not store_dir.exists()


def test_a_root_that_others_can_write_is_a_problem_with_its_cure(monkeypatch, tmp_path):
    Store(tmp_path / "open").put(artifact())
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("SSMGEN_CACHE_PATH", str(tmp_path / "open"))
    report = examine()
    (todo,) = said(report, "problem", f"{tmp_path / 'open'} is not used: everyone may write")
    assert todo.startswith("chmod")
    assert "SSMGEN_CACHE_TRUST" in todo
    monkeypatch.setenv("SSMGEN_CACHE_TRUST", str(tmp_path / "open"))
    assert problems(examine()) == []


def test_a_store_that_cannot_be_written_is_a_note_and_stays_as_it_is(monkeypatch, store_dir):
    Store(store_dir).put(artifact())
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != store_dir and real(p, mode))
    report = examine()
    assert said(report, "note", f"{store_dir} cannot be written")
    assert report["roots"][0]["writable"] is False
    assert problems(report) == []


def test_a_store_of_another_user_is_noted(monkeypatch, store_dir):
    Store(store_dir).put(artifact())
    monkeypatch.setattr(os, "geteuid", lambda: store_dir.stat().st_uid + 1)
    (todo,) = said(examine(), "note", f"{store_dir} belongs to {store_dir.owner()}")
    assert "SSMGEN_CACHE_PATH" in todo


def test_a_file_where_the_store_should_be_is_a_problem(store_dir):
    store_dir.write_text("no folder")
    report = examine()
    assert f"{store_dir} is not a folder" in problems(report)
    assert store_dir.read_text() == "no folder"


def test_a_store_that_may_not_be_read_is_a_problem(monkeypatch, store_dir):
    store_dir.mkdir()
    real = os.listdir

    def listdir(path="."):
        if Path(path) == store_dir:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert f"{store_dir}: Permission denied" in problems(examine())


def test_bad_entries_that_were_set_aside_are_counted(store_dir):
    (store_dir / "v1" / "bad" / "x").mkdir(parents=True)
    report = examine()
    assert report["roots"][0]["set_aside"] == 1
    assert said(report, "note", "1 bad entries")


def test_little_room_is_noted(monkeypatch, store_dir):
    monkeypatch.setattr(probes, "LITTLE_SPACE", 1 << 62)
    assert said(examine(), "note", f"{store_dir}: ") == ["make room: ssmgen cache gc"]


# The remote


def test_a_remote_that_answers(monkeypatch, tmp_path):
    Store(tmp_path / "far").put(artifact())
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", f"file://{tmp_path / 'far'}")
    report = examine()
    assert report["remote"]["answers"]
    assert said(report, "ok", "answers")
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", f"file://{tmp_path / 'typo'}")
    assert said(examine(), "note", "answers that nothing is there")


@pytest.mark.parametrize("url", ["nosuch://host/kernels", "http://127.0.0.1:9/kernels"])
def test_a_broken_remote_is_a_problem(monkeypatch, url):
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", url)
    report = examine()
    (todo,) = [f["todo"] for f in report["findings"] if f["level"] == "problem"]
    assert "SSMGEN_CACHE_REMOTE" in todo
    assert report["round_trip"]["milliseconds"]


def test_a_remote_that_is_silent_is_not_waited_for(monkeypatch):
    import threading

    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", "memory://kernels")
    monkeypatch.setattr(probes, "REMOTE_SECONDS", 0.05)
    released = threading.Event()
    monkeypatch.setattr(probes, "_ask", lambda url: released.wait(30))
    report = examine()
    released.set()
    assert any("silent for 0.05 s" in problem for problem in problems(report))


# The round trip


def test_a_compiler_that_fails_is_a_problem(monkeypatch, store_dir):
    def fails(*arguments):
        raise CompileError("ptxas: no such instruction")

    monkeypatch.setattr(compiler, "compile", fails)
    report = examine()
    assert problems(report) == ["round trip: ptxas: no such instruction"]
    assert "render" in report["round_trip"]["milliseconds"]
    assert list(store_dir.parent.iterdir()) == []


def test_a_disk_that_gives_back_something_else_is_a_problem(monkeypatch):
    monkeypatch.setattr(Store, "get", lambda self, key, toolchain: artifact("another"))
    assert any("does not read back" in problem for problem in problems(examine()))


def test_the_round_trip_is_on_the_filesystem_of_the_store(monkeypatch, store_dir):
    places, real_put = [], Store.put
    monkeypatch.setattr(Store, "put", lambda self, a: places.append(self.root) or real_put(self, a))
    examine()
    assert nearest(places[0].parent.parent) == store_dir.parent
    assert not places[0].exists()
    real = tempfile.TemporaryDirectory

    def refused(dir=None, **options):
        if dir == store_dir.parent:
            raise PermissionError(13, "Permission denied")
        return real(dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refused)
    report = examine()
    assert not places[1].is_relative_to(store_dir.parent)
    assert said(report, "note", f"nothing can be written beside {store_dir}")


def test_the_real_compiler_makes_the_trip_in_a_process_of_its_own(store_dir):
    code = "import json; from ssmgen.cli.doctor import examine; print(json.dumps(examine()))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["round_trip"]["milliseconds"]["compile"] > 10
    assert said(report, "ok", "round trip for sm_90")
    assert not store_dir.exists()


# Mounts

MOUNTINFO = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
31 27 0:30 / /home rw,relatime shared:5 master:2 - nfs4 host:/home rw,vers=4.2
32 31 0:31 / /home/u/fast rw,noatime - xfs /dev/vdb rw
33 27 0:32 / /mnt/my\040disk ro,noatime - ext4 /dev/vdc ro
34 27 0:33 / /tmp rw - ext4 /dev/vdd rw
35 27 0:34 / /tmp rw - tmpfs tmpfs rw,size=1g
36 27 0:35 / /data rw - fuse.sshfs u@h:/ rw
37 27 0:36 / /layers rw - fuse.fuse-overlayfs fuse-overlayfs rw
""".strip()


@pytest.mark.parametrize(
    ("path", "point", "kind", "traits"),
    [
        ("/srv/store", "/", "ext4", set()),
        ("/homestead", "/", "ext4", set()),
        ("/home/u/.cache", "/home", "nfs4", {"network"}),
        ("/home/u/fast/store", "/home/u/fast", "xfs", {"noatime"}),
        ("/mnt/my disk", "/mnt/my disk", "ext4", {"noatime", "read_only"}),
        ("/tmp/store", "/tmp", "tmpfs", {"memory"}),
        ("/data", "/data", "fuse.sshfs", {"network"}),
        ("/layers/store", "/layers", "fuse.fuse-overlayfs", set()),
    ],
)
def test_the_mount_of_a_path(path, point, kind, traits):
    mount = mount_of(Path(path), MOUNTINFO)
    assert (mount.point, mount.kind) == (point, kind)
    names = ("network", "noatime", "read_only", "memory")
    assert {name for name in names if getattr(mount, name)} == traits


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("nfs4", "rw", "network filesystem (nfs4): locks may not reach other hosts"),
        ("ext4", "rw,noatime", "mounted noatime: eviction goes by when a kernel was made"),
        ("tmpfs", "rw", "in memory (tmpfs): it is empty after a restart"),
    ],
)
def test_what_a_mount_means_for_the_store_is_said(monkeypatch, kind, options, words):
    line = f"1 1 0:1 / / {options} - {kind} source {options}"
    monkeypatch.setattr(probes, "mount_of", lambda path: mount_of(path, line))
    report = examine()
    assert said(report, "note", words)
    assert problems(report) == []
