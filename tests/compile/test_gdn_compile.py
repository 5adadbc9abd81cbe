"""The kernels of gated_delta_rule_decode on every architecture: they compile, within limits, to the
instructions meant."""

from __future__ import annotations

import dataclasses
import re

import pytest
from cases import covering
from gdn_calls import LAYOUTS, STATES
from test_ssu_compile import (
    MAY_SPILL,
    MOST,
    NO_PDL,
    assert_right_instructions,
    assert_within_limits,
    compiled,
    largest,
)

from ssmgen import Arch, KernelConfig
from ssmgen.arch import KNOWN
from ssmgen.families.gdn.config import ITEMSIZE
from ssmgen.plan import dispatch

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")


def config_of(state, rounding="nearest", order="VK", **fields):
    return KernelConfig(
        family="gdn", state_dtype=state, rounding=rounding, state_layout=order, **fields
    )


def variants(config, arch):
    """Each plan of the table for a config."""
    return [compiled(config, plan, arch)
            for plan in dict.fromkeys(c.plan for c in dispatch(config, Arch.of(arch)))]  # fmt: skip


def assert_whole(found):
    """Within limits, the state in 16-byte pieces, each element loaded and stored once."""
    assert_within_limits(found, MOST)
    assert_right_instructions(found)
    config = found.config
    tile = found.plan.block_m * config.head_k_dim * ITEMSIZE[config.state_dtype]
    assert found.wide_loads >= tile
    assert found.wide_stores >= tile * config.stores


EVERY = [(arch, *STATES[i], LAYOUTS[i % 2]) for arch in KNOWN for i in (0, 3)]
EVERY += [("sm_90", *state, order) for state in STATES for order in LAYOUTS]


@pytest.mark.parametrize(("arch", "state", "rounding", "order"), dict.fromkeys(EVERY))
def test_every_plan_of_the_table_compiles_within_limits_and_moves_16_bytes(
    arch, state, rounding, order
):
    for found in variants(config_of(state, rounding, order), arch):
        assert_whole(found)


KINDS = {
    "tokens": {"ntokens": 4},
    "tokens with snapshots": {"ntokens": 4, "has_intermediate": True, "update_state": False},
    "a destination a token": {
        "ntokens": 4, "accepted_dtype": "int32", "has_dst": True, "dst_tokens": True,
    },
    "sequences": {"ntokens": 8, "seqlens_dtype": "int32", "accepted_dtype": "int32"},
    "accepted, one token": {"accepted_dtype": "int32", "has_dst": True},
    "kda": {"kda": True, "gate": "bounded"},
    "kda tokens": {"kda": True, "ntokens": 4, "a_dtype": "fp32"},
    "given": {"gate": "given", "a_dtype": "fp32"},
    "interleaved": {"grouped": True, "index_dtype": "int32"},
    "wide": {"head_k_dim": 256, "head_v_dim": 64},
    "tall": {"head_k_dim": 64, "head_v_dim": 256},
    "odd": {"head_k_dim": 96, "head_v_dim": 72, "ntokens": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "order", "arch"), covering(tuple(KINDS), LAYOUTS, ("sm_80", "sm_90", "sm_120"))
)
def test_every_kind_of_kernel_compiles_within_limits_and_moves_16_bytes(arch, kind, order):
    state, rounding = STATES[0] if order == "VK" else STATES[2]
    assert_whole(largest(config_of(state, rounding, order, **KINDS[kind]), arch))


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize(("state", "rounding"), STATES)
def test_the_unaligned_variant_compiles_and_assumes_no_alignment(state, rounding, order):
    found = largest(config_of(state, rounding, order, aligned=False), "sm_90")
    assert_within_limits(found, MOST)
    assert not re.search(r"(ld|st)\.global[.\w:]*\.v[248]\.", found.ptx)


@pytest.mark.parametrize("arch", ARCHS)
def test_dependent_launch_is_there_only_where_asked_for_and_supported(arch):
    for pdl in (True, False):
        found = largest(config_of("bf16", pdl=pdl), arch)
        assert ("griddepcontrol" in found.ptx) == (pdl and arch not in NO_PDL)
        assert found.manifest["spills"] <= MAY_SPILL.get(arch, 0)


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("kind", ["plain", "accepted, one token", "a destination a token"])
def test_the_state_is_loaded_before_the_dependency_wait_and_nothing_stored(kind, order):
    config = config_of("fp32", order=order, pdl=True, **KINDS.get(kind, {}))
    plans = {dataclasses.replace(c.plan, early=True) for c in dispatch(config, Arch.of("sm_90"))}
    for found in (compiled(config, plan, "sm_90") for plan in plans):
        before, after = found.ptx.split("griddepcontrol.wait", 1)
        loads = re.findall(r"ld\.global[.\w:]*\.v4\.b32", before)
        assert 16 * 32 * found.plan.num_warps * len(loads) >= found.tile
        assert "st.global" not in before
        # q, k, v, a and b come from the kernel ahead.
        assert len(re.findall(r"ld\.global", after)) >= 5


@pytest.mark.parametrize("kind", ["plain", "accepted, one token", "a destination a token"])
def test_a_late_plan_reads_no_state_before_it_waits(kind):
    config = config_of("fp32", pdl=True, **KINDS.get(kind, {}))
    plan = dispatch(config, Arch.of("sm_90"))[-1].plan
    found = compiled(config, dataclasses.replace(plan, early=False), "sm_90")
    before, after = found.ptx.split("griddepcontrol.wait", 1)
    assert not re.search(r"ld\.global[.\w:]*\.v4\.b32", before)
    assert "griddepcontrol.launch_dependents" in after.split("ld.global")[0]
    assert found.manifest["spills"] == 0


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_one_binary_serves_every_ratio_of_heads(ratio):
    from gdn_calls import make

    wanted = make(H=2, HV=2, K=16, V=8).layout()
    found = make(H=2, HV=2 * ratio, K=16, V=8).layout()
    assert found.config == wanted.config
