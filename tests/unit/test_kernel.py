"""get_kernel: the road end to end, on a machine with or without a GPU."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from artifacts import compiled, snapshot
from dispatch_tables import put
from ssu_calls import make

from ssmgen import Arch, Kernel, KernelConfig, Plan, compiler, get_kernel, kernel, plan
from ssmgen.artifact import Artifact
from ssmgen.errors import (
    ArgumentValueError,
    CompileError,
    ConfigError,
    ConfigTypeError,
    DeviceError,
)
from ssmgen.template import key

ROOT = Path(__file__).parents[2]
# Compiles in little time.
SMALL = {
    "dim": 8,
    "dstate": 8,
    "has_d": False,
    "has_dt_bias": False,
    "dt_softplus": False,
    "index_dtype": None,
    "batch_invariant": True,
}


@pytest.fixture
def buckets(monkeypatch, store_dir, tmp_path):
    """Three variants a kernel, and a compiler that costs nothing; the compilations, by time."""
    done = []
    rows = [
        {"up_to_heads": 64, "plan": {"block_m": 4}},
        {"up_to_heads": 1024, "plan": {"block_m": 8}},
        {"plan": {"block_m": 16}},
    ]
    for row in rows:
        row["plan"] = {"algorithm": "simple", "block_n": 128, "num_warps": 1, **row["plan"]}
    for name in ("fp32.nearest", "fp16.nearest"):
        put(tmp_path / "tuned", rows, key=name)
    monkeypatch.setenv("SSMGEN_TUNED_PATH", str(tmp_path / "tuned"))

    def compile(config, chosen, arch):
        done.append(chosen)
        time.sleep(0.05)
        return compiled(config, chosen, arch, compiler.toolchain())

    monkeypatch.setattr(compiler, "compile", compile)
    return done


# What a kernel shows


def test_a_named_arch_is_compiled_without_a_gpu_and_shows_what_it_is(store_dir):
    config = KernelConfig(**SMALL)
    found = get_kernel(config, arch="sm_90")
    assert isinstance(found, Kernel)
    assert (found.config, found.arch, found.device) == (config, Arch.of("sm_90"), None)
    assert isinstance(found.plan, Plan)
    assert isinstance(found.artifact, Artifact)
    assert found.artifact.cubin.startswith(b"\x7fELF")
    manifest = found.artifact.manifest
    assert manifest["key"] == key(config, found.plan, found.arch)
    assert manifest["num_warps"] == found.plan.num_warps
    assert f"def {manifest['entry']}(" in found.source
    assert manifest["key"] in found.source
    assert manifest["arguments"][0] == ["state", "*fp32"]
    why = found.explain()
    assert all(text in why for text in (str(found.plan), "sm_90", "table", manifest["key"][:12]))
    assert re.search(r"\d+ registers, 0 bytes spilled", why)


def test_the_manifest_names_every_factor_of_the_key(store_dir):
    manifest = get_kernel(KernelConfig(**SMALL), arch="sm_80").artifact.manifest
    assert set(manifest["factors"]) == {
        "schema", "abi", "arch", "config", "plan", "templates", "arguments", "context", "options",
    }  # fmt: skip
    assert set(manifest["files"]) == {"kernel.cubin", "source.py"}
    assert manifest["toolchain"] == compiler.toolchain()


def test_the_same_call_gives_the_same_object(buckets):
    config = KernelConfig()
    found = get_kernel(config, arch="sm_90")
    assert get_kernel(KernelConfig(), arch="9.0") is found
    assert get_kernel(config, arch=Arch.of("sm_90")) is found
    assert get_kernel(config, arch="sm_80") is not found


def test_another_store_or_switch_gives_another_object(buckets, monkeypatch, tmp_path):
    found = get_kernel(KernelConfig(), arch="sm_90")
    monkeypatch.setenv("SSMGEN_BATCH_INVARIANT", "1")
    invariant = get_kernel(KernelConfig(), arch="sm_90")
    assert (len(found.variants), len(invariant.variants)) == (3, 1)
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(tmp_path / "other"))
    assert get_kernel(KernelConfig(), arch="sm_90") is not invariant
    assert list((tmp_path / "other").glob("v1/??/*/*"))


def test_select_takes_the_smallest_bucket_that_serves(buckets):
    found = get_kernel(KernelConfig(), arch="sm_90")
    sizes = {
        (1, 1): 4,
        (1, 64): 4,
        (64, 1): 4,
        (1, 65): 8,
        (16, 64): 8,
        (1025, 1): 16,
        (9, 999): 16,
    }
    assert {size: found.select(*size).plan.block_m for size in sizes} == sizes
    assert found.select(0, 128).plan.block_m == 4
    assert found.plan.block_m == 16


def test_explain_has_a_line_a_variant(buckets):
    lines = get_kernel(KernelConfig(), arch="sm_90").explain().splitlines()
    assert ["<= 64" in lines[0], "<= 1024" in lines[1], "any batch" in lines[2]] == [True] * 3
    assert all("fp32.nearest.json" in line for line in lines)


# Errors


def test_without_a_gpu_the_error_says_to_name_an_arch(monkeypatch):
    monkeypatch.setattr(kernel, "_cuda_ready", lambda: False)
    with pytest.raises(DeviceError, match="arch='sm_90'"):
        get_kernel(KernelConfig())


@pytest.mark.parametrize("device", [-1, "cuda:0", True, 1.0])
def test_a_device_is_named_by_its_index(device):
    with pytest.raises(ConfigTypeError, match=r"device: .*the index of a CUDA device"):
        get_kernel(KernelConfig(), device=device)


@pytest.mark.parametrize("config", [None, "ssu", {"dim": 64}])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(ConfigTypeError, match=r"config: .* found; allowed: KernelConfig"):
        get_kernel(config, arch="sm_90")


def test_with_triton_told_to_interpret_nothing_is_compiled(store_dir, monkeypatch):
    # Imported while this is set, Triton could not compile again in this process.
    import triton.language  # noqa: F401

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(CompileError, match="TRITON_INTERPRET is set"):
        get_kernel(KernelConfig(**SMALL), arch="sm_90")


def test_an_unknown_arch_is_refused(store_dir):
    with pytest.raises(ConfigError, match="arch: 'sm_70'"):
        get_kernel(KernelConfig(), arch="sm_70")


def test_a_kernel_that_was_only_compiled_refuses_to_launch(buckets):
    call = make("fp32", dim=64, dstate=128)
    found = get_kernel(call.layout().config, arch="sm_90")
    arguments = {**call.tensors, "pad_slot_id": -1}
    for launch in (found, found.bind):
        with pytest.raises(DeviceError, match="compiled for sm_90 only"):
            launch(**arguments)


def test_arguments_of_another_config_are_refused_by_what_differs(buckets):
    call = make("fp32", dim=64, dstate=128, z=True)
    found = get_kernel(make("fp32", dim=64, dstate=128).layout().config, arch="sm_90")
    with pytest.raises(
        ArgumentValueError, match="has_z: the arguments have True, the kernel False"
    ):
        found.bind(**call.tensors)


def test_a_failed_compilation_fails_again_and_blocks_nobody(buckets, monkeypatch):
    def fail(config, chosen, arch):
        raise CompileError("ptxas: no")

    good = compiler.compile
    monkeypatch.setattr(compiler, "compile", fail)
    for _ in range(2):
        with pytest.raises(CompileError, match="ptxas: no"):
            get_kernel(KernelConfig(), arch="sm_90")
    monkeypatch.setattr(compiler, "compile", good)
    assert get_kernel(KernelConfig(), arch="sm_90").artifact.cubin.startswith(b"\x7fELF")


def test_what_the_compiler_says_is_in_the_error(store_dir, monkeypatch):
    monkeypatch.setattr(compiler, "render", lambda *a: "import triton\n\n@triton.jit\ndef ssu_simple():\n    nonsense\n")  # fmt: skip  # noqa: E501
    monkeypatch.setattr(
        compiler, "spec", lambda family: type("F", (), {"arguments": lambda s, c: ()})()
    )
    with pytest.raises(CompileError) as caught:
        compiler.compile(KernelConfig(), Plan(algorithm="simple", block_m=1, block_n=8, num_warps=1), Arch(90))  # fmt: skip  # noqa: E501
    text = str(caught.value)
    assert all(word in text for word in ("ssu_simple", "sm_90", "nonsense", '"family":"ssu"'))


# Once


def test_threads_that_ask_for_one_config_compile_it_once(buckets):
    barrier = threading.Barrier(8)
    found = []

    def ask():
        barrier.wait()
        found.append(get_kernel(KernelConfig(), arch="sm_90"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(buckets) == 3
    assert len(found) == 8
    assert all(one is found[0] for one in found)


ASK = f"""
    import logging, sys, time
    from pathlib import Path
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    from ssmgen import KernelConfig, get_kernel
    print("ready", flush=True)
    sys.stdin.read()
    manifest = get_kernel(KernelConfig(**{SMALL!r}), arch="sm_90").artifact.manifest
    print(manifest["sha256"], flush=True)
"""


def test_32_processes_that_ask_for_one_config_compile_it_once(store_dir):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(ASK)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(32)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.close()
    said = [process.stdout.read().splitlines() for process in processes]
    assert [process.wait() for process in processes] == [0] * 32
    for process in processes:
        process.stdout.close()
    lines = [line for lines in said for line in lines]
    assert len([line for line in lines if line.startswith("compiled")]) == 1
    assert len({lines[-1] for lines in said}) == 1
    assert len(lines) == 33, lines
    assert len(list(store_dir.glob("v1/??/*/*"))) == 1


# A hit


def test_a_hit_needs_no_compiler_lock_or_write(store_dir):
    config = KernelConfig(**SMALL)
    manifest = get_kernel(config, arch="sm_90").artifact.manifest
    before = snapshot(store_dir)
    code = f"""
        import sys

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("triton", "jinja2", "filelock", "torch"):
                    raise ImportError(f"{{name}} was imported")

        sys.meta_path.insert(0, Refuse())
        from ssmgen import KernelConfig, get_kernel
        found = get_kernel(KernelConfig(**{SMALL!r}), arch="sm_90")
        print(found.artifact.manifest["sha256"])
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == manifest["sha256"]
    assert snapshot(store_dir) == before


def test_a_hit_says_nothing_and_a_compilation_says_what_took_how_long(store_dir, caplog):
    config, arch = KernelConfig(**SMALL), Arch.of("sm_90")
    (choice,) = plan.dispatch(config, arch)
    with caplog.at_level(logging.INFO, "ssmgen"):
        kernel.build(config, choice.plan, arch)
        assert re.fullmatch(r"compiled ssu simple .* for sm_90 in \d+\.\d\d s", caplog.messages[0])
        caplog.clear()
        kernel.build(config, choice.plan, arch)
    assert not caplog.records
