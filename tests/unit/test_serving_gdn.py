"""Speculative serving with StatePool and DecodeMetadata: drafts, batches and moves change no bit of
what is accepted; and each way in which engines got this wrong is seen."""

from __future__ import annotations

import pytest
import torch
from serving import assert_close, assert_same_outputs
from serving_gdn import POLICIES, Server, exact


@pytest.fixture(autouse=True)
def _nan_in_free_slots(monkeypatch):
    monkeypatch.setenv("SSMGEN_DEBUG", "1")


def served(**options):
    server = Server(**options)
    outputs = server.run()
    assert server.pool.check() > 20
    assert server.pool.free_slots == server.pool.slots
    return outputs


@pytest.fixture(scope="module")
def token_by_token():
    """By seed: one request at a time, one token at a time, without drafts."""
    found = {}

    def of(seed):
        if seed not in found:
            found[seed] = Server(drafts=0, rows=1, seed=seed).run()
        return found[seed]

    return of


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("uniform", [False, True])
def test_speculation_changes_no_bit_of_what_is_accepted(seed, uniform, token_by_token):
    assert_same_outputs(served(seed=seed, uniform=uniform), token_by_token(seed))


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_what_is_served_is_the_recurrence(drafts):
    server = Server(drafts=drafts, dtype=torch.float64)
    wanted = exact(server)
    assert_close(server.run(), wanted, 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"moves": True},
        {"counts": "table"},
        {"counts": "table", "moves": True, "padded": True},
        {"padded": True},
        {"pad_slot_id": 0, "padded": True},
        {"transposed": True, "moves": True},
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_bit_depends_on_moves_padding_layout_or_where_counts_are(options, seed, token_by_token):
    assert_same_outputs(served(seed=seed, **options), token_by_token(seed))


def test_the_simulation_has_every_kind_of_row_beside_every_other():
    server = Server(moves=True, requests=12, turns=3)
    server.run()
    assert min(server.seen.values()) >= 3, server.seen


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", POLICIES)
def test_a_wrong_policy_is_caught(policy, seed, token_by_token):
    with pytest.raises(AssertionError, match="outputs differ"):
        assert_same_outputs(Server(policy=policy, seed=seed).run(), token_by_token(seed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", POLICIES)
def test_only_the_homogeneous_fix_passes_homogeneous_batches(policy, seed, token_by_token):
    """Which is how it was released."""
    found, wanted = Server(policy=policy, seed=seed, uniform=True).run(), token_by_token(seed)
    if policy == "homogeneous only":
        assert_same_outputs(found, wanted)
    else:
        with pytest.raises(AssertionError, match="outputs differ"):
            assert_same_outputs(found, wanted)
