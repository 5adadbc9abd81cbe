"""`ssmgen doctor` launches on a GPU, sees a wrong kernel there, and leaves the store alone."""

from __future__ import annotations

import pytest

from ssmgen import compiler, template
from ssmgen.cli.doctor import examine

pytestmark = pytest.mark.gpu


def test_the_round_trip_ends_with_a_launch_that_is_right(store_dir):
    report = examine()
    assert report["ok"], report["findings"]
    assert "launch" in report["round_trip"]["milliseconds"]
    assert 0 < report["round_trip"]["share_of_allowed_error"] <= 1
    assert not store_dir.exists()


def test_a_kernel_that_runs_and_is_wrong_is_a_problem(monkeypatch, store_dir):
    def broken(*arguments):
        source = template.render(*arguments)
        assert "x_ * D_" in source
        return source.replace("x_ * D_", "D_")

    monkeypatch.setattr(compiler, "render", broken)
    report = examine()
    (problem,) = [f["what"] for f in report["findings"] if f["level"] == "problem"]
    assert "the kernel ran and is wrong: the output is off by" in problem
    assert not store_dir.exists()
