"""The serving simulation of tests/serving_gdn.py on the rendered kernels, interpreted."""

from __future__ import annotations

import pytest
from gdn_steps import Model
from serving import assert_close, assert_same_outputs
from serving_gdn import POLICIES, Server, exact

import ssmgen

SMALL = {
    "steps": ssmgen, "model": Model(layers=1, K=8, V=16), "requests": 3, "rows": 2, "turns": 1,
    "drafts": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    monkeypatch.setenv("SSMGEN_DEBUG", "1")


@pytest.mark.parametrize("options", [{"moves": True}, {"counts": "table", "padded": True}])
def test_speculation_changes_no_bit_of_what_is_accepted(options):
    server = Server(**SMALL, **options)
    wanted = exact(server)
    found = server.run()
    server.pool.check()
    assert_close(found, wanted, 1e-5)
    assert_same_outputs(found, Server(**SMALL | {"drafts": 0, "rows": 1}).run())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_wrong_policy_is_caught(policy):
    wanted = Server(**SMALL | {"drafts": 0, "rows": 1}).run()
    with pytest.raises(AssertionError, match="outputs differ"):
        assert_same_outputs(Server(**SMALL, policy=policy).run(), wanted)
