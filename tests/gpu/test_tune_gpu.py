"""The tuner on a real GPU: a small table that dispatch takes, and kernels that stay right."""

from __future__ import annotations

import json

import pytest
import torch

from ssmgen import KernelConfig, Plan, get_kernel
from ssmgen.arch import gpu_name
from ssmgen.bench.problem import make, planned
from ssmgen.plan import dispatch
from ssmgen.tune import tune
from ssmgen.tune.check import check
from ssmgen.tune.rig import GpuRig
from ssmgen.tune.tuner import cells_of

pytestmark = [pytest.mark.gpu, pytest.mark.timed]

CONFIG = KernelConfig(state_dtype="fp16", index_dtype="int32")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    rig = GpuRig()
    return out, rig, tune([CONFIG], rig, out, budget=90, sizes=(128, 2048))


def test_a_table_of_this_gpu_is_written_and_used(tuned, monkeypatch):
    out, _, report = tuned
    assert not report.missing
    assert not report.failed
    (path,) = report.tables
    data = json.loads((out / path).read_text())
    assert data["gpu"] == torch.cuda.get_device_name() == gpu_name(None)
    monkeypatch.setenv("SSMGEN_TUNED_PATH", str(out))
    kernel = get_kernel(CONFIG)
    rows = [Plan(**row["plan"]) for row in data["rows"]]
    assert [variant.plan for variant in kernel.variants] == rows
    problem = make(CONFIG, 16, 128, pool_bytes=2**26)
    variant = kernel.select(16, 128)
    assert not problem.verify(planned(problem, variant.function, variant.plan))


def test_no_candidate_is_wrong_and_the_times_make_sense(tuned):
    _, _, report = tuned
    for cell in report.cells:
        assert not [o for o in cell["left_out"] if o["why"].startswith("wrong")]
        assert cell["noise"] < 0.05
        least = 2 * cell["batch"] * cell["nheads"] * 64 * 128 * 2 / 10e6  # at 10 TB/s
        assert all(least < s["us"] < 1000 * least + 50 for s in cell["standings"])


def test_a_second_run_measures_nothing(tuned):
    out, rig, _ = tuned
    again = tune([CONFIG], rig, out, budget=90, sizes=(128, 2048))
    assert again.measured == 0
    assert again.tables


def test_check_runs_and_finds_the_plan_in_use_among_the_best():
    rig = GpuRig()
    cells = cells_of([CONFIG], rig.arch, rig.gpu, (3 * 24 * 7,))
    report = check(cells, rig, budget=60)
    assert [c["cell"] for c in report.cells] == [str(cells[0])]
    assert report.cells[0]["margin"] < 0.25


@pytest.mark.parametrize("family", ["ssu", "gdn", "conv1d"])
def test_plans_with_pdl_race_in_a_chain_and_none_is_wrong(family, tmp_path):
    report = tune([KernelConfig(family=family, pdl=True)], GpuRig(), tmp_path, budget=60,
                  sizes=(8192,))  # fmt: skip
    assert not report.failed
    (cell,) = report.cells
    assert not [o for o in cell["left_out"] if o["why"].startswith("wrong")]
    assert {s["plan"]["early"] for s in cell["standings"]} == {True, False}


def test_dispatch_on_this_device_is_by_its_name():
    arch = GpuRig().arch
    found = dispatch(CONFIG, arch, gpu_name(None))
    assert [v.plan for v in get_kernel(CONFIG).variants] == [c.plan for c in found]
