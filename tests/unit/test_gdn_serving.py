"""Speculative serving on the gated delta rule: what is accepted is what decoding without drafts
would give, also where rows without drafts take the one-token kernel beside drafting rows."""

from __future__ import annotations

import pytest
import torch
from gdn_serving import GdnServer, exact
from serving import MUTATIONS, assert_close, assert_same_outputs

WAYS = [{"keep": "slots"}, {"keep": "slots", "plain": True}, {"keep": "buffered"}]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_speculation_changes_no_bit_of_what_is_accepted(way, seed):
    server = GdnServer(drafts=3, seed=seed, requests=12, **way)
    close = exact(server)
    found = server.run()
    assert_same_outputs(found, GdnServer(drafts=0, seed=seed, requests=12, **way).run())
    assert_close(found, close, 1e-5)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_simulation_fails_for_a_server_with_this_bug(way, mutation):
    wanted = GdnServer(drafts=0, **way).run()
    with pytest.raises(AssertionError, match="outputs differ"):
        assert_same_outputs(GdnServer(drafts=3, mutation=mutation, **way).run(), wanted)


def test_a_16_bit_state_serves_the_recurrence_within_its_rounding():
    server = GdnServer(drafts=3, plain=True, state=torch.bfloat16)
    wanted = exact(server)
    # Half a unit of bf16 at each of some twenty steps, of which most is forgotten.
    assert_close(server.run(), wanted, 20 * 2.0**-9)
