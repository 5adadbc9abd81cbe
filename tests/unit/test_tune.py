"""The tuner on a GPU that there is not: what it compiles, races and keeps, and how it stops."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from types import SimpleNamespace

import pytest
from rigs import FakeCompiler, FakeRig

from ssmgen import Arch, KernelConfig, Plan, tables
from ssmgen.cost import estimate
from ssmgen.errors import ConfigError
from ssmgen.families import spec
from ssmgen.plan import dispatch, fitted
from ssmgen.tune import Progress, tune
from ssmgen.tune.check import LIMIT, check, odd_cells
from ssmgen.tune.journal import Journal
from ssmgen.tune.rig import turns
from ssmgen.tune.space import AROUND, COMPILED, ENTRANTS, entrants, fill, prune
from ssmgen.tune.table import rows_of
from ssmgen.tune.tuner import cells_of

SSU = spec("ssu")
SM_90 = Arch.of("sm_90")
FP16 = KernelConfig(state_dtype="fp16")
FEW = (128, 1024, 16384)


def of_the_model(config, plan, heads):
    return estimate(SSU.work(config, plan), SM_90)(heads)


def secretly(best):
    """The model's costs, but the plans of `best` (by least heads) are 12% faster than any other."""

    @functools.cache
    def cost(config, plan, heads):
        wanted = [tile for least, tile in best if heads >= least][-1]
        fast = fastest(config, heads)
        if (plan.algorithm, plan.block_m, plan.num_warps, plan.evict_first) == wanted:
            return 0.88 * fast
        return max(fast, of_the_model(config, plan, heads))

    return cost


@functools.cache
def fastest(config, heads):
    return min(of_the_model(config, p, heads) for p in SSU_PLANS)


SSU_PLANS = list(entrants(FP16, SM_90, FEW, []))
BEST = ((0, ("simple", 8, 1, True)), (2000, ("simple", 64, 8, True)))


def run(rig, out, configs=(FP16,), **more):
    return tune(configs, rig, out, sizes=FEW, **{"compile": FakeCompiler(), "budget": 60, **more})


def table_at(out, key="fp16.nearest", gpu=FakeRig.gpu):
    return tables.read((out / "ssu" / "sm_90" / tables.slug(gpu) / f"{key}.json").read_text(), "t")


def heads_of(config):
    """The powers of two come first."""
    sizes = SSU.tuned_at(config)
    return [n for n in sizes if n.bit_count() == 1] + [n for n in sizes if n.bit_count() > 1]


def test_sizes_of_other_shapes_are_powers_of_two_of_their_own_heads():
    """A head of 80x128 has 5/4 of the bytes, one of 96x128 3/2, one of 64x256 twice as many."""
    whole = heads_of(FP16)
    for shape, part in (({"dim": 80}, 1), ({"dim": 96}, 2), ({"dstate": 256}, 2)):
        own = [c.heads for c in cells_of([FP16.replace(**shape)], SM_90, None)]
        assert own == [heads // part for heads in whole]


def test_sizes_that_a_table_cannot_tell_apart_are_measured_once(tmp_path):
    small = FP16.replace(dim=16, dstate=96)
    sizes = range(16, 25)
    assert len(cells_of([small], SM_90, None, sizes)) < len(sizes)
    rig = FakeRig(lambda config, plan, heads: 10.0 + plan.block_m * heads % 7)
    report = tune([small], rig, tmp_path, sizes=sizes, compile=FakeCompiler(), budget=60)
    assert len(report.tables) == 1


def test_channels_of_any_size_are_those_of_aligned_rows():
    found = cells_of([KernelConfig(family="conv1d")], SM_90, None, [1500, 3001, 16384])
    assert [(c.batch, c.nheads) for c in found] == [(2, 8192), (1, 1472), (1, 2944)]


@pytest.mark.parametrize(
    ("sets", "states", "expected"),
    [(2, 2**29, 2), (256, 2**21, 256), (2048, 2**18, 600), (2048, 2**17, 1200), (700, 2**17, 700)],
)
def test_a_graph_goes_through_two_and_a_half_l2s_of_states_if_there_are_as_many(
    sets, states, expected
):
    """60 MiB of L2; a state is read and written, and a write counts as a read does."""
    problem = SimpleNamespace(sets=sets, times=1, bytes=2 * states)
    assert turns(problem, 60 * 2**20) == expected


def test_untied_states_drafts_and_chains_have_the_usual_sizes():
    for fields in ({"tie_hdim": False}, {"ntokens": 4}, {"pdl": True}):
        assert SSU.tuned_at(FP16.replace(**fields)) == [*SSU.sizes]
    assert len(SSU.tuned_at(FP16)) > len(SSU.sizes)


def test_no_size_that_is_checked_is_one_that_is_tuned():
    configs = [FP16.replace(state_dtype=s, rounding=r) for s, r in
               (("fp32", "nearest"), ("int16", "nearest"), ("int8", "stochastic"))]  # fmt: skip
    for cell in odd_cells(configs, FakeRig(secretly(BEST))):
        tuned = cells_of([cell.config], SM_90, None)
        assert cell.heads not in {c.heads for c in tuned}, str(cell)


def test_heads_are_of_a_layer_where_they_can_be():
    cells = cells_of(
        [FP16.replace(state_dtype="int8", rounding="stochastic", philox_rounds=10)], SM_90, None
    )
    found = {c.heads: (c.batch, c.nheads) for c in cells}
    assert found[352] == (22, 16)
    assert found[136] == (1, 136)
    assert found[3328] == (26, 128)


# What it finds


@pytest.mark.parametrize("seed", range(5))
def test_the_best_plans_are_found_and_dispatch_takes_them(tmp_path, monkeypatch, seed):
    report = run(FakeRig(secretly(BEST), seed=seed), tmp_path)
    assert not report.missing
    assert not report.failed
    for cell in report.cells:
        wanted = BEST[cell["batch"] * cell["nheads"] >= 2000][1]
        plan = Plan(**cell["winner"])
        assert (plan.algorithm, plan.block_m, plan.num_warps, plan.evict_first) == wanted
        assert 0.1 < cell["margin"] < 0.25
        assert 0 < cell["noise"] < cell["margin"]
    monkeypatch.setenv("SSMGEN_TUNED_PATH", str(tmp_path))
    low, high = dispatch(FP16, SM_90, FakeRig.gpu)
    assert (low.limit, high.limit) == (4096, None)  # between 1024 and 16384, in ratio
    assert (low.plan.block_m, high.plan.block_m) == (8, 64)
    assert low.why == f"table {tmp_path}/ssu/sm_90/nvidia-pretend-9000/fp16.nearest.json"


def test_a_table_is_left_as_it_is_where_nothing_is_faster(tmp_path, monkeypatch):
    run(FakeRig(secretly(BEST), noise=0.002), tmp_path / "first")
    monkeypatch.setenv("SSMGEN_TUNED_PATH", str(tmp_path / "first"))
    first = table_at(tmp_path / "first")
    changed = 0
    for seed in range(8):
        # Now all are the same: whoever is first is so by chance.
        again = tmp_path / str(seed)
        report = run(FakeRig(lambda *_: 10.0, noise=0.02, seed=seed), again)
        changes = sum(cell["margin"] > 0 for cell in report.cells)
        if not changes:
            # Buckets that the noise cannot tell apart become one, of a plan that was in use.
            rows = table_at(again)["rows"]
            assert {row["plan"] for row in rows} <= {row["plan"] for row in first["rows"]}
        changed += changes
    assert changed <= 4  # of 24


def test_the_plan_of_the_cost_model_races_whatever_its_estimate(tmp_path, monkeypatch):
    plans = fitted(FP16, SM_90, SSU.candidates(FP16, SM_90))
    slow = max(plans, key=lambda plan: of_the_model(FP16, plan, 128))
    report = run(FakeRig(of_the_model), tmp_path / "first")
    assert len(report.losses()) == len(FEW)
    for cell in report.cells:
        assert slow.fields() not in [standing["plan"] for standing in cell["standings"]]
    monkeypatch.setattr("ssmgen.tune.tuner.modelled", lambda config, arch: [(None, slow)])
    report = run(FakeRig(of_the_model), tmp_path / "second")
    for cell in report.cells:
        assert slow.fields() in [standing["plan"] for standing in cell["standings"]]
        assert slow.fields() == cell["modelled"] != cell["winner"]
    times = [(of_the_model(FP16, slow, n), fastest(FP16, n)) for n in FEW]
    wanted = sorted(mine / best - 1 for mine, best in times)
    assert report.losses() == pytest.approx(wanted, rel=0.05, abs=0.05)
    assert report.losses()[-1] > 0.3


def test_a_table_says_where_it_is_from_and_what_was_measured(tmp_path):
    report = run(FakeRig(secretly(BEST)), tmp_path)
    (path,) = report.tables
    data = json.loads((tmp_path / path).read_text())
    assert path.endswith("ssu/sm_90/nvidia-pretend-9000/fp16.nearest.json")
    assert data["measured"]["driver"] == "1.0"
    assert data["measured"]["config"] == {"state_dtype": "fp16"}
    assert data["measured"]["seconds"] > 0
    assert [list(row["us"]) for row in data["rows"]] == [["128", "1024"], ["16384"]]
    assert not list(tmp_path.rglob("*.part"))


def test_wrong_plans_do_not_race_and_a_wrong_plan_in_use_is_said(tmp_path):
    cost = secretly(BEST)
    report = run(FakeRig(cost), tmp_path / "right")
    bad = Plan(**next(s["plan"] for s in report.cells[0]["standings"]
                      if s["plan"] != report.cells[0]["present"]))  # fmt: skip
    report = run(FakeRig(cost, wrong={bad: "state off by 2"}), tmp_path / "wrong")
    for cell in report.cells:
        assert Plan(**cell["winner"]) != bad
    told = [o["why"] for o in report.cells[0]["left_out"] if Plan(**o["plan"]) == bad]
    assert told == ["wrong: state off by 2"]

    present = cells_of([FP16], SM_90, None, [128])[0].present
    report = run(FakeRig(cost, wrong={present: "output off"}), tmp_path / "other")
    assert any("in use failed" in row["error"] for row in report.failed)
    assert not report.tables


def test_a_kernel_that_does_not_compile_is_reported_and_stops_no_other(tmp_path):
    bad = next(p for p in SSU_PLANS if p.algorithm == "vertical" and not p.evict_first)

    def resources(job):
        return {"error": "ptxas says no"} if job.plan == bad else {}

    report = run(FakeRig(secretly(BEST)), tmp_path, compile=FakeCompiler(resources))
    (row,) = report.failed
    assert str(bad) in row["kernel"]
    assert row["error"] == "ptxas says no"
    assert not report.missing


def test_configs_of_one_key_are_measured_once(tmp_path):
    same = [FP16, FP16.replace(has_z=True), FP16.replace(index_dtype="int32", algorithm="simple")]
    assert [c.heads for c in cells_of(same, SM_90, None)] == heads_of(FP16)
    other = [FP16.replace(pdl=True), FP16.replace(dim=128)]
    assert len({c.key for c in cells_of([*same, *other], SM_90, None)}) == 3


def test_sizes_are_of_equal_work_whatever_the_shape():
    wide = FP16.replace(dstate=256)
    plain, double = (
        [c.heads for c in cells_of([config], SM_90, None, (256, 4096))] for config in (FP16, wide)
    )
    assert (plain, double) == ([256, 4096], [128, 2048])


def test_a_table_of_another_shape_has_limits_of_the_reference_shape(tmp_path, monkeypatch):
    wide = FP16.replace(dstate=256)
    best = ((0, ("simple", 4, 1, True)), (1000, ("simple", 16, 1, True)))
    run(FakeRig(secretly(best)), tmp_path, [wide])
    (table,) = (table_at(tmp_path, key="64x256.fp16.nearest"),)
    assert [row.get("up_to_heads") for row in table["rows"]] == [4096, None]
    monkeypatch.setenv("SSMGEN_TUNED_PATH", str(tmp_path))
    low, high = dispatch(wide, SM_90, FakeRig.gpu)
    assert (low.limit, low.plan.block_m, high.plan.block_m) == (2048, 4, 16)


def test_a_family_without_inputs_is_named_and_stops_no_other(tmp_path):
    configs = [FP16, KernelConfig(family="conv1d")]
    report = run(FakeRig(secretly(BEST), blind=("conv1d",)), tmp_path, configs)
    assert [row["kernel"] for row in report.failed] == ["conv1d"]
    assert len(report.tables) == 1


def test_another_family_is_tuned_at_sizes_of_its_own(tmp_path, monkeypatch):
    conv = KernelConfig(family="conv1d")
    own = spec("conv1d")

    def cost(config, plan, heads):
        return 5 + heads / 1e5 + (plan.block_n != 512) + (plan.num_warps != 2)

    rig = FakeRig(cost)
    report = tune([conv], rig, tmp_path, compile=FakeCompiler())
    assert [batch * heads for _, batch, heads, _ in rig.opened] == list(own.sizes)
    assert len(report.tables) == 1
    monkeypatch.setenv("SSMGEN_TUNED_PATH", str(tmp_path))
    chosen = dispatch(conv, SM_90, rig.gpu)[0].plan
    assert (chosen.block_n, chosen.num_warps) == (512, 2)


# What it leaves out


def test_candidates_are_pruned_by_estimate_but_never_the_plan_in_use():
    slow = Plan(algorithm="vertical", block_m=4, block_n=128, num_warps=1, num_stages=2)
    kept = entrants(FP16, SM_90, FEW, [slow])
    assert slow in kept
    assert slow not in entrants(FP16, SM_90, FEW, [])
    staples = {SSU.fit(FP16, p, SM_90) for p in SSU.staples(FP16, SM_90)}
    assert len(staples) > 5
    assert staples <= kept.keys()
    assert len(kept) <= COMPILED + len(staples) + 1
    everything = {SSU.fit(FP16, p, SM_90) for p in SSU.candidates(FP16, SM_90)}
    assert len(everything) > 3 * len(kept)


def manifest(**resources):
    return {"registers": 64, "spills": 0, "shared": 0, **resources}


def test_what_spills_or_does_not_fit_is_not_raced():
    plans = SSU_PLANS[:6]
    present, spills, big, wide, *_ = plans
    built = {plan: manifest() for plan in plans}
    built[spills] = manifest(spills=16)
    built[big] = manifest(shared=SM_90.shared_memory + 1)
    built[present] = manifest(spills=16)
    chosen, why = prune(FP16, SM_90, 1024, built, present)
    assert chosen[0] == present
    assert spills not in chosen
    assert "spills 16 bytes" in why[spills]
    assert big not in chosen
    assert "does not fit" in why[big]
    assert wide in chosen


def test_registers_of_the_artifact_decide_occupancy():
    tile = Plan(algorithm="simple", block_m=64, block_n=128, num_warps=16)
    usual = SSU_PLANS[0]
    built = {usual: manifest(), tile: manifest(registers=255)}
    _, why = prune(FP16, SM_90, 16384, built, usual)
    assert "does not fit: 255 registers" in why[tile]  # 512 threads of them
    built[tile] = manifest(registers=32)
    assert "fit" not in prune(FP16, SM_90, 16384, built, usual)[1].get(tile, "")


@pytest.mark.parametrize("arch", [SM_90, Arch.of("sm_80")], ids=str)
def test_a_race_has_few_entrants(arch):
    # With as much of that a multiprocessor holds one program, and the estimate is hopeless.
    slow = next(p for p in SSU.staples(FP16, arch) if (p.block_m, p.num_warps) == (16, 8))
    built = {plan: manifest() for plan in SSU_PLANS} | {slow: manifest(shared=100_000)}
    chosen, _ = prune(FP16, arch, 16384, built, SSU_PLANS[-1])
    staples = {SSU.fit(FP16, p, arch) for p in SSU.staples(FP16, arch)} & built.keys()
    assert staples
    if arch == SM_90:  # there the estimate is asked of them, too
        costs = {plan: of_the_model(FP16, plan, 16384) for plan in SSU_PLANS}
        assert slow not in chosen
        staples = {plan for plan in staples if costs[plan] < 1.1 * min(costs.values())}
    assert staples <= {*chosen}
    assert len(chosen) <= ENTRANTS + len(staples) + 1
    assert SSU_PLANS[-1] in chosen


def test_between_two_sizes_those_race_that_were_fast_at_either(tmp_path):
    sizes = (192, 128, 256, 16384, 3000)
    report = tune([FP16], FakeRig(secretly(BEST)), tmp_path, sizes=sizes, compile=FakeCompiler(),
                  budget=60)  # fmt: skip
    cells = {cell["batch"] * cell["nheads"]: cell for cell in report.cells}
    assert list(cells) == [128, 256, 16384, 192, 3000]
    ratios = {}
    for heads in (128, 256):
        for standing in cells[heads]["standings"]:
            plan = Plan(**standing["plan"])
            ratios[plan] = min(standing["ratio"], ratios.get(plan, 9))
    ranked = sorted(ratios, key=ratios.__getitem__)
    raced = {Plan(**s["plan"]) for s in cells[192]["standings"]}
    use = {Plan(**cells[192][name]) for name in ("present", "modelled")}
    assert {*ranked[: AROUND // 2]} - use <= raced
    assert raced - use <= {*ranked[: AROUND + 2]}
    assert len(raced) <= AROUND + len(use) < len(ratios)
    (why,) = {why["why"] for why in cells[192]["left_out"]}
    assert why == "not among the fastest at the sizes around"
    # More than an octave lies between those around this one.
    assert len(cells[3000]["standings"]) > AROUND + 2
    # A run that goes on knows those that were measured before; a power of two is raced in full.
    (journal,) = tmp_path.glob("*.journal")
    gone = tuple(f'{{"cell": "{cells[heads]["cell"]}"' for heads in (192, 256))
    kept = journal.read_text().splitlines(keepends=True)
    lines = [line for line in kept if not line.startswith(gone)]
    assert len(lines) == len(cells) + 1 - 2
    journal.write_text("".join(lines))
    rig = FakeRig(secretly(BEST))
    again = tune([FP16], rig, tmp_path, sizes=sizes, compile=FakeCompiler(), budget=60)
    assert again.measured == 2
    raced = {batch * nheads: len(plans) for _, batch, nheads, plans in rig.opened}
    assert set(raced) == {192, 256}
    assert raced[192] <= AROUND + len(use) < raced[256]


# Time


def test_the_budget_is_kept_and_the_next_run_goes_on(tmp_path):
    cost = secretly(BEST)
    whole = FakeRig(cost)
    full = tune([FP16], whole, tmp_path / "whole", compile=FakeCompiler())
    assert [c["batch"] * c["nheads"] for c in full.cells] == heads_of(FP16)

    rig = FakeRig(cost, launches=20000)
    start = rig.now
    report = tune([FP16], rig, tmp_path / "short", compile=FakeCompiler(), budget=30)
    # One round that had begun may run on.
    assert rig.now - start < 30 + 25
    assert report.missing
    assert report.cells
    assert not report.tables
    first = report.measured
    for _ in range(40):
        if not report.missing:
            break
        report = tune([FP16], rig, tmp_path / "short", compile=FakeCompiler(), budget=30)
    assert not report.missing
    assert report.measured < len(full.cells) - first + 1
    assert len(report.tables) == 1


@pytest.mark.parametrize(("budget", "rounds"), [(30, 1), (33, 2)])
def test_what_it_takes_to_load_kernels_that_are_yet_to_come_is_kept(tmp_path, budget, rounds):
    names = ("fp32", "bf16", "fp16", "int16", "int8")
    states = [FP16.replace(state_dtype=name, pdl=pdl) for name in names for pdl in (False, True)]
    # The first config begins everything, which says nothing of the others.
    rig = FakeRig(of_the_model, launches=30, load=2.0, begin=4.0)
    report = run(rig, tmp_path, states, budget=budget)
    assert not report.missing
    assert len(report.cells) == len(states) * len(FEW)
    # 24 seconds of loading; the races have the rest.
    assert 28 < report.seconds < budget
    assert all(cell["rounds"] >= rounds for cell in report.cells)


def test_ctrl_c_keeps_what_is_done_and_nothing_is_measured_twice(tmp_path):
    stopped = FakeRig(secretly(BEST), stop=250)
    report = run(stopped, tmp_path)
    assert report.interrupted
    done = [cell["cell"] for cell in report.cells]
    assert done
    assert report.missing
    again = FakeRig(secretly(BEST))
    compiler = FakeCompiler()
    report = run(again, tmp_path, compile=compiler)
    assert not report.interrupted
    assert not report.missing
    measured = {f"ssu fp16.nearest {batch}x{nheads}" for _, batch, nheads, _ in again.opened}
    assert measured.isdisjoint(done)
    assert report.tables
    idle = FakeRig(secretly(BEST))
    report = run(idle, tmp_path)
    assert idle.timings == 0
    assert report.measured == 0
    assert report.tables


def test_progress_says_what_and_how_long(tmp_path):
    heard: list[Progress] = []
    run(FakeRig(secretly(BEST)), tmp_path, note=heard.append, budget=50)
    assert {p.stage for p in heard} == {"compile", "race"}
    races = [p for p in heard if p.stage == "race"]
    assert [p.done for p in races] == [0, 1, 2]
    assert races[0].left == pytest.approx(50, abs=1)
    assert races[0].left > races[-1].left


# The journal


def test_a_journal_of_another_driver_is_refused(tmp_path):
    run(FakeRig(secretly(BEST)), tmp_path)
    other = FakeRig(secretly(BEST))
    other.identity = {**other.identity, "driver": "2.0"}
    with pytest.raises(ConfigError, match=r"driver: measured with '1\.0', here is '2\.0'"):
        run(other, tmp_path)


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    run(FakeRig(secretly(BEST)), tmp_path)
    path = tmp_path / "sm_90.journal"
    # Longer than the line that will stand there.
    path.write_bytes(path.read_bytes()[:-20] + b" " * 50_000)
    report = run(FakeRig(secretly(BEST)), tmp_path)
    assert report.measured == 1
    assert not report.missing
    for line in path.read_text().splitlines():
        json.loads(line)


def test_a_journal_is_on_disk_after_a_second_and_when_it_is_closed(tmp_path, monkeypatch):
    now, synced = [100.0], []
    path = tmp_path / "journal"
    monkeypatch.setattr("ssmgen.tune.journal.time.monotonic", lambda: now[0])
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(path.read_bytes().count(b"\n")))
    journal = Journal(path, {"gpu": "x"})
    for n, wait in enumerate((0.0, 0.4, 0.4, 0.4, 0.1)):
        now[0] += wait
        journal.add({"cell": str(n)})
        assert path.read_bytes().count(b"\n") == n + 2
    assert synced == [1, 5]
    journal.close()
    assert synced == [1, 5, 6]


def test_a_journal_with_a_bad_line_in_its_middle_is_refused(tmp_path):
    run(FakeRig(secretly(BEST)), tmp_path)
    path = tmp_path / "sm_90.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{nonsense\n", *lines[2:]]))
    with pytest.raises(ConfigError, match="line 2"):
        run(FakeRig(secretly(BEST)), tmp_path)
    path.write_text("{}\n")
    with pytest.raises(ConfigError, match="not a journal of this version"):
        Journal(path, {})


def test_another_template_or_plan_in_use_is_measured_anew(tmp_path, monkeypatch):
    run(FakeRig(secretly(BEST)), tmp_path)
    monkeypatch.setenv("SSMGEN_TUNED_PATH", str(tmp_path))
    report = run(FakeRig(secretly(BEST)), tmp_path)  # the plans in use are others now
    assert report.measured == len(FEW)


# Buckets


def record(heads, times, winner=None, noise=0.01, rounds=8, fill=10**6):
    best = min(times.values())
    plans = {n: {"algorithm": "simple", "block_m": n, "block_n": 128, "num_warps": 1}
             for n in times}  # fmt: skip
    return {
        "family": "ssu", "key": "fp16.nearest", "config": FP16.to_json(), "batch": heads,
        "nheads": 1, "noise": noise,
        "winner": plans[winner or min(times, key=times.get)],
        "standings": [
            {"plan": plans[n], "table": Plan(**plans[n]).fields(), "us": us, "ratio": us / best,
             "rounds": rounds, "fill": fill}
            for n, us in times.items()
        ],
    }  # fmt: skip


def test_neighbours_share_a_plan_that_is_within_the_noise():
    cells = [
        record(100, {4: 1.0, 8: 1.005, 16: 1.2}),
        record(400, {4: 1.02, 8: 1.0, 16: 1.1}),
        record(1600, {4: 1.3, 8: 1.03, 16: 1.0}),
    ]
    rows = rows_of(cells)
    assert [row["plan"]["block_m"] for row in rows] == [8, 16]
    assert [row.get("up_to_heads") for row in rows] == [800, None]
    assert [row["us"] for row in rows] == [{"100": 1.005, "400": 1.0}, {"1600": 1.0}]
    tight = rows_of([{**cell, "noise": 0.001} for cell in cells])
    assert [row["plan"]["block_m"] for row in tight] == [4, 8, 16]


def test_noise_never_excuses_more_than_two_percent():
    cells = [record(100, {4: 1.0, 8: 1.05}, noise=0.3), record(400, {4: 1.3, 8: 1.0}, noise=0.3)]
    assert [row["plan"]["block_m"] for row in rows_of(cells)] == [4, 8]


def test_the_plan_in_use_holds_its_bucket_within_the_noise():
    cells = [record(100, {4: 1.0, 8: 1.04}, winner=8, noise=0.05), record(400, {8: 1.0, 4: 1.2})]
    assert [row["plan"]["block_m"] for row in rows_of(cells)] == [8]


@pytest.mark.parametrize(
    ("fill", "limit"),
    [(528, 528), (132, 528), (60, 627), (1000, 627), (512, 512)],
    ids=["one each", "four each", "nine each", "that ends later", "at its end"],
)
def test_a_plan_serves_to_where_its_programs_fill_the_gpu_evenly(fill, limit):
    """With a program more one part of it has more to do, which shows where there are few."""
    rows = rows_of([record(512, {4: 1.0, 8: 1.1}, fill=fill), record(768, {4: 1.1, 8: 1.0})])
    assert rows[0]["up_to_heads"] == limit


def test_of_sizes_far_apart_that_says_nothing():
    rows = rows_of([record(512, {4: 1.0, 8: 1.1}, fill=528), record(2048, {4: 1.1, 8: 1.0})])
    assert rows[0]["up_to_heads"] == 1024


def test_where_they_do_is_counted_in_the_config_s_own_heads():
    own = FP16.replace(dstate=256)
    cells = [record(256, {4: 1.0, 8: 1.1}, fill=264), record(384, {4: 1.1, 8: 1.0})]
    rows = rows_of([{**cell, "config": own.to_json()} for cell in cells])
    limit = rows[0]["up_to_heads"]
    assert SSU.limit(own, limit) == 264
    assert SSU.limit(own, limit + 1) > 264


@pytest.mark.parametrize(
    ("tile", "heads"),
    [((64, 1), 528), ((64, 2), 264), ((64, 8), 132), ((16, 1), 132), ((16, 4), 33)],
    ids=str,
)
def test_so_many_heads_give_each_part_of_a_multiprocessor_one_program(tile, heads):
    rows, warps = tile
    plan = Plan(algorithm="simple", block_m=rows, block_n=128, num_warps=warps)
    assert fill(FP16, plan, 132) == heads


# No cliff


def test_check_finds_a_cliff_and_says_how_deep():
    def cost(config, plan, heads):
        return 10.0 * (1.3 if plan == bad and heads == 37 * 24 else 1.0)

    rig = FakeRig(cost, noise=0.002)
    cells = [c for c in odd_cells([FP16], rig, batches=(3, 37), heads=(24,)) if c.config == FP16]
    bad = cells[1].present
    report = check(cells, rig, compile=FakeCompiler())
    deep = {c["cell"]: c["margin"] for c in report.cells if c["margin"] > LIMIT}
    assert list(deep) == ["ssu fp16.nearest 37x24"]
    assert deep["ssu fp16.nearest 37x24"] > 0.1
    assert not report.tables
    assert not report.missing


def test_check_asks_odd_shapes_where_a_config_has_them():
    cells = odd_cells([FP16, KernelConfig(dim=512)], FakeRig(of_the_model), (7,), (48,))
    shapes = {(c.config.dim, c.config.dstate) for c in cells}
    assert shapes == {(64, 128), (80, 128), (96, 128), (64, 96), (64, 256), (512, 128), (512, 96),
                      (512, 256)}  # fmt: skip
    assert {c.heads for c in cells} == {7 * 48}


def test_check_stops_at_its_budget_and_at_ctrl_c():
    rig = FakeRig(of_the_model, launches=20000)
    cells = odd_cells([FP16], rig, (3, 200), (24,))
    report = check(cells, rig, compile=FakeCompiler(), budget=2)
    assert report.missing
    assert len(report.missing) + len(report.cells) == len(cells)
    rig = FakeRig(of_the_model, stop=300)
    report = check(cells, rig, compile=FakeCompiler())
    assert report.interrupted
    assert len(report.missing) + len(report.cells) == len(cells)


# Every family


def test_a_family_that_declares_nothing_has_candidates_and_costs():
    class Plain(type(SSU)):
        candidates = SSU.__class__.__mro__[1].candidates
        listings = SSU.__class__.__mro__[1].listings
        general = SSU.__class__.__mro__[1].general
        work = SSU.__class__.__mro__[1].work

    plain = Plain()
    plans = plain.shortlist(FP16, SM_90)
    assert len(set(plans)) == 40
    costs = {p: estimate(plain.work(FP16, p), SM_90)(1024) for p in plans}
    assert all(cost > 0 for cost in costs.values())
    assert len(set(costs.values())) > 10


def test_every_candidate_of_every_kind_of_config_can_be_costed():
    for state, rounding, pdl, tokens in itertools.product(
        ("fp32", "fp16", "int8"), ("nearest", "stochastic"), (False, True), (1, 6)
    ):
        if (state, rounding) == ("fp32", "stochastic"):
            continue
        config = KernelConfig(state_dtype=state, rounding=rounding, pdl=pdl, ntokens=tokens)
        for plan in entrants(config, SM_90, FEW, []):
            work = SSU.work(config, plan)
            assert all(v >= 0 for v in dataclasses.asdict(work).values())
            assert work.bytes > config.dim * config.dstate
            low, high = (estimate(work, SM_90)(n) for n in (100, 100_000))
            assert 0 < low < high
