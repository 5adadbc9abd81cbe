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
from ssmgen.bench.chain import OPS, Links, in_chain
from ssmgen.bench.grid import Wanted, config_of, gdn_config
from ssmgen.bench.problem import Problem, make
from ssmgen.bench.problems.gdn import GdnProblem
from ssmgen.bench.problems.ssu import SsuProblem
from ssmgen.bench.report import load, tables
from ssmgen.bench.session import Session, run
from ssmgen.config import KernelConfig
from ssmgen.families.conv1d.config import Conv1dConfig

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


def test_the_chains_that_were_measured_have_a_table_each():
    ssu, gdn = tables(load(RESULTS / "chain-h200.json"))
    assert (ssu.title, gdn.title) == ("conv and SSU", "conv and GDN")
    assert ssu.columns[2:] == ["conv alone", "SSU alone", "chain", "chain with PDL"]


def dependent(family: str, **fields: Any) -> Problem:
    """A problem of one token with PDL, small."""
    configs: dict[str, KernelConfig] = {
        "ssu": config_of("fp16", dim=16, dstate=16),
        "gdn": gdn_config("fp32", head_k_dim=16, head_v_dim=24),
        "conv1d": Conv1dConfig(),
    }
    config = configs[family].replace(pdl=True, **fields)
    return make(config, 3, 512 if family == "conv1d" else 4, device="cpu", pool_bytes=0)


@pytest.mark.parametrize("family", ["ssu", "gdn"])
def test_an_op_with_pdl_is_timed_behind_the_convolution_that_writes_its_input(family):
    problem: Any = dependent(family)
    order = []
    placed = in_chain(problem, 0)(lambda which: order.append((which, problem.packed.clone())))
    for which in (1, 0):
        problem.packed.fill_(torch.nan)
        placed(which)
    assert [which for which, _ in order] == [1, 0]
    assert all(packed.isfinite().all() for _, packed in order)


def test_a_convolution_with_pdl_is_timed_ahead_of_a_gated_delta_net_as_wide(monkeypatch):
    order: list[Any] = []
    real = GdnProblem.call

    def call(self: GdnProblem, which: int) -> Any:
        assert self.config.pdl
        assert (self.batch, self.packed.shape[-1]) == (3, 512)
        launch = real(self, which)
        return lambda: order.append(("op", which)) or launch()

    monkeypatch.setattr(GdnProblem, "call", call)
    problem = dependent("conv1d")
    placed = in_chain(problem, 0)(lambda which: order.append(("conv", which)))
    placed(1)
    placed(5)
    assert [name for name, _ in order] == ["conv", "op"] * 2
    assert [which for name, which in order if name == "conv"] == [1, 5]


@pytest.mark.parametrize(
    ("family", "fields"),
    [("ssu", {"ntokens": 3}), ("gdn", {"index_dtype": None}), ("conv1d", {"many": True})],
)
def test_where_there_is_no_such_chain_a_launch_is_timed_alone(family, fields):
    launch = print
    assert in_chain(dependent(family, **fields), 0)(launch) is launch
    problem = make(config_of("fp16", dim=16, dstate=16), 3, 4, device="cpu", pool_bytes=0)
    assert in_chain(problem, 0)(launch) is launch


def test_gdn_is_that_of_qwen3_next():
    make, layers = OPS["GDN"]
    assert layers == (32, 8)
    problem = make(1, 32, device="cpu", pool_bytes=0)
    assert isinstance(problem, GdnProblem)
    assert (problem.k_heads, problem.packed.shape[-1]) == (16, 8192)
