"""What compute-sanitizer watches in ``make sanitize``: kernels of every form, in each plan that may
serve them on this GPU, with elements placed where they can be, late with PDL, and asking for what
the next row loads; each launched on a few rows of which one is padded. Of all these, those that
name the words of the command line: ``python tests/gpu/sanitize.py gdn prefetch``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from ssmgen.arch import Arch
from ssmgen.bench.problem import make, planned
from ssmgen.bench.session import environment
from ssmgen.config import KernelConfig
from ssmgen.families import spec
from ssmgen.families.conv1d.config import Conv1dConfig
from ssmgen.families.gdn.config import GdnConfig
from ssmgen.families.ssu.config import SsuConfig
from ssmgen.kernel import build
from ssmgen.launcher import load
from ssmgen.plan import Plan, variants
from ssmgen.template import key

ROWS, HEADS, CHANNELS = 3, 4, 256

Fields = dict[str, Any]
BUFFER: Fields = {"has_intermediate": True, "entry_dtype": "int64"}
VERIFY: Fields = {"has_dst": True, "dst_tokens": True, "accepted_dtype": "int32"}


def ssu() -> Iterator[SsuConfig]:
    for state in ("fp32", "bf16", "int16", "int8", "fp8_e4m3fn"):
        yield SsuConfig(state_dtype=state)
    for state in ("fp16", "int16", "int8", "fp8_e4m3fn"):
        yield SsuConfig(state_dtype=state, rounding="stochastic")
    yield SsuConfig(state_dtype="bf16", aligned=False)
    yield SsuConfig(algorithm="vertical", has_z=True)
    yield SsuConfig(algorithm="horizontal", has_dst=True)
    yield SsuConfig(tie_hdim=False, dim=80, dstate=96)
    yield SsuConfig(pdl=True)


def tokens() -> Iterator[SsuConfig]:
    for state in ("fp32", "bf16", "fp16", "int16"):
        for count in (2, 4, 6):
            yield SsuConfig(state_dtype=state, ntokens=count, update_state=False, **BUFFER)
    loop: Fields = {"algorithm": "simple", "ntokens": 5, "has_z": True}
    yield SsuConfig(**loop, **BUFFER, parents_dtype="int32")
    yield SsuConfig(**loop, **VERIFY, seqlens_dtype="int32", state_dtype="fp16")
    yield SsuConfig(**loop, has_dst=True, state_dtype="int8", rounding="stochastic", dim=80)


def matrix() -> Iterator[SsuConfig]:
    for state in ("fp32", "bf16", "fp16"):
        for count in (2, 6, 12):
            yield SsuConfig(algorithm="matrix", state_dtype=state, ntokens=count, has_z=True)
    yield SsuConfig(algorithm="matrix", ntokens=8, dim=80, dstate=256)


def gdn() -> Iterator[GdnConfig]:
    for fields in ({}, {"state_dtype": "bf16"}, {"state_dtype": "bf16", "rounding": "stochastic"}):
        yield GdnConfig(**fields)
        yield GdnConfig(**fields, ntokens=4, **VERIFY)
    yield GdnConfig(state_layout="KV", kda=True, head_k_dim=96, head_v_dim=64)
    yield GdnConfig(state_layout="KV", ntokens=3, seqlens_dtype="int32", grouped=True, **BUFFER)
    yield GdnConfig(gate="given", use_qk_l2norm=False, pdl=True)
    yield GdnConfig(gate="bounded", kda=True, state_dtype="fp16")
    yield GdnConfig(aligned=False)


def conv1d() -> Iterator[Conv1dConfig]:
    yield Conv1dConfig(pdl=True)
    yield Conv1dConfig(dtype="fp32", width=6, depth=8, has_bias=True, has_dst=True)
    yield Conv1dConfig(packed_channels=False)
    yield Conv1dConfig(aligned=False)
    yield Conv1dConfig(counts_dtype="int32", many=True)
    yield Conv1dConfig(accepted_dtype="int32")
    for many in ({"accepted_dtype": "int32"}, {"seqlens_dtype": "int32", "depth": 5}):
        yield Conv1dConfig(many=True, **many)
        yield Conv1dConfig(many=True, packed_channels=False, **many)
    for past in ({"history": "pool", "has_initial": True}, {"history": "rows"}, {"history": None}):
        yield Conv1dConfig(many=True, prefill=True, seqlens_dtype="int32", **past)


def plans(config: KernelConfig, arch: Arch) -> list[Plan]:
    """Those that may serve it here; the simple ones also placed, with PDL late, and prefetching."""
    family, found = spec(config.family), variants(config, arch, torch.cuda.get_device_name())
    others = [dataclasses.replace(plan, placed=True) for plan in found]
    others += [dataclasses.replace(plan, early=False) for plan in found]
    if config.family != "conv1d":
        others += [
            dataclasses.replace(plan, prefetch=family.grid(config, plan, 1, HEADS)[0])
            for plan in found
        ]
    return list(dict.fromkeys([*found, *(family.fit(config, plan, arch) for plan in others)]))


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("make sanitize: no GPU here")
    arch = Arch.detect()
    configs: list[KernelConfig] = [*ssu(), *tokens(), *matrix(), *gdn(), *conv1d()]
    print(json.dumps(environment()), flush=True)
    launches = 0
    for config in configs:
        nheads = CHANNELS if config.family == "conv1d" else HEADS
        problem: Any = make(config, ROWS, nheads, pool_bytes=0)
        if getattr(problem, "sources", None) is not None:
            problem.sources[:, 0] = -1
        for plan in plans(config, arch):
            if not all(word in f"{config.family} {plan}" for word in sys.argv[1:]):
                continue
            function = load(build(config, plan, arch), torch.cuda.current_device())
            launch = planned(problem, function, plan)
            for which in range(problem.sets):
                launch(which)
            torch.cuda.synchronize()
            launches += problem.sets
            print(f"{key(config, plan, arch)[:12]} {config.family} {plan}", flush=True)
    print(f"{launches} launches of {len(configs)} configs")


if __name__ == "__main__":
    main()
