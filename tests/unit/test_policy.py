"""What may be compiled, and what serves where nothing may."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys

import pytest
from artifacts import compiled
from processes import ROOT, python

import ssmgen
from ssmgen import Arch, KernelConfig, compiler, get_kernel, kernel, policy
from ssmgen.errors import JitDeniedError, StoreError
from ssmgen.plan import dispatch
from ssmgen.store import Store, local
from ssmgen.template import key

CONFIG, SM_90 = KernelConfig(state_dtype="bf16", has_z=True), Arch.of("sm_90")
PLAN = dispatch(CONFIG, SM_90)[-1].plan
HERE, OLDER, NEWER = "triton-3.6.0", "triton-3.5.0", "triton-3.10.0"
# Compiles in little time.
SMALL = {"dim": 8, "dstate": 8, "has_d": False, "has_dt_bias": False, "dt_softplus": False}


@pytest.fixture(autouse=True)
def _not_frozen(monkeypatch):
    local.report.cache_clear()
    monkeypatch.setattr(policy, "_frozen", False)


@pytest.fixture
def compilations(monkeypatch, store_dir):
    """Compilations, by a compiler that costs nothing and obeys `freeze`."""
    done = []

    def compile(config, plan, arch):
        policy.refuse_if_frozen(config, arch)
        done.append(config)
        return compiled(config, plan, arch, HERE)

    monkeypatch.setattr(compiler, "toolchain", lambda: HERE)
    monkeypatch.setattr(compiler, "compile", compile)
    return done


def build():
    return kernel.build(CONFIG, PLAN, SM_90)


def put(store_dir, toolchain):
    Store(store_dir).put(compiled(CONFIG, PLAN, SM_90, toolchain))


def printed(message):
    """The command of an error: what stands on its indented last line, as a shell reads it."""
    return shlex.split(message.splitlines()[-1])


def test_denied_the_error_prints_the_command_for_exactly_this_config(compilations, monkeypatch):
    monkeypatch.setenv("SSMGEN_JIT", "deny")
    with pytest.raises(JitDeniedError) as caught:
        build()
    assert isinstance(caught.value, StoreError)
    assert isinstance(caught.value, RuntimeError)
    *command, option, text, arch_option, arch = printed(str(caught.value))
    assert (command, option, arch_option) == (["ssmgen", "prewarm"], "--config", "--arch")
    assert KernelConfig.from_json(text) == CONFIG
    assert arch == "sm_90"
    assert "SSMGEN_JIT=deny" in str(caught.value)
    assert not compilations


def test_the_command_keeps_what_decides_the_plans(compilations, monkeypatch):
    monkeypatch.setenv("SSMGEN_JIT", "deny")
    monkeypatch.setenv("SSMGEN_BATCH_INVARIANT", "1")
    with pytest.raises(JitDeniedError) as caught:
        build()
    assert printed(str(caught.value))[:3] == ["SSMGEN_BATCH_INVARIANT=1", "ssmgen", "prewarm"]


def test_without_a_compiler_the_error_prints_the_same_command(compilations, monkeypatch):
    monkeypatch.setattr(compiler, "toolchain", lambda: None)
    with pytest.raises(StoreError) as caught:
        build()
    assert not isinstance(caught.value, JitDeniedError)
    assert shlex.join(printed(str(caught.value))) == policy.prewarm_command(CONFIG, SM_90)


def test_frozen_later_compilations_are_errors_and_hits_are_not(compilations, store_dir):
    assert policy.allowed()
    built = build()
    in_memory = get_kernel(CONFIG, arch="sm_90")
    compilations.clear()
    ssmgen.freeze()
    assert not policy.allowed()
    assert build().contents() == built.contents()
    assert get_kernel(CONFIG, arch="sm_90") is in_memory
    other = CONFIG.replace(dim=128)
    with pytest.raises(JitDeniedError, match=r"ssmgen\.freeze\(\) was called"):
        get_kernel(other, arch="sm_90")
    put(store_dir, HERE)
    assert not compilations
    assert not [name for name in os.listdir(store_dir / "v1" / "locks") if key(other, PLAN, SM_90) in name]  # fmt: skip  # noqa: E501


def test_frozen_nothing_compiles_by_any_other_road(store_dir):
    ssmgen.freeze()
    with pytest.raises(JitDeniedError):
        compiler.compile(CONFIG, PLAN, SM_90)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_exact_match_comes_first_even_in_a_later_layer(
    compilations, store_dir, tmp_path, monkeypatch, caplog, frozen
):
    if frozen:
        ssmgen.freeze()
    else:
        monkeypatch.setenv("SSMGEN_JIT", "deny")
    monkeypatch.setenv("SSMGEN_CACHE_PATH", str(tmp_path / "later"))
    put(store_dir, NEWER)
    put(store_dir, OLDER)
    put(tmp_path / "later", HERE)
    assert build().manifest["toolchain"] == HERE
    assert not caplog.records


def test_denied_another_toolchain_serves_and_the_mismatch_is_logged(
    compilations, store_dir, monkeypatch, caplog
):
    monkeypatch.setenv("SSMGEN_JIT", "deny")
    put(store_dir, OLDER)
    with caplog.at_level(logging.WARNING, "ssmgen"):
        assert build().manifest["toolchain"] == OLDER
    assert f"built by {OLDER}, {HERE} is here" in caplog.text
    put(store_dir, NEWER)
    assert build().manifest["toolchain"] == NEWER


def test_denied_a_bad_entry_of_another_toolchain_does_not_serve(
    compilations, store_dir, monkeypatch
):
    monkeypatch.setenv("SSMGEN_JIT", "deny")
    put(store_dir, OLDER)
    (store_dir / "v1").joinpath(
        Store(store_dir).entry(key(CONFIG, PLAN, SM_90), OLDER), "kernel.cubin"
    ).write_bytes(b"\x7fELF")
    with pytest.raises(JitDeniedError):
        build()


def test_allowed_another_toolchain_does_not_serve(compilations, store_dir):
    put(store_dir, OLDER)
    assert build().manifest["toolchain"] == HERE
    assert len(compilations) == 1


def test_the_printed_command_run_as_it_is_makes_the_kernel_served(tmp_path):
    """In a shell where compiling is denied: `ssmgen prewarm` is the way to ask for it."""
    ask = f"""
        import sys
        from ssmgen import KernelConfig, get_kernel
        from ssmgen.errors import JitDeniedError
        try:
            print(get_kernel(KernelConfig(**{SMALL!r}), arch="sm_90").artifact.manifest["key"])
        except JitDeniedError as error:
            print(error)
    """
    env = {"SSMGEN_CACHE_DIR": str(tmp_path / "store"), "SSMGEN_JIT": "deny"}
    denied = python(ask, **env)
    assert "may not be compiled" in denied
    program = "import sys; from ssmgen.cli import main; sys.argv[0] = 'ssmgen'; main()"
    (tmp_path / "ssmgen").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}" "$@"\n')
    (tmp_path / "ssmgen").chmod(0o755)
    run = subprocess.run(
        denied.splitlines()[-1],
        shell=True,
        cwd=tmp_path,
        env={
            **os.environ,
            **env,
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(python(ask, **env).strip()) == 64
