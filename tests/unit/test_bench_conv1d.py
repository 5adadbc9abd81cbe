"""A problem of the convolution asks for its config, moves the bytes it says, and sees what is
wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_configs import conv_configs
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmgen.bench.problem import make
from ssmgen.bench.problems.conv1d import Conv1dProblem
from ssmgen.families import spec
from ssmgen.families.conv1d.config import Conv1dConfig


def small(config: Conv1dConfig, batch: int = 3, dim: int = 16, **shape: int) -> Conv1dProblem:
    made = make(config, batch, dim, device="cpu", pool_bytes=0, **shape)
    assert isinstance(made, Conv1dProblem)
    return made


@settings(max_examples=120)
@given(conv_configs(), st.integers(1, 3), st.sampled_from((2, 3, 4)))
def test_a_call_of_any_config_asks_for_it_and_the_reference_is_right(config, batch, tokens):
    problem = small(config, batch, tokens=tokens if config.many else 1)
    for which in (0, problem.sets - 1):
        found = spec("conv1d").layout(**problem.arguments(which)).config.fields()
        # batch_invariant is no part of a call.
        assert {**found, "batch_invariant": config.batch_invariant} == config.fields()
    assert problem.verify(problem.launch, 1) == ""


@settings(max_examples=120)
@given(conv_configs(), st.integers(1, 3), st.sampled_from((2, 3, 4)))
def test_bytes_are_those_of_the_tensors_with_the_columns_that_move(config, batch, tokens):
    problem = small(config, batch, tokens=tokens if config.many else 1)
    arguments = problem.arguments(1)
    total = sum(
        tensor.nbytes for name, tensor in arguments.items()
        if isinstance(tensor, torch.Tensor) and name != "conv_state"
    )  # fmt: skip
    if problem.pool is not None:
        column = batch * problem.nheads * problem.pool.element_size()
        read = set(range(config.depth)) if config.history == "pool" else set()
        # Of a window that moves, what falls out of it and is no tap.
        read -= set(range(min(problem.tokens, config.depth - config.width + 1)))
        written = config.depth
        if config.accepted_dtype:
            written = config.width - 2 + problem.tokens
        elif config.counts_dtype:
            written = min(written, problem.tokens)
        total += column * (len(read) + written)
    assert problem.bytes == total


@pytest.mark.parametrize(
    ("config", "tokens", "columns"),
    [
        (Conv1dConfig(), 1, 3 + 3),
        (Conv1dConfig(width=2), 1, 1 + 1),
        (Conv1dConfig(many=True, accepted_dtype="int32"), 4, 3 + 6),
        (Conv1dConfig(depth=5), 1, 4 + 5),
        (Conv1dConfig(many=True, counts_dtype="int32"), 2, 3 + 2),
        (Conv1dConfig(many=True, prefill=True, history=None), 7, 3),
    ],
)
def test_the_columns_of_a_window_that_move(config, tokens, columns):
    """By hand: of 10 rows of 16 channels."""
    problem = small(config, batch=10, tokens=tokens)
    rest = 2 * 10 * tokens * 16 * 2 + 16 * config.width * 2 + 10 * 4
    rest += 10 * 4 * bool(config.accepted_dtype or config.counts_dtype)
    assert problem.bytes == rest + columns * 10 * 16 * 2


def test_the_sets_are_disjoint_and_the_pool_is_as_large_as_asked():
    config = Conv1dConfig(has_dst=True)
    problem = make(config, 3, 16, device="cpu", pool_bytes=20_000)
    slot = 16 * 3 * 2
    assert problem.sets * 3 * slot >= 20_000 > (problem.sets - 1) * 3 * slot
    named = torch.cat([problem.sources.flatten(), problem.targets.flatten()])
    assert len(named.unique()) == len(named) == len(problem.pool) - 1
    assert 0 not in named


def test_rows_start_from_any_count_of_accepted_tokens():
    problem = small(Conv1dConfig(many=True, accepted_dtype="int32"), batch=64)
    assert set(problem.inputs["num_accepted_tokens"].tolist()) == {1, 2, 3, 4}
    assert problem.pool.shape[2] == 3 + 3


def spoil_output(problem: Conv1dProblem) -> None:
    problem.out[(0,) * problem.out.dim()] += 1


def forget_output(problem: Conv1dProblem) -> None:
    problem.out[(-1,) * problem.out.dim()] = torch.nan


def spoil_state(problem: Conv1dProblem) -> None:
    slot = 3 if problem.sources is None else problem.sources[0][-1]
    problem.pool[slot, -1, -1] += 1


def spoil_other_slot(problem: Conv1dProblem) -> None:
    problem.pool[0, 0, 0] += 1


CASES = {
    "one token": Conv1dConfig(),
    "without table": Conv1dConfig(index_dtype=None, packed_channels=False),
    "verify": Conv1dConfig(many=True, accepted_dtype="int32"),
    "prefill": Conv1dConfig(many=True, prefill=True, has_initial=True, seqlens_dtype="int32"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_output, "output off by"),
        (forget_output, "output not written"),
        (spoil_state, "state of 1 rows wrong"),
        (spoil_other_slot, "a slot that was not named"),
    ],
)
def test_verify_sees_what_is_wrong(case, spoil, said):
    problem = small(CASES[case])

    def launch(which: int) -> None:
        problem.launch(which)
        spoil(problem)

    assert said in problem.verify(launch)
    fresh = small(CASES[case])
    assert fresh.verify(fresh.launch) == ""


def test_verify_sees_a_launch_that_does_nothing_and_takes_a_returned_output():
    problem = small(Conv1dConfig())
    assert problem.verify(lambda which: None) == "output not written everywhere"

    def returning(which: int) -> Any:
        problem.launch(which)
        result = problem.out.clone()
        problem.out.fill_(torch.nan)
        return result

    assert problem.verify(returning) == ""
