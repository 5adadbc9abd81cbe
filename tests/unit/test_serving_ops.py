"""The server of tests/serving_gdn.py on the ops themselves: conv, gated delta net, pool and
metadata together give the bits of decoding one token at a time, alone."""

from __future__ import annotations

import pytest
import torch
from gdn_steps import Model
from serving import assert_close, assert_same_outputs
from serving_gdn import POLICIES, Server, exact

import ssmgen

OPTIONS = {"steps": ssmgen, "model": Model(layers=2, H=2, HV=4, K=8, V=16), "requests": 8}


@pytest.fixture(scope="module")
def alone():
    """One request at a time, one token at a time, without drafts."""
    server = Server(drafts=0, rows=1, **OPTIONS)
    wanted = exact(server)
    found = server.run()
    assert_close(found, wanted, 1e-5)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"uniform": True}, {"moves": True, "padded": True, "pad_slot_id": 0},
     {"transposed": True, "moves": True, "counts": "table"}, {"keep": "columns", "padded": True},
     {"keep": "sequences"}, {"keep": "buffer"}, {"keep": "buffer", "padded": True}],
    ids=" ".join,
)  # fmt: skip
def test_speculation_changes_no_bit_of_what_is_accepted(options, alone):
    assert_same_outputs(Server(drafts=3, **OPTIONS, **options).run(), alone)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_wrong_policy_is_caught(policy, alone):
    with pytest.raises(AssertionError, match="outputs differ"):
        assert_same_outputs(Server(drafts=3, policy=policy, **OPTIONS).run(), alone)


@pytest.mark.parametrize("policy", ["original bug", "homogeneous only"])
@pytest.mark.parametrize("keep", ["columns", "sequences", "buffer"])
def test_a_state_that_loses_accepted_tokens_is_caught_however_it_is_kept(keep, policy, alone):
    with pytest.raises(AssertionError, match="outputs differ"):
        assert_same_outputs(Server(drafts=3, policy=policy, keep=keep, **OPTIONS).run(), alone)


def test_a_prompt_that_starts_from_what_its_slot_held_is_caught(alone):
    server = Server(drafts=3, begin=False, **OPTIONS)
    for layer in range(2):
        server.pool.state(layer).fill_(0.5)
    with pytest.raises(AssertionError, match="outputs differ"):
        assert_same_outputs(server.run(), alone)


@pytest.mark.parametrize("keep", ["slots", "buffer"])
def test_a_16_bit_state_serves_the_recurrence_within_its_rounding(keep):
    server = Server(drafts=3, keep=keep, state=torch.bfloat16, **OPTIONS)
    wanted = exact(server)
    # Half a unit of bf16 at each of some twenty steps, of which most is forgotten.
    assert_close(server.run(), wanted, 20 * 2.0**-9)
