"""selective_state_update of many tokens on a GPU, at real shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launching import launch
from placing import placed
from serving import MUTATIONS, Server, assert_close, assert_same_outputs, exact
from ssu_calls import ROUNDINGS, Call, digest, moved, raw, same, verify
from ssu_tokens import KINDS, make_tokens, path_of, row_of, token_of
from waiting import no_waiting

import ssmgen
from ssmgen.errors import ArgumentValueError, ConfigError
from ssmgen.families.ssu.contract import ABI_TENSORS

pytestmark = pytest.mark.gpu

MAMBA2 = {"nheads": 24, "ngroups": 3, "dim": 64, "dstate": 128}
BUFFER = "intermediate_states_buffer"


def run(call: Call, **options: Any) -> Call:
    """What the op makes of `call` on the GPU, back on the CPU."""
    device = moved(call, "cuda")
    ssmgen.selective_state_update(**{**device.arguments(), **options})
    return moved(device, "cpu")


def of(kind: str) -> dict[str, Any]:
    return {**({} if "headless" in KINDS[kind] else MAMBA2), **KINDS[kind]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("state", "rounding"),
    [("fp32", "nearest"), ("fp16", "stochastic"), ("int8", "nearest")],
)
def test_every_kind_of_call_is_right(kind, state, rounding):
    call = make_tokens(state, rounding, **of(kind))
    verify(call, run(call))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_every_placed_plan_is_right(kind, state):
    call = make_tokens(state, **of(kind))
    for plan in placed(call.layout().config):
        after = moved(call, "cuda")
        launch(after, plan)
        verify(call, moved(after, "cpu"))


@pytest.mark.parametrize("kind", ["tree, all else", "intermediate and final"])
@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
def test_every_state_and_rounding_is_right(kind, state, rounding):
    call = make_tokens(state, rounding, **of(kind))
    verify(call, run(call))


@pytest.mark.parametrize(("dim", "dstate"), [(8, 8), (80, 128), (192, 256), (64, 512), (512, 16)])
def test_odd_sizes_are_right(dim, dstate):
    for tokens in (2, 17):
        call = make_tokens("fp16", tokens=tokens, nheads=6, ngroups=2, dim=dim, dstate=dstate,
                           buffer=tokens)  # fmt: skip
        verify(call, run(call))


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"packed": True, "z": True}], ids=str)
def test_many_tokens_are_as_many_single_tokens_bit_for_bit(options):
    call = make_tokens("fp32", tokens=6, **MAMBA2, **options)
    together = run(call)
    single = moved(call, "cuda")
    for token in range(6):
        ssmgen.selective_state_update(**token_of(single, token).arguments())
    assert same(single["state"].cpu(), together["state"])


@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
def test_a_tree_that_is_a_chain_gives_the_bits_of_the_chain(state, rounding):
    chain = make_tokens(state, rounding, tokens=5, buffer=5, **MAMBA2)
    parents = [[-1, 0, 1, 2, 3]] * 3
    tree = make_tokens(state, rounding, tokens=5, buffer=5, parents=parents, **MAMBA2)
    one, other = run(chain), run(tree)
    assert all(same(one[name], other[name]) for name in chain.tensors)


def test_a_path_of_a_tree_gives_the_bits_of_the_path_alone():
    parents = [-1, 0, 1, 0, 3, -1, 1, 6]
    tree = make_tokens("fp32", tokens=8, batch=1, parents=[parents], buffer=8, **MAMBA2)
    after = run(tree)
    entry = int(tree["state_batch_indices"][0])
    for path in ([0, 1, 2], [0, 3, 4], [5], [0, 1, 6, 7]):
        found = run(path_of(tree, path))
        for at, token in enumerate(path):
            assert same(found["out"][:, at], after["out"][:, token])
            assert same(found[BUFFER][entry, at], after[BUFFER][entry, token])


@pytest.mark.parametrize(("state", "rounding"), [("fp32", "nearest"), ("int8", "stochastic")])
def test_a_row_alone_gives_the_bits_of_the_row_in_a_batch(state, rounding):
    call = make_tokens(state, rounding, tokens=4, buffer=4, z=True, **MAMBA2)
    together = run(call)
    assert digest(*run(call).tensors.values()) == digest(*together.tensors.values())
    for row in range(3):
        alone = run(row_of(call, row))
        slot = int(call["state_batch_indices"][row])
        assert same(alone["out"][0], together["out"][row])
        assert same(alone["state"][slot], together["state"][slot])
        assert same(alone[BUFFER][slot], together[BUFFER][slot])


@pytest.mark.parametrize("name", ["x", "z"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_out_may_be_x_or_z_itself(precision, name):
    call = make_tokens("fp32", tokens=6, z=True, precision=precision, **MAMBA2)
    want = run(call)
    call.tensors["out"] = call[name]
    after = run(call)
    assert all(same(after[n], want[n]) for n in ("out", "state"))


def test_out_is_never_x_where_a_path_reads_x_again():
    """Also where the layout is known from a call with another `out`."""
    call = moved(make_tokens("fp32", **of("tree")), "cuda")
    ssmgen.selective_state_update(**call.arguments())
    with pytest.raises(ArgumentValueError, match="out: found x itself"):
        ssmgen.selective_state_update(**{**call.arguments(), "out": call["x"]})


@pytest.mark.parametrize("name", ["cu_seqlens", "num_accepted_tokens", "parent_tokens"])
def test_a_table_that_cannot_be_followed_is_nan_and_writes_no_state(name, monkeypatch):
    call = make_tokens(
        "bf16", lengths=[2, 3, 1], steps=3, spare=0, indices=[[0, 1], [2, 3], [4, 5]],
        accepted=[1, 2, 1], parents=[[-1, 0, 0]] * 3, buffer=3, entries=[0, 1, 2], **MAMBA2,
    )  # fmt: skip
    bad = {"cu_seqlens": [0, 1, 5, 6], "num_accepted_tokens": [1, 3, 1],
           "parent_tokens": [[-1, 0, 0], [-1, 1, 0], [-1, 0, 0]]}  # fmt: skip
    call[name].copy_(torch.tensor(bad[name]))
    before = call["out"].fill_(0).clone()
    after = run(call)
    nan = after["out"].isnan().flatten(1)
    rows = [1, 2, 3, 4] if name == "cu_seqlens" else [2, 3, 4]
    assert nan.all(1).nonzero()[:, 0].tolist() == rows
    assert nan.any(1).nonzero()[:, 0].tolist() == rows
    changed = (after["state"] != call["state"]).flatten(1).any(1).nonzero()[:, 0]
    assert changed.tolist() == [0, 4]
    changed = (raw(after[BUFFER]) != raw(call[BUFFER])).flatten(1).any(1).nonzero()[:, 0]
    assert changed.tolist() == [0, 2]
    # A layout is checked from the time it is first seen: another stride is another layout.
    monkeypatch.setenv("SSMGEN_CHECK", "1")
    call.tensors["out"] = torch.zeros(*before.shape[:2], 128, dtype=before.dtype)[..., :64]
    with pytest.raises(ArgumentValueError, match=f"{name}: found"):
        run(call)


def test_offsets_beyond_two_to_the_31_elements_are_addressed():
    near = make_tokens("fp16", tokens=3, batch=1, buffer=3, indices=[0], nheads=128, ngroups=8,
                       dim=64, dstate=128, slots=2)  # fmt: skip
    far = moved(near, "cuda")
    slots = 2**31 // near["state"][0].numel() + 3
    for name in ("state", BUFFER):
        count = slots if name == "state" else slots // 3 + 2
        pool = torch.zeros(count, *near[name].shape[1:], dtype=torch.float16, device="cuda")
        pool[-1] = far[name][0]
        far.tensors[name] = pool
    far.tensors["state_batch_indices"] = torch.tensor([slots - 1], device="cuda")
    far.tensors["intermediate_state_indices"] = torch.tensor([slots // 3 + 1], device="cuda")
    ssmgen.selective_state_update(**far.arguments())
    want = run(near)
    for name in ("state", BUFFER):
        assert same(far[name][-1].cpu(), want[name][0])
        far[name][-1] = 0
        assert not far[name].any()
    assert same(far["out"].cpu(), want["out"])


def test_a_captured_graph_follows_its_tables():
    options = {**KINDS["varlen, accepted"], **MAMBA2}
    call = moved(make_tokens("fp32", **options), "cuda")
    start = call["state"].clone()
    ssmgen.selective_state_update(**call.arguments())
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_waiting():
        ssmgen.selective_state_update(**call.arguments())
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ssmgen.selective_state_update(**call.arguments())
    for lengths, accepted in (([3, 1, 0], [2, 1, 1]), ([0, 2, 2], [1, 3, 2]), ([1, 1, 1], [3] * 3)):
        other = make_tokens("fp32", **{**options, "lengths": lengths, "accepted": accepted,
                                       "spare": 6 - sum(lengths)})  # fmt: skip
        for name in ("cu_seqlens", "num_accepted_tokens"):
            call[name].copy_(other[name])
        for name in ("x", "B", "C", "out"):
            call[name].copy_(other[name])
        call["dt"][..., :1].copy_(other["dt"][..., :1])
        call["state"].copy_(start)
        graph.replay()
        other.tensors["state"] = start.cpu()
        verify(other, moved(call, "cpu"))


def test_opcheck_and_compile():
    call = moved(make_tokens("bf16", "stochastic", **of("tree, all else")), "cuda")
    names = ("dt_softplus", "pad_slot_id", "disable_state_update", "philox_rounds", "algorithm",
             "pdl", "cache_steps", "precision")  # fmt: skip
    flat = (*(call.tensors.get(n) for n in ABI_TENSORS), *(call.switches[n] for n in names))
    torch.library.opcheck(torch.ops.ssmgen.selective_state_update.default, flat)
    want = moved(call, "cuda")
    ssmgen.selective_state_update(**want.arguments())
    compiled = torch.compile(ssmgen.selective_state_update, fullgraph=True)
    compiled(**call.arguments())
    assert all(same(call[n], want[n]) for n in ("state", "out", BUFFER))


@pytest.mark.parametrize("algorithm", ["vertical", "horizontal"])
def test_an_algorithm_that_has_no_tokens_is_refused_before_anything_is_written(algorithm):
    call = moved(make_tokens("fp32", tokens=2, **MAMBA2), "cuda")
    before = call["state"].clone()
    with pytest.raises(ConfigError, match=f"algorithm: '{algorithm}'.*auto, simple"):
        ssmgen.selective_state_update(**{**call.arguments(), "algorithm": algorithm})
    assert same(call["state"], before)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("keep", ["slots", "buffered"])
def test_serving_speculatively_changes_no_bit_of_what_is_accepted(keep, pdl):
    options = {"keep": keep, "device": "cuda", "dim": 64, "dstate": 128, "requests": 20, "rows": 6,
               "pdl": pdl}  # fmt: skip
    server = Server(drafts=3, **options)
    close = exact(server)
    found = server.run()
    assert_same_outputs(found, Server(drafts=0, **options).run())
    assert_close(found, close, 1e-5)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("keep", ["slots", "buffered"])
def test_the_simulation_fails_for_a_server_with_this_bug(keep, mutation):
    options = {"keep": keep, "device": "cuda", "dim": 64, "dstate": 128}
    wanted = Server(drafts=0, **options).run()
    with pytest.raises(AssertionError, match="outputs differ"):
        assert_same_outputs(Server(drafts=3, mutation=mutation, **options).run(), wanted)
