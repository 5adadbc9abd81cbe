"""The matrix form of many tokens on a GPU, at real shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launching import launch
from ssu_calls import Call, digest, expected, moved, same, verify
from ssu_matrix import CALLS, bounded, make_matrix
from ssu_tokens import make_tokens, row_of

import ssmgen
from ssmgen.arch import Arch
from ssmgen.interpreter import interpret
from ssmgen.plan import dispatch

pytestmark = pytest.mark.gpu

MAMBA2 = {"nheads": 24, "ngroups": 3, "dim": 64, "dstate": 128}
STATES = ("fp32", "bf16", "fp16")


def run(call: Call, **options: Any) -> Call:
    """What the op makes of `call` on the GPU, back on the CPU."""
    device = moved(call, "cuda")
    ssmgen.selective_state_update(**{**device.arguments(), **options})
    return moved(device, "cpu")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("state", STATES)
def test_every_call_is_right(state, name):
    call = make_matrix(state, tokens=6, **{**MAMBA2, **CALLS[name]})
    verify(call, run(call), bounded(call))


@pytest.mark.parametrize("tokens", range(2, 17))
@pytest.mark.parametrize("state", STATES)
def test_every_number_of_tokens_is_right(state, tokens):
    call = make_matrix(state, tokens=tokens, **MAMBA2, z=True)
    verify(call, run(call), bounded(call))


@pytest.mark.parametrize(("dim", "dstate"), [(16, 32), (80, 128), (192, 256), (64, 64), (48, 256)])
@pytest.mark.parametrize("state", STATES)
def test_odd_sizes_are_right(state, dim, dstate):
    for tokens in (3, 12):
        call = make_matrix(state, tokens=tokens, nheads=6, ngroups=2, dim=dim, dstate=dstate)
        verify(call, run(call), bounded(call))


@pytest.mark.parametrize("tokens", [2, 6, 8, 16])
@pytest.mark.parametrize("state", STATES)
def test_every_plan_of_the_table_is_right(state, tokens):
    """Each launched by itself, whatever batch the table has it for."""
    call = make_matrix(state, tokens=tokens, z=True, **MAMBA2)
    config, arch = call.layout().config, Arch.detect()
    want = bounded(call)
    for plan in {choice.plan for choice in dispatch(config, arch)}:
        after = moved(call, "cuda")
        launch(after, plan)
        verify(call, moved(after, "cpu"), want)


@pytest.mark.parametrize("tokens", [6, 16])
def test_an_fp32_state_is_within_4_times_the_error_of_the_loop(tokens):
    call = make_matrix("fp32", tokens=tokens, **MAMBA2)
    want = expected(call)
    at = list(want.written.items())
    h = torch.stack([want.h[place] for _, place in at])

    def error(after):
        return (after["state"][[slot for slot, _ in at]].double() - h).abs().mean()

    loop = run(call, algorithm="simple")
    assert error(run(call)) <= 4 * error(loop)


@pytest.mark.parametrize("state", STATES)
def test_a_row_alone_gives_the_bits_of_the_row_in_a_batch(state):
    call = make_matrix(state, tokens=6, **MAMBA2, z=True)
    plan = dispatch(call.layout().config, Arch.detect())[-1].plan
    together = moved(call, "cuda")
    launch(together, plan)
    again = moved(call, "cuda")
    launch(again, plan)
    assert digest(*again.tensors.values()) == digest(*together.tensors.values())
    for row in range(3):
        alone = moved(row_of(call, row), "cuda")
        launch(alone, plan)
        slot = int(call["state_batch_indices"][row])
        assert same(alone["out"][0].cpu(), together["out"][row].cpu())
        assert same(alone["state"][slot].cpu(), together["state"][slot].cpu())


@pytest.mark.parametrize("state", STATES)
def test_the_gpu_and_the_interpreter_agree_to_the_last_sums(state):
    """Their products are the same; sums of eight and more differ in order."""
    call = make_matrix(state, tokens=5, nheads=2, ngroups=1, dim=32, dstate=64)
    on_cpu = call.copy()
    interpret(on_cpu.layout(), on_cpu.tensors)
    after = run(call)
    close = {"fp32": 1e-5, "bf16": 2**-7, "fp16": 2**-10}[state]
    torch.testing.assert_close(after["state"].float(), on_cpu["state"].float(), rtol=close,
                               atol=1e-5)  # fmt: skip


def test_auto_takes_it_and_exact_does_not():
    if Arch.detect().cc != 90:
        pytest.skip("the table has it for sm_90")
    options = {"tokens": 6, "algorithm": "auto", **MAMBA2}
    fast = make_tokens("fp32", **options, precision="fast")
    exact = make_tokens("fp32", **options)
    assert same(run(fast)["state"], run(fast, algorithm="matrix")["state"])
    assert same(run(exact)["state"], run(exact, algorithm="simple")["state"])
    assert not same(run(fast)["state"], run(exact)["state"])


def test_a_captured_graph_gives_the_bits_of_the_calls():
    call = make_matrix("fp16", tokens=6, **MAMBA2)
    want = run(call)
    device = moved(call, "cuda")
    start = device["state"].clone()
    ssmgen.selective_state_update(**device.arguments())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ssmgen.selective_state_update(**device.arguments())
    device["state"].copy_(start)
    device["out"].fill_(torch.nan)
    graph.replay()
    assert same(device["state"].cpu(), want["state"])
    assert same(device["out"].cpu(), want["out"])
