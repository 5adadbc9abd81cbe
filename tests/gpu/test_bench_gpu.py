"""The benchmark on a GPU: its timing, its sections at a few cells, and what is wrong is seen."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from typer.testing import CliRunner

from ssmgen.arch import Arch
from ssmgen.bench.chain import OPS, Links
from ssmgen.bench.grid import config_of, gdn_config
from ssmgen.bench.measure import cold, interleaved
from ssmgen.bench.problem import make, plan_of, planned
from ssmgen.bench.session import contest
from ssmgen.bench.spread import spread
from ssmgen.cli import app
from ssmgen.families.conv1d.config import Conv1dConfig
from ssmgen.kernel import build
from ssmgen.launcher import load
from ssmgen.timing import Graph, copy_bandwidth, time_graph

pytestmark = pytest.mark.gpu

STATES = ("fp32", "bf16", "fp16 + SR 10", "int16", "int8 + SR 10", "fp8_e4m3fn")


@pytest.mark.timed
def test_a_graph_takes_as_long_as_its_work():
    small, large = (torch.randn(n * 2**20, device="cuda") for n in (8, 64))
    few, many = (time_graph([functools.partial(t.mul_, -1)] * 4) for t in (small, large))
    assert 3 < many / few < 20
    assert Graph([functools.partial(large.mul_, -1)] * 4).replay() == pytest.approx(many, rel=0.5)


def test_a_graph_keeps_what_its_launches_hold():
    held = torch.ones(2**22, device="cuda")
    where = held.data_ptr()
    graph = Graph([functools.partial(torch.neg, held, out=held)])
    del held
    others = [torch.ones(2**22, device="cuda") for _ in range(4)]
    assert where not in [other.data_ptr() for other in others]
    graph.replay()
    assert all(other.min() == 1 for other in others)


@pytest.mark.timed
def test_interleaved_times_are_those_of_graphs_alone():
    data = torch.randn(2**26, device="cuda")
    launch = functools.partial(data.mul_, -1)
    times = interleaved({"one": [launch] * 4, "two": [launch, launch] * 4}, rounds=5)
    assert times["one"].median == pytest.approx(times["two"].median, rel=0.05)
    assert times["one"].median == pytest.approx(time_graph([launch] * 4), rel=0.1)
    assert len(times["one"].rounds) == 5


@pytest.mark.parametrize("count", [1, 2048, 5001])
def test_spread_writes_every_row_as_often_as_asked_and_nothing_else(count):
    source = torch.randn(3, count, device="cuda")
    memory = torch.full((3 * 4 * count + 8,), torch.nan, device="cuda")
    out = memory[: 3 * 4 * count].view(3, 4, count)
    spread(source, out=out)
    assert torch.equal(out, source.unsqueeze(1).expand_as(out))
    assert memory[3 * 4 * count :].isnan().all()


@pytest.mark.timed
@pytest.mark.parametrize("label", STATES)
def test_ssmgen_is_right_and_no_faster_than_memory(label):
    problem = make(config_of(label), 64, 32)
    found = contest(problem, ("ssmgen", "copy"), rounds=3)
    assert not found["wrong"]
    floor = problem.bytes / copy_bandwidth() * 1e6
    # A copy of the same bytes, and the op, are no faster than the bandwidth allows.
    assert found["us"]["copy"] > 0.9 * floor
    assert found["us"]["ssmgen"] > 0.9 * floor
    assert found["again"] == pytest.approx(found["us"]["ssmgen"], rel=0.1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"index_dtype": None},
        {"index_dtype": "int32", "has_dst": True, "has_z": True},
        {"ntokens": 4},
        {"ntokens": 4, "has_intermediate": True, "update_state": False, "entry_dtype": "int64"},
        {"ntokens": 3, "seqlens_dtype": "int32", "accepted_dtype": "int32"},
        {"ntokens": 5, "parents_dtype": "int64"},
        {"pdl": True},
        {"aligned": False, "tie_hdim": False},
    ],
    ids=lambda fields: ", ".join(fields) or "plain",
)
def test_the_op_and_a_planned_launch_are_right_on_every_kind_of_problem(fields):
    problem = make(config_of("fp16", dim=32, dstate=64, **fields), 37, 6, pool_bytes=2**22)
    assert problem.verify(problem.launch) == ""
    arch = Arch.detect()
    plan = plan_of(problem, arch)
    function = load(build(problem.config, plan, arch), torch.cuda.current_device())
    launch = planned(problem, function, plan)
    assert problem.verify(launch, problem.sets - 1) == ""
    assert len(cold(launch, problem.sets)) == problem.sets


@pytest.mark.parametrize(
    "config",
    [
        gdn_config("fp32"),
        gdn_config("bf16", 4),
        gdn_config("fp32", state_layout="KV", grouped=True, index_dtype=None),
        gdn_config("bf16 + SR 10", ntokens=3, seqlens_dtype="int32", has_intermediate=True,
                   update_state=False, entry_dtype="int64"),
        gdn_config("fp16", kda=True, gate="given", aligned=False),
        Conv1dConfig(),
        Conv1dConfig(many=True, accepted_dtype="int32", index_dtype="int64"),
        Conv1dConfig(width=6, depth=9, packed_channels=False, index_dtype=None),
        Conv1dConfig(many=True, seqlens_dtype="int32", counts_dtype="int64", has_bias=True),
        Conv1dConfig(many=True, prefill=True, has_initial=True, seqlens_dtype="int32"),
        Conv1dConfig(many=True, prefill=True, history="rows", update_state=False, index_dtype=None),
    ],
    ids=repr,
)  # fmt: skip
def test_every_kind_of_problem_of_the_other_families_is_right(config):
    heads = 6 if config.family == "gdn" else 192
    problem = make(config, 37, heads, pool_bytes=2**22)
    assert problem.verify(problem.launch) == ""
    assert problem.verify(problem.launch, problem.sets - 1) == ""


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_a_chain_is_right(name, pdl):
    if pdl and not Arch.detect().pdl:
        pytest.skip("this GPU has no programmatic dependent launch")
    problem = OPS[name][0](5, 8, pool_bytes=2**22)
    assert Links(problem).check(pdl) == ""


def test_a_wrong_launch_is_seen():
    problem = make(config_of("fp16"), 64, 8, pool_bytes=2**22)

    def half(which: int) -> None:
        problem.launch(which)
        problem.out[32:] *= 2

    assert problem.verify(lambda which: None) == "output not written everywhere"
    assert "output off by" in problem.verify(half)


@pytest.mark.parametrize(
    "arguments",
    [
        ["ssu", "--heads", "16", "--states", "fp16,int8+sr", "--batches", "1,16"],
        ["tokens", "--heads", "16", "--states", "fp16", "--tokens", "2,6", "--batches", "4"],
        ["gdn", "--heads", "8", "--tokens", "1,4", "--batches", "1,16"],
        ["conv1d", "--dims", "2048", "--tokens", "1,4", "--batches", "1,16"],
        ["chain", "--heads", "16", "--batches", "1,4"],
        ["host"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_section_runs_from_the_command_to_its_file(arguments, tmp_path):
    options = [] if arguments[0] in ("chain", "host") else ["--contestants", "ssmgen,copy"]
    where = tmp_path / "result.json"
    result = CliRunner().invoke(
        app, ["bench", *arguments, *options, "--quick", "--out", str(where)]
    )
    assert result.exit_code == 0, result.output
    content = json.loads(where.read_text())
    assert content["environment"]["gpu"] == torch.cuda.get_device_name()
    for cell in content.get("cells", ()):
        assert not cell["wrong"]
        assert all(us > 0 for us in cell["us"].values())
    if arguments[0] == "chain":
        expected = 4 if Arch.detect().pdl else 3
        assert all(len(cell["us"]) == expected for cell in content["cells"])
        assert [cell["op"] for cell in content["cells"]] == ["SSU", "SSU", "GDN", "GDN"]
    if arguments[0] == "host":
        assert {"ssmgen op call", "ssmgen bound launch"} <= {r["name"] for r in content["rows"]}
    shown = CliRunner().invoke(app, ["bench", "--table", str(where)])
    assert shown.exit_code == 0
    assert "NVIDIA" in shown.stdout
