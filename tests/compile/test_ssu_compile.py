"""Every ssu kernel on every architecture: it compiles, within limits, to the instructions meant."""

from __future__ import annotations

import dataclasses
import re

import pytest
from cases import covering
from placing import placed
from ssu_calls import ROUNDINGS, SCALED, SERVED

from ssmgen import Arch, KernelConfig, Plan, compiler
from ssmgen.arch import KNOWN
from ssmgen.families import spec
from ssmgen.families.ssu.config import ITEMSIZE
from ssmgen.plan import dispatch
from ssmgen.template import TRITON_TYPES, key

# Where no plan was measured, eleven warps, about three a scheduler, must fit the 65536 registers of
# an SM, or too few loads are in flight. Where plans were measured, the clock has spoken; a thread
# cannot have more than 255.
GUESSED, MOST = 65536 // (11 * 32), 255
MEASURED = {"sm_90"}

ROUNDED = ("fp16", "bf16", "int16", "int8", "fp8_e4m3fn")
NO_PDL = {"sm_80", "sm_86", "sm_89"}
CVT_RS = {"sm_100", "sm_103"}
# Each generation, and those whose code differs from it by little.
GENERATIONS = ("sm_80", "sm_90", "sm_100", "sm_120")
SIBLINGS = tuple(arch for arch in KNOWN if arch not in GENERATIONS)
# There ptxas may give up two values for one more warp, however few registers are in use.
MAY_SPILL = {"sm_100": 8, "sm_103": 8, "sm_120": 8, "sm_121": 8}


class Compiled:
    """An artifact with the PTX it was made from."""

    def __init__(self, config, plan, arch):
        seen = []
        real = compiler._triton
        try:
            compiler._triton = lambda *a: seen.append(real(*a, stages=True)) or seen[0]
            self.artifact = compiler.compile(config, plan, Arch.of(arch))
        finally:
            compiler._triton = real
        self.config, self.plan, self.arch = config, plan, Arch.of(arch)
        self.manifest = self.artifact.manifest
        self.ptx, self.ttgir = seen[0].asm["ptx"], seen[0].asm["ttgir"]

    def bytes_of(self, pattern):
        """What all threads move with the 16-byte instructions that match, were each run once."""
        return 16 * 32 * self.plan.num_warps * len(re.findall(pattern, self.ptx))

    @property
    def wide_loads(self):
        return self.bytes_of(r"\bld\.global[.\w:]*\.v4\.b32") + self.bytes_of(r"cp\.async\.cg\.")

    @property
    def wide_stores(self):
        return self.bytes_of(r"\bst\.global[.\w:]*\.v4\.b32")

    @property
    def tile(self):
        return self.plan.block_m * self.plan.block_n * ITEMSIZE[self.config.state_dtype]


_compiled = {}


def compiled(config, plan, arch):
    name = key(config, plan, Arch.of(arch))
    if name not in _compiled:
        _compiled[name] = Compiled(config, plan, arch)
    return _compiled[name]


def largest(config, arch):
    """The kernel for the largest batches."""
    return compiled(config, dispatch(config, Arch.of(arch))[-1].plan, arch)


def for_largest(arch, **fields):
    """The kernel for the largest batches of a config on an arch."""
    return largest(KernelConfig(**fields), arch)


def may_spill(found):
    """Bytes a thread. The caps on the matrix form's registers are those measured fastest, a few
    words of spills included."""
    if found.plan.algorithm == "matrix":
        return 16 if found.config.ntokens <= 8 else 144
    return MAY_SPILL.get(str(found.arch), 0)


def assert_within_limits(found, registers=None):
    manifest, arch = found.manifest, str(found.arch)
    assert found.artifact.cubin.startswith(b"\x7fELF")
    assert manifest["spills"] <= may_spill(found)
    assert manifest["registers"] <= (registers or (MOST if arch in MEASURED else GUESSED))
    assert manifest["shared"] <= found.arch.shared_memory
    assert manifest["registers"] * 32 * manifest["num_warps"] <= 65536


def assert_right_instructions(found):
    config, arch = found.config, str(found.arch)
    halves = config.state_dtype in ("fp16", "bf16")
    hardware = config.rounding == "stochastic" and halves and config.aligned
    assert ("cvt.rs." in found.ptx) == (hardware and arch in CVT_RS)
    if hardware and arch in CVT_RS:
        assert f"cvt.rs.{config.state_dtype.replace('fp', 'f')}x2.f32" in found.ptx
    assert ("griddepcontrol" in found.ptx) == (config.pdl and arch not in NO_PDL)
    assert f".target {arch}" in found.ptx


def _served():
    """Every kernel on each generation, and on one of the siblings."""
    for i, served in enumerate(SERVED):
        for arch in (*GENERATIONS, SIBLINGS[i % len(SIBLINGS)]):
            yield arch, *served


@pytest.mark.parametrize(("arch", "algorithm", "state", "rounding"), _served())
def test_every_kernel_compiles_within_limits(arch, algorithm, state, rounding):
    found = for_largest(arch, algorithm=algorithm, state_dtype=state, rounding=rounding)
    assert found.plan.algorithm == algorithm
    assert_within_limits(found)
    assert_right_instructions(found)


@pytest.mark.parametrize("sizes", [(64, 128), (80, 128)], ids=str)
@pytest.mark.parametrize(("algorithm", "state", "rounding"), SERVED)
def test_aligned_states_move_16_bytes_a_time(algorithm, state, rounding, sizes):
    dim, dstate = sizes
    found = for_largest(
        "sm_90", algorithm=algorithm, state_dtype=state, rounding=rounding, dim=dim, dstate=dstate
    )
    assert_within_limits(found)
    # A loop's body may stand there more than once.
    assert found.wide_loads >= found.tile
    assert found.wide_stores >= found.tile
    assert found.wide_stores % found.tile == 0


@pytest.mark.parametrize("arch", GENERATIONS)
@pytest.mark.parametrize("state", ROUNDED)
@pytest.mark.parametrize(("algorithm", "warps"), [("simple", 1), ("simple", 4), ("vertical", 1)])
def test_no_random_bits_pass_between_threads(arch, state, algorithm, warps):
    """Each thread computes those of the elements it holds."""
    plan = Plan(algorithm=algorithm, block_m=8 * warps, block_n=128, num_warps=warps)
    nearest, stochastic = (
        compiled(KernelConfig(state_dtype=state, rounding=rounding), plan, arch)
        for rounding in ("nearest", "stochastic")
    )
    once, often = (1 + ("loop_unroll_factor" in k.artifact.source) for k in (nearest, stochastic))
    for exchange in ("shfl.sync.idx", "bar.sync", "ld.shared"):
        found, allowed = stochastic.ptx.count(exchange), nearest.ptx.count(exchange)
        assert found / often <= allowed / once, exchange


PACKED = re.compile(r"elementwise_inline_asm.*packed_element = (\d+) : i32.*?: (.*) -> (.*)$", re.M)
SIDE_BY_SIDE = re.compile(
    r"sizePerThread = \[\d+, \d*[2468]\].*order = \[1, 0\]|register = \[\[0, 1\]"
)


@pytest.mark.parametrize(
    ("arch", "state"),
    [("sm_80", "int8"), ("sm_90", "int16"), ("sm_90", "fp8_e4m3fn"), ("sm_100", "fp16"),
     ("sm_100", "bf16"), ("sm_120", "int8")],
)  # fmt: skip
@pytest.mark.parametrize("fields", [{}, {"ntokens": 3}, {"dim": 8, "dstate": 8}], ids=str)
@pytest.mark.parametrize(("algorithm", "stages"), [("simple", 1), ("vertical", 1), ("vertical", 3)])
def test_elements_whose_words_are_shared_are_neighbours(arch, state, fields, algorithm, stages):
    """An element takes its half of a random word by its place among the registers of its lane."""
    if algorithm == "vertical" and "ntokens" in fields:
        algorithm = "simple"
    wanted = Plan(algorithm=algorithm, block_m=8, block_n=128, num_warps=1, num_stages=stages)
    for aligned in (True, False):
        config = KernelConfig(state_dtype=state, rounding="stochastic", aligned=aligned, **fields)
        plan = spec("ssu").fit(config, wanted, Arch.of(arch))
        ttgir = compiled(config, plan, arch).ttgir
        layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.M))
        packed = [match for match in PACKED.findall(ttgir) if int(match[0]) > 1]
        assert bool(packed) == aligned
        for _, operands, result in packed:
            for name in set(re.findall(r"tensor<[^,]+, (#\w+)>", operands + result)):
                assert SIDE_BY_SIDE.search(layouts[name]), layouts[name]


@pytest.mark.parametrize(("algorithm", "state", "rounding"), SERVED)
def test_unaligned_variants_compile_and_assume_no_alignment(algorithm, state, rounding):
    arch = "sm_80" if state in SCALED else "sm_90"
    found = for_largest(
        arch, algorithm=algorithm, state_dtype=state, rounding=rounding, aligned=False
    )
    assert_within_limits(found, MOST)
    assert found.wide_loads == found.wide_stores == 0
    assert not re.search(r"(ld|st)\.global[.\w:]*\.v[248]\.", found.ptx)


TOKENS = {
    "dense": {"ntokens": 6},
    "intermediate": {"ntokens": 6, "has_intermediate": True, "update_state": False, "has_z": True},
    "sequences": {
        "ntokens": 8, "seqlens_dtype": "int32", "accepted_dtype": "int32", "has_dst": True,
        "dst_tokens": True,
    },
    "tree": {"ntokens": 16, "parents_dtype": "int32", "has_intermediate": True},
    "mamba1 tree": {"ntokens": 6, "parents_dtype": "int32", "tie_hdim": False, "dstate": 16},
    "untied tree": {"ntokens": 6, "parents_dtype": "int32", "tie_hdim": False},
}  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "kind", "rounded"), covering(("sm_80", "sm_90", "sm_100"), tuple(TOKENS), ROUNDINGS)
)
def test_kernels_of_many_tokens_compile_without_spills(arch, kind, rounded):
    state, rounding = rounded
    found = for_largest(arch, state_dtype=state, rounding=rounding, **TOKENS[kind])
    assert_within_limits(found, MOST)
    assert_right_instructions(found)
    assert found.wide_loads >= found.tile
    assert found.wide_stores >= found.tile


@pytest.mark.parametrize("tokens", [2, 8, 9, 16])
@pytest.mark.parametrize("state", ["fp32", "bf16", "fp16"])
def test_the_matrix_form_multiplies_on_tensor_cores_and_moves_16_bytes_at_a_time(state, tokens):
    config = KernelConfig(state_dtype=state, ntokens=tokens, algorithm="matrix", has_z=True)
    for choice in dispatch(config, Arch.of("sm_90")):
        found = compiled(config, choice.plan, "sm_90")
        assert found.plan.algorithm == "matrix"
        assert_within_limits(found, 255)
        assert "mma.sync.aligned.m16n8k16" in found.ptx
        copies = re.findall(r"cp\.async\.\w+\.shared\.global .*?\], .*?\], (\w+),", found.ptx)
        assert copies
        assert set(copies) == {"0x10"}
        assert found.wide_stores >= found.tile


@pytest.mark.parametrize("arch", KNOWN)
@pytest.mark.parametrize("state", ["fp32", "bf16", "fp16"])
def test_the_matrix_form_compiles_for_every_architecture(arch, state):
    found = for_largest(arch, state_dtype=state, ntokens=6, algorithm="matrix")
    assert_within_limits(found, 255)


def _shipped():
    """Every plan measured, with the very config it was measured with; and some the model takes."""
    for state in ITEMSIZE:
        for rounding in ("nearest", "stochastic"):
            for pdl in (False, True):
                if (state, rounding) != ("fp32", "stochastic"):
                    config = KernelConfig(state_dtype=state, rounding=rounding, pdl=pdl)
                    others = ("sm_80", "sm_100", "sm_120") if state in ("bf16", "int8") else ()
                    for arch in ("sm_90", *others):
                        for choice in dispatch(config, Arch.of(arch))[:-1]:
                            yield pytest.param(
                                config, choice.plan, arch, id=f"{arch}-{state}-{rounding}-{pdl}"
                            )


@pytest.mark.parametrize(("config", "plan", "arch"), _shipped())
def test_every_plan_that_dispatch_takes_compiles_within_limits(config, plan, arch):
    found = compiled(config, plan, arch)
    assert_within_limits(found)
    assert_right_instructions(found)
    assert found.wide_stores >= found.tile


@pytest.mark.parametrize("arch", KNOWN)
@pytest.mark.parametrize(("state", "rounding"), [("fp16", "stochastic"), ("int8", "nearest")])
def test_dependent_launch_is_there_only_where_asked_for_and_supported(arch, state, rounding):
    for pdl in (True, False):
        found = for_largest(arch, state_dtype=state, rounding=rounding, pdl=pdl)
        assert_within_limits(found)
        assert_right_instructions(found)


@pytest.mark.parametrize(("state", "rounding"), [("fp32", "nearest"), ("fp16", "stochastic")])
def test_the_state_is_loaded_before_the_dependency_wait(state, rounding):
    config = KernelConfig(algorithm="simple", state_dtype=state, rounding=rounding, pdl=True)
    plan = dispatch(config, Arch.of("sm_90"))[-1].plan
    found = compiled(config, dataclasses.replace(plan, early=True), "sm_90")
    before, after = found.ptx.split("griddepcontrol.wait", 1)
    loads = re.findall(r"ld\.global[.\w:]*\.v4\.b32", before)
    assert 16 * 32 * found.plan.num_warps * len(loads) >= found.tile
    assert "st.global" not in before
    assert "st.global" in after


PLACED = {
    "one": {},
    "odd": {"dim": 80, "dstate": 96, "has_z": True},
    "mamba1": {"dstate": 16, "tie_hdim": False},
    "drafts": {"ntokens": 6, "has_intermediate": True, "entry_dtype": "int64"},
    "sequences": {"ntokens": 4, "seqlens_dtype": "int32", "accepted_dtype": "int32",
                  "has_dst": True, "dst_tokens": True},
    "wide": {"dstate": 512},
}  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "form", "state"), covering(GENERATIONS, tuple(PLACED), ("fp32", "bf16", "fp16"))
)
def test_in_a_placed_plan_nothing_passes_through_shared_memory(arch, form, state):
    plans = placed(KernelConfig(algorithm="simple", state_dtype=state, **PLACED[form]), arch)
    assert plans
    for plan in plans:
        config = KernelConfig(algorithm="simple", state_dtype=state, **PLACED[form])
        found = compiled(config, plan, arch)
        assert found.manifest["spills"] <= may_spill(found)
        assert found.wide_loads >= found.tile
        assert found.wide_stores >= found.tile
        across = plan.block_n > 32 * 16 // ITEMSIZE[state]
        if not across:
            assert "bar.sync" not in found.ptx
            assert found.manifest["shared"] == 0


@pytest.mark.parametrize("state", ["int8", "fp8_e4m3fn"])
def test_capped_plans_of_small_states_fit_without_spills(state):
    config = KernelConfig(state_dtype=state)
    plan = Plan(algorithm="vertical", block_m=8, block_n=128, num_warps=1, num_stages=4, maxnreg=96)
    found = compiled(config, plan, "sm_90")
    assert_within_limits(found)
    assert found.manifest["registers"] <= 96


@pytest.mark.parametrize(("state", "ntokens"), [("fp32", 1), ("fp16", 1), ("bf16", 3)])
def test_a_late_plan_reads_no_state_before_it_waits(state, ntokens):
    config = KernelConfig(algorithm="simple", state_dtype=state, ntokens=ntokens, pdl=True)
    plan = dispatch(config, Arch.of("sm_90"))[-1].plan
    found = compiled(config, dataclasses.replace(plan, early=False), "sm_90")
    assert_within_limits(found)
    before, after = found.ptx.split("griddepcontrol.wait", 1)
    assert not re.search(r"ld\.global[.\w:]*\.v4\.b32", before)
    assert "griddepcontrol.launch_dependents" in after.split("ld.global")[0]


SIZES = ((80, 128), (96, 96), (160, 64), (192, 256), (512, 512), (8, 8))


@pytest.mark.parametrize(
    ("arch", "sizes", "algorithm"),
    covering(("sm_80", "sm_90", "sm_120"), SIZES, ("simple", "vertical", "horizontal")),
)
def test_odd_and_extreme_sizes_compile_without_spills(arch, sizes, algorithm):
    dim, dstate = sizes
    for state in ("bf16", "int8"):
        if algorithm != "horizontal" or state not in SCALED:
            found = for_largest(
                arch, algorithm=algorithm, state_dtype=state, dim=dim, dstate=dstate
            )
            assert_within_limits(found, MOST)


@pytest.mark.parametrize(("algorithm", "state", "rounding"), SERVED)
def test_mamba1_kernels_compile_without_spills(algorithm, state, rounding):
    found = for_largest(
        "sm_90", algorithm=algorithm, state_dtype=state, rounding=rounding, tie_hdim=False,
        dstate=16, has_z=True,
    )  # fmt: skip
    assert_within_limits(found, MOST)


def test_the_manifest_lists_the_arguments_of_the_binary():
    found = for_largest("sm_90", state_dtype="int8", rounding="stochastic")
    parameters = re.search(r"\.entry \w+\((.*?)\n\)", found.ptx, re.DOTALL).group(1)
    widths = re.findall(r"\.param \.(?:u|b|s)(\d+)( \.ptr)?", parameters)
    types = [type for _, type in found.manifest["arguments"]]
    wanted = ["64" if type.startswith("*") else type[1:] for type in types]
    wanted += ["64"] * found.manifest["scratch_pointers"]
    assert [width for width, _ in widths] == wanted
    assert {t.removeprefix("*") for t in types if t.startswith("*")} <= TRITON_TYPES.keys()


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize(
    ("fields", "rows", "size"),
    [
        ({"state_dtype": "bf16"}, 16, 16 * 128 * 2),
        ({"state_dtype": "int16", "dim": 80, "dstate": 96, "has_z": True}, 16, 16 * 96 * 2),
        ({"family": "gdn", "state_dtype": "bf16", "pdl": True}, 32, 32 * 128 * 2),
        ({"family": "gdn", "head_k_dim": 96, "index_dtype": None}, 4, 4 * 96 * 4),
    ],
    ids=str,
)
def test_one_thread_asks_once_for_as_much_as_a_program_loads(arch, fields, rows, size):
    config = KernelConfig(**fields)
    plan = Plan(algorithm="simple", block_m=rows, block_n=128, num_warps=1, prefetch=512)
    plan = spec(config.family).fit(config, plan, Arch.of(arch))
    found = compiled(config, plan, arch)
    (line,) = (line for line in found.ptx.splitlines() if "prefetch" in line)
    asks = rf"@\w+ cp\.async\.bulk\.prefetch\.L2\.global \[%rd\d+\], {size};"
    assert re.fullmatch(asks, line.strip())
    assert_within_limits(found)
