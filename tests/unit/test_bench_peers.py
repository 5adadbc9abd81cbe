"""The sections gdn and conv1d: which cells they have, who is measured, and how they are shown.

Peers are played by our adapters, which have their signatures.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import pytest
import torch
from test_bench import Clock, result_of

import ssmgen
from ssmgen.adapters import fla, flashinfer, vllm
from ssmgen.bench import contestants
from ssmgen.bench.contestants import Missing
from ssmgen.bench.grid import GRIDS, Wanted, gdn_config, key_heads
from ssmgen.bench.plots import plot
from ssmgen.bench.problem import make
from ssmgen.bench.report import tables
from ssmgen.bench.session import Session, contest, run
from ssmgen.families.conv1d.config import Conv1dConfig

BATCHES = (1, 4, 16, 64, 256, 1024)


def sigmoid_gating(
    A_log, a, b, dt_bias, q, k, v, scale, initial_state, ssm_state_indices, num_accepted_tokens,
    use_qk_l2norm_in_kernel,
):  # fmt: skip
    """vLLM's fused_sigmoid_gating_delta_rule_update, with a slot for each token."""
    out = ssmgen.gated_delta_rule_decode(
        initial_state, q, k, v, A_log, a, dt_bias, b, scale=scale,
        use_qk_l2norm=use_qk_l2norm_in_kernel, state_batch_indices=ssm_state_indices,
        dst_state_batch_indices=ssm_state_indices, num_accepted_tokens=num_accepted_tokens,
    )  # fmt: skip
    return out, initial_state


PLAYED = {
    "fused_sigmoid_gating_delta_rule_update": sigmoid_gating,
    "fused_recurrent_gated_delta_rule_packed_decode": (
        vllm.fused_recurrent_gated_delta_rule_packed_decode
    ),
    "fused_recurrent_gated_delta_rule": fla.fused_recurrent_gated_delta_rule,
    "gated_delta_rule_decode_pretranspose": flashinfer.gated_delta_rule_decode_pretranspose,
    "gated_delta_rule_mtp": flashinfer.gated_delta_rule_mtp,
    # Windows of vLLM are aligned left, and its null block is 0.
    "causal_conv1d_update": functools.partial(
        ssmgen.causal_conv1d_update, alignment="left", pad_slot_id=0
    ),
}
PLAYED_UPDATE = PLAYED["causal_conv1d_update"]
# K = V = 128 is all that FlashInfer has; two value heads of one key head are enough.
GDN = {
    "one token": gdn_config("fp32"),
    "bf16": gdn_config("bf16"),
    "verify": gdn_config("fp32", 3),
    "verify, bf16": gdn_config("bf16", 3),
    "last of several": gdn_config("fp32", ntokens=2),
    "two slots": gdn_config("fp32", has_dst=True),
    "accepted": gdn_config("fp32", accepted_dtype="int32"),
    "grouped": gdn_config("fp32", grouped=True),
    "(K, V)": gdn_config("fp32", state_layout="KV"),
    "kda": gdn_config("fp32", kda=True),
    "rounded": gdn_config("bf16 + SR 10"),
    "sequences": gdn_config("fp32", ntokens=2, seqlens_dtype="int32"),
    "small": gdn_config("fp32", head_k_dim=16),
}
SERVED = {
    "flashinfer": {"one token", "bf16", "verify", "last of several", "accepted"},
    "vllm": {"one token", "bf16", "small", "verify", "verify, bf16"},
    "fla": {"one token", "last of several", "small"},
}
CONV = {
    "one token": Conv1dConfig(),
    "verify": Conv1dConfig(many=True, accepted_dtype="int32", width=3, has_bias=True),
    "no activation": Conv1dConfig(activation=None),
    "two slots": Conv1dConfig(has_dst=True),
    "no table": Conv1dConfig(index_dtype=None),
    "circular": Conv1dConfig(counts_dtype="int32"),
    "right": Conv1dConfig(depth=5),
    "prefill": Conv1dConfig(many=True, prefill=True, has_initial=True),
}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "_public", lambda name, module, function: PLAYED[function])


def test_the_grid_of_gated_delta_nets_is_every_layer_state_and_step_by_batch():
    cells = GRIDS["gdn"].cells(Wanted())
    found = {
        (dict(c.shape)["k_heads"], c.nheads, c.config.state_dtype, c.config.ntokens, c.batch)
        for c in cells
    }
    layers = ((16, 32), (16, 48), (16, 64), (4, 8), (4, 12), (4, 16))
    assert found == {
        (*layer, state, tokens, batch)
        for layer in layers for state in ("fp32", "bf16") for tokens in (1, 4) for batch in BATCHES
    }  # fmt: skip
    assert len(found) == len(cells) == len({c.key for c in cells})
    for cell in cells:
        config = cell.config
        assert (config.head_k_dim, config.head_v_dim, config.dtype) == (128, 128, "bf16")
        verifies = config.ntokens == 4
        assert config.dst_tokens == verifies == bool(config.accepted_dtype)
        assert dict(cell.key)["k_heads"] == dict(cell.shape)["k_heads"]


def test_the_grid_of_convolutions_is_the_layers_before_those_nets():
    cells = GRIDS["conv1d"].cells(Wanted())
    found = {(c.nheads, dict(c.shape)["tokens"], c.batch) for c in cells}
    dims = (8192, 10240, 12288, 2048, 2560, 3072)
    assert found == {(d, tokens, batch) for d in dims for tokens in (1, 4) for batch in BATCHES}
    assert len(found) == len(cells)
    for cell in cells:
        config, tokens = cell.config, dict(cell.shape)["tokens"]
        assert (config.width, config.dtype, config.activation) == (4, "bf16", "silu")
        assert config.many == bool(config.accepted_dtype) == (tokens == 4)


def test_what_is_asked_for_is_what_the_grids_have():
    wanted = Wanted(heads=(6, 7), dims=(24,), states=("fp16 + SR 5",), batches=(3,), tokens=(2,))
    six, seven = GRIDS["gdn"].cells(wanted)
    assert (six.nheads, six.shape) == (6, (("k_heads", 3),))
    assert (seven.nheads, seven.shape) == (7, (("k_heads", 7),))
    assert (six.batch, six.config.ntokens, six.config.philox_rounds) == (3, 2, 5)
    (conv,) = GRIDS["conv1d"].cells(wanted)
    assert (conv.nheads, conv.batch, conv.shape) == (24, 3, (("tokens", 2),))
    for cell in (six, seven, conv):
        assert wanted.takes(dict(cell.key))
        assert not wanted.takes({**dict(cell.key), "tokens": 1})


@pytest.mark.parametrize("section", ["gdn", "conv1d"])
def test_a_cell_is_compiled_beforehand_under_the_config_its_calls_ask_for(section):
    from ssmgen.families import spec

    wanted = Wanted(heads=(2,), dims=(16, 20), batches=(2,))
    for cell in GRIDS[section].cells(wanted):
        shape = dict(cell.shape)
        problem = make(cell.config, 2, cell.nheads, device="cpu", pool_bytes=0, **shape)
        asked = spec(section).layout(**problem.arguments(0)).config
        assert asked.key_fields() == cell.config.key_fields()


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("case", GDN)
def test_peers_of_the_gated_delta_net_are_called_with_what_makes_them_right(name, case, played):
    heads = (4, 2) if case == "grouped" else (2, 1)
    problem: Any = make(
        GDN[case], 3, heads[0], k_heads=heads[1], device="cpu", pool_bytes=0
    )  # fmt: skip
    try:
        calls = contestants.adapter(name, "gdn")(problem)
    except Missing:
        assert case not in SERVED[name]
        return
    assert case in SERVED[name]
    assert len(calls) == problem.sets
    for which in range(problem.sets):
        assert problem.verify(lambda i: calls[i](), which) == ""


def test_the_states_that_fla_returns_are_checked(played, monkeypatch):
    def wrong(**given: Any) -> Any:
        out, states = fla.fused_recurrent_gated_delta_rule(**given)
        return out, states + 1

    monkeypatch.setitem(PLAYED, "fused_recurrent_gated_delta_rule", wrong)
    problem = make(GDN["one token"], 3, 2, device="cpu", pool_bytes=0)
    calls = contestants.adapter("fla", "gdn")(problem)
    assert "state off by" in problem.verify(lambda i: calls[i]())


def test_flashinfer_gets_slots_that_it_need_not_cast(played, monkeypatch):
    seen = []
    for name in ("gated_delta_rule_decode_pretranspose", "gated_delta_rule_mtp"):
        monkeypatch.setitem(
            PLAYED, name, lambda **given: seen.append(given["initial_state_indices"].dtype)
        )
    for case in ("one token", "verify"):
        problem = make(GDN[case], 2, 2, device="cpu", pool_bytes=0)
        contestants.adapter("flashinfer", "gdn")(problem)[0]()
    assert seen == [torch.int32, torch.int32]


def test_a_convolution_that_rounds_its_products_to_bf16_is_timed_and_a_wrong_one_not(
    played, monkeypatch
):
    def rounded(by: float) -> Any:
        def update(**given: Any) -> Any:
            out = PLAYED_UPDATE(**given)
            return out.add_(by)

        return update

    problem = make(Conv1dConfig(), 2, 16, device="cpu", pool_bytes=0)
    for by, admitted in ((2.0**-6, True), (2.0**-2, False)):
        monkeypatch.setitem(PLAYED, "causal_conv1d_update", rounded(by))
        found = contest(problem, ("vllm",), rounds=1, record=Clock(1.0))
        assert ("vllm" in found["us"]) == admitted
        assert ("vllm" in found["wrong"]) != admitted


def test_versions_are_those_of_distributions_or_of_modules(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__="9.8"))
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    found = contestants.versions()
    assert found["vllm"] == "9.8"
    assert "mamba_ssm" not in found


def test_vllm_is_found_where_it_was_before(monkeypatch):
    asked = []

    def public(name: str, module: str, function: str) -> Any:
        asked.append(module)
        if len(asked) == 1:
            raise Missing("vllm is not installed")
        return PLAYED[function]

    monkeypatch.setattr(contestants, "_public", public)
    problem = make(GDN["one token"], 1, 2, device="cpu", pool_bytes=0)
    contestants.adapter("vllm", "gdn")(problem)
    assert asked == ["vllm.third_party.flash_linear_attention.ops",
                     "vllm.model_executor.layers.fla.ops"]  # fmt: skip


@pytest.mark.parametrize("case", CONV)
def test_vllm_convolves_as_we_do(case, played):
    problem = make(CONV[case], 3, 16, device="cpu", pool_bytes=0)
    try:
        calls = contestants.adapter("vllm", "conv1d")(problem)
    except Missing:
        assert case not in ("one token", "verify", "no activation")
        return
    assert case in ("one token", "verify", "no activation")
    for which in range(problem.sets):
        assert problem.verify(lambda i: calls[i](), which) == ""


@pytest.mark.parametrize(
    ("family", "name"),
    [("gdn", "flashinfer"), ("gdn", "vllm"), ("gdn", "fla"), ("conv1d", "vllm")],
)
def test_a_peer_that_is_not_installed_is_missing(family, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    config = gdn_config("fp32") if family == "gdn" else Conv1dConfig()
    problem = make(config, 1, 2, device="cpu", pool_bytes=0)
    with pytest.raises(Missing, match=f"{name} (is not installed|cannot be imported)"):
        contestants.adapter(name, family)(problem)


def test_a_contest_names_who_has_nothing_for_the_family(played):
    problem = make(Conv1dConfig(), 2, 16, device="cpu", pool_bytes=0)
    names = ("ssmgen", "flashinfer", "vllm", "fla", "copy")
    found = contest(problem, names, rounds=1, record=Clock(1.0, 2.0, 3.0, 4.0))
    assert list(found["us"]) == ["ssmgen", "vllm", "copy"]
    assert found["missing"]["fla"] == "fla has nothing for the family conv1d"
    assert not found["wrong"]


@pytest.mark.parametrize(
    ("section", "title", "columns"),
    [
        ("gdn", "1 key heads, 2 value heads", ["state", "tokens", "batch"]),
        ("conv1d", "16 channels", ["tokens", "batch"]),
    ],
)
def test_a_section_runs_and_is_shown(section, title, columns, played):
    wanted = Wanted(heads=(2,), dims=(16,), states=("fp32",), batches=(1, 2))
    made = Session(wanted=wanted, names=("ssmgen", "vllm", "copy"), device="cpu", pool_bytes=0,
                   rounds=1, bandwidth=1e9, record=Clock(2.0))  # fmt: skip
    result = run(section, made)
    assert "failed" not in result
    assert len(result["cells"]) == 4
    for cell in result["cells"]:
        assert not cell["wrong"]
        assert cell["us"]["ssmgen"] == 2.0
        assert cell["floor_us"] > 0
        assert "vllm" in cell["us"]
    (table,) = tables(result, wanted)
    assert table.title == title
    assert table.columns == [*columns, "floor", "ssmgen", "vllm", "copy"]
    assert len(table.rows) == 4
    assert any(note.startswith("vllm / ssmgen, one token") for note in table.notes)


def test_a_picture_is_named_after_the_layer(tmp_path):
    pytest.importorskip("matplotlib")
    times = {"floor_us": 1.0, "us": {"ssmgen": 2.0}, "wrong": {}, "missing": {}}
    nets = [{"k_heads": 16, "heads": n, "state": "bf16", "tokens": 1, "batch": b, **times}
            for n in (32, 48) for b in (1, 8)]  # fmt: skip
    convs = [{"dim": 64, "tokens": t, "batch": 1, **times} for t in (1, 4)]
    written = [
        *plot({**result_of(nets), "section": "gdn"}, tmp_path),
        *plot({**result_of(convs), "section": "conv1d"}, tmp_path),
    ]
    assert [path.name for path in written] == [
        "gdn-t9-16-key-heads-32-heads-bf16.png", "gdn-t9-16-key-heads-48-heads-bf16.png",
        "conv1d-t9-64-channels.png",
    ]  # fmt: skip


@pytest.mark.parametrize(("nheads", "count"), [(32, 16), (48, 16), (12, 4), (10, 5), (7, 7)])
def test_key_heads_are_those_of_the_layer(nheads, count):
    assert key_heads(nheads) == count
    assert make(gdn_config("fp32", head_k_dim=8, head_v_dim=8), 1, nheads, device="cpu",
                pool_bytes=0).k_heads == count  # fmt: skip
