"""Every conv1d kernel on every architecture: it compiles, to the instructions that were meant."""

from __future__ import annotations

import dataclasses
import re

import pytest

from ssmgen import Arch, KernelConfig, compiler
from ssmgen.arch import KNOWN
from ssmgen.families.conv1d.config import ITEMSIZE
from ssmgen.plan import dispatch
from ssmgen.template import key

NO_PDL = {"sm_80", "sm_86", "sm_89"}
# Eight warps, two a scheduler, must fit the registers of an SM beside those of another program.
MOST = {"one": 128, "many": 168, "prefill": 255}

PREFILL = {"many": True, "prefill": True, "seqlens_dtype": "int32", "has_initial": True}
FORMS = {
    "one": {},
    "one accepted": {"accepted_dtype": "int32"},
    "one circular": {"counts_dtype": "int32"},
    "one right": {"depth": 4},
    "one to another slot": {"has_dst": True},
    "many": {"many": True},
    "many accepted": {"many": True, "seqlens_dtype": "int32", "accepted_dtype": "int32"},
    "many circular": {"many": True, "counts_dtype": "int32"},
    "many right": {"many": True, "depth": 4},
    "prefill": PREFILL,
    "prefill right": {**PREFILL, "depth": 4},
    "prefill accepted": {**PREFILL, "accepted_dtype": "int32"},
    "prefill to another slot": {**PREFILL, "has_dst": True},
    "prefill of rows": {"many": True, "prefill": True, "history": "rows"},
    "prefill alone": {"many": True, "prefill": True, "history": None, "update_state": False,
                      "index_dtype": None},
}  # fmt: skip

_compiled = {}


class Compiled:
    """An artifact's manifest with the PTX it was made from."""

    def __init__(self, config, plan, arch):
        seen, real = [], compiler._triton
        try:
            compiler._triton = lambda *a: seen.append(real(*a, stages=True)) or seen[0]
            self.manifest = compiler.compile(config, plan, arch).manifest
        finally:
            compiler._triton = real
        self.config, self.plan, self.arch = config, plan, arch
        self.ptx, self.ttgir = seen[0].asm["ptx"], seen[0].asm["ttgir"]
        self.form = "prefill" if config.prefill else "many" if config.many else "one"

    def count(self, kind, wide=False, ptx=None):
        """Loads or stores; wide ones move 16 bytes, or all that a thread has of a token."""
        widths = {16: r"\.(v4\.b32|v2\.b64)", 8: r"\.(v2\.b32|b64)", 4: r"\.b32", 2: r"\.[bu]16"}
        vector = widths[self.bytes]
        return len(
            re.findall(rf"\b{kind}\.global[.\w:]*{vector if wide else ''}\s", ptx or self.ptx)
        )

    @property
    def bytes(self):
        """What one instruction can move for a thread of a token's channels."""
        each = self.plan.block_n * ITEMSIZE[self.config.dtype] // (32 * self.plan.num_warps)
        return min(16, each * (self.plan.block_m if self.config.prefill else 1))

    def vectors(self, dtype, elements):
        """16-byte vectors of a thread that holds its share of so many elements; at least one."""
        return max(1, elements * ITEMSIZE[dtype] // (16 * 32 * self.plan.num_warps))

    @property
    def turns(self):
        """How often x is read: in a chunk under each tap, in rows before the loop and in it."""
        config = self.config
        return config.width if config.prefill else 2 if config.many else 1


def compiled(arch="sm_90", smallest=False, **fields):
    config, arch = KernelConfig(family="conv1d", **fields), Arch.of(arch)
    plan = dispatch(config, arch)[0 if smallest else -1].plan
    name = key(config, plan, arch)
    if name not in _compiled:
        _compiled[name] = Compiled(config, plan, arch)
    return _compiled[name]


def assert_within_limits(found):
    manifest = found.manifest
    assert manifest["spills"] == 0
    assert manifest["registers"] <= MOST[found.form]
    assert manifest["registers"] * 32 * manifest["num_warps"] <= 65536
    assert f".target {found.arch}" in found.ptx
    dependent = found.config.pdl and str(found.arch) not in NO_PDL
    assert ("griddepcontrol" in found.ptx) == dependent


@pytest.mark.parametrize("arch", KNOWN)
@pytest.mark.parametrize("form", ["one", "many accepted", "prefill"])
def test_every_form_compiles_for_every_architecture(arch, form):
    assert_within_limits(compiled(arch, **FORMS[form], pdl=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "types",
    [{}, {"width": 2, "has_bias": True}, {"width": 6, "state_dtype": "fp32", "has_bias": True},
     {"dtype": "fp32", "weight_dtype": "fp32"}, {"dtype": "fp16", "weight_dtype": "fp32"}],
    ids=str,
)  # fmt: skip
def test_every_form_and_width_compiles_without_spills(form, types):
    if types.get("width") == 6 and FORMS[form].get("depth"):
        types = {**types, "depth": 16}
    elif types.get("width") == 6:
        types = {**types, "depth": 5}
    if form == "prefill alone":
        types = {name: value for name, value in types.items() if name != "depth"}
    found = compiled(**{**FORMS[form], **types})
    assert_within_limits(found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_aligned_kernels_move_16_bytes_a_time(form, arch):
    found = compiled(arch, **FORMS[form], has_bias=True)
    config, plan = found.config, found.plan
    one = found.vectors("bf16", plan.block_m * plan.block_n)
    channel = found.vectors("bf16", plan.block_n)
    # x, the taps as one word, the window.
    loads = one * found.turns + found.vectors("bf16", plan.block_n * config.width)
    if not config.prefill:
        loads += channel * (config.width - 1)
    assert found.count("ld", wide=True) >= loads
    assert found.count("st", wide=True) >= one
    if not config.prefill:
        # All that is stored, and of what is loaded all but tables.
        assert found.count("st", wide=True) == found.count("st")
        tables = {"one": 1, "many": 1}[found.form] + bool(config.accepted_dtype)
        tables += bool(config.counts_dtype) + 2 * bool(config.seqlens_dtype) + config.has_dst
        assert found.count("ld") - found.count("ld", wide=True) == tables


@pytest.mark.parametrize("form", FORMS)
def test_unaligned_kernels_assume_no_alignment(form):
    found = compiled(**FORMS[form], aligned=False, packed_channels="depth" not in FORMS[form])
    assert found.manifest["spills"] == 0
    assert not re.search(r"(ld|st)\.global[.\w:]*\.v[248]\.", found.ptx)


@pytest.mark.parametrize("form", ["one", "one right", "many right", "prefill"])
def test_windows_of_columns_side_by_side_leave_x_and_out_their_vectors(form):
    found = compiled(**FORMS[form], packed_channels=False)
    assert found.manifest["spills"] == 0
    vectors = found.vectors("bf16", found.plan.block_m * found.plan.block_n)
    assert found.count("ld", wide=True) >= vectors * found.turns
    assert found.count("st", wide=True) >= vectors


@pytest.mark.parametrize("smallest", [True, False])
@pytest.mark.parametrize("form", ["one", "one accepted", "many accepted", "many right"])
def test_window_and_taps_are_loaded_before_the_dependency_wait(form, smallest):
    found = compiled(smallest=smallest, **FORMS[form], has_bias=True, pdl=True)
    before, after = found.ptx.split("griddepcontrol.wait", 1)
    assert "griddepcontrol.launch_dependents" in after.split("ld.global")[0]
    channel = found.vectors("bf16", found.plan.block_n)
    taps = found.vectors("bf16", found.plan.block_n * found.config.width)
    tables = 1 + bool(found.config.accepted_dtype) + 2 * bool(found.config.seqlens_dtype)
    assert found.count("ld", ptx=before) >= tables + channel * (3 + 1) + taps
    # x, which the kernel ahead writes, is all that is read after it; nothing is written before.
    tokens = found.plan.block_m if found.config.many else 1
    assert found.count("ld", ptx=after) == found.turns * tokens * channel
    assert "st.global" not in before
    assert "st.global" in after


@pytest.mark.parametrize("form", ["one", "many accepted"])
def test_a_late_plan_lets_nobody_start_before_it_has_ended(form):
    config, arch = KernelConfig(family="conv1d", **FORMS[form], pdl=True), Arch.of("sm_90")
    early = dispatch(config, arch)[-1].plan
    found = Compiled(config, dataclasses.replace(early, early=False), arch)
    assert "griddepcontrol.wait" in found.ptx
    assert "griddepcontrol.launch_dependents" not in found.ptx
    assert found.manifest["spills"] == 0


@pytest.mark.parametrize(
    "form", [n for n in FORMS if n not in ("prefill of rows", "prefill alone")]
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_barrier_stands_between_the_reads_of_a_window_and_its_writes(form, packed):
    # In the compiler's own words, before it adds barriers that pass values between threads.
    found = compiled(**FORMS[form], packed_channels=packed)
    before, after = found.ttgir.split("gpu.barrier")
    config = found.config
    # Of inputs, some are read after it: the last ones of a chunk, and all but a row's first block.
    inputs = config.depth if config.prefill else found.plan.block_m if config.many else 0
    assert len(re.findall("tt.load", after)) == inputs
    assert "tt.store" not in before
    assert "tt.store" in after
    # Computed is behind it, and of rows behind a branch as well: ptxas would rather put a sum
    # between two loads, and so wait twice.
    assert "math.fma" not in before
    if found.form == "many":
        assert "math.fma" not in after.split("scf.if")[0].split("cf.cond_br")[0]


@pytest.mark.parametrize(
    ("arch", "dtype"), [("sm_80", "bf16"), ("sm_90", "bf16"), ("sm_90", "fp32"), ("sm_120", "fp16")]
)
@pytest.mark.parametrize("form", ["one", "many", "prefill"])
@pytest.mark.parametrize("pdl", [False, True])
def test_every_plan_of_the_table_compiles_within_limits(arch, dtype, form, pdl):
    for smallest in (True, False):
        found = compiled(arch, smallest, **FORMS[form], dtype=dtype, weight_dtype=dtype, pdl=pdl)
        assert_within_limits(found)
        assert found.count("st", wide=True) >= 1
