"""The chain of a convolution and the op after it, without a GPU: what is measured, and that what
is wrong is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import Clock

from ssmgen.arch import Arch
from ssmgen.bench import chain as module
from ssmgen.bench.chain import OPS, Links
from ssmgen.bench.grid import Wanted, config_of, gdn_config
from ssmgen.bench.problems.gdn import GdnProblem
from ssmgen.bench.problems.ssu import SsuProblem
from ssmgen.bench.report import load, tables
from ssmgen.bench.session import Session, run

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def links(name: str, batch: int = 3) -> Links:
    make: dict[str, Any] = {
        "SSU": lambda **o: SsuProblem(config_of("fp16", dim=16, dstate=16), batch, 4, **o),
        "GDN": lambda **o: GdnProblem(
            gdn_config("fp32", head_k_dim=16, head_v_dim=24), batch, 4, **o
        ),
    }
    return Links(make[name](device="cpu", pool_bytes=0))


def right(chained: Links) -> None:
    chained.both(1, False)
    chained.both(0, False)


def without_conv(chained: Links) -> None:
    chained.op(1, False)
    chained.op(0, False)


def without_op(chained: Links) -> None:
    chained.conv(1, False)
    chained.conv(0, False)


def other_input(chained: Links) -> None:
    chained.both(1, False)
    chained.conv(0, False)
    chained.problem.packed.mul_(1.1)
    chained.op(0, False)


def other_slot(chained: Links) -> None:
    right(chained)
    chained.problem.pool[0] += 1


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("replay", "said"),
    [
        (without_conv, "output not written"),
        (without_op, "output not written"),
        (other_input, "output of the conv off by"),
        (other_slot, "a slot that was not named"),
    ],
)
def test_what_is_wrong_in_a_chain_is_seen(name, replay, said):
    chained = links(name)
    assert chained.verify(lambda: right(chained)) == ""
    assert said in chained.verify(lambda: replay(chained))


@pytest.mark.parametrize("name", OPS)
def test_pdl_is_asked_of_both_links(name, monkeypatch):
    chained = links(name)
    asked: list[Any] = []
    monkeypatch.setattr(module, "causal_conv1d_update", lambda *a, pdl, **o: asked.append(pdl))
    chained._ops = [lambda pdl: asked.append(pdl)] * 2
    chained.both(0, True)
    chained.both(1, False)
    assert asked == [True, True, False, False]


@pytest.mark.parametrize("name", OPS)
def test_windows_move_in_the_slots_of_the_op(name):
    chained = links(name)
    mine = chained.problem.sources[1].long()
    before = chained.windows.clone()
    chained.conv(1, False)
    assert torch.equal(chained.windows[mine, :, :-1], before[mine, :, 1:])
    assert torch.equal(chained.windows[mine, :, -1], chained.x)
    changed = (chained.windows != before).flatten(1).any(1).nonzero()[:, 0]
    assert sorted(mine.tolist()) == changed.tolist()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    checked: list[Any] = []

    def check(self: Links, pdl: bool) -> str:
        checked.append((self.problem.config.family, self.problem.nheads, pdl))
        return "off" if (self.problem.config.family, pdl) == ("gdn", True) else ""

    monkeypatch.setattr(Links, "check", check)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return checked


@pytest.mark.parametrize(("arch", "early"), [("sm_80", False), ("sm_90", True)])
def test_a_section_has_both_chains_with_and_without_pdl(arch, early, measured):
    made = Session(wanted=Wanted(heads=(2,), batches=(1,)), device="cpu", pool_bytes=0, rounds=1,
                   arch=Arch.of(arch), record=Clock(2.0))  # fmt: skip
    result = run("chain", made)
    assert "failed" not in result
    found = {cell["op"]: cell for cell in result["cells"]}
    assert list(found["SSU"]["us"]) == [
        "conv alone", "SSU alone", "chain", *(["chain with PDL"] if early else []),
    ]  # fmt: skip
    assert list(found["GDN"]["us"]) == ["conv alone", "GDN alone", "chain"]
    assert found["GDN"]["wrong"] == ({"chain with PDL": "off"} if early else {})
    assert {pdl for _, _, pdl in measured} == ({False, True} if early else {False})
    ssu, gdn = tables(result)
    assert (ssu.title, gdn.title) == ("conv and SSU", "conv and GDN")
    assert any("WRONG: chain with PDL" in note for note in gdn.notes) == early
    assert not ssu.notes


def test_a_chain_of_before_has_its_one_table_without_a_title():
    (table,) = tables(load(RESULTS / "chain-h200.json"))
    assert table.title == ""
    assert table.columns[2:] == ["conv alone", "SSU alone", "chain", "chain with PDL"]


def test_gdn_is_that_of_qwen3_next():
    make, layers = OPS["GDN"]
    assert layers == (32, 8)
    problem = make(1, 32, device="cpu", pool_bytes=0)
    assert isinstance(problem, GdnProblem)
    assert (problem.k_heads, problem.packed.shape[-1]) == (16, 8192)
