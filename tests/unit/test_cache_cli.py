"""`ssmgen cache`: what it says is so, what it removes may go, and its exit codes can be used."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import click
import pytest
import typer
from artifacts import artifact, compiled, snapshot
from typer.testing import CliRunner

from ssmgen import Arch, KernelConfig, compiler, kernel
from ssmgen.cli.cache import app
from ssmgen.cli.why import differences
from ssmgen.errors import StoreError
from ssmgen.plan import dispatch
from ssmgen.policy import prewarm_command
from ssmgen.store import Store, evict, layers
from ssmgen.store.local import MAX_FILE
from ssmgen.template import factors, key

SM_90, SM_80 = Arch.of("sm_90"), Arch.of("sm_80")
CONFIG, OTHER = KernelConfig(), KernelConfig(state_dtype="fp16", has_z=True)
# No other process on this machine holds an entry of it open.
TOOLCHAIN = "triton-3.6.0+tests"


def run(*arguments, input=None, exit=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=input)
    assert result.exit_code == exit, result.output
    assert exit == 0 or isinstance(result.exception, SystemExit), result.exception
    return result


def report(*arguments, exit=0):
    """What a command says as JSON; nothing else is on standard output."""
    return json.loads(run(*arguments, "--json", exit=exit).stdout)


def plans(config, arch=SM_90):
    return list(dict.fromkeys(choice.plan for choice in dispatch(config, arch)))


def keys(config, arch=SM_90):
    return [key(config, plan, arch) for plan in plans(config, arch)]


def fill(store, config, arch=SM_90, toolchain=TOOLCHAIN):
    for plan in plans(config, arch):
        store.put(compiled(config, plan, arch, toolchain))


def spoil(store, name, toolchain=TOOLCHAIN):
    (store.entry(name, toolchain) / "kernel.cubin").write_bytes(b"\x7fELF")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compiler, "toolchain", lambda: TOOLCHAIN)


@pytest.fixture
def own(store_dir):
    return Store(store_dir)


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    root = tmp_path / "theirs"
    monkeypatch.setenv("SSMGEN_CACHE_PATH", str(root))
    return Store(root, writable=False, origin="path"), Store(root)


# path


def test_path_shows_every_layer_in_the_order_they_are_asked(own, theirs, monkeypatch):
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", "memory://kernels")
    fill(own, CONFIG)
    rows = report("path")
    assert [(row["origin"], row["root"]) for row in rows] == [
        ("user", str(own.root)), ("path", str(theirs[0].root)), ("remote", "memory://kernels"),
    ]  # fmt: skip
    assert [row["exists"] for row in rows] == [True, False, None]
    assert [row["writable"] for row in rows] == [True, False, False]
    assert [row["entries"] for row in rows] == [len(plans(CONFIG)), 0, None]
    text = run("path").stdout
    assert text.index(str(own.root)) < text.index(str(theirs[0].root)) < text.index("memory://")


def test_path_says_which_layer_is_refused_and_why(own, theirs):
    own.make(own.base)
    own.root.chmod(0o777)
    rows = report("path", exit=1)
    assert "everyone may write" in rows[0]["refused"]
    assert rows[1]["refused"] is None
    assert "is not used: everyone may write" in run("path", exit=1).stdout


def test_path_knows_a_root_that_cannot_be_made(monkeypatch):
    monkeypatch.setenv("SSMGEN_CACHE_DIR", "/dev/null/store")
    assert report("path")[0]["writable"] is False


# ls


def test_ls_lists_the_entries_of_every_layer(own, theirs):
    fill(own, CONFIG)
    fill(theirs[1], OTHER, toolchain="triton-3.5.0")
    rows = report("ls")
    assert {r["key"] for r in rows} == {*keys(CONFIG), *keys(OTHER)}
    found = next(r for r in rows if r["key"] == keys(OTHER)[0])
    assert (found["arch"], found["family"], found["state_dtype"], found["origin"]) == (
        "sm_90", "ssu", "fp16", "path"
    )  # fmt: skip
    assert found["plan"] == plans(OTHER)[0].fields()
    assert (found["registers"], found["spills"], found["stays"]) == (78, 0, None)
    folder = theirs[0].entry(found["key"], "triton-3.5.0")
    assert found["size"] == sum(path.stat().st_size for path in folder.iterdir())
    lines = run("ls").stdout.splitlines()
    assert len(lines) == 1 + len(rows)
    assert all(re.match(r"[0-9a-f]{12}  sm_90 +ssu +\w+ \d+x\d+ ", line) for line in lines[1:])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--arch", "sm_80"], keys(CONFIG, SM_80)),
        (["--arch", "9.0", "--toolchain", "triton-3.5.0"], keys(OTHER)),
        (["--toolchain", TOOLCHAIN], [*keys(CONFIG), *keys(CONFIG, SM_80)]),
        (["--arch", "sm_80", "--arch", "sm_90", "--family", "ssu"],
         [*keys(CONFIG), *keys(CONFIG, SM_80), *keys(OTHER)]),
    ],
)  # fmt: skip
def test_ls_filters(options, wanted, own):
    fill(own, CONFIG)
    fill(own, CONFIG, SM_80)
    fill(own, OTHER, toolchain="triton-3.5.0")
    assert {r["key"] for r in report("ls", *options)} == set(wanted)


def test_ls_of_nothing(own):
    assert report("ls") == []
    assert run("ls").stdout == ""
    assert report("ls", "--family", "none", exit=1) == []
    assert "no kernel in the stores matches" in run("ls", "--family", "none", exit=1).stderr
    run("ls", "--arch", "sm_1", exit=2)


def test_ls_shows_a_bad_entry_and_leaves_it(own):
    fill(own, CONFIG)
    spoil(own, keys(CONFIG)[0])
    before = snapshot(own.root)
    (bad,) = [r for r in report("ls") if r["fault"]]
    assert bad["key"] == keys(CONFIG)[0]
    assert "kernel.cubin" in bad["fault"]
    assert re.search(r"^[0-9a-f]{12} .* bad: kernel.cubin: ", run("ls").stdout, re.M)
    assert snapshot(own.root) == before


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["show", keys(CONFIG)[0]]])
def test_looking_is_no_use(command, own):
    """An entry that is only looked at goes as early as before."""
    fill(own, CONFIG)
    for file in own.root.rglob("*.*"):
        os.utime(file, (1000, 1000))
    before = [entry.used for entry in evict.usage(own)]
    run(*command)
    assert [entry.used for entry in evict.usage(own)] == before == [1000] * len(before)


def test_what_is_pinned_or_in_use_says_so(own):
    fill(own, CONFIG)
    evict.pin(own, keys(CONFIG)[0])
    used = own.get(keys(CONFIG)[1], TOOLCHAIN)
    assert {r["key"]: r["stays"] for r in report("ls")} == {
        **dict.fromkeys(keys(CONFIG)), keys(CONFIG)[0]: "pinned", keys(CONFIG)[1]: "in use",
    }  # fmt: skip
    assert used


def test_a_manifest_cannot_write_to_the_terminal(own):
    own.put(
        artifact(
            factors={"abi": 1, "arch": "\x1b[2J", "config": {"family": "a\nb"}}, entry="\x1b]0;"
        )
    )
    shown = run("ls").stdout + run("show", report("ls")[0]["key"]).stdout
    assert "\x1b" not in shown
    assert r"\x1b[2J" in shown
    assert r"a\nb" in shown


# show


def test_show_by_a_few_digits(own, theirs):
    fill(own, CONFIG)
    fill(theirs[1], CONFIG, toolchain="triton-3.5.0")
    first = keys(CONFIG)[0]
    rows = report("show", first[:8])
    assert [row["toolchain"] for row in rows] == [TOOLCHAIN, "triton-3.5.0"]
    assert rows[0]["manifest"] == own.get(first, TOOLCHAIN).manifest
    assert rows[0]["path"] == str(own.entry(first, TOOLCHAIN))
    assert "source" not in rows[0]
    text = run("show", first[:8]).stdout
    assert str(own.entry(first, TOOLCHAIN)) in text
    assert str(plans(CONFIG)[0]) in text
    assert "registers 78" in text


@pytest.mark.parametrize("form", ["inline", "file", "stdin"])
def test_show_of_a_config_shows_each_of_its_kernels(form, own, tmp_path):
    fill(own, OTHER)
    fill(own, CONFIG)
    argument = {"inline": OTHER.to_json(), "stdin": "-"}.get(form, str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text(OTHER.to_json())
    input = OTHER.to_json() if form == "stdin" else None
    result = run("show", argument, "--arch", "sm_90", "--json", input=input)
    assert [row["key"] for row in json.loads(result.stdout)] == keys(OTHER)


def test_show_source_is_the_source_alone(own):
    one = artifact("one")
    for toolchain in ("triton-1", "triton-2"):
        own.put(artifact("one", toolchain=toolchain))
    assert run("show", one.manifest["key"], "--source").stdout == one.source
    rows = report("show", one.manifest["key"], "--source")
    assert [row["source"] for row in rows] == [one.source] * 2


def test_a_bad_entry_is_shown_and_is_an_error(own):
    fill(own, CONFIG)
    spoil(own, keys(CONFIG)[0])
    (row,) = report("show", keys(CONFIG)[0], exit=1)
    assert row["manifest"] is None
    assert "kernel.cubin" in row["fault"]
    assert "bad entry" in run("show", keys(CONFIG)[0], exit=1).stderr


def alike():
    """Two artifacts whose keys begin with the same digit."""
    seen = {}
    for i in range(100):
        one = artifact(str(i))
        other = seen.setdefault(one.manifest["key"][0], one)
        if other is not one:
            return other, one
    raise AssertionError


@pytest.mark.parametrize("command", ["show", "pin", "why"])
def test_unknown_and_ambiguous_keys_are_told_apart(command, own):
    a, b = alike()
    own.put(a)
    own.put(b)
    more = [a.manifest["key"]] if command == "why" else []
    error = run(command, a.manifest["key"][0], *more, exit=2).stderr
    assert "begins 2 keys" in error
    assert a.manifest["key"][:16] in re.sub(r"[│\s]+", "", error)
    unknown = next(d for d in "0123456789abcdef" if d not in (a.manifest["key"][0],))
    assert f"begins with {unknown}" in run(command, unknown, *more, exit=1).stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["show", '{"dim": 81}', "--arch", "sm_90"], "dim: 81"),
        (["show", "{", "--arch", "sm_90"], "not JSON"),
        (["why", "no-such.json", "--arch", "sm_90"], "no-such.json"),
        (["why", "{}", "--arch", "sm_1"], "sm_1"),
        (["why", "{}"], "name an architecture, e.g. --arch sm_90"),
        (["pin", "no-key"], "no-key: No such file"),
        (["why", "abc"], "two keys"),
        (["pin", "--remove"], "--remove needs"),
        (["import", "x.tar", "--signer", "me"], "--signers"),
        (["export", "x.zip"], ".tar"),
        (["clear", "--json"], "--yes"),
        (["gc", "--size", "many"], "many"),
        (["gc", "--size", ""], "not a size"),
    ],
)
def test_wrong_calls_are_named(arguments, named, own):
    assert named in " ".join(run(*arguments, exit=2).stderr.replace("│", " ").split())


# why A B


def test_why_names_every_factor_by_which_two_keys_differ(own):
    fill(own, CONFIG)
    fill(own, OTHER, toolchain="triton-3.5.0")
    a, b = keys(CONFIG)[-1], keys(OTHER)[-1]
    found = report("why", a[:10], b[:10])
    assert found["a"] == {"key": a, "toolchains": [TOOLCHAIN]}
    assert found["b"] == {"key": b, "toolchains": ["triton-3.5.0"]}
    rows = {row["factor"]: row for row in found["differences"]}
    assert rows["config.state_dtype"] == {
        "factor": "config.state_dtype", "a": "fp32", "b": "fp16"
    }  # fmt: skip
    assert (rows["config.has_z"]["a"], rows["config.has_z"]["b"]) == (False, True)
    assert "a" not in rows["arguments.z"]
    assert not {"arch", "abi", "templates"} & set(rows)
    lines = run("why", a, b).stdout.splitlines()
    assert any(re.fullmatch(r"config\.state_dtype +fp32 +fp16", line) for line in lines)


def test_why_compares_a_key_with_a_config_that_is_nowhere(own):
    fill(own, CONFIG)
    found = report("why", keys(CONFIG)[-1], CONFIG.replace(dim=128).to_json(), "--arch", "sm_90")
    assert {"config.dim"} <= {row["factor"] for row in found["differences"]}
    assert found["b"]["key"] == keys(CONFIG.replace(dim=128))[-1]


def test_why_of_one_key_twice_says_that_it_is_one(own):
    fill(own, CONFIG)
    found = report("why", keys(CONFIG)[-1], CONFIG.to_json(), "--arch", "sm_90")
    assert found["same"]
    assert found["differences"] == []
    assert "the same kernel" in run("why", keys(CONFIG)[-1], keys(CONFIG)[-1]).stdout


def test_why_reads_a_key_from_its_good_entry(own):
    a, b = keys(CONFIG)[:2]
    fill(own, CONFIG)
    fill(own, CONFIG, toolchain="triton-3.5.0")
    for toolchain in (TOOLCHAIN, "triton-3.5.0"):
        spoil(own, a, toolchain)
        if toolchain == TOOLCHAIN:
            assert report("why", a, b)["differences"] != []
    assert "bad entry" in run("why", a, b, exit=1).stderr


def test_differences_are_empty_only_for_equal_factors():
    a, b = (factors(CONFIG, plan, SM_90) for plan in plans(CONFIG)[:2])
    assert differences(a, a) == []
    for other in (
        b,
        {**a, "arguments": a["arguments"][::-1]},
        {**a, "arguments": a["arguments"][:-1]},
        {**a, "context": {}},
        {k: v for k, v in a.items() if k != "context"},
        {**a, "new": {}},
        {**a, "schema": None},
    ):
        assert differences(a, other) != []
        assert differences(other, a) != []


# why CONFIG


def why(config=CONFIG, exit=0):
    """Outcomes and layers of each plan, checked against what `kernel.build` would do."""
    found = report("why", config.to_json(), "--arch", "sm_90", exit=exit)
    assert [p["key"] for p in found["plans"]] == keys(config)
    assert found["command"] == prewarm_command(config, SM_90)
    return found["plans"]


def states(plan):
    return [layer["state"] for layer in plan["layers"]]


def test_why_finds_a_hit_in_the_first_layer_that_has_it(own, theirs):
    fill(theirs[1], CONFIG)
    for plan in why():
        assert plan["outcome"] == "hit"
        assert plan["served_by"] == {
            "root": str(theirs[0].root), "origin": "path", "toolchain": TOOLCHAIN
        }  # fmt: skip
        assert states(plan) == ["absent", "hit"]
    fill(own, CONFIG)
    assert {plan["served_by"]["origin"] for plan in why()} == {"user"}
    text = run("why", CONFIG.to_json(), "--arch", "sm_90").stdout
    assert f"hit: {own.root} (user), by {TOOLCHAIN}" in text
    assert "prewarm" not in text


def test_why_says_how_a_missing_kernel_stands_in_each_layer(own, tmp_path, monkeypatch):
    roots = [tmp_path / name for name in ("older", "open", "bad", "none")]
    monkeypatch.setenv("SSMGEN_CACHE_PATH", os.pathsep.join(map(str, roots)))
    fill(Store(roots[0]), CONFIG, toolchain="triton-3.5.0")
    fill(Store(roots[1]), CONFIG)
    roots[1].chmod(0o777)
    fill(Store(roots[2]), CONFIG)
    for name in keys(CONFIG):
        spoil(Store(roots[2]), name)
    for plan in why(exit=1):
        assert plan["outcome"] == "compile"
        assert plan["served_by"] is None
        assert states(plan) == ["absent", "other toolchain", "refused", "bad", "absent"]
        assert plan["layers"][1]["detail"] == "triton-3.5.0"
        assert "may write" in plan["layers"][2]["detail"]
        assert "kernel.cubin" in plan["layers"][3]["detail"]
    text = run("why", CONFIG.to_json(), "--arch", "sm_90", exit=1).stdout
    assert f"{TOOLCHAIN} would compile it" in text
    assert f"\n  {prewarm_command(CONFIG, SM_90)}\n" in text
    assert f"{roots[1]} (path): refused: everyone may write" in text


def test_why_names_the_nearest_entry_and_what_differs(own):
    fill(own, CONFIG)
    fill(own, CONFIG, SM_80)
    wanted = CONFIG.replace(dt_softplus=False)
    for plan, name in zip(why(wanted, exit=1), keys(CONFIG)):
        assert plan["nearest"]["key"] == name
        assert plan["nearest"]["differences"] == [
            {"factor": "config.dt_softplus", "a": False, "b": True}
        ]
    text = run("why", wanted.to_json(), "--arch", "sm_90", exit=1).stdout
    assert "config.dt_softplus: False, there True" in text


def test_why_under_deny_takes_another_toolchain_or_is_an_error(own, monkeypatch):
    monkeypatch.setenv("SSMGEN_JIT", "deny")
    fill(own, CONFIG, toolchain="triton-3.5.0")
    for plan in why():
        assert plan["outcome"] == "other toolchain"
        assert plan["served_by"]["toolchain"] == "triton-3.5.0"
    assert {plan["outcome"] for plan in why(OTHER, exit=1)} == {"error"}
    text = run("why", OTHER.to_json(), "--arch", "sm_90", exit=1).stdout
    assert "SSMGEN_JIT=deny" in text
    monkeypatch.delenv("SSMGEN_JIT")
    assert {plan["outcome"] for plan in why(exit=1)} == {"compile"}
    monkeypatch.setattr(compiler, "toolchain", lambda: None)
    assert {plan["outcome"] for plan in why()} == {"other toolchain"}


def test_why_asks_the_remote_and_keeps_nothing(own, tmp_path, monkeypatch):
    fill(Store(tmp_path / "far"), CONFIG)
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", f"file://{tmp_path / 'far'}")
    assert {plan["served_by"]["origin"] for plan in why()} == {"remote"}
    assert not own.root.exists()


def test_why_asks_the_remote_for_another_toolchain_under_deny(own, tmp_path, monkeypatch):
    fill(Store(tmp_path / "far"), CONFIG, toolchain="triton-3.5.0")
    monkeypatch.setenv("SSMGEN_CACHE_REMOTE", f"file://{tmp_path / 'far'}")
    assert {plan["outcome"] for plan in why(exit=1)} == {"compile"}
    monkeypatch.setenv("SSMGEN_JIT", "deny")
    for plan in why():
        assert plan["outcome"] == "other toolchain"
        assert plan["served_by"]["origin"] == "remote"


def test_the_nearest_entry_is_a_good_one_of_another_key(own):
    fill(own, CONFIG, toolchain="triton-3.5.0")
    for plan in why(exit=1):
        assert plan["nearest"]["key"] in set(keys(CONFIG)) - {plan["key"]}
    for name in keys(CONFIG):
        spoil(own, name, "triton-3.5.0")
    assert {plan["nearest"] for plan in why(OTHER, exit=1)} == {None}


@pytest.mark.parametrize("jit", ["allow", "deny"])
@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("toolchain", [TOOLCHAIN, "triton-3.5.0", None])
def test_why_says_what_get_kernel_does(jit, spoilt, toolchain, own, theirs, monkeypatch):
    monkeypatch.setenv("SSMGEN_JIT", jit)
    if toolchain:
        fill(theirs[1], CONFIG, toolchain=toolchain)
        if spoilt:
            spoil(theirs[1], keys(CONFIG)[0], toolchain)
    done = []
    monkeypatch.setattr(compiler, "compile", lambda *a: done.append(a) or compiled(*a, TOOLCHAIN))
    plan = why(exit=spoilt or (toolchain != TOOLCHAIN and (jit == "allow" or not toolchain)))[0]
    if plan["outcome"] == "error":
        with pytest.raises(StoreError):
            kernel.build(CONFIG, plans(CONFIG)[0], SM_90)
        return
    built = kernel.build(CONFIG, plans(CONFIG)[0], SM_90).manifest["toolchain"]
    assert (plan["outcome"] == "compile") == bool(done)
    assert done or plan["served_by"]["toolchain"] == built


# verify


def test_verify_finds_a_bad_entry_in_any_layer(own, theirs):
    fill(own, CONFIG)
    fill(theirs[1], OTHER)
    assert report("verify") == {"checked": len(keys(CONFIG)) + len(keys(OTHER)), "bad": []}
    spoil(theirs[1], keys(OTHER)[0])
    before = snapshot(own.root), snapshot(theirs[1].root)
    found = report("verify", exit=1)
    assert found["bad"] == [
        {
            "path": str(theirs[0].entry(keys(OTHER)[0], TOOLCHAIN)),
            "fault": found["bad"][0]["fault"],
            "repaired": False,
        }
    ]
    assert "kernel.cubin" in found["bad"][0]["fault"]
    assert "1 bad" in run("verify", exit=1).stdout
    assert report("verify", "--repair", exit=1) == found
    assert (snapshot(own.root), snapshot(theirs[1].root)) == before


@pytest.mark.parametrize("name", ["manifest.json", "kernel.cubin", "source.py"])
@pytest.mark.parametrize("how", ["flip", "remove", "folder", "pipe", "dangling"])
def test_verify_repair_sets_bad_entries_of_the_user_store_aside(name, how, own):
    fill(own, CONFIG)
    path = own.entry(keys(CONFIG)[0], TOOLCHAIN) / name
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "flip":
        data[-2] ^= 1
        path.write_bytes(data)
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "dangling":
        path.symlink_to("nowhere")
    assert name in report("verify", exit=1)["bad"][0]["fault"]
    assert path.parent.exists()
    assert report("verify", "--repair")["bad"][0]["repaired"]
    assert not path.parent.exists()
    assert len(list((own.base / "bad").iterdir())) == 1
    assert report("verify")["bad"] == []


def test_a_file_larger_than_any_kernel_is_bad_and_not_read(own):
    fill(own, CONFIG)
    os.truncate(own.entry(keys(CONFIG)[0], TOOLCHAIN) / "source.py", MAX_FILE + 1)
    assert "more than any kernel" in report("verify", exit=1)["bad"][0]["fault"]


def test_entries_of_another_user_can_be_looked_at(own, monkeypatch):
    fill(own, CONFIG)
    real = os.open

    def refuse(path, flags, *arguments, **options):
        if flags & os.O_NOATIME:
            raise PermissionError(1, "Operation not permitted", path)
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert report("verify")["bad"] == []


# gc


def age(store, *names):
    """Make entries old, the first the oldest."""
    for i, name in enumerate(names):
        for file in store.entry(name, TOOLCHAIN).iterdir():
            os.utime(file, (1000 + i, 1000 + i))


@pytest.fixture
def aged(own):
    fill(own, CONFIG)
    fill(own, OTHER)
    names = [*keys(CONFIG), *keys(OTHER)]
    age(own, *names)
    return own, names


def test_gc_removes_the_least_recently_used_first(aged):
    own, names = aged
    size = max(entry.size for entry in evict.usage(own))
    before = list(own.names())
    dry = report("gc", "--size", str(3 * size), "--dry-run")
    assert list(own.names()) == before
    done = report("gc", "--size", str(3 * size))
    assert {**done, "dry_run": True} == dry
    assert [row["key"] for row in done["removed"]] == names[:-3]
    assert [row["key"] for row in done["kept"]] == names[-3:]
    assert {row["why"] for row in done["kept"]} == {"fits"}
    assert done["after"] <= 3 * size < done["before"]
    assert {name for name, _ in own.names()} == set(names[-3:])


def test_gc_says_what_stays_and_fails_if_that_is_too_much(aged):
    own, names = aged
    run("pin", names[0])
    held = own.get(names[1], TOOLCHAIN)
    done = report("gc", "--size", "1kB", exit=1)
    assert {row["key"]: row["why"] for row in done["kept"]} == {
        names[0]: "pinned", names[1]: "in use"
    }  # fmt: skip
    assert {name for name, _ in own.names()} == {*names[:2]}
    text = run("gc", "--size", "1kB", exit=1).stdout
    assert re.search(rf"stays +{names[0][:12]} .* pinned", text)
    assert re.search(rf"stays +{names[1][:12]} .* in use", text)
    assert "Still too large" in text
    assert held


def test_gc_without_a_size_takes_the_variable(aged, monkeypatch):
    names = aged[1]
    assert report("gc")["removed"] == []
    monkeypatch.setenv("SSMGEN_CACHE_SIZE", "0")
    assert report("gc")["cap"] is None
    monkeypatch.setenv("SSMGEN_CACHE_SIZE", "1B")
    assert len(report("gc")["removed"]) == len(names)


def test_gc_deletes_what_killed_processes_left_but_nothing_fresh(own):
    own.make(own.base / "bad")
    own.make(own.base / "stage")
    for name in ("old", "fresh"):
        for folder in ("stage", "bad"):
            (own.base / folder / name).mkdir()
            (own.base / folder / name / "file").write_bytes(b"12345")
    old = time.time() - 2 * 86400
    for folder in ("stage", "bad"):
        os.utime(own.base / folder / "old", (old, old))
    dry = report("gc", "--dry-run")
    assert [(Path(row["path"]).name, row["size"]) for row in dry["leftovers"]] == [("old", 5)] * 2
    assert (own.base / "bad" / "old").exists()
    assert "left behind" in run("gc").stdout
    assert sorted(p.name for p in own.base.glob("*/*")) == ["fresh", "fresh"]


def test_gc_deletes_a_link_and_not_what_it_leads_to(own, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    own.make(own.base / "bad")
    link = own.base / "bad" / "link"
    link.symlink_to(tmp_path / "precious")
    os.utime(link, (1000, 1000), follow_symlinks=False)
    assert report("gc")["problems"] == []
    assert not os.path.lexists(link)
    assert (tmp_path / "precious" / "file").exists()


@pytest.mark.parametrize("command", [["gc", "--size", "1B"], ["clear", "--yes"]])
def test_what_cannot_be_removed_is_a_problem_and_stays(command, aged, monkeypatch):
    def refuse(store, name, toolchain):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(evict, "remove", refuse)
    done = report(*command, exit=1)
    assert done["removed"] == []
    assert len(done["kept"]) == len(done["problems"]) == len(aged[1])
    assert "Permission denied" in done["problems"][0]
    assert "Permission denied" in run(*command, exit=1).stderr


def test_what_another_process_removed_first_is_no_problem(aged, monkeypatch):
    remove = evict.remove

    def twice(*arguments):
        remove(*arguments)
        remove(*arguments)

    monkeypatch.setattr(evict, "remove", twice)
    assert len(report("clear", "--yes")["removed"]) == len(aged[1])


def test_gc_of_a_store_on_a_read_only_disk_says_so(own, monkeypatch):
    def refuse(store):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(evict, "sweep", refuse)
    assert "Read-only file system" in run("gc", exit=1).stderr


# pin


def test_pins_are_listed_and_removed(own):
    fill(own, CONFIG)
    assert report("pin") == []
    assert report("pin", keys(CONFIG)[0][:9]) == [
        {"key": keys(CONFIG)[0], "toolchains": [TOOLCHAIN]}
    ]
    run("pin", CONFIG.to_json(), "--arch", "sm_90")
    assert {row["key"] for row in report("pin")} == set(keys(CONFIG))
    evict.remove(own, keys(CONFIG)[0], TOOLCHAIN)
    assert f"{keys(CONFIG)[0]}  not in the store" in run("pin").stdout
    assert "unpinned" in run("pin", "--remove", keys(CONFIG)[0]).stdout
    assert {row["key"] for row in report("pin")} == set(keys(CONFIG)[1:])
    run("pin", "--remove", keys(CONFIG)[0], exit=1)
    run("pin", OTHER.to_json(), "--arch", "sm_90", exit=1)


# clear


def test_clear_asks_and_keeps_what_is_pinned_or_in_use(aged, theirs):
    own, names = aged
    fill(theirs[1], CONFIG)
    before = snapshot(theirs[1].root)
    run("pin", names[0])
    held = own.get(names[1], TOOLCHAIN)
    assert "Aborted" in run("clear", input="n\n", exit=1).output
    assert len(list(own.names())) == len(names)
    run("clear", input="y\n")
    assert {name for name, _ in own.names()} == set(names[:2])
    done = report("clear", "--yes")
    assert {row["key"]: row["why"] for row in done["kept"]} == {
        names[0]: "pinned", names[1]: "in use"
    }  # fmt: skip
    assert len(report("clear", "--yes", "--all")["removed"]) == 2
    assert list(own.names()) == []
    assert report("pin") == []
    assert snapshot(theirs[1].root) == before
    assert held


@pytest.mark.parametrize(
    "command", [["gc"], ["clear", "--yes"], ["pin"], ["import", "x.tar"], ["verify", "--repair"]]
)
def test_a_refused_user_store_is_not_written(command, own):
    fill(own, CONFIG)
    own.root.chmod(0o777)
    before = snapshot(own.root)
    assert "may write" in run(*command, exit=1).stderr
    assert snapshot(own.root) == before


# export and import


def test_kernels_go_from_one_store_to_another(own, theirs, tmp_path, monkeypatch):
    fill(own, CONFIG)
    fill(theirs[1], OTHER)
    fill(theirs[1], CONFIG)
    file = tmp_path / "kernels.tar.gz"
    count = len(keys(CONFIG)) + len(keys(OTHER))
    assert report("export", file)["entries"] == count
    again = tmp_path / "again.tar.gz"
    run("export", again)
    assert again.read_bytes() == file.read_bytes()
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(tmp_path / "new"))
    monkeypatch.delenv("SSMGEN_CACHE_PATH")
    done = report("import", file)
    assert (done["imported"], done["already_there"]) == (count, 0)
    assert (done["signature_checked"], done["signer"]) == (False, None)
    assert {name for name, _ in Store(tmp_path / "new").names()} == {*keys(CONFIG), *keys(OTHER)}
    text = run("import", file).stdout
    assert f"0 kernels imported, {count} were there already" in text
    assert "NOT checked" in text
    assert report("verify")["bad"] == []


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--arch", "sm_80"], keys(CONFIG, SM_80)),
        (["--family", "ssu", "--arch", "sm_90"], keys(CONFIG)),
        ([keys(CONFIG)[0][:12], keys(CONFIG, SM_80)[0]], [keys(CONFIG)[0], keys(CONFIG, SM_80)[0]]),
    ],
)
def test_export_takes_what_is_asked_for(options, wanted, own, tmp_path, monkeypatch):
    fill(own, CONFIG)
    fill(own, CONFIG, SM_80)
    file = tmp_path / "kernels.tar"
    run("export", file, *options)
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(tmp_path / "new"))
    run("import", file)
    assert {row["key"] for row in report("ls")} == set(wanted)


def test_export_of_nothing_writes_nothing(own, tmp_path):
    fill(own, CONFIG)
    for options in (["--arch", "sm_120"], ["ffffffffff"]):
        run("export", tmp_path / "x.tar", *options, exit=1)
    assert not (tmp_path / "x.tar").exists()


def test_export_leaves_a_bad_entry_out_and_says_so(own, theirs, tmp_path):
    fill(own, CONFIG)
    spoil(own, keys(CONFIG)[0])
    result = run("export", tmp_path / "x.tar", exit=1)
    assert "left out" in result.stderr
    assert f"{len(keys(CONFIG)) - 1} kernels" in result.stdout
    fill(theirs[1], CONFIG)  # another layer has it
    assert report("export", tmp_path / "x.tar")["left_out"] == []


def test_a_bad_bundle_changes_nothing(own, tmp_path):
    fill(own, CONFIG)
    file = tmp_path / "kernels.tar"
    run("export", file)
    data = bytearray(file.read_bytes())
    data[-1600] ^= 1
    file.write_bytes(data)
    run("clear", "--yes")
    before = snapshot(own.root)
    assert "error: bundle" in run("import", file, exit=1).stderr
    assert snapshot(own.root) == before


def test_import_with_signers_refuses_what_they_did_not_sign(own, tmp_path):
    fill(own, CONFIG)
    public = {}
    for name in ("good", "evil"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True
        )
        public[name] = (tmp_path / f"{name}.pub").read_text()
    signers = tmp_path / "signers"
    signers.write_text(f"build@example.com {public['good']}other@example.com {public['good']}")
    file = tmp_path / "kernels.tar"
    assert report("export", file, "--sign", tmp_path / "good")["signature"] == f"{file}.sig"
    run("clear", "--yes")
    assert "signed by build@example.com" in run("import", file, "--signers", signers).stdout
    done = report("import", file, "--signers", signers, "--signer", "other@example.com")
    assert (done["signature_checked"], done["signer"]) == (True, "other@example.com")
    run("import", file, "--signers", signers, "--signer", "me@example.com", exit=1)
    run("export", file, "--sign", tmp_path / "evil")
    run("clear", "--yes")
    assert "signature" in run("import", file, "--signers", signers, exit=1).stderr
    Path(f"{file}.sig").unlink()
    assert "no file" in run("import", file, "--signers", signers, exit=1).stderr
    assert list(own.names()) == []
    assert "NOT checked" in run("import", file).stdout


# All of them


COMMANDS = typer.main.get_command(app).commands
DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_command_has_json_help_with_an_example_and_stands_in_the_docs(name):
    command = COMMANDS[name]
    assert f"    ssmgen cache {name}" in command.help
    section = re.search(
        rf"^### `ssmgen cache {name}\b.*?(?=^#)",
        (DOCS / "store.md").read_text() + "\n#",
        re.M | re.S,
    )
    assert section, f"docs/store.md has no section on {name}"
    options = [p for p in command.params if isinstance(p, click.Option) or "--" in p.opts[0]]
    assert "--json" in {opt for p in options for opt in p.opts}
    for parameter in options:
        if parameter.name in ("help", "as_json"):
            continue
        assert parameter.help, parameter.name
        assert any(f"`{opt}" in section[0] for opt in parameter.opts), parameter.name


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_is_printed(name):
    assert "Usage" in run(name, "--help").stdout


def test_on_a_terminal_a_table_is_drawn(own, monkeypatch):
    fill(own, CONFIG)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert "─" in run("ls").stdout


def test_layers_are_the_ones_that_kernels_are_found_in(own, theirs):
    assert [row["root"] for row in report("path")] == [str(s.root) for s in layers.named()]
