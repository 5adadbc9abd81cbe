"""A problem asks for its config, moves the bytes it says, and sees what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssu_configs import configs

from ssmgen import launcher
from ssmgen.arch import Arch
from ssmgen.bench.grid import config_of
from ssmgen.bench.problem import make, plan_of, planned
from ssmgen.bench.problems.ssu import SsuProblem, groups, moved
from ssmgen.errors import UnsupportedError
from ssmgen.families import spec
from ssmgen.families.ssu.config import SsuConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def small(config: SsuConfig, batch: int = 3, nheads: int = 2) -> SsuProblem:
    made = make(config, batch, nheads, device="cpu", pool_bytes=0)
    assert isinstance(made, SsuProblem)
    return made


def of_layout(problem: SsuProblem, which: int) -> dict[str, Any]:
    """The config a call asks for; batch_invariant is no part of a call."""
    fields = spec("ssu").layout(**problem.arguments(which)).config.fields()
    return {**fields, "batch_invariant": problem.config.batch_invariant}


@st.composite
def small_configs(draw):
    config = draw(configs())
    if config.algorithm == "matrix":
        return config.replace(dim=16, dstate=32)
    return config.replace(dim=min(config.dim, 24), dstate=min(config.dstate, 40))


@settings(max_examples=60)
@given(small_configs(), st.integers(1, 3), st.sampled_from((1, 4)))
def test_a_call_of_any_config_asks_for_it_and_the_reference_is_right(config, batch, nheads):
    problem = small(config, batch, nheads)
    for which in (0, problem.sets - 1):
        assert of_layout(problem, which) == config.fields()
    assert problem.verify(problem.launch, 1) == ""


@settings(max_examples=60)
@given(small_configs(), st.integers(1, 3))
def test_bytes_are_those_of_the_tensors_with_states_both_ways(config, batch):
    problem = small(config, batch)
    arguments = problem.arguments(0)
    pools = ("state", "state_scale", "intermediate_states_buffer", "intermediate_state_scales")
    table = problem.sources[0] if problem.sources is not None and config.accepted_dtype else None
    storages = {}
    for name, tensor in arguments.items():
        if isinstance(tensor, torch.Tensor) and name not in pools:
            # Of tables that are rows of larger ones, and of views, the bytes they show.
            own = name.endswith("indices")
            size = tensor.nbytes if own else tensor.untyped_storage().nbytes()
            storages[name if own else tensor.untyped_storage().data_ptr()] = size
    total = sum(storages.values())
    if table is not None:  # of its columns one is read
        total -= table.nbytes - table.nbytes // table.shape[1]
    if not config.aligned:  # the element that packed inputs and output are shifted by
        total -= 2 * problem.out.itemsize
    slot = sum(t[0].nbytes for t in (problem.pool, problem.scale) if t is not None)
    states = 1 + (config.ntokens if config.dst_tokens else 1) * config.update_state
    states += config.ntokens * config.has_intermediate
    assert problem.bytes == total + batch * states * slot


def test_the_floors_of_published_results_are_these_bytes():
    data = json.loads((RESULTS / "ssu-h200.json").read_text())
    seen = set()
    for cell in data["cells"]:
        config = config_of(cell["state"], dim=cell["dim"])
        floor = moved(config, cell["batch"], cell["heads"]) / data["bandwidth"] * 1e6
        assert floor == pytest.approx(cell["floor_us"], rel=1e-9), cell
        seen.add(cell["state"])
    assert len(seen) == 12


def test_the_pool_is_as_large_as_asked_and_its_sets_are_disjoint():
    config = SsuConfig(state_dtype="fp16", dim=16, dstate=32, has_dst=True)
    problem = make(config, 3, 2, device="cpu", pool_bytes=100_000)
    slot = 2 * 16 * 32 * 2
    assert problem.sets * 3 * slot >= 100_000 > (problem.sets - 1) * 3 * slot
    named = torch.cat(
        [
            problem.arguments(i)[name]
            for i in range(problem.sets)
            for name in ("state_batch_indices", "dst_state_batch_indices")
        ]
    )
    assert len(named.unique()) == len(named)
    assert 0 not in named
    assert sorted(named.tolist()) != named.tolist()


def test_arguments_allocate_nothing_on_the_way_to_a_launch():
    config = SsuConfig(dim=16, dstate=16, ntokens=2, dst_tokens=True, has_dst=True,
                       accepted_dtype="int32", has_intermediate=True)  # fmt: skip
    problem = small(config)
    twice = [problem.arguments(1), problem.arguments(1)]
    for name, tensor in twice[0].items():
        if isinstance(tensor, torch.Tensor):
            assert tensor.data_ptr() == twice[1][name].data_ptr(), name


@pytest.mark.parametrize("index_dtype", ["int64", None])
def test_a_planned_launch_has_the_addresses_of_its_slot_set(index_dtype, monkeypatch):
    config = SsuConfig(state_dtype="fp16", dim=16, dstate=32, index_dtype=index_dtype)
    problem = make(config, 3, 2, device="cpu", pool_bytes=20_000)
    plan = plan_of(problem, Arch.of("sm_90"))
    made: list[Any] = []
    launched: list[Any] = []

    def kernel_launch(*arguments: Any) -> Any:
        made.append(arguments)
        return lambda *addresses: launched.append(addresses)

    class Function:
        device = 0

    monkeypatch.setattr(launcher, "Launch", kernel_launch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    run = planned(problem, Function(), plan)
    for which in range(problem.sets):
        run(which)
    layout = spec("ssu").layout(**problem.arguments(0))
    grid = spec("ssu").grid(config, plan, 3, 2)
    assert [arguments[1:] for arguments in made] == [(grid, layout.scalars, False)]
    assert problem.sets > 2
    for which, addresses in enumerate(launched):
        arguments = problem.arguments(which)
        assert addresses == (7, *(arguments[name].data_ptr() for name in layout.tensors))
    assert len(set(launched)) == problem.sets


def test_a_family_without_problems_is_an_error_that_names_it():
    class Config:
        family = "none"

    with pytest.raises(UnsupportedError, match="the family none has no problems"):
        make(Config(), 1, 1)


@pytest.mark.parametrize(("nheads", "count"), [(128, 8), (16, 1), (8, 1), (48, 3), (80, 5)])
def test_there_is_a_group_for_every_sixteen_heads(nheads, count):
    assert groups(nheads) == count


def spoil_output(problem: SsuProblem) -> None:
    problem.out.view(-1)[-1] += 1


def forget_output(problem: SsuProblem) -> None:
    problem.out.view(-1)[5] = torch.nan


def spoil_state(problem: SsuProblem) -> None:
    arguments = problem.arguments(0)
    slot = arguments["state_batch_indices"][-1]
    if problem.config.has_intermediate:
        entry = arguments["intermediate_state_indices"][-1]
        problem.buffer[entry, -1, 0, 0] += 10
    else:
        problem.pool[slot, 0, 0] += 10


def spoil_other_slot(problem: SsuProblem) -> None:
    problem.pool.view(torch.uint8)[0, 0, 0, 0] ^= 1


def write_other_entry(problem: SsuProblem) -> None:
    problem.buffer[problem.entries[1, 0], 0] = 0


CASES = {
    "one token": SsuConfig(state_dtype="fp16", dim=16, dstate=32),
    "scaled": SsuConfig(state_dtype="int16", dim=16, dstate=32),
    "tokens": SsuConfig(dim=16, dstate=32, ntokens=3),
    "buffer": SsuConfig(dim=16, dstate=32, ntokens=2, has_intermediate=True, update_state=False,
                        entry_dtype="int64"),
}  # fmt: skip
FAULTS = [
    (spoil_output, "output"),
    (forget_output, "output not written"),
    (spoil_state, "state"),
    (spoil_other_slot, "a slot that was not named"),
]


@pytest.mark.parametrize(
    ("case", "spoil", "said"),
    [
        *((case, *fault) for case in CASES for fault in FAULTS),
        ("buffer", write_other_entry, "an entry that was not named"),
    ],
)
def test_verify_sees_what_is_wrong(case, spoil, said):
    problem = make(CASES[case], 3, 2, device="cpu", pool_bytes=100_000)

    def launch(which: int) -> None:
        problem.launch(which)
        spoil(problem)

    assert said in problem.verify(launch)
    fresh = make(CASES[case], 3, 2, device="cpu", pool_bytes=100_000)
    assert fresh.verify(fresh.launch) == ""


def test_verify_looks_at_the_rows_it_is_told_and_the_far_end_of_memory():
    problem = make(SsuConfig(dim=8, dstate=16), 9, 2, device="cpu", pool_bytes=40_000)
    which, far = next(
        (i, int(slots.argmax()))
        for i, slots in enumerate(problem.sources)
        if slots.argmax() not in (0, 8)
    )

    def wrong(row: int) -> Any:
        def run(which: int) -> None:
            problem.launch(which)
            problem.out[row] += 1

        return run

    seen = {row for row in range(9) if problem.verify(wrong(row), which, rows=2)}
    assert seen == {0, far, 8}


def test_verify_sees_a_launch_that_does_nothing_after_a_right_one():
    problem = small(SsuConfig(dim=8, dstate=16))
    assert problem.verify(problem.launch) == ""
    assert problem.verify(lambda which: None) == "output not written everywhere"


def test_verify_sees_a_state_that_is_nan():
    problem = small(SsuConfig(dim=8, dstate=16))

    def launch(which: int) -> None:
        problem.launch(which)
        problem.pool[problem.sources[which][0], 1, 2, 3] = torch.nan

    assert problem.verify(launch) == "state off by inf of what is allowed"
