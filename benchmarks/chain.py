"""conv1d update, then selective_state_update, as one graph: what PDL with early state loads saves.

    python benchmarks/chain.py       writes benchmarks/results/chain-<gpu>.json

The conv here is a plain Triton kernel of width 4 that lets its dependents start as soon as its own
wait is over. Each cell times conv alone, SSU alone, the chain, and the chain with PDL.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from harness import environment, result, save, warm_clocks
from problem import Problem

import ssmgen
from ssmgen.reference.ssu import ssu_step
from ssmgen.timing import copy_bandwidth, time_graph


@triton.jit
def conv_update(xin, pool, weight, xout, slots, slot_stride, WIDTH: tl.constexpr,
                BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1)
    slot = tl.load(slots + batch).to(tl.int64)
    row = pool + slot * slot_stride + at
    w0 = tl.load(weight + at * 4).to(tl.float32)
    w1 = tl.load(weight + at * 4 + 1).to(tl.float32)
    w2 = tl.load(weight + at * 4 + 2).to(tl.float32)
    w3 = tl.load(weight + at * 4 + 3).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    c0 = tl.load(row)
    c1 = tl.load(row + WIDTH)
    c2 = tl.load(row + 2 * WIDTH)
    x = tl.load(xin + batch * WIDTH + at)
    v = c0.to(tl.float32) * w0 + c1.to(tl.float32) * w1 + c2.to(tl.float32) * w2
    v += x.to(tl.float32) * w3
    v = v / (1.0 + tl.exp(-v))
    tl.store(row, c1)
    tl.store(row + WIDTH, c2)
    tl.store(row + 2 * WIDTH, x)
    tl.store(xout + batch * WIDTH + at, v.to(tl.bfloat16))


def cell(nheads: int, ngroups: int, batch: int) -> dict[str, Any]:
    p = Problem(batch, "fp16", nheads=nheads, ngroups=ngroups)
    inner, group = nheads * p.dim, ngroups * p.dstate
    width = inner + 2 * group
    conv_pool = torch.randn(p.pool.shape[0], 3, width, device="cuda").bfloat16()
    weight = torch.randn(width, 4, device="cuda").bfloat16()
    xin = torch.randn(batch, width, device="cuda").bfloat16()
    xout = torch.empty_like(xin)
    inputs = {
        **p.inputs,
        "x": xout[:, :inner].unflatten(1, (nheads, p.dim)),
        "B": xout[:, inner : inner + group].unflatten(1, (ngroups, p.dstate)),
        "C": xout[:, inner + group :].unflatten(1, (ngroups, p.dstate)),
    }

    def conv(i: int, pdl: bool) -> None:
        conv_update[(width // 256, batch)](
            xin, conv_pool, weight, xout, p.indices[i], 3 * width,
            WIDTH=width, BLOCK=256, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip

    def ssu(i: int, pdl: bool) -> None:
        ssmgen.selective_state_update(
            p.pool, **inputs, dt_softplus=True, state_batch_indices=p.indices[i], out=p.out, pdl=pdl
        )

    def chain(i: int, pdl: bool) -> None:
        conv(i, pdl)
        ssu(i, pdl)

    for pdl in (False, True):
        check(p, functools.partial(chain, pdl=pdl), inputs)
    runs = {
        "conv alone": functools.partial(conv, pdl=False),
        "SSU alone": functools.partial(ssu, pdl=False),
        "chain": functools.partial(chain, pdl=False),
        "chain with PDL": functools.partial(chain, pdl=True),
    }
    times = {
        name: time_graph([functools.partial(run, i) for i in range(p.sets)])
        for name, run in runs.items()
    }
    return {"heads": nheads, "batch": batch, "us": times}


def check(p: Problem, chain: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Two links of the chain in a graph against fp64, with everything in between poisoned."""
    slots = p.indices[0]
    before = p.pool[slots].double()
    graph = torch.cuda.CUDAGraph()
    chain(1)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        chain(1)
        chain(0)
    p.out.fill_(float("nan"))
    inputs["x"].fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    y, h = ssu_step(before, **inputs, dt_softplus=True, compute_dtype=torch.float64)
    assert ((p.out.double() - y).abs() <= 2**-7 * y.abs() + 1e-4).all(), "output is wrong"
    assert ((p.pool[slots].double() - h).abs() <= 2**-10 * h.abs() + 2**-21).all(), "state is wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    arguments = parser.parse_args()
    warm_clocks()
    cells = []
    for nheads, ngroups in ((128, 8), (16, 1)):
        for batch in (1, 4, 8, 16, 64):
            cells.append(cell(nheads, ngroups, batch))
            text = "  ".join(f"{n} {t:.2f}" for n, t in cells[-1]["us"].items())
            print(f"{nheads:4} heads, batch {batch:3}: {text}", flush=True)
    content = {"environment": environment(), "bandwidth": copy_bandwidth(), "cells": cells}
    save(arguments.out or result("chain", content), content)


if __name__ == "__main__":
    main()
