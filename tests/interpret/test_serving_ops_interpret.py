"""The serving simulation with conv, gated delta net, pool and metadata on the rendered kernels."""

from __future__ import annotations

import pytest
from gdn_steps import Model
from serving import assert_close, assert_same_outputs
from serving_gdn import POLICIES, Server, exact

import ssmgen

# A seed with which rows without drafts stand beside drafting rows right after they accepted two.
OPTIONS = {
    "steps": ssmgen, "model": Model(layers=1, H=1, HV=1, K=8, V=16), "requests": 3, "rows": 3,
    "turns": 1, "seed": 7,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSMGEN_INTERPRET", "1")
        yield


@pytest.fixture(scope="module")
def alone(_interpreted):
    """One request at a time, one token at a time, without drafts."""
    return Server(drafts=0, **{**OPTIONS, "rows": 1}).run()


@pytest.mark.parametrize("options", [{}, {"padded": True, "transposed": True}], ids=" ".join)
def test_speculation_changes_no_bit_of_what_is_accepted(options, alone):
    server = Server(drafts=2, **OPTIONS, **options)
    close = exact(server)
    found = server.run()
    assert server.seen["mixed"]
    assert server.seen["plain after drafts"]
    assert_same_outputs(found, alone)
    assert_close(found, close, 1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_wrong_policy_is_caught(policy, alone):
    with pytest.raises(AssertionError, match="outputs differ"):
        assert_same_outputs(Server(drafts=2, policy=policy, **OPTIONS).run(), alone)
