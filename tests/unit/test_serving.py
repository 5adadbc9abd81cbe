"""Speculative serving on the op: what is accepted is what decoding without drafts would give."""

from __future__ import annotations

import pytest
import torch
from serving import MUTATIONS, Server, assert_close, assert_same_outputs, exact

KEEPS = ["slots", "buffered"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", KEEPS)
def test_speculation_changes_no_bit_of_what_is_accepted(keep, seed):
    found = Server(drafts=3, keep=keep, seed=seed, requests=12).run()
    assert_same_outputs(found, Server(drafts=0, keep=keep, seed=seed, requests=12).run())


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("drafts", [0, 3])
def test_what_is_served_is_the_recurrence(keep, drafts):
    server = Server(drafts=drafts, keep=keep, requests=12)
    wanted = exact(server)
    assert_close(server.run(), wanted, 1e-5)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_16_bit_state_serves_the_recurrence_within_its_rounding(keep):
    server = Server(drafts=3, keep=keep, state=torch.bfloat16)
    wanted = exact(server)
    # Half a unit of bf16 at each of some twenty steps, of which most is forgotten.
    assert_close(server.run(), wanted, 20 * 2.0**-9)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("keep", KEEPS)
def test_the_simulation_fails_for_a_server_with_this_bug(keep, mutation):
    wanted = Server(drafts=0, keep=keep).run()
    with pytest.raises(AssertionError, match="outputs differ"):
        assert_same_outputs(Server(drafts=3, keep=keep, mutation=mutation).run(), wanted)


def test_without_drafts_a_dropped_offset_is_no_bug():
    """With rows of one token column 0 is the only one: the mutation is in the offset alone."""
    server = {"requests": 5, "steps": 1}
    wanted = Server(drafts=0, **server).run()
    assert_same_outputs(Server(drafts=0, **server, mutation="accepted dropped").run(), wanted)
