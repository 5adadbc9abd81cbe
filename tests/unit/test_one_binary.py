"""One config, one plan, one arch: one binary. Shapes, strides and pointers change none."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ssu_calls import make

from ssmgen import Arch, Plan, compiler
from ssmgen.families import spec
from ssmgen.template import key

ROOT = Path(__file__).parents[2]
SM_90 = Arch.of("sm_90")
PLAN = Plan(algorithm="simple", block_m=16, block_n=32, num_warps=1)


@given(
    batch=st.integers(0, 40),
    more_slots=st.integers(0, 5),
    ngroups=st.sampled_from([1, 2, 3, 5]),
    ratio=st.sampled_from([1, 2, 3, 16, 17]),
    lead=st.sampled_from([0, 8, 16, 1024]),
    packed=st.booleans(),
    pitch=st.sampled_from([0, 8, 16, 1000]),
    width=st.sampled_from([0, 1, 7]),
    pad=st.sampled_from([-1, 0, 99, 2**40]),
    offset=st.sampled_from([0, 8, 64]),
    token=st.booleans(),
    random=st.integers(0, 9),
)
def test_shapes_strides_and_pointers_change_no_binary(
    batch, more_slots, ngroups, ratio, lead, packed, pitch, width, pad, offset, token, random
):
    call = make(
        "bf16",
        batch=batch,
        slots=batch + more_slots,
        ngroups=ngroups,
        nheads=ngroups * ratio,
        dim=16,
        dstate=32,
        dt_dtype="bf16",
        lead=lead,
        packed=packed and batch > 0,
        pitch=pitch,
        index_width=width,
        pad=pad,
        offset=offset,
        token=token,
        random=random,
    )
    config = call.layout().config
    reference = make("bf16", dim=16, dstate=32, dt_dtype="bf16").layout().config
    if config.aligned:
        assert config == reference
        assert key(config, PLAN, SM_90) == key(reference, PLAN, SM_90)
    else:
        assert config == reference.replace(aligned=False)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_a_pool_off_by_less_than_16_bytes_takes_the_unaligned_variant(offset):
    aligned, unaligned = (make("bf16", offset=o).layout().config for o in (0, offset))
    assert aligned.aligned
    assert unaligned == aligned.replace(aligned=False)


@pytest.mark.parametrize(
    "loose", [{"pitch": 4}, {"packed": True, "lead": 4}, {"packed": True, "ngroups": 1, "dim": 24}]
)
def test_rows_that_step_by_less_than_16_bytes_take_the_unaligned_variant(loose):
    call = make("bf16", **{"nheads": 5, "ngroups": 5, **loose})
    odd = call.tensors["B"].stride(0) % 8 or call.tensors["B"].data_ptr() % 16
    assert call.layout().config.aligned == (not odd and "pitch" not in loose)


def test_the_integers_of_a_layout_are_those_the_manifest_lists():
    for headless in (False, True):
        for more in ({}, {"z": True, "dst": [0, 1, 2]}, {"indices": None, "D": False}):
            call = make("int8", "stochastic", headless=headless, **more)
            layout = call.layout()
            arguments = spec("ssu").arguments(layout.config)
            pointers = [a for a in arguments if a.pointer]
            assert len(layout.tensors) == len(pointers)
            assert len(layout.scalars) == len(arguments) - len(pointers)
            assert all(a.pointer for a in arguments[: len(pointers)])
            for argument, value in zip(arguments[len(pointers) :], layout.scalars):
                signed, width = argument.type[0] == "i", int(argument.type[1:])
                low, high = (-(2 ** (width - 1)), 2 ** (width - 1)) if signed else (0, 2**width)
                assert low <= value < high, argument.name
                assert value % argument.align == 0, argument.name


COMPILE = """
    import hashlib, json, sys
    from ssmgen import Arch, KernelConfig, Plan, compiler
    config = KernelConfig(state_dtype="fp16", rounding="stochastic", dim=16, dstate=32)
    plan = Plan(algorithm="simple", block_m=16, block_n=32, num_warps=1)
    built = compiler.compile(config, plan, Arch.of(sys.argv[1]))
    files = {name: hashlib.sha256(data).hexdigest() for name, data in built.contents().items()}
    print(json.dumps(files))
"""


# What would make Triton compile otherwise, were the environment asked.
UNTOLD = {
    "DISABLE_PTXAS_OPT": "1",
    "TRITON_DISABLE_LINE_INFO": "0",
    "TRITON_DEFAULT_FP_FUSION": "0",
    "TRITON_KERNEL_OVERRIDE": "1",
    "PTXAS_OPTIONS": "-O0",
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_two_processes_in_two_places_compile_the_same_bytes(arch, tmp_path):
    found = []
    for name in ("one", "another-place/deeper"):
        place = tmp_path / name
        place.mkdir(parents=True)
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(COMPILE), arch],
            cwd=place,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PYTHONHASHSEED": str(len(found)),
                "TMPDIR": str(place),
                "HOME": str(place),
                "TRITON_CACHE_DIR": str(place / "triton"),
                **(UNTOLD if found else {}),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(run.stdout))
        assert not any(place.iterdir())
    assert found[0] == found[1]
    assert len(found[0]) == 3


def test_a_second_compilation_in_a_process_gives_the_same_bytes():
    config = make("fp32").layout().config
    digests = {
        hashlib.sha256(compiler.compile(config, PLAN, SM_90).cubin).hexdigest() for _ in range(2)
    }
    assert len(digests) == 1
