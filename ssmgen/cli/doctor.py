"""``ssmgen doctor``: what is here, what is wrong with it, what to do about it.

Probes run one after the other, and none stops the next: what one raises is a finding. Nothing is
written but a temporary store beside the user store, or in the temporary folder if that cannot be.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._version import __version__
from .mounts import mount_of, nearest

if TYPE_CHECKING:
    from ..arch import Arch
    from ..artifact import Artifact
    from ..plan import Plan
    from ..store import Store
    from .trial import Trial

__all__ = ["doctor", "examine"]

# A remote that takes longer for one small file is of no use to a server that starts.
REMOTE_SECONDS = 10.0
# Free space below this is worth a word: some thousand kernels.
LITTLE_SPACE = 256 << 20

Facts = dict[str, Any]
Note = Callable[..., None]


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Look at this installation and say what to do about what is found.

    1. Versions, GPUs and driver, settings (and variables that look like settings), policy.

    2. Every store in the order it is asked: owner, mode, kind of mount, entries, size, free space.

    3. A round trip: render, compile, publish to a temporary store beside the user store, read back,
    verify; with a GPU also load, launch and compare with fp64. The user store is not changed.

    A finding is ok, a note, or a problem. Exits with 1 if there is a problem.

        ssmgen doctor

        ssmgen doctor --json | jq .findings
    """
    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _show(report)
    if not report["ok"]:
        raise typer.Exit(1)


def examine() -> Facts:
    """All facts and findings. Whatever is broken, it returns."""
    facts: Facts = {}
    findings: list[dict[str, str]] = []

    def note(level: str, what: str, todo: str = "") -> None:
        finding = {"level": level, "what": what, "todo": todo}
        if finding not in findings:
            findings.append(finding)

    for name, probe in PROBES.items():
        facts[name] = None
        if name in NEED_SETTINGS and facts["settings"] is None:
            continue
        try:
            # That a variable is unknown is logged too; the probe says it better.
            with _overheard(note if name != "settings" else lambda *_: None):
                probe(facts, note)
        except Exception as error:
            kind = (
                "" if type(error).__module__.startswith("ssmgen") else f"{type(error).__name__}: "
            )
            note("problem", f"{name.replace('_', ' ')}: {kind}{error}", TODO.get(name, ""))
    ok = all(finding["level"] != "problem" for finding in findings)
    return {**facts, "findings": findings, "ok": ok}


@contextlib.contextmanager
def _overheard(note: Note) -> Iterator[None]:
    """What is logged or warned about meanwhile becomes a note."""
    log = logging.getLogger("ssmgen")

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note("note", record.getMessage())

    ear, propagate = Ear(logging.WARNING), log.propagate
    log.addHandler(ear)
    log.propagate = False
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    finally:
        log.removeHandler(ear)
        log.propagate = propagate
        for warning in warned:
            if not issubclass(warning.category, DeprecationWarning):
                note("note", str(warning.message))


# Probes


def _versions(facts: Facts, note: Note) -> None:
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


def _gpus(facts: Facts, note: Note) -> None:
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
        gpu["measured"] = {family: _measured(family, arch) for family in names()}
        for family, measured in gpu["measured"].items():
            if measured:
                note("ok", f"GPU {index}: {family} has a dispatch table measured on {arch}")
            else:
                note(
                    "note",
                    f"GPU {index}: {family} has no dispatch table for {arch}: plans are the "
                    "default ones, right but perhaps slower",
                    "nothing needs to be done; force another algorithm in the config to compare",
                )


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def _measured(family: str, arch: Arch) -> bool:
    from ..config import KernelConfig
    from ..plan import dispatch

    return "table default/" not in dispatch(KernelConfig(family=family), arch)[-1].why


def _settings(facts: Facts, note: Note) -> None:
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


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return _hidden(str(value)) if isinstance(value, (str, Path)) else value


def _hidden(url: str) -> str:
    """Without user and password: a report is there to be shown around."""
    return re.sub(r"//[^/@]+@", "//...@", url)


def _policy(facts: Facts, note: Note) -> None:
    from .. import policy

    facts["policy"] = {"may_compile": policy.allowed()}
    if not policy.allowed():
        note(
            "note",
            "SSMGEN_JIT=deny: a kernel that is in no store is an error",
            "put all of them there with ssmgen prewarm, where SSMGEN_JIT=allow",
        )


def _roots(facts: Facts, note: Note) -> None:
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
    note("ok", f"{store.root}: {root['entries']} entries, {_size(root['size'])}, writable")
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
        note("note", f"{store.root}: {_size(root['free'])} free", "make room: ssmgen cache gc")
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


def _remote(facts: Facts, note: Note) -> None:
    from ..store.layers import remote

    far = remote()
    if far is None:
        return
    url = _hidden(far.url)
    facts["remote"] = {"url": url, "answers": False}
    answer: list[Exception | bool] = []
    thread = threading.Thread(target=lambda: answer.append(_ask(far.url)), daemon=True)
    thread.start()
    thread.join(REMOTE_SECONDS)
    said = answer[0] if answer else TimeoutError(f"silent for {REMOTE_SECONDS:g} s")
    if isinstance(said, Exception):
        note(
            "problem",
            f"the remote store {url} does not answer: {type(said).__name__}: {_hidden(str(said))}",
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
            files.open(path, "rb").close()
        return files.exists(root)
    except Exception as error:
        return error


def _round_trip(facts: Facts, note: Note) -> None:
    from ..arch import Arch

    may_compile = facts["policy"]["may_compile"]
    if not may_compile or facts["versions"]["triton"] is None:
        entries = sum(
            root.get("entries", 0) for root in facts["roots"] or () if not root["refused"]
        )
        cause = "SSMGEN_JIT=deny" if not may_compile else "there is no Triton"
        if entries or facts["remote"]:
            note("note", f"no round trip was tried: {cause}")
        else:
            note(
                "problem",
                f"{cause}, and no store has a kernel: none can be had",
                "fill a store with ssmgen prewarm and name it in SSMGEN_CACHE_PATH",
            )
        return
    gpu = next((gpu for gpu in facts["gpus"] or () if gpu["arch"]), None)
    steps: Facts = {"arch": gpu["arch"] if gpu else "sm_90", "milliseconds": {}}
    facts["round_trip"] = steps
    place = _place(facts["roots"] or [], note)
    with tempfile.TemporaryDirectory(
        prefix=".ssmgen-doctor-", dir=place, ignore_cleanup_errors=True
    ) as folder:
        _travel(Arch.of(steps["arch"]), gpu is not None, Path(folder), steps)
    done = ", ".join(f"{name} {ms:.1f} ms" for name, ms in steps["milliseconds"].items())
    note("ok", f"round trip for {steps['arch']}: {done}")


def _place(roots: list[Facts], note: Note) -> str | None:
    """A folder on the filesystem of the user store, outside it; None is the temporary folder."""
    if not roots or roots[0]["origin"] != "user":
        return None
    root = Path(roots[0]["root"])
    beside = nearest(root.parent)
    if os.access(beside, os.W_OK | os.X_OK) and beside.stat().st_dev == nearest(root).stat().st_dev:
        return str(beside)
    note(
        "note",
        f"the round trip was made in {tempfile.gettempdir()}: nothing can be written beside {root} "
        "on the same filesystem, and nothing is written into it",
    )
    return None


def _travel(arch: Arch, gpu: bool, folder: Path, steps: Facts) -> None:
    from .. import compiler
    from ..families import spec
    from ..families.ssu import SsuConfig
    from ..plan import dispatch
    from ..store import Store
    from ..template import key, render

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        steps["milliseconds"][name] = round((time.perf_counter() - start) * 1e3, 1)

    config = SsuConfig(state_dtype="fp16", rounding="stochastic")
    trial = None
    if gpu:
        from .trial import Trial

        trial = Trial(config, batch=8, nheads=8, ngroups=1, device="cuda")
        config = spec("ssu").layout(**trial.arguments(0)).config  # type: ignore[assignment]
    plan = dispatch(config, arch)[-1].plan
    with timed("render"):
        render(config, plan, arch)
    with timed("compile"):
        artifact = compiler.compile(config, plan, arch)
    wanted, toolchain = key(config, plan, arch), artifact.manifest["toolchain"]
    with timed("publish"):
        Store(folder / "store").put(artifact)
    with timed("read back"):
        found = Store(folder / "store", writable=False).get(wanted, toolchain)
    if found is None or found.contents() != artifact.contents():
        raise RuntimeError(f"what was published in {folder} does not read back as it was")
    if trial is not None:
        with timed("launch"):
            _launch(found, plan, trial, steps)


def _launch(artifact: Artifact, plan: Plan, trial: Trial, steps: Facts) -> None:
    import torch

    from ..families import spec
    from ..launcher import Launch, load

    arguments = trial.arguments(0)
    family = spec(trial.config.family)
    layout = family.layout(**arguments)
    grid = family.grid(layout.config, plan, layout.batch, layout.nheads)
    function = load(artifact, torch.cuda.current_device())
    launch = Launch(function, grid, layout.scalars, False)
    addresses = [arguments[name].data_ptr() for name in layout.tensors]
    verdict = trial.judge(lambda: launch(torch.cuda.current_stream().cuda_stream, *addresses))
    steps["share_of_allowed_error"] = round(verdict.share, 3)
    if verdict.wrong:
        raise RuntimeError(f"the kernel ran and is wrong: {'; '.join(verdict.wrong)}")


PROBES: dict[str, Callable[[Facts, Note], None]] = {
    "versions": _versions,
    "gpus": _gpus,
    "settings": _settings,
    "policy": _policy,
    "roots": _roots,
    "remote": _remote,
    "round_trip": _round_trip,
}
NEED_SETTINGS = ("policy", "roots", "remote", "round_trip")
TODO = {
    "gpus": "look at the installation of torch and the driver",
    "settings": "correct the variable, or unset it",
    "remote": "correct SSMGEN_CACHE_REMOTE, or unset it",
    "round_trip": "kernels that are in a store still serve; see the cause above",
}


# What people read


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _show(report: Facts) -> None:
    def head(title: str) -> None:
        typer.secho(f"\n{title}", bold=True)

    typer.secho("Versions", bold=True)
    versions = report["versions"] or {}
    typer.echo("  " + ", ".join(f"{name} {version or '-'}" for name, version in versions.items()))
    head("GPUs")
    for gpu in report["gpus"] or ():
        typer.echo(f"  {gpu['name']}, {gpu['arch'] or 'unknown'}, {_size(gpu['memory'])}")
    typer.echo(f"  driver {report['driver']}" if report.get("driver") else "  no driver")
    head("Settings")
    for name, setting in (report["settings"] or {}).items():
        typer.echo(f"  {name}={setting['value']}{'' if setting['set'] else ' (default)'}")
    head("Stores, in the order they are asked")
    for root in report["roots"] or ():
        typer.echo(f"  {root['root']} ({root['origin']})")
        if "set_aside" in root:
            mount = root["mount"]
            where = f"{mount['kind']} {','.join(mount['options'])}" if mount else "unknown mount"
            state = "used" if root["refused"] is None else "refused"
            typer.echo(
                f"    {state if root['exists'] else 'absent'}, owner {root['owner']}, mode "
                f"{root['mode']}, {'writable' if root['writable'] else 'not writable'}, {where}; "
                f"{root['entries']} entries, {_size(root['size'])}, {_size(root['free'])} free"
            )
    if report["remote"]:
        typer.echo(f"  {report['remote']['url']} (remote)")
    head("Findings")
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in report["findings"]:
        level = typer.style(f"{finding['level']:<8}", fg=colours[finding["level"]], bold=True)
        typer.echo(f"  {level} {finding['what']}")
        if finding["todo"]:
            typer.echo(f"           {finding['todo']}")
