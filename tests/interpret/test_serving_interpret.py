"""The serving simulation of tests/serving.py on the rendered kernels, in Triton's interpreter."""

from __future__ import annotations

import pytest
from serving import MUTATIONS, Server, assert_close, assert_same_outputs, exact

SMALL = {"requests": 3, "rows": 2, "dim": 8, "dstate": 8, "steps": 3}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")


@pytest.mark.parametrize("keep", ["slots", "buffered"])
def test_speculation_changes_no_bit_of_what_is_accepted(keep):
    server = Server(drafts=2, keep=keep, **SMALL)
    close = exact(server)
    found = server.run()
    assert_same_outputs(found, Server(drafts=0, keep=keep, **SMALL).run())
    assert_close(found, close, 1e-5)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_simulation_fails_for_a_server_with_this_bug(mutation):
    wanted = Server(drafts=0, **SMALL).run()
    with pytest.raises(AssertionError, match="outputs differ"):
        assert_same_outputs(Server(drafts=2, mutation=mutation, **SMALL).run(), wanted)
