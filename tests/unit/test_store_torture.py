"""The store under attack: killed writers, races, spoilt entries, odd disks, odd locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from artifacts import artifact, compiled, snapshot
from processes import (
    as_nobody,
    can_mount,
    forked,
    killed_at_every_step,
    mounted,
    python,
    race,
)

from ssmgen import Arch, KernelConfig, compiler, get_kernel, kernel
from ssmgen.artifact import FILES, Artifact
from ssmgen.errors import StoreError
from ssmgen.plan import dispatch
from ssmgen.store import Store, evict, local
from ssmgen.template import ABI_VERSION

EVERY_FILE = ("manifest.json", *FILES)
ONE, TWO = artifact("one"), artifact("two")
KEY, TOOLCHAIN = ONE.manifest["key"], ONE.manifest["toolchain"]
CONFIG, SM_90 = KernelConfig(batch_invariant=True), Arch.of("sm_90")
PLAN = dispatch(CONFIG, SM_90)[-1].plan

# Long enough for others to come while it lasts.
COMPILATION = 0.1

needs_mounts = pytest.mark.skipif(not can_mount(), reason="no user name spaces with mounts here")


@pytest.fixture(autouse=True)
def _reports_anew():
    local.report.cache_clear()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


@pytest.fixture
def filled(store):
    store.put(ONE)
    return store


@pytest.fixture
def log_of_compilations(monkeypatch, tmp_path, store_dir):
    """A file with a line for each compilation, whatever process made it; the compiler is quick."""
    path = tmp_path / "compilations"
    path.touch()

    def compile(config, plan, arch):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(handle, f"{config.to_json()}\n".encode())
        os.close(handle)
        time.sleep(COMPILATION)
        return compiled(config, plan, arch, TOOLCHAIN)

    monkeypatch.setattr(compiler, "toolchain", lambda: TOOLCHAIN)
    monkeypatch.setattr(compiler, "compile", compile)
    return path


def entry(store):
    return store.entry(KEY, TOOLCHAIN)


def same(found, wanted):
    return found is not None and found.contents() == wanted.contents()


def set_aside(store):
    return sorted((store.base / "bad").glob("*"))


def build(config=CONFIG):
    return kernel.build(config, PLAN, SM_90)


BUILT = compiled(CONFIG, PLAN, SM_90, TOOLCHAIN)


# Hits need nothing


HIT = """
    import os, sys

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("triton", "jinja2", "filelock", "torch", "fsspec"):
                raise ImportError(f"{name} was imported")

    sys.meta_path.insert(0, Refuse())
    from ssmgen import KernelConfig, get_kernel

    done = []
    WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    FORBIDDEN = (
        "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
        "os.chmod", "os.utime", "fcntl.flock", "fcntl.lockf", "os.fork", "os.posix_spawn",
        "os.exec", "subprocess.Popen", "socket.connect", "tempfile.mkstemp", "tempfile.mkdtemp",
    )

    def watch(event, arguments):
        if event in FORBIDDEN or (event == "open" and arguments[2] & WRITES):
            done.append((event, arguments))

    if len(sys.argv) > 1 and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(int(sys.argv[1]))
        os.setuid(int(sys.argv[1]))
    sys.addaudithook(watch)
    found = get_kernel(KernelConfig(batch_invariant=True), arch="sm_90")
    assert not done, done
    open(os.devnull, "w").close()
    assert done, "the hook sees nothing"
    print(found.artifact.manifest["sha256"])
"""


@pytest.fixture
def full_store(store_dir, monkeypatch):
    """A user store with the kernel that `HIT` asks for."""
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "compile", lambda *a: compiled(*a, compiler.toolchain()))
        get_kernel(CONFIG, arch="sm_90")
    return store_dir


def digest_in(root):
    (one,) = Store(root).entries()
    return one.manifest["sha256"]


def test_a_hit_in_a_store_of_another_user_without_rights_needs_nothing(full_store, tmp_path):
    wanted = digest_in(full_store)
    parents = [p for p in full_store.parents if p != Path("/") and p.owner() == tmp_path.owner()]
    modes = {path: path.stat().st_mode for path in (*parents, *full_store.rglob("*"), full_store)}
    for path in modes:
        path.chmod(0o444 if path.is_file() else 0o555)
    before = snapshot(full_store)
    if os.geteuid() == 0:
        for path in (full_store, *full_store.rglob("*")):
            os.chown(path, 4321, 4321)
    try:
        assert python(HIT, 65534, PATH="").strip() == wanted
        assert snapshot(full_store) == before
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@needs_mounts
def test_a_hit_on_a_read_only_mount_needs_nothing(full_store, tmp_path):
    wanted = digest_in(full_store)
    for path in (full_store, full_store / "v1"):
        path.chmod(0o777)  # a mount that nobody can write to needs no modes
    ro = tmp_path / "ro"
    ro.mkdir()
    wrap = mounted(f"mount --bind {full_store} {ro} && mount -o remount,bind,ro {ro}")
    assert python(HIT, wrap=wrap, SSMGEN_CACHE_DIR=str(ro)).strip() == wanted
    denied = python(
        """
        import sys, logging
        from ssmgen.errors import StoreError
        from ssmgen.store import user_store
        from artifacts import artifact
        try:
            user_store().put(artifact("two"))
        except StoreError as error:
            print(error)
        """,
        wrap=wrap,
        SSMGEN_CACHE_DIR=str(ro),
    )
    assert "Read-only file system" in denied
    assert "SSMGEN_CACHE_DIR" in denied


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace here")
def test_a_hit_makes_no_system_call_that_writes_or_locks(full_store, tmp_path):
    trace = tmp_path / "trace"
    calls = "openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,"
    calls += "flock,link,linkat,symlink,symlinkat,ftruncate,fsync,chmod,fchmod,utimensat,execve"
    wrap = ("strace", "-f", "-o", str(trace), "-e", f"trace={calls}")
    if subprocess.run([*wrap, "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace here")
    code = """
        from ssmgen import KernelConfig, get_kernel
        get_kernel(KernelConfig(batch_invariant=True), arch="sm_90")
    """
    python(code, wrap=wrap)
    lines = [line for line in trace.read_text().splitlines() if "(" in line]
    assert any("kernel.cubin" in line for line in lines)
    changes = [
        line
        for line in lines
        if re.search(r"O_(WRONLY|RDWR|CREAT)", line) or not re.search(r"\d+ +open(at)?\(", line)
    ]
    assert len(changes) == 1, changes  # the interpreter itself
    assert "execve(" in changes[0]


# Same bytes


def test_two_processes_in_two_folders_publish_identical_trees(tmp_path):
    code = """
        import os, sys
        os.chdir(sys.argv[1])
        from ssmgen import KernelConfig, get_kernel
        common = dict(dim=8, dstate=8, has_d=False, batch_invariant=True)
        get_kernel(KernelConfig(**common), arch="sm_90")
        get_kernel(KernelConfig(**common, state_dtype="fp16", rounding="stochastic"), arch="sm_80")
        get_kernel(KernelConfig(**common, state_dtype="int8"), arch="sm_120")
    """
    trees = []
    for seed in ("1", "2"):
        folder = tmp_path / (seed * 9)
        (folder / "elsewhere").mkdir(parents=True)
        root = folder / "store"
        python(code, folder, PYTHONHASHSEED=seed, SSMGEN_CACHE_DIR=str(root))
        files = [*root.glob("v1/??/**/*")]
        trees.append(
            {
                str(path.relative_to(root)): (
                    path.stat().st_mode,
                    path.read_bytes() if path.is_file() else None,
                )
                for path in files
            }
        )
    assert len([name for name in trees[0] if name.endswith(".cubin")]) == 3
    assert trees[0] == trees[1]


# kill -9


def count_steps(step):
    """Every call that changes a disk is a step, and so is the middle of every write."""

    def before(function):
        def counted(*args, **kwargs):
            step()
            return function(*args, **kwargs)

        return counted

    for name in ("mkdir", "open", "fsync", "rename", "unlink", "rmdir", "utime"):
        setattr(os, name, before(getattr(os, name)))
    fcntl.flock = before(fcntl.flock)

    class HalfWay:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            step()
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            step()
            self.file.write(data[len(data) // 2 :])

        def __getattr__(self, name):
            return getattr(self.file, name)

    local.open = lambda *args, **kwargs: HalfWay(open(*args, **kwargs))  # noqa: SIM115


def test_a_writer_killed_at_any_step_leaves_an_entry_whole_or_absent(
    log_of_compilations, store_dir, caplog, monkeypatch
):
    monkeypatch.setitem(globals(), "COMPILATION", 0)
    outcomes = []
    for step in killed_at_every_step(build, count_steps):
        found = Store(store_dir).get(BUILT.manifest["key"], TOOLCHAIN)
        outcomes.append(found is not None)
        assert found is None or same(found, BUILT), step
        assert same(build(), BUILT), step
        assert same(Store(store_dir).get(BUILT.manifest["key"], TOOLCHAIN), BUILT), step
        assert not set_aside(Store(store_dir))
        shutil.rmtree(store_dir)
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes)
    assert outcomes.count(True) >= 2  # killed between the rename and the end, and not killed
    assert not caplog.records


def test_a_writer_killed_while_it_sets_a_bad_entry_aside_loses_nothing(
    log_of_compilations, store_dir, monkeypatch
):
    monkeypatch.setitem(globals(), "COMPILATION", 0)

    def spoil():
        shutil.rmtree(store_dir, ignore_errors=True)
        Store(store_dir).put(BUILT)
        (cubin,) = store_dir.glob("v1/??/*/*/kernel.cubin")
        cubin.write_bytes(b"")

    spoil()
    for step in killed_at_every_step(build, count_steps):
        assert same(build(), BUILT), step
        assert same(Store(store_dir).get(BUILT.manifest["key"], TOOLCHAIN), BUILT), step
        assert len(set_aside(Store(store_dir))) == 1, step
        spoil()
    assert step > 20


def test_an_evictor_killed_at_any_step_leaves_an_entry_whole_or_absent(filled, caplog):
    for step in killed_at_every_step(
        lambda: evict.remove(Store(filled.root), KEY, TOOLCHAIN), count_steps
    ):
        found = filled.get(KEY, TOOLCHAIN)
        assert found is None or same(found, ONE), step
        filled.put(ONE)
        assert same(filled.get(KEY, TOOLCHAIN), ONE), step
    assert step > 4
    assert filled.get(KEY, TOOLCHAIN)
    assert not caplog.records


# Races


def test_64_processes_that_want_one_kernel_compile_it_once(log_of_compilations):
    assert race([lambda: same(build(), BUILT)] * 64) == [0] * 64
    assert len(log_of_compilations.read_text().splitlines()) == 1


def test_64_processes_that_want_many_kernels_compile_each_once(log_of_compilations, store_dir):
    configs = [CONFIG.replace(dim=8 * n) for n in range(1, 9)]

    def work(turn):
        def all_of_them():
            mine = configs[turn % 8 :] + configs[: turn % 8]
            return all(same(build(c), compiled(c, PLAN, SM_90, TOOLCHAIN)) for c in mine)

        return all_of_them

    assert race([work(turn) for turn in range(64)]) == [0] * 64
    lines = log_of_compilations.read_text().splitlines()
    assert sorted(lines) == sorted(c.to_json() for c in configs)
    assert not list((store_dir / "v1" / "stage").iterdir())


@pytest.mark.parametrize("what", ["bad", "file", "folder file"])
def test_processes_that_race_on_something_bad_all_get_the_kernel(
    log_of_compilations, store_dir, what
):
    store = Store(store_dir)
    key = BUILT.manifest["key"]
    store.put(BUILT)
    folder = store.entry(key, TOOLCHAIN)
    if what == "bad":
        (folder / "kernel.cubin").write_bytes(b"")
    else:
        broken = folder if what == "file" else store.base / key[:2]
        shutil.rmtree(broken)
        broken.write_text("in the way")
    assert race([lambda: same(build(), BUILT)] * 24) == [0] * 24
    assert len(log_of_compilations.read_text().splitlines()) == 1
    assert same(store.get(key, TOOLCHAIN), BUILT)


def test_publishers_and_evictors_that_race_never_fail_or_mix(store):
    def publish():
        for _ in range(40):
            store.put(ONE)
            found = store.get(KEY, TOOLCHAIN)
            if found is not None and not same(found, ONE):
                return False
        return not set_aside(store)

    def remove():
        for _ in range(200):
            with contextlib.suppress(FileNotFoundError):
                evict.remove(store, KEY, TOOLCHAIN)
        return True

    assert race([publish, remove] * 4) == [0] * 8
    assert not set_aside(store)
    store.put(ONE)
    assert same(store.get(KEY, TOOLCHAIN), ONE)


def test_an_entry_that_loses_its_parent_between_two_steps_is_published(store, monkeypatch):
    rename, lost = Path.rename, []

    def rename_late(self, target):
        if not lost and self.parent.name == "stage":
            lost.append(target)
            target.parent.rmdir()
            target.parent.parent.rmdir()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_late)
    store.put(ONE)
    assert lost
    assert same(store.get(KEY, TOOLCHAIN), ONE)


# Spoilt entries


def classes_of(data):
    """Positions of every kind of byte: both ends, the headers, and a few inside."""
    end = len(data)
    return sorted({*range(0, min(end, 64), 7), *range(0, end, max(1, end // 20)), end - 1})


def put_back(store, path, data):
    """Undo what was done to a file of the entry, wherever the entry is now."""
    for folder in set_aside(store):
        shutil.rmtree(folder)
    store.put(ONE)
    assert path.read_bytes() == data


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_flipped_bit_at_any_kind_of_byte_is_a_miss_set_aside(filled, name, caplog):
    path = entry(filled) / name
    data = path.read_bytes()
    for at, bit in itertools.product(classes_of(data.rstrip()), (0, 7)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        assert filled.get(KEY, TOOLCHAIN) is None, at
        assert len(set_aside(filled)) == 1
        put_back(filled, path, data)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_file_cut_at_any_kind_of_byte_is_a_miss_set_aside(filled, name):
    path = entry(filled) / name
    data = path.read_bytes()
    for keep in (*classes_of(data.rstrip()), 0):
        path.write_bytes(data[:keep])
        assert filled.get(KEY, TOOLCHAIN) is None, keep
        assert len(set_aside(filled)) == 1
        put_back(filled, path, data)


def test_a_manifest_cut_anywhere_is_refused():
    contents = ONE.contents()
    text = contents["manifest.json"].rstrip()
    for keep in range(len(text)):
        with pytest.raises(StoreError):
            Artifact.verify(KEY, TOOLCHAIN, {**contents, "manifest.json": text[:keep]}, ABI_VERSION)


def test_a_bad_entry_is_reported_once_however_often_it_is_met(filled, caplog):
    (entry(filled) / "kernel.cubin").write_bytes(b"")
    reader = Store(filled.root, writable=False)
    assert [reader.get(KEY, TOOLCHAIN) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert "kernel.cubin: 0 bytes" in caplog.text


@pytest.mark.parametrize("names", [(name,) for name in EVERY_FILE] + [EVERY_FILE, ()])
def test_empty_files_and_empty_folders_are_a_miss_set_aside(filled, names, caplog):
    for name in EVERY_FILE:
        if name in names:
            (entry(filled) / name).write_bytes(b"")
        elif not names:
            (entry(filled) / name).unlink()
    assert filled.get(KEY, TOOLCHAIN) is None
    assert "bad entry" in caplog.text
    assert len(set_aside(filled)) == 1
    filled.put(ONE)
    assert same(filled.get(KEY, TOOLCHAIN), ONE)


def test_entries_swapped_between_keys_are_both_set_aside(filled):
    filled.put(TWO)
    one, two = entry(filled), filled.entry(TWO.manifest["key"], TOOLCHAIN)
    one.rename(filled.root / "third")
    two.rename(one)
    (filled.root / "third").rename(two)
    assert filled.get(KEY, TOOLCHAIN) is None
    assert filled.get(TWO.manifest["key"], TOOLCHAIN) is None
    assert len(set_aside(filled)) == 2


def test_entries_swapped_between_toolchains_are_both_set_aside(filled):
    filled.put(artifact("one", toolchain="triton-1"))
    one, other = entry(filled), filled.entry(KEY, "triton-1")
    one.rename(filled.root / "third")
    other.rename(one)
    (filled.root / "third").rename(other)
    assert filled.get(KEY, None) is None
    assert len(set_aside(filled)) == 2


@pytest.mark.parametrize("name", EVERY_FILE)
def test_files_swapped_between_good_entries_are_no_entry(filled, name):
    filled.put(TWO)
    (entry(filled) / name).write_bytes(TWO.contents()[name])
    assert filled.get(KEY, TOOLCHAIN) is None
    assert same(filled.get(TWO.manifest["key"], TOOLCHAIN), TWO)


def _device(path):
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        path.symlink_to("/dev/zero")


@contextlib.contextmanager
def _inside(folder):
    back = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(back)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as server, _inside(path.parent):
        server.bind(path.name)


THINGS = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "device": _device,
    "socket": _socket,
    "dangling link": lambda path: path.symlink_to("/nonexistent"),
    "loop": lambda path: path.symlink_to(path.name),
    "file": lambda path: path.write_text("x"),
}


@pytest.mark.parametrize("thing", [thing for thing in THINGS if thing != "file"])
@pytest.mark.parametrize("name", EVERY_FILE)
def test_what_is_no_file_in_the_place_of_one_is_set_aside(filled, thing, name, caplog):
    before = len(os.listdir("/proc/self/fd"))
    path = entry(filled) / name
    path.unlink()
    THINGS[thing](path)
    assert filled.get(KEY, TOOLCHAIN) is None
    assert f"bad entry {entry(filled)}: {name}" in caplog.text
    assert len(set_aside(filled)) == 1
    filled.put(ONE)
    assert same(filled.get(KEY, TOOLCHAIN), ONE)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("thing", [thing for thing in THINGS if thing != "folder"])
@pytest.mark.parametrize("level", ["entry", "key", "xx", "stage", "locks", "bad"])
def test_what_is_no_folder_in_the_place_of_one_is_set_aside(
    log_of_compilations, store_dir, level, thing
):
    store = Store(store_dir)
    key = BUILT.manifest["key"]
    path = {
        "entry": store.entry(key, TOOLCHAIN),
        "key": store.entry(key, TOOLCHAIN).parent,
        "xx": store.base / key[:2],
    }.get(level, store.base / level)
    path.parent.mkdir(parents=True)
    THINGS[thing](path)
    if level == "bad":  # which is used only if something is bad
        store.put(BUILT)
        (store.entry(key, TOOLCHAIN) / "source.py").unlink()
    assert same(build(), BUILT)
    assert same(store.get(key, TOOLCHAIN), BUILT)
    assert os.path.lexists(next(store.base.glob("bad.*")) if level == "bad" else set_aside(store)[0])  # fmt: skip  # noqa: E501
    assert same(build(), BUILT)
    assert len(log_of_compilations.read_text().splitlines()) == 1


@pytest.mark.parametrize("thing", ["file", "pipe", "dangling link", "loop"])
@pytest.mark.parametrize("level", ["root", "v1", "above"])
def test_a_store_that_cannot_be_made_costs_the_store_not_the_kernel(
    log_of_compilations, store_dir, level, thing, caplog, monkeypatch
):
    if level == "above":
        monkeypatch.setenv("SSMGEN_CACHE_DIR", str(store_dir / "deeper"))
    path = store_dir / "v1" if level == "v1" else store_dir
    path.parent.mkdir(exist_ok=True)
    THINGS[thing](path)
    for _ in range(2):
        assert same(build(), BUILT)
    assert "SSMGEN_CACHE_DIR" in caplog.text
    assert "used from memory" in caplog.text
    assert path.is_symlink() or not path.is_dir()


def test_something_else_where_pins_should_be_pins_nothing_and_is_set_aside(filled):
    (filled.base / "pins").write_text("x")
    assert not evict.pinned(filled)
    assert len(evict.usage(filled)) == 1
    evict.pin(filled, KEY)
    assert set(evict.pinned(filled)) == {KEY}


@pytest.mark.parametrize("level", ["", "??", "??/*"])
def test_junk_anywhere_is_passed_over(filled, level):
    folder = next(filled.base.glob(level)) if level else filled.base
    (folder / "junk").write_text("x")
    (folder / ".hidden").write_text("x")
    (folder / "junk folder").mkdir()
    assert same(filled.get(KEY, None), ONE)
    assert [one.manifest["key"] for one in filled.entries()] == [KEY]
    assert evict.usage(filled)


# Odd disks


@needs_mounts
def test_a_full_disk_costs_the_store_not_the_kernel(tmp_path):
    code = """
        import logging, sys
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        from pathlib import Path
        from artifacts import artifact, compiled
        from ssmgen import Arch, KernelConfig, compiler, kernel
        from ssmgen.plan import dispatch
        from ssmgen.store import Store, user_store
        compiler.toolchain = lambda: "triton-0"
        done = []
        def compile(*a):
            done.append(a)
            return compiled(*a, "triton-0")
        compiler.compile = compile
        arch = Arch.of("sm_90")
        plan = dispatch(KernelConfig(), arch)[-1].plan
        def build(dim):
            config = KernelConfig(dim=dim)
            wanted = compiled(config, plan, arch, "triton-0").contents()
            assert kernel.build(config, plan, arch).contents() == wanted
        for dim in range(8, 8 * 20, 8):
            build(dim)
        assert len(done) == 19
        good = list(user_store().entries())
        print("good", len(good))
        assert not list((user_store().base / "stage").iterdir())
        assert not (user_store().base / "bad").exists()
        for one in good[:-1]:
            from ssmgen.store import evict
            evict.remove(user_store(), one.manifest["key"], "triton-0")
        build(8 * 30)
        build(8 * 30)
        assert len(done) == 20
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    said = python(
        code,
        wrap=mounted(f"mount -t tmpfs -o size=80k,nr_inodes=60,mode=755 none {disk}"),
        SSMGEN_CACHE_DIR=str(disk / "store"),
    )
    assert "No space left on device" in said
    assert "make room there" in said
    assert 0 < int(re.search(r"good (\d+)", said)[1]) < 19


def test_a_file_that_may_not_grow_costs_the_store_not_the_kernel(
    log_of_compilations, store_dir, caplog
):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        return same(build(), BUILT)

    assert forked(limited) == 0
    store = Store(store_dir)
    assert store.get(BUILT.manifest["key"], TOOLCHAIN) is None
    assert not list(store.base.glob("stage/*"))
    assert not set_aside(store)
    assert same(build(), BUILT)
    assert same(store.get(BUILT.manifest["key"], TOOLCHAIN), BUILT)


@needs_mounts
def test_a_store_that_came_with_an_image_is_mended_and_evicted_in_a_container(filled, tmp_path):
    filled.put(TWO)
    (entry(filled) / "kernel.cubin").write_bytes(b"")
    before = snapshot(filled.root)
    upper, work, merged = (tmp_path / name for name in ("upper", "work", "merged"))
    for folder in (upper, work, merged):
        folder.mkdir()
    overlay = f"lowerdir={filled.root},upperdir={upper},workdir={work},userxattr"
    mount = f"mount -t overlay overlay -o {overlay} {merged}"
    if subprocess.run((*mounted(mount), "true"), capture_output=True, check=False).returncode:
        pytest.skip("no overlays here")
    code = """
        import sys
        from pathlib import Path
        from artifacts import artifact
        from ssmgen.store import Store, evict
        store, one, two = Store(Path(sys.argv[1])), artifact("one"), artifact("two")
        key = one.manifest["key"]
        assert store.get(key, "triton-0") is None
        assert len(list((store.base / "bad").iterdir())) == 1
        store.put(one)
        assert store.get(key, "triton-0").contents() == one.contents()
        evict.remove(store, two.manifest["key"], "triton-0")
        assert [found for found, _ in store.names()] == [key]
        assert not list((store.base / "stage").iterdir())
    """
    python(code, merged, wrap=mounted(mount))
    assert snapshot(filled.root) == before


@pytest.mark.parametrize("home", ["", "/dev/null", "/proc/nowhere", None])
def test_without_a_home_a_kernel_lives_in_memory(home, tmp_path):
    code = """
        import logging, os, pwd, sys
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        def unknown(*a):
            raise KeyError("no such user")
        pwd.getpwuid = pwd.getpwnam = unknown
        from artifacts import compiled
        from ssmgen import KernelConfig, compiler, get_kernel
        compiler.toolchain = lambda: "triton-0"
        compiler.compile = lambda *a: compiled(*a, "triton-0")
        if len(sys.argv) > 1:
            os.environ["HOME"] = sys.argv[1]
        else:
            del os.environ["HOME"]
        for name in ("SSMGEN_CACHE_DIR", "XDG_CACHE_HOME"):
            os.environ.pop(name, None)
        from ssmgen.store import layers
        roots = [store.root for store in layers.named()]
        os.makedirs = os.mkdir = lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "no"))
        print(get_kernel(KernelConfig(batch_invariant=True), arch="sm_90").artifact.cubin[:4])
        print("roots", len(roots))
    """
    said = python(code, *([] if home is None else [home]))
    assert "ELF" in said
    assert f"roots {int(home is not None)}" in said
    assert ("used from memory" in said) == (home is not None)


@pytest.mark.parametrize("when", [0, 1, 2**33, 4e9, -1e9])
def test_file_times_of_any_clock_mean_nothing(filled, when):
    filled.put(artifact(f"clock {when}"))
    for path in (filled.root, *filled.root.rglob("*")):
        os.utime(path, (when, when))
    assert same(filled.get(KEY, TOOLCHAIN), ONE)
    assert len(evict.usage(filled)) == 2
    with filled.claim(KEY):
        filled.put(artifact(f"another clock {when}"))
    stale = evict.sweep(filled)
    assert entry(filled) not in stale
    assert not [path for path in stale if path.parent.name == "stage"]
    used = [entry for entry in evict.usage(filled) if entry.key != KEY]
    assert len(evict.surplus(used, 1)) == 2


# Odd locks


@pytest.mark.parametrize("thing", THINGS)
def test_a_lock_file_left_behind_holds_up_nobody(filled, thing, caplog):
    (filled.base / "locks").mkdir(exist_ok=True)
    THINGS[thing](filled.base / "locks" / f"{KEY}.lock")
    start = time.monotonic()
    with filled.claim(KEY):
        pass
    assert time.monotonic() - start < 1
    assert bool(caplog.records) == (thing in ("folder", "socket", "dangling link", "loop"))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EIO, errno.EINVAL])
def test_a_disk_without_locks_holds_up_nobody(
    log_of_compilations, store_dir, monkeypatch, code, caplog
):
    def flock(handle, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    before = len(os.listdir("/proc/self/fd"))
    start = time.monotonic()
    assert same(build(), BUILT)
    assert time.monotonic() - start < 2
    assert same(Store(store_dir).get(BUILT.manifest["key"], TOOLCHAIN), BUILT)
    assert "no lock at" in caplog.text
    assert len(os.listdir("/proc/self/fd")) == before


def test_locks_that_do_nothing_cost_time_only(log_of_compilations, store_dir, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda handle, how: None)
    assert race([lambda: same(build(), BUILT)] * 16) == [0] * 16
    assert len(log_of_compilations.read_text().splitlines()) > 1
    store = Store(store_dir)
    assert same(store.get(BUILT.manifest["key"], TOOLCHAIN), BUILT)
    assert not set_aside(store)
    assert not list(store.base.glob("stage/*"))


def test_a_lock_that_is_never_let_go_is_not_waited_for_forever(store, monkeypatch, caplog):
    monkeypatch.setattr(local, "LOCK_SECONDS", 0.2)
    start = time.monotonic()
    with store.claim(KEY), store.claim(KEY):
        assert 0.2 < time.monotonic() - start < 3
    assert "could not be acquired" in caplog.text


def test_a_lock_ends_with_its_claim_even_if_a_fork_lives_on(store):
    with store.claim(KEY):
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
    start = time.monotonic()
    try:
        with store.claim(KEY):
            assert time.monotonic() - start < 5
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# Another host


@pytest.fixture
def blind(monkeypatch):
    """Names that this host does not see, as after a negative lookup that it remembers."""
    hidden = []

    def hide(function):
        def looked_up(path, *args, **kwargs):
            if any(str(path).startswith(str(one)) for one in hidden):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            return function(path, *args, **kwargs)

        return looked_up

    for name in ("open", "stat", "lstat", "listdir"):
        monkeypatch.setattr(os, name, hide(getattr(os, name)))
    return hidden


def test_the_loser_that_does_not_see_the_winner_keeps_its_kernel(
    log_of_compilations, store_dir, blind, caplog
):
    store = Store(store_dir)
    store.put(BUILT)
    folder = store.entry(BUILT.manifest["key"], TOOLCHAIN)
    before = snapshot(folder)
    blind.append(folder)
    assert same(build(), BUILT)
    assert len(log_of_compilations.read_text().splitlines()) == 1
    blind.clear()
    assert snapshot(folder) == before
    assert same(build(), BUILT)
    assert len(log_of_compilations.read_text().splitlines()) == 1
    assert not caplog.records
    assert not list(store.base.glob("stage/*"))


def test_files_that_come_into_sight_late_are_never_lost(filled, monkeypatch):
    real, blind = os.open, [True]

    def late(path, flags, mode=0o777, *, dir_fd=None):
        if blind and path == "kernel.cubin":
            blind.pop()
            raise FileNotFoundError(errno.ENOENT, "not yet", path)
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", late)
    assert filled.get(KEY, TOOLCHAIN) is None
    assert same(filled.get(KEY, TOOLCHAIN), ONE)
    assert not set_aside(filled)


# Not the entry's fault


def test_running_out_of_handles_sets_nothing_aside(filled, caplog):
    def starved():
        low = len(os.listdir("/proc/self/fd"))
        for more in (0, 1, 2, 3):
            resource.setrlimit(resource.RLIMIT_NOFILE, (low + more, 4096))
            found = filled.get(KEY, TOOLCHAIN)
            if found is not None and not same(found, ONE):
                return False
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        return same(filled.get(KEY, TOOLCHAIN), ONE)

    assert forked(starved) == 0
    assert not set_aside(filled)
    assert same(filled.get(KEY, TOOLCHAIN), ONE)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("name", ["", *EVERY_FILE])
def test_what_cannot_be_read_is_reported_and_left(filled, monkeypatch, caplog, code, name):
    real = os.open
    target = name or str(entry(filled))

    def refuse(path, flags, mode=0o777, *, dir_fd=None):
        if str(path) == target:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, mode, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert filled.get(KEY, TOOLCHAIN) is None
        assert filled.get(KEY, TOOLCHAIN) is None
    assert len(caplog.records) == 1
    assert f"cannot read {entry(filled)}" in caplog.text
    assert not set_aside(filled)
    assert same(filled.get(KEY, TOOLCHAIN), ONE)


def test_an_entry_that_this_user_may_not_read_is_left_to_its_owner(filled, tmp_path):
    opened = [p for p in tmp_path.parents if p.owner() == tmp_path.owner() and p != Path("/")]
    modes = {path: path.stat().st_mode for path in (*opened, tmp_path)}
    for path in modes:
        path.chmod(0o755)
    (entry(filled) / "kernel.cubin").chmod(0o600 if os.geteuid() == 0 else 0)
    try:
        assert as_nobody(lambda: filled.get(KEY, TOOLCHAIN) is None) == 0
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
        (entry(filled) / "kernel.cubin").chmod(0o644)
    assert not set_aside(filled)


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("how", ["evicted", "replaced", "spoilt and replaced"])
def test_an_entry_that_goes_while_it_is_read_is_a_miss_or_whole(
    filled, monkeypatch, caplog, at, how
):
    real, reads = local._read, []

    def read(name, folder):
        if len(reads) == at:
            reads.append(name)
            if how == "spoilt and replaced":
                entry(filled).rename(filled.base / "elsewhere")
            else:
                evict.remove(filled, KEY, TOOLCHAIN)
            if how != "evicted":
                filled.put(ONE)
        reads.append(name)
        return real(name, folder)

    monkeypatch.setattr(local, "_read", read)
    found = filled.get(KEY, TOOLCHAIN)
    assert found is None or same(found, ONE)
    assert not caplog.records
    assert not set_aside(filled)
    assert same(filled.get(KEY, TOOLCHAIN), ONE) == (how != "evicted")


def test_a_good_entry_that_replaced_a_bad_one_in_time_goes_back(filled, monkeypatch):
    (entry(filled) / "kernel.cubin").write_bytes(b"")
    make = Store.make

    def slow_make(self, folder):
        make(self, folder)
        if folder.name == "bad" and entry(self).exists():
            shutil.rmtree(entry(self))
            Store(filled.root).put(ONE)

    monkeypatch.setattr(Store, "make", slow_make)
    assert filled.get(KEY, TOOLCHAIN) is None
    monkeypatch.setattr(Store, "make", make)
    assert same(filled.get(KEY, TOOLCHAIN), ONE)


def test_a_disk_that_cannot_sync_folders_is_good_enough(store, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    store.put(ONE)
    assert same(store.get(KEY, TOOLCHAIN), ONE)


def test_reading_leaves_no_handle_but_the_hold(filled):
    before = len(os.listdir("/proc/self/fd"))
    held = [filled.get(KEY, TOOLCHAIN) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    del held
    assert len(os.listdir("/proc/self/fd")) == before
