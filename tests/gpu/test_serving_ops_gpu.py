"""The serving simulation with conv, gated delta net, pool and metadata on a GPU, at the shape of
Qwen3-Next and at one with K != V."""

from __future__ import annotations

import pytest
from gdn_steps import Model
from serving import assert_close, assert_same_outputs
from serving_gdn import POLICIES, Server, exact

import ssmgen

pytestmark = pytest.mark.gpu

MODELS = {
    "Qwen3-Next": Model(layers=2, H=16, HV=32, K=128, V=128),
    "K is not V": Model(layers=2, H=4, HV=12, K=128, V=64),
}


def served(name, **options):
    return Server(steps=ssmgen, model=MODELS[name], device="cuda", requests=8, **options)


@pytest.fixture(scope="module", params=MODELS)
def alone(request):
    """One request at a time, one token at a time, without drafts."""
    server = served(request.param, drafts=0, rows=1)
    wanted = exact(server)
    found = server.run()
    assert_close(found, wanted, 1e-5)
    return request.param, found


@pytest.mark.parametrize(
    "options",
    [{}, {"uniform": True}, {"moves": True, "padded": True, "pad_slot_id": 0},
     {"transposed": True, "moves": True, "counts": "table"}],
    ids=" ".join,
)  # fmt: skip
def test_speculation_changes_no_bit_of_what_is_accepted(options, alone):
    name, wanted = alone
    if options.get("transposed"):
        # Sums over K have another order there; its bits are those of itself, token by token.
        wanted = served(name, drafts=0, rows=1, transposed=True).run()
    assert_same_outputs(served(name, drafts=3, **options).run(), wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_wrong_policy_is_caught(policy, alone):
    name, wanted = alone
    with pytest.raises(AssertionError, match="outputs differ"):
        assert_same_outputs(served(name, drafts=3, policy=policy).run(), wanted)
