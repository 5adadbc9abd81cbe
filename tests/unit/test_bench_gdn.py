"""A problem of the gated delta net asks for its config, moves the bytes it says, and sees what is
wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gdn_configs import gdn_configs
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmgen.bench.problem import make
from ssmgen.bench.problems.gdn import GdnProblem
from ssmgen.errors import ArgumentValueError
from ssmgen.families import spec
from ssmgen.families.gdn.config import GdnConfig

TINY = {"head_k_dim": 16, "head_v_dim": 24}
VERIFY = {"ntokens": 3, "has_dst": True, "dst_tokens": True, "accepted_dtype": "int32"}


def small(config: GdnConfig, batch: int = 3, nheads: int = 4, **shape: int) -> GdnProblem:
    made = make(config, batch, nheads, device="cpu", pool_bytes=0, **shape)
    assert isinstance(made, GdnProblem)
    return made


@settings(max_examples=80)
@given(gdn_configs(), st.integers(1, 3), st.sampled_from(((4, 2), (6, 2), (8, 2))))
def test_a_call_of_any_config_asks_for_it_and_the_reference_is_right(config, batch, heads):
    problem = small(config, batch, heads[0], k_heads=heads[1])
    for which in (0, problem.sets - 1):
        found = spec("gdn").layout(**problem.arguments(which)).config.fields()
        # batch_invariant is no part of a call.
        assert {**found, "batch_invariant": config.batch_invariant} == config.fields()
    assert problem.verify(problem.launch, 1) == ""


@settings(max_examples=80)
@given(gdn_configs(), st.integers(1, 3))
def test_bytes_are_those_of_the_tensors_with_states_both_ways(config, batch):
    problem = small(config, batch)
    arguments = problem.arguments(0)
    tables = ("state_batch_indices", "dst_state_batch_indices", "intermediate_state_indices")
    total = problem.packed.nbytes
    for name, tensor in arguments.items():
        skipped = ("state", "intermediate_states_buffer", "q", "k", "v", *tables)
        if isinstance(tensor, torch.Tensor) and name not in skipped:
            total += tensor.nbytes
    # Of sources one a row is read, and none of its own where destinations are the same table.
    named = [arguments[name] for name in tables if name in arguments]
    shared = len({tensor.data_ptr() for tensor in named}) < len(named)
    for name in tables:
        if name in arguments and not (shared and name == "state_batch_indices"):
            rows = arguments[name][:, :1] if name == "state_batch_indices" and (
                arguments[name].dim() == 2
            ) else arguments[name]  # fmt: skip
            total += rows.nbytes
    slot = problem.pool[0].nbytes
    states = 1 + (config.ntokens if config.dst_tokens else 1) * config.update_state
    states += config.ntokens * config.has_intermediate
    assert problem.bytes == total + batch * states * slot


def test_a_verify_step_reads_one_of_the_slots_it_writes():
    problem = small(GdnConfig(**VERIFY, **TINY), batch=32)
    for which in range(problem.sets):
        arguments = problem.arguments(which)
        assert torch.equal(arguments["state_batch_indices"], arguments["dst_state_batch_indices"])
    assert set(problem.inputs["num_accepted_tokens"].tolist()) == {1, 2, 3}


def test_the_sets_are_disjoint_and_the_pool_is_as_large_as_asked():
    problem = make(GdnConfig(**VERIFY, **TINY), 3, 4, device="cpu", pool_bytes=100_000)
    slot = problem.pool[0].nbytes
    assert problem.sets * 3 * slot >= 100_000 > (problem.sets - 1) * 3 * slot
    named = problem.sources.flatten()
    assert len(named.unique()) == len(named) == len(problem.pool) - 1
    assert 0 not in named


def test_inputs_are_views_of_one_tensor_in_flat_or_interleaved_packing():
    flat = small(GdnConfig(**TINY))
    inputs = flat.inputs
    assert inputs["q"].data_ptr() == flat.packed.data_ptr()
    assert inputs["k"].data_ptr() - inputs["q"].data_ptr() == 2 * 2 * 16
    grouped = small(GdnConfig(grouped=True, **TINY))
    assert grouped.inputs["v"].shape == (3, 2, 2, 24)
    with pytest.raises(ArgumentValueError, match="1 key heads for 4 value heads"):
        small(GdnConfig(grouped=True, **TINY), k_heads=1)


def spoil_output(problem: GdnProblem) -> None:
    problem.out.view(-1)[-1] += 1


def forget_output(problem: GdnProblem) -> None:
    problem.out.view(-1)[5] = torch.nan


def spoil_state(problem: GdnProblem) -> None:
    if problem.buffer is not None:
        problem.buffer[problem.entries[0, -1], -1, 0, 0] += 1
    else:
        target = problem.sources if problem.targets is None else problem.targets
        problem.pool[target[0].flatten()[-1], 0, 0] += 1


def spoil_other_slot(problem: GdnProblem) -> None:
    problem.pool[0, 0, 0, 0] += 1


def write_other_entry(problem: GdnProblem) -> None:
    problem.buffer[problem.entries[1, 0], 0] = 0


CASES = {
    "one token": GdnConfig(**TINY),
    "bf16": GdnConfig(state_dtype="bf16", **TINY),
    "transposed": GdnConfig(state_dtype="bf16", state_layout="KV", **TINY),
    "verify": GdnConfig(**VERIFY, **TINY),
    "buffer": GdnConfig(ntokens=2, has_intermediate=True, update_state=False, state_layout="KV",
                        entry_dtype="int64", **TINY),
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
    def fresh() -> Any:
        return make(CASES[case], 3, 4, device="cpu", pool_bytes=100_000)

    problem = fresh()

    def launch(which: int) -> None:
        problem.launch(which)
        spoil(problem)

    assert said in problem.verify(launch)
    right = fresh()
    assert right.verify(right.launch) == ""


@pytest.mark.parametrize("spoilt", ["q", "k", "v", "a", "b"])
def test_verify_sees_an_input_that_was_not_heeded(spoilt):
    problem = small(GdnConfig(**TINY))

    def launch(which: int) -> None:
        kept = problem.inputs[spoilt].clone()
        problem.inputs[spoilt].mul_(1.1)
        problem.launch(which)
        problem.inputs[spoilt].copy_(kept)

    # q and k are normalised; of them it is one channel that tells.
    def one_channel(which: int) -> None:
        kept = problem.inputs[spoilt].clone()
        problem.inputs[spoilt][..., 0] = 1
        problem.launch(which)
        problem.inputs[spoilt].copy_(kept)

    assert "off by" in problem.verify(one_channel if spoilt in "qk" else launch)
