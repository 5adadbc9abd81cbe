"""Plans whose programs ask for what later ones load: the same bits, whatever the later slots."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ssmgen import Arch, KernelConfig, Plan
from ssmgen.bench.problem import make, planned
from ssmgen.families import spec
from ssmgen.kernel import build
from ssmgen.launcher import load

pytestmark = pytest.mark.gpu

HEADS, BATCH = 6, 9


@pytest.mark.parametrize("ahead", [1, 2, 8, 40])
@pytest.mark.parametrize("fields", [
    {"state_dtype": "bf16"},
    {"state_dtype": "int16"},
    {"state_dtype": "fp16", "rounding": "stochastic", "pdl": True},
    {"state_dtype": "int8", "index_dtype": None},
    {"state_dtype": "bf16", "dim": 80, "dstate": 96, "index_dtype": "int32"},
    {"state_dtype": "bf16", "tie_hdim": False, "dstate": 16, "has_z": True},
    {"state_dtype": "fp32", "has_dst": True},
    {"family": "gdn"},
    {"family": "gdn", "state_dtype": "bf16", "has_dst": True},
    {"family": "gdn", "state_dtype": "bf16", "rounding": "stochastic", "head_k_dim": 96},
    {"family": "gdn", "state_dtype": "fp16", "index_dtype": None, "head_v_dim": 48},
], ids=str)  # fmt: skip
def test_the_bits_are_those_without(fields, ahead):
    config, arch = KernelConfig(**fields), Arch.detect()
    if not arch.bulk_prefetch:
        pytest.skip("this GPU has no such instruction")
    family, device = spec(config.family), torch.cuda.current_device()
    plain = Plan(algorithm="simple", block_m=16, block_n=128, num_warps=1)
    plain = family.fit(config, plain, arch)
    programs = family.grid(config, plain, 1, HEADS)[0]
    asking = family.fit(config, dataclasses.replace(plain, prefetch=ahead * programs), arch)
    assert asking.prefetch
    problem = make(config, BATCH, HEADS, pool_bytes=0)
    launches = [
        planned(problem, load(build(config, plan, arch), device), plan) for plan in (plain, asking)
    ]
    assert not problem.verify(launches[1], rows=BATCH)
    if config.index_dtype:
        # Padding, which nobody may ask the state of.
        problem.sources[:, 3] = -1
        problem.sources[:, 7] = -(2**31)
    written = [t for t in (problem.pool, getattr(problem, "scale", None)) if t is not None]
    start, found = [t.clone() for t in written], []
    for launch in launches:
        for tensor, before in zip(written, start):
            tensor.copy_(before)
        launch(0)
        torch.cuda.synchronize()
        found.append([t.clone() for t in (*written, problem.arguments(0)["out"])])
    for one, other in zip(*found):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
