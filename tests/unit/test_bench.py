"""Grids, contests, noise, tables and pictures of the benchmark: all of it but the GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ssmgen
from ssmgen import kernel
from ssmgen.arch import Arch
from ssmgen.bench import contestants, host, jit, measure, session
from ssmgen.bench.contestants import Missing
from ssmgen.bench.grid import GRIDS, SECTIONS, Wanted, config_of, parse_state
from ssmgen.bench.plots import plot
from ssmgen.bench.problem import make
from ssmgen.bench.report import dump, fit, line, load, markdown, tables
from ssmgen.bench.session import Session, contest, run
from ssmgen.errors import ArgumentValueError, ConfigError, DeviceError, UnsupportedError
from ssmgen.families import spec

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TINY = Wanted(heads=(2,), dims=(16,), states=("fp16",), batches=(1, 3))


class Clock:
    """Stands in for CUDA graphs: runs the calls once, then replays times that a test sets."""

    def __init__(self, *turns: float) -> None:
        self.turns = turns
        self.log: list[int] = []
        self.count = 0

    def __call__(self, launches: Any) -> Any:
        clock, me = self, self.count
        self.count += 1

        class Recorded:
            def replay(self) -> float:
                clock.log.append(me)
                return clock.turns[me % len(clock.turns)]

            def warm_up(self, milliseconds: float) -> None:
                assert milliseconds > 0

        for launch in launches:
            launch()
        return Recorded()


def tiny(**fields: Any) -> Any:
    config = config_of("fp16", dim=16, dstate=32, **fields)
    return make(config, 3, 2, device="cpu", pool_bytes=0)


# Grids


def test_the_single_token_grid_is_every_state_by_batch_at_three_layers():
    cells = GRIDS["ssu"].cells(Wanted())
    assert len(cells) == 3 * 12 * 6
    assert len({cell.key for cell in cells}) == len(cells)
    for cell in cells:
        key = dict(cell.key)
        assert (key["heads"], key["batch"]) == (cell.nheads, cell.batch)
        assert key["dim"] == cell.config.dim
        assert ("SR" in key["state"]) == (cell.config.rounding == "stochastic")
    published = json.loads((RESULTS / "ssu-h200.json").read_text())["cells"]
    named = [tuple((n, c[n]) for n in ("heads", "dim", "state", "batch")) for c in published]
    assert sorted(cell.key for cell in cells) == sorted(named)


def test_the_grid_of_tokens_writes_one_state_or_each():
    cells = GRIDS["tokens"].cells(Wanted())
    assert len(cells) == 2 * 2 * 3 * 4 * 6
    for cell in cells:
        every = dict(cell.key)["writes"] == "every token"
        assert cell.config.has_intermediate == every
        assert cell.config.update_state != every
        assert cell.config.ntokens == dict(cell.key)["tokens"]


def test_of_the_grid_of_tokens_one_half_may_be_wanted():
    every = GRIDS["tokens"].cells(Wanted(writes=("every token",)))
    assert len(every) == len(GRIDS["tokens"].cells(Wanted())) / 2
    assert all(cell.config.has_intermediate for cell in every)


def test_scaling_varies_one_size_at_a_time():
    cells = GRIDS["scaling"].cells(Wanted())
    for axis in ("batch", "heads", "dim", "dstate", "tokens"):
        mine = [cell for cell in cells if dict(cell.key)["axis"] == axis]
        sizes = {(c.batch, c.nheads, c.config.dim, c.config.dstate, c.config.ntokens) for c in mine}
        assert len(sizes) == len(mine) > 5
        assert sum(len({s[i] for s in sizes}) > 1 for i in range(5)) == 1


def test_odd_is_every_batch_and_heads_in_five_shapes():
    cells = GRIDS["odd"].cells(Wanted())
    shapes = {(cell.config.dim, cell.config.dstate) for cell in cells}
    assert shapes == {(64, 128), (80, 128), (96, 128), (64, 96), (64, 256)}
    assert len({cell.key for cell in cells}) == len(cells) == 2 * 5 * 3 * 7
    assert {cell.batch for cell in cells} == {3, 7, 24, 37, 96, 200, 600}
    assert {cell.nheads for cell in cells} == {24, 48, 80}


def test_tables_and_pictures_of_odd_say_the_shape(tmp_path):
    cells = [
        {**cell(batch, 2.0, ssmgen=4.0), "heads": 24, "dstate": dstate}
        for dstate in (128, 256)
        for batch in (3, 7)
    ]
    result = {**result_of(cells), "section": "odd"}
    assert [table.title for table in tables(result)] == ["24 heads", "24 heads, dstate 256"]
    pytest.importorskip("matplotlib")
    assert [path.name for path in plot(result, tmp_path)] == [
        "odd-t9-24-heads-dstate-128-fp32.png", "odd-t9-24-heads-dstate-256-fp32.png"
    ]  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_quick_is_a_small_part_of_the_grid(name):
    whole = {cell.key for cell in GRIDS[name].cells(Wanted())}
    quick = {cell.key for cell in GRIDS[name].cells(Wanted(quick=True))}
    assert quick
    assert quick < whole
    assert len(quick) <= len(whole) / 2


def test_what_is_asked_for_is_what_the_grid_has():
    wanted = Wanted(heads=(24,), dims=(96,), states=("int8",), batches=(7,), tokens=(3,))
    (cell,) = GRIDS["ssu"].cells(wanted)
    assert (cell.nheads, cell.batch, cell.config.dim, cell.config.state_dtype) == (
        24,
        7,
        96,
        "int8",
    )
    assert {dict(c.key)["tokens"] for c in GRIDS["tokens"].cells(wanted)} == {3}
    assert wanted.takes(dict(cell.key))
    assert not wanted.takes({**dict(cell.key), "batch": 8})


@pytest.mark.parametrize(
    ("text", "label"),
    [("fp16", "fp16"), ("fp16+sr", "fp16 + SR 10"), ("FP16 + SR 5", "fp16 + SR 5"),
     ("fp8_e4m3fn+sr10", "fp8_e4m3fn + SR 10")],
)  # fmt: skip
def test_states_are_read_as_people_type_them(text, label):
    assert parse_state(text) == label


@pytest.mark.parametrize("text", ["fp12", "fp32+sr", "fp16+sr99", "fp16+", ""])
def test_a_state_that_is_none_is_an_error(text):
    with pytest.raises(ConfigError):
        parse_state(text)


@pytest.mark.parametrize("cell", GRIDS["tokens"].cells(Wanted(quick=True)), ids=lambda c: c.name)
def test_a_cell_is_compiled_beforehand_under_the_config_its_calls_ask_for(cell):
    problem = make(cell.config, 1, 2, device="cpu", pool_bytes=0)
    asked = spec("ssu").layout(**problem.arguments(0)).config
    assert asked.key_fields() == cell.config.key_fields()


# Timing


def test_contestants_take_turns_forwards_and_backwards():
    clock = Clock(1.0, 2.0, 3.0)
    times = measure.interleaved(
        {name: [lambda: None] for name in "abc"}, rounds=4, replays=2, record=clock
    )
    turns = clock.log[::3]
    assert turns == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0]
    assert all(clock.log[i : i + 3] == [clock.log[i]] * 3 for i in range(0, len(clock.log), 3))
    assert {name: each.rounds for name, each in times.items()} == {
        "a": (1.0,) * 4, "b": (2.0,) * 4, "c": (3.0,) * 4,
    }  # fmt: skip


def test_a_turn_is_the_median_of_its_replays_without_the_first():
    values = iter([50.0, 4.0, 9.0, 5.0])

    class Recorded:
        def replay(self) -> float:
            return next(values)

        def warm_up(self, milliseconds: float) -> None:
            pass

    times = measure.in_turn({"a": Recorded()}, rounds=1, replays=3)
    assert times["a"].rounds == (5.0,)


def test_noise_is_what_nineteen_of_twenty_pairs_stay_within():
    pairs = [(100.0, 100.0 + i / 10) for i in range(40)] + [(100.0, 300.0)]
    assert measure.noise(pairs) == pytest.approx(0.038)
    assert measure.noise([(10.0, 11.0), (10.0, 10.0)]) == pytest.approx(0.1)
    assert measure.noise([(11.0, 10.0)]) == pytest.approx(0.1)
    assert measure.noise([]) is None


def test_host_time_is_microseconds_a_call(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    waits = []

    def call() -> None:
        now[0] += 7e-6

    found = measure.host_time(call, wait=lambda: waits.append(1), samples=3, calls=10)
    assert found == pytest.approx(7.0)
    assert len(waits) == 4


def test_cold_launches_every_slot_set_in_turn():
    seen: list[int] = []
    for call in measure.cold(seen.append, 3):
        call()
    assert seen == [0, 1, 2]


# Contests


def peers(monkeypatch: pytest.MonkeyPatch, **adapters: Any) -> None:
    monkeypatch.setitem(contestants.PEERS, "ssu", adapters)


def right(problem: Any) -> Any:
    return [problem.call(i) for i in range(problem.sets)]


def off(problem: Any) -> Any:
    def call(which: int) -> None:
        problem.launch(which)
        problem.out.view(-1)[0] += 1

    return measure.cold(call, problem.sets)


def returning(problem: Any) -> Any:
    """Leaves `out` alone and returns its result, as functions without that argument do."""

    def call(which: int) -> torch.Tensor:
        arguments = {n: v for n, v in problem.arguments(which).items() if n != "out"}
        return ssmgen.selective_state_update(**arguments)

    return measure.cold(call, problem.sets)


def raising(problem: Any) -> Any:
    raise RuntimeError("/home/me/peer/kernel.cuh:12: no kernel image")


def test_a_wrong_contestant_gets_no_time(monkeypatch):
    peers(monkeypatch, flashinfer=off, vllm=right, mamba_ssm=raising, fla=returning)
    names = ("ssmgen", "flashinfer", "vllm", "mamba_ssm", "fla", "copy")
    found = contest(tiny(), names, rounds=2, record=Clock(1.0, 2.0, 3.0, 4.0, 5.0))
    assert found["us"] == {"ssmgen": 1.0, "vllm": 2.0, "fla": 3.0, "copy": 4.0}
    assert found["again"] == 5.0
    assert "output off by" in found["wrong"]["flashinfer"]
    assert found["wrong"]["mamba_ssm"] == "RuntimeError: kernel.cuh:12: no kernel image"
    assert not found["missing"]
    assert found["rounds"]["vllm"] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("at '/opt/peer/kernel.cuh':12", "at 'kernel.cuh':12"),
        ("nvcc -I/opt/peer/include ~/.cache/peer/x.cu", "nvcc -Iinclude x.cu"),
        ("see https://example.org/a/b/3, or peer/data/x.cu", None),
        ("1/2 of it", None),
    ],
)
def test_files_in_an_error_lose_their_folders(text, kept):
    assert session._without_folders(text) == (kept or text)


def test_a_wrong_ssmgen_gets_no_time_either(monkeypatch):
    monkeypatch.setattr(contestants, "ours", off)
    found = contest(tiny(), ("ssmgen",), record=Clock(1.0))
    assert found["us"] == {}
    assert "again" not in found
    assert "output off by" in found["wrong"]["ssmgen"]


def test_who_cannot_take_part_says_why(monkeypatch):
    def scarce(problem: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    peers(monkeypatch, vllm=scarce)
    found = contest(tiny(), ("vllm", "fla"), record=Clock(1.0))
    assert found["missing"] == {
        "vllm": "out of memory", "fla": "fla has nothing for the family ssu",
    }  # fmt: skip
    assert not found["wrong"]


@pytest.mark.parametrize("name", ["flashinfer", "vllm", "mamba_ssm"])
def test_a_peer_that_is_not_installed_is_missing(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Missing, match=f"{name} (is not installed|cannot be imported)"):
        contestants.adapter(name, "ssu")(tiny())


def test_a_peer_whose_import_fails_says_how(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("import no_such_module_of_vllm")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(Missing, match=r"cannot be imported: .*no_such_module_of_vllm"):
        contestants.adapter("vllm", "ssu")(tiny())


@pytest.mark.parametrize(
    ("name", "label", "fields", "why"),
    [
        ("flashinfer", "int8", {}, "no int8 states"),
        ("flashinfer", "fp32", {"dim": 80}, "multiple of 64, not 80"),
        ("flashinfer", "bf16 + SR 10", {"dim": 64}, "only fp16 stochastically"),
        ("vllm", "int16", {}, "no block-scaled states"),
        ("vllm", "fp16 + SR 10", {}, "rounding to nearest"),
        ("mamba_ssm", "fp16", {"ntokens": 2}, "one token a row"),
    ],
)
def test_what_a_peer_does_not_do_it_says(name, label, fields, why, monkeypatch):
    monkeypatch.setattr(contestants, "_public", lambda *names: None)
    config = config_of(label, **{"dim": 16, "dstate": 16, **fields})
    problem = make(config, 1, 2, device="cpu", pool_bytes=0)
    with pytest.raises(Missing, match=why):
        contestants.adapter(name, "ssu")(problem)


@pytest.mark.parametrize("name", ["flashinfer", "vllm", "mamba_ssm"])
@pytest.mark.parametrize(
    ("label", "fields"),
    [("fp16", {}), ("fp16 + SR 5", {}), ("int16", {}), ("fp16", {"ntokens": 3}),
     ("fp16", {"ntokens": 2, "has_intermediate": True, "update_state": False,
               "entry_dtype": "int64"})],
)  # fmt: skip
def test_peers_are_called_with_what_makes_them_right(name, label, fields, monkeypatch):
    """The peer is played by our op, whose signature is FlashInfer's."""
    monkeypatch.setattr(contestants, "_public", lambda *names: ssmgen.selective_state_update)
    problem = make(config_of(label, dim=64, dstate=16, **fields), 2, 2, device="cpu", pool_bytes=0)
    try:
        calls = contestants.adapter(name, "ssu")(problem)
    except Missing:
        assert name != "flashinfer"
        return
    assert len(calls) == problem.sets
    assert problem.verify(lambda which: calls[which]()) == ""
    given = calls[0].keywords
    assert ("out" in given) == (name != "mamba_ssm")
    if name == "flashinfer":
        assert given.get("philox_rounds", 0) == problem.config.philox_rounds
        assert given.get("cache_steps", 1) == problem.config.ntokens


def test_the_copy_moves_the_bytes_of_the_problem_in_place():
    problem = tiny()
    calls = contestants.adapter("copy", "ssu")(problem)
    assert len(calls) == problem.sets
    for call in calls:
        (source,) = call.args
        assert source.data_ptr() == call.keywords["out"].data_ptr()
        assert 0 <= problem.bytes - 2 * source.nbytes < 8
        before = source.clone()
        call()
        assert torch.equal(source, -before)


@pytest.mark.parametrize(
    ("fields", "times"),
    [({"ntokens": 3}, 1),
     ({"ntokens": 3, "has_intermediate": True, "update_state": False, "entry_dtype": "int64"}, 3),
     ({"ntokens": 3, "has_intermediate": True, "entry_dtype": "int64"}, 4),
     ({"ntokens": 2, "has_dst": True, "dst_tokens": True}, 2)],
)  # fmt: skip
def test_where_more_is_written_than_read_the_copy_does_so_too(fields, times):
    problem = make(config_of("fp32", dim=64, dstate=16, **fields), 2, 2, device="cpu", pool_bytes=0)
    assert problem.times == times
    calls = contestants.adapter("copy", "ssu")(problem)
    assert len(calls) == problem.sets
    for call in calls:
        (source,), out = call.args, call.keywords["out"]
        lost = problem.bytes - source.nbytes - out.nbytes
        if times == 1:
            assert 0 <= lost < 8
            continue
        # Rows are whole lines, so that the pass moves 16 bytes at a time, as the op does.
        assert source.shape[1] % 16 == 0
        assert 0 <= lost < 2 * (1 + times) * 64
        assert out.shape == (2, times, source.shape[1])
        out.fill_(torch.nan)
        call()
        assert all(torch.equal(out[:, turn], source) for turn in range(times))


def test_a_lost_gpu_stops_the_run_and_keeps_what_was_measured(monkeypatch):
    def lost(*arguments: Any) -> None:
        raise DeviceError("bench: the GPU context was lost while vllm ran")

    peers(monkeypatch, vllm=right)
    made = Session(wanted=TINY, names=("ssmgen",), device="cpu", pool_bytes=0, bandwidth=1e12,
                   record=Clock(2.0))  # fmt: skip
    made.note = lambda done, total, text: done and lost()
    result = run("ssu", made)
    assert len(result["cells"]) == 1
    assert "context was lost" in result["failed"]


def test_an_error_that_takes_the_gpu_with_it_is_one_of_the_device(monkeypatch):
    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    peers(monkeypatch, vllm=raising)
    problem = tiny()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(DeviceError, match=r"lost while vllm ran .*--contestants"):
        contest(problem, ("vllm",), record=Clock(1.0))


# Sections


def test_a_run_says_what_ran_on_what_and_how_noisy_it_was(monkeypatch):
    clock = Clock(2.0, 3.0, 2.1)
    made = Session(wanted=TINY, names=("ssmgen", "copy"), device="cpu", pool_bytes=0, rounds=2,
                   bandwidth=4e12, arch=Arch.of("sm_90"), record=clock)  # fmt: skip
    heard: list[str] = []
    made.note = lambda done, total, text: heard.append(f"{done}/{total} {text}")
    monkeypatch.setattr(session, "compile_all", lambda cells, made: None)
    result = run("ssu", made)
    assert heard == ["0/2 heads 2, dim 16, fp16, batch 1", "1/2 heads 2, dim 16, fp16, batch 3"]
    assert {"date", "torch", "triton", "ssmgen"} <= set(result["environment"])
    assert result["noise"] == pytest.approx(0.05)
    for cell in result["cells"]:
        config = config_of("fp16", dim=16)
        assert cell["us"] == {"ssmgen": 2.0, "copy": 3.0}
        assert cell["again"] == 2.1
        ours = ssmgen.get_kernel(config, arch="sm_90")
        serves = ours.select(cell["batch"], 2)
        assert serves.plan != ours.plan
        assert cell["kernel"] == {
            "key": serves.artifact.manifest["key"], "plan": str(serves.plan),
        }  # fmt: skip
    assert json.loads(dump(result)) == json.loads(json.dumps(result))


def test_what_a_run_launches_is_compiled_before_its_first_cell(store_dir):
    made = Session(wanted=TINY, names=("ssmgen",), arch=Arch.of("sm_90"))
    session.compile_all(GRIDS["ssu"].cells(TINY), made)
    there = {path.parent.name for path in store_dir.glob("v1/??/*/*")}
    variants = ssmgen.get_kernel(config_of("fp16", dim=16), arch="sm_90").variants
    assert {v.artifact.manifest["key"] for v in variants} == there


def test_ctrl_c_keeps_the_cells_that_were_measured():
    def interrupt(done: int, total: int, text: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    made = Session(wanted=TINY, names=("ssmgen",), device="cpu", pool_bytes=0, bandwidth=1e12,
                   record=Clock(2.0), note=interrupt)  # fmt: skip
    result = run("ssu", made)
    assert result["interrupted"]
    assert [cell["batch"] for cell in result["cells"]] == [1]
    assert result["noise"] == 0.0


def test_host_times_public_functions_and_a_bound_launch(monkeypatch):
    class Kernel:
        def bind(self, **tensors: torch.Tensor) -> Any:
            assert spec("ssu").layout(**tensors, dt_softplus=True).config == asked[0]
            return "bound"

    asked: list[Any] = []

    def get_kernel(config: Any) -> Kernel:
        asked.append(config)
        return Kernel()

    timed: list[Any] = []
    monkeypatch.setattr(kernel, "get_kernel", get_kernel)
    monkeypatch.setattr(host, "host_time", lambda call, samples: timed.append(call) or len(timed))
    monkeypatch.setattr(host, "make", lambda *a, **o: tiny())
    peers(monkeypatch, flashinfer=off, vllm=right, mamba_ssm=raising)
    names = ("ssmgen", "flashinfer", "vllm", "mamba_ssm", "fla", "copy")
    result = run("host", Session(names=names, device="cpu"))
    assert [(row["name"], row["value"]) for row in result["rows"]] == [
        ("ssmgen op call", 1), ("vllm op call", 2), ("ssmgen bound launch", 3),
        ("get_kernel again", 4),
    ]  # fmt: skip
    assert timed[2] == "bound"
    assert set(result["wrong"]) == {"flashinfer", "mamba_ssm"}
    assert set(result["missing"]) == {"fla"}


def test_jit_times_compilation_and_reading_in_fresh_processes(monkeypatch):
    monkeypatch.setattr(
        jit, "prewarm_rate", lambda configs, archs: {"of": len(configs), "on": archs}
    )
    result = run("jit", Session(wanted=Wanted(quick=True), device="cpu"))
    values = {row["name"]: row["value"] for row in result["rows"]}
    assert values["first get_kernel from disk"] < values["first get_kernel compiled"]
    assert values["next get_kernel from disk"] < values["next get_kernel compiled"]
    assert result["prewarm"] == {"model": jit.MODEL, "of": 4, "on": ["sm_90"]}
    assert result["environment"]["cores"] >= 1


def test_prewarm_rate_counts_what_an_empty_store_was_given(store_dir):
    configs = [config_of("fp32", dim=16, dstate=16), config_of("fp16", dim=16, dstate=16)]
    found = jit.prewarm_rate(configs, ["sm_90"], workers=1)
    assert found["kernels"] == sum(found["kernels_per_arch"].values()) >= 2
    assert found["kernels_per_second_after_first"] > 0
    assert not list(store_dir.glob("v1/??/*"))


# Tables


def result_of(cells: list[dict[str, Any]], noise: float | None = None, **more: Any) -> Any:
    environment = {"date": "2026-01-02", "gpu": "NVIDIA T9", "driver": "1.2", "torch": "3",
                   "triton": "4"}  # fmt: skip
    return {"schema": 1, "section": "ssu", "environment": environment, "bandwidth": 2e12,
            "cells": cells, "noise": noise, **more}  # fmt: skip


def cell(batch: int, floor: float, wrong: Any = None, missing: Any = None, **us: float) -> Any:
    return {"heads": 128, "dim": 64, "state": "fp32", "batch": batch, "floor_us": floor, "us": us,
            "again": us.get("ssmgen"), "wrong": wrong or {}, "missing": missing or {}}  # fmt: skip


def test_a_table_has_time_share_and_ratio_and_calls_small_differences_noise():
    cells = [
        cell(1, 2.0, ssmgen=4.0, flashinfer=5.0, vllm=4.04, copy=2.5),
        cell(4, 8.0, ssmgen=10.0, flashinfer=12.0, vllm=9.5),
    ]
    (table,) = tables(result_of(cells, noise=0.012))
    assert table.columns == ["state", "batch", "floor", "ssmgen", "flashinfer", "vllm", "copy"]
    assert [str(entry) for entry in table.rows[0]] == [
        "fp32", "1", "2.00", "4.00 (50%)", "5.00 (40%, 1.25x)", "4.04 (50%, ≈1.01x)", "2.50 (80%)",
    ]  # fmt: skip
    assert str(table.rows[1][5]) == "9.50 (84%, 0.95x)"
    assert str(table.rows[1][6]) == "–"
    assert table.notes[0] == (
        "flashinfer / ssmgen, nearest: geometric mean 1.22, least 1.20, of 2 cells."
    )
    assert "differ by up to 1.2% (95th percentile of 2 cells)" in table.notes[-1]
    assert not any("copy /" in note for note in table.notes)


def test_a_wrong_contestant_is_named_and_has_no_time_in_a_table():
    cells = [cell(1, 2.0, {"vllm": "output off by 3"}, {"fla": "no such thing"}, ssmgen=4.0),
             cell(4, 2.0, None, {"fla": "no such thing"}, ssmgen=4.0, vllm=5.0)]  # fmt: skip
    text = markdown([result_of(cells)])
    assert "| fp32 | 1 | 2.00 | 4.00 (50%) | wrong |" in text
    assert "WRONG: vllm, not timed in 1: output off by 3" in text
    assert text.count("no such thing") == 1


def test_a_cell_on_one_line_has_times_shares_and_faults():
    assert line(cell(1, 2.0, {"vllm": "output off by 3"}, ssmgen=4.0, copy=2.5)) == (
        "floor 2.00, ssmgen 4.00 (50%), copy 2.50 (80%), WRONG vllm: output off by 3"
    )


def test_markdown_says_once_what_neighbours_were_measured_on():
    first = result_of([cell(1, 2.0, ssmgen=4.0)])
    host = {**first, "section": "host", "bandwidth": None,
            "rows": [{"name": "op call", "value": 1.25, "unit": "us"}]}  # fmt: skip
    text = markdown([first, host])
    assert text.count("NVIDIA T9") == 1
    assert text.endswith("| host | time |\n|---|---|\n| op call | 1.25 us |\n")
    other = {**host, "environment": {**host["environment"], "date": "2026-01-03"}}
    assert markdown([first, other]).count("NVIDIA T9") == 2


def test_scaling_gives_the_line_through_its_points():
    cells = [
        {"axis": "heads", "state": "fp16", "value": n, "floor_us": 0.5 * n,
         "us": {"ssmgen": 2 + 0.625 * n}, "wrong": {}, "missing": {}}
        for n in (8, 16, 64)
    ]  # fmt: skip
    (table,) = tables({**result_of(cells), "section": "scaling"})
    assert table.columns == ["heads", "floor", "ssmgen"]
    assert table.notes[0] == (
        "ssmgen: 2.00 us + 0.6250 us a head (the floor grows at 80% of that); the line is off by "
        "0% at most."
    )


def test_fit_is_the_least_squares_line():
    intercept, slope, worst = fit([(0.0, 1.0), (1.0, 3.0), (2.0, 4.0)])
    assert (intercept, slope) == (pytest.approx(7 / 6), pytest.approx(1.5))
    assert worst == pytest.approx(1 / 6)


def test_cells_that_are_not_wanted_are_not_shown():
    published = load(RESULTS / "ssu-h200.json")
    (table,) = tables(published, Wanted(heads=(16,), states=("int8",), batches=(1, 64)))
    assert table.title == "16 heads"
    assert [row[:2] for row in table.rows] == [["int8", 1], ["int8", 64]]


# Others belong to the dispatch tables.
PUBLISHED = [path for path in sorted(RESULTS.glob("*.json")) if path.name.split("-")[0] in SECTIONS]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_results_can_be_read_and_shown(path):
    result = load(path)
    assert path.name.startswith(result["section"])
    assert dump(result) == path.read_text()
    assert all(table.rows for table in tables(result))


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not JSON"), ("[]", "not a result"), ('{"cells": []}', "not a result"),
     ('{"section": "ssu", "schema": 9}', "schema 9 found")],
)  # fmt: skip
def test_a_file_that_is_no_result_is_an_error_that_names_it(text, said, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ArgumentValueError, match=rf"x\.json: {said}"):
        load(path)
    with pytest.raises(ArgumentValueError, match="No such file"):
        load(tmp_path / "none.json")


def test_numbers_survive_a_result_file(tmp_path):
    value = math.pi / 3
    path = tmp_path / "x.json"
    path.write_text(dump(result_of([cell(1, value, ssmgen=value)])))
    assert load(path)["cells"][0]["us"]["ssmgen"] == value
    assert len(path.read_text().splitlines()) == 10


# Pictures


def test_there_is_a_picture_for_each_state_dtype_and_layer(tmp_path):
    pytest.importorskip("matplotlib")
    published = load(RESULTS / "ssu-h200.json")
    written = plot(published, tmp_path / "new", Wanted(batches=(1, 4), states=("fp16", "int8")))
    assert sorted(path.name for path in written) == sorted(
        f"ssu-h200-{layer}-{state}.png"
        for layer in ("128-heads", "16-heads", "128-heads-dim-80")
        for state in ("fp16", "int8")
    )
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_picture_has_time_and_share_of_every_contestant_in_its_colour(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot as plt

    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    published = load(RESULTS / "ssu-h200.json")
    wanted = Wanted(heads=(128,), states=("fp16", "fp16 + SR 10"))
    assert len(plot(published, tmp_path, wanted)) == 2
    monkeypatch.undo()
    time, share, _, stochastic = figures[0].axes
    chosen = [c for c in published["cells"]
              if (c["heads"], c["dim"], c["state"]) == (128, 64, "fp16")]  # fmt: skip
    times, shares = ({each.get_label(): each for each in axis.lines} for axis in (time, share))
    assert set(times) == {"ssmgen", "flashinfer", "vllm", "mamba_ssm", "copy", "floor"}
    assert list(times["vllm"].get_ydata()) == [c["us"]["vllm"] for c in chosen]
    assert list(times["floor"].get_ydata()) == [c["floor_us"] for c in chosen]
    assert list(shares["vllm"].get_ydata()) == [
        pytest.approx(100 * c["floor_us"] / c["us"]["vllm"]) for c in chosen
    ]
    assert [each.get_label() for each in stochastic.lines] == ["ssmgen", "flashinfer", "copy"]
    # The second picture has no FlashInfer.
    (other,) = (e for e in figures[1].axes[0].lines if e.get_label() == "vllm")
    assert other.get_color() == times["vllm"].get_color()
    for figure in figures:
        plt.close(figure)


def test_tokens_and_scaling_have_pictures_of_their_own(tmp_path):
    pytest.importorskip("matplotlib")
    times = {"floor_us": 1.0, "us": {"ssmgen": 2.0}, "wrong": {}, "missing": {}}
    many = [{"heads": 16, "writes": "last only", "state": "bf16", "tokens": t, "batch": b, **times}
            for t in (2, 4) for b in (1, 8)]  # fmt: skip
    grows = [{"axis": "dstate", "state": "bf16", "value": n, **times} for n in (16, 32)]
    written = [
        *plot({**result_of(many), "section": "tokens"}, tmp_path),
        *plot({**result_of(grows), "section": "scaling"}, tmp_path),
    ]
    assert [path.name for path in written] == [
        "tokens-t9-16-heads-last-only-bf16.png", "scaling-t9-dstate-bf16.png",
    ]  # fmt: skip


def test_a_section_without_pictures_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ArgumentValueError, match="allowed: ssu, tokens, odd, scaling"):
        plot(load(RESULTS / "chain-h200.json"), tmp_path)


def test_pictures_without_matplotlib_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"ssmgen\[bench\]"):
        plot(load(RESULTS / "ssu-h200.json"), tmp_path)


def test_reports_need_no_torch():
    code = (
        "import ssmgen.bench.report, ssmgen.bench.grid, ssmgen.bench.plots, sys;"
        "assert not {'torch', 'triton', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
