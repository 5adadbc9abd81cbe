"""What ``ssmgen doctor`` looks at. A probe adds to `facts` and notes what it finds as
``note(level, what, todo)``; it may raise, which is a finding too, and changes nothing."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import os
import platform
import re
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from .mounts import mount_of, nearest

if TYPE_CHECKING:
    from ..arch import Arch
    from ..store import Store

__all__ = ["Facts", "Note", "gpus", "hidden", "policy", "remote", "roots", "settings", "size_text",
           "versions"]  # fmt: skip

# A remote that takes longer for one small file is of no use to a server that starts.
REMOTE_SECONDS = 10.0
# Free space below this is worth a word: some thousand kernels.
LITTLE_SPACE = 256 << 20

Facts = dict[str, Any]
Note = Callable[..., None]


def versions(facts: Facts, note: Note) -> None:
    found: Facts = {"ssmgen": __version__, "python": platform.python_version()}
    facts["versions"] = found
    for name in ("torch", "triton", "jinja2", "filelock", "cuda-bindings", "fsspec"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    for name in ("torch", "jinja2", "filelock"):
        if found[name] is None:
            note("problem", f"{name} is not installed", f"pip install {name}")
    found["ptxas"] = None
    if found["triton"] is None:
        note(
            "note",
            "no Triton: nothing can be compiled here, kernels come from the stores alone",
            "to compile here, pip install triton; else fill a store elsewhere with ssmgen prewarm",
        )
        return
    try:
        import triton

        tools = triton.knobs.nvidia
        names = [name for name in ("ptxas", "ptxas_blackwell") if hasattr(tools, name)]
        found["ptxas"] = ", ".join(dict.fromkeys(getattr(tools, name).version for name in names))
    except Exception as error:
        note(
            "problem",
            f"Triton {found['triton']} or its ptxas does not start: {error}",
            "reinstall it: pip install --force-reinstall --no-deps triton",
        )


def gpus(facts: Facts, note: Note) -> None:
    import torch

    from ..arch import Arch
    from ..errors import DeviceError
    from ..families import names

    facts["driver"] = _driver()
    facts["gpus"] = gpus = []
    if not torch.cuda.is_available():
        devices = sorted(map(str, Path("/dev").glob("nvidia[0-9]*")))
        if devices:
            cpu_build = torch.version.cuda is None
            note(
                "problem",
                f"{devices[0]} is here, but torch {torch.__version__} sees no GPU",
                "install a CUDA build of torch"
                if cpu_build
                else "compare the driver (nvidia-smi) "
                f"with CUDA {torch.version.cuda}, and look at CUDA_VISIBLE_DEVICES",
            )
        else:
            note("ok", "no GPU: kernels can be rendered, compiled and interpreted here, not run")
        return
    if facts["versions"] and facts["versions"]["cuda-bindings"] is None:
        note("problem", "no cuda-bindings: nothing can be launched", "pip install 'ssmgen[cuda]'")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpu: Facts = {"name": properties.name, "memory": properties.total_memory, "arch": None}
        gpus.append(gpu)
        try:
            arch = Arch.detect(index)
        except DeviceError as error:
            note("problem", f"GPU {index}, {properties.name}: {error}", "use another GPU")
            continue
        gpu["arch"] = str(arch)
        gpu["measured"] = {family: _measured(family, arch, properties.name) for family in names()}
        for family, measured in gpu["measured"].items():
            if measured:
                note("ok", f"GPU {index}: {family} has a dispatch table measured on {arch}")
            else:
                note(
                    "note",
                    f"GPU {index}: {family} has no dispatch table for {arch}: plans are those of "
                    "a cost model, right but perhaps slower",
                    "nothing needs to be done; ssmgen tune measures better ones",
                )


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def _measured(family: str, arch: Arch, gpu: str) -> bool:
    from ..config import KernelConfig
    from ..plan import dispatch

    return "cost model" not in dispatch(KernelConfig(family=family), arch, gpu)[-1].why


def settings(facts: Facts, note: Note) -> None:
    from ..settings import VARIABLES, settings

    for name in sorted(os.environ):
        if name.startswith("SSMGEN_") and name not in VARIABLES:
            near = difflib.get_close_matches(name[7:], [known[7:] for known in VARIABLES], 1)
            note(
                "note",
                f"{name} is set, but there is no such setting",
                f"did you mean SSMGEN_{near[0]}?" if near else "unset it",
            )
    now = settings()
    facts["settings"] = {
        name: {"set": name in os.environ, "value": _plain(getattr(now, name[7:].lower()))}
        for name in VARIABLES
    }
    facts["settings"]["SSMGEN_JIT"]["value"] = "allow" if now.jit else "deny"
    for folder in now.tuned_path:
        if not folder.is_dir():
            note("note", f"{folder} is no folder of tables", "correct SSMGEN_TUNED_PATH")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return hidden(str(value)) if isinstance(value, (str, Path)) else value


def hidden(url: str) -> str:
    """A text with no user and password in its URLs: a report is there to be shown around."""
    return re.sub(r"//[^/@]+@", "//...@", url)


def policy(facts: Facts, note: Note) -> None:
    from .. import policy

    facts["policy"] = {"may_compile": policy.allowed()}
    if not policy.allowed():
        note(
            "note",
            "SSMGEN_JIT=deny: a kernel that is in no store is an error",
            "put all of them there with ssmgen prewarm, which compiles all the same",
        )


def roots(facts: Facts, note: Note) -> None:
    from ..store.layers import named

    facts["roots"] = roots = []
    for store in named():
        root: Facts = {"root": str(store.root), "origin": store.origin}
        roots.append(root)
        try:
            _look(store, root, note)
        except OSError as error:
            note("problem", f"{store.root}: {error.strerror or error}", "give it rights to read")
    if not roots or roots[0]["origin"] != "user":
        note(
            "note" if roots else "problem",
            "no user store: there is no home directory. What is compiled is lost with the process",
            "name a folder in SSMGEN_CACHE_DIR",
        )


def _look(store: Store, root: Facts, note: Note) -> None:
    from ..store.evict import usage
    from ..store.layers import refusal

    there = nearest(store.root)
    found = there.stat()
    mount = mount_of(there)
    root["exists"] = store.root.is_dir()
    root["owner"], root["mode"] = _owner(found.st_uid), f"{stat.S_IMODE(found.st_mode):o}"
    root["writable"] = os.access(there, os.W_OK | os.X_OK) and there.is_dir()
    root["mount"] = mount and {
        "point": mount.point,
        "kind": mount.kind,
        "options": sorted(mount.options),
        "network": mount.network,
    }
    root["free"] = shutil.disk_usage(there).free
    root["refused"] = why = refusal(store)
    root["entries"] = root["size"] = root["set_aside"] = 0
    if os.path.lexists(store.root) and not root["exists"]:
        note("problem", f"{store.root} is not a folder", "move it away")
        return
    if root["exists"]:
        os.listdir(store.root)  # a folder that may not be read is not an empty one
        entries = usage(store)
        root["entries"], root["size"] = len(entries), sum(entry.size for entry in entries)
        with contextlib.suppress(FileNotFoundError):
            root["set_aside"] = len(os.listdir(store.base / "bad"))
    if why is not None:
        what, _, todo = why.partition("; ")
        note("problem", f"{store.root} is not used: {what}", todo)
    elif store.origin != "user":
        if root["exists"]:
            note("ok", f"{store.root}: {root['entries']} entries, read-only")
        else:
            note("note", f"{store.root} does not exist", "nothing, or correct SSMGEN_CACHE_PATH")
    else:
        _look_at_own(store, root, found.st_uid, note)


def _look_at_own(store: Store, root: Facts, owner: int, note: Note) -> None:
    mount = mount_of(nearest(store.root))
    if not root["writable"]:
        why = "is on a read-only mount" if mount and mount.read_only else "cannot be written"
        note(
            "note",
            f"{store.root} {why}: what it lacks, each process compiles anew",
            "fill it with ssmgen prewarm as its owner, or name another folder in SSMGEN_CACHE_DIR",
        )
        return
    note("ok", f"{store.root}: {root['entries']} entries, {size_text(root['size'])}, writable")
    if root["exists"] and owner != os.geteuid():
        note(
            "note",
            f"{store.root} belongs to {root['owner']}: that user can replace every kernel in it",
            "use a store of your own, or list this one in SSMGEN_CACHE_PATH to read it only",
        )
    if root["set_aside"]:
        note(
            "note",
            f"{store.base / 'bad'} holds {root['set_aside']} bad entries that were set aside",
            "if they grow in number, test the disk; ssmgen cache gc deletes them after a day",
        )
    if root["free"] < LITTLE_SPACE:
        note("note", f"{store.root}: {size_text(root['free'])} free", "make room: ssmgen cache gc")
    if mount is None:
        return
    if mount.network:
        note(
            "note",
            f"{store.root} is on a network filesystem ({mount.kind}): locks may not reach other "
            "hosts, so two may compile one kernel (never a wrong one); eviction sees only what "
            "processes of this host have open",
            "SSMGEN_CACHE_SIZE=0 on all hosts but one; or a local user store, with this one in "
            "SSMGEN_CACHE_PATH",
        )
    if mount.noatime:
        note(
            "note",
            f"{mount.point} is mounted noatime: eviction goes by when a kernel was made, not by "
            "when it was last used",
            "mount it relatime, or pin what must stay: ssmgen cache pin",
        )
    if mount.memory:
        note(
            "note",
            f"{store.root} is in memory ({mount.kind}): it is empty after a restart",
            "name a folder on a disk in SSMGEN_CACHE_DIR if kernels are to last",
        )


def _owner(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def remote(facts: Facts, note: Note) -> None:
    from ..store.layers import remote

    far = remote()
    if far is None:
        return
    url = hidden(far.url)
    facts["remote"] = {"url": url, "answers": False}
    answer: list[Exception | bool] = []
    thread = threading.Thread(target=lambda: answer.append(_ask(far.url)), daemon=True)
    thread.start()
    thread.join(REMOTE_SECONDS)
    said = answer[0] if answer else TimeoutError(f"silent for {REMOTE_SECONDS:g} s")
    if isinstance(said, Exception):
        note(
            "problem",
            f"the remote store {url} does not answer: {type(said).__name__}: {said}",
            "look at address, network and credentials, or unset SSMGEN_CACHE_REMOTE",
        )
        return
    facts["remote"]["answers"] = True
    if said:
        note("ok", f"the remote store {url} answers")
    else:
        note(
            "note",
            f"the remote store {url} answers that nothing is there",
            "look at the address, or copy a store there",
        )


def _ask(url: str) -> Exception | bool:
    """Whether there is something at a URL, or what went wrong. Asks first as a miss does."""
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
        with contextlib.suppress(FileNotFoundError):
            path = f"{root.rstrip('/')}/v1/00/{'0' * 64}/doctor/manifest.json"
            files.cat_file(path, 0, 1)
        return files.exists(root)
    except Exception as error:
        return error


def size_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
