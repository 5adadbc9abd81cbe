"""The rendered kernels of many tokens, in Triton's interpreter, against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from placing import placed
from ssu_calls import ROUNDINGS, SCALED, expected, make, raw, same, verify
from ssu_tokens import KINDS, make_tokens, path_of, row_of, token_of

import ssmgen
from ssmgen import Plan
from ssmgen.errors import ArgumentValueError

SMALL = {"nheads": 2, "ngroups": 1}
MATRIX = {"algorithm": "matrix", "precision": "fast"}
# As in test_ssu_interpret; a token's error is the larger the later it comes.
DETERMINED = {"fp32": 0.0, "bf16": 0.99, "fp16": 0.95, "int16": 0.3, "int8": 0.99,
              "fp8_e4m3fn": 0.99}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
def test_every_kind_of_call_is_right_for_every_state_and_rounding(kind, state, rounding):
    options = KINDS[kind]
    call = make_tokens(state, rounding, **options, **({} if "headless" in options else SMALL))
    assert verify(call, call.interpreted()).determined >= DETERMINED[state]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", ["fp32", "bf16", "fp16"])
def test_a_placed_plan_gives_the_same_bits(state, kind):
    options = KINDS[kind]
    call = make_tokens(state, **options, **({} if "headless" in options else SMALL))
    wanted = call.interpreted()
    plans = placed(call.layout().config)
    assert bool(plans) == (call.layout().config.aligned and "tree" not in kind and kind != "chain")
    for plan in plans:
        found = call.interpreted(plan)
        verify(call, found)
        for name in ("out", "state", "intermediate_states_buffer"):
            if wanted.tensors.get(name) is not None:
                assert same(found[name], wanted[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tables", [("int32", "int64"), ("int64", "int32")])
def test_every_index_dtype_is_right(kind, tables):
    call = make_tokens("bf16", **KINDS[kind], index_dtype=tables[0], table_dtype=tables[1])
    verify(call, call.interpreted())


@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    served=st.sampled_from(ROUNDINGS),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    dim=st.sampled_from([8, 24]),
    dstate=st.sampled_from([8, 24]),
    tied=st.booleans(),
    z=st.booleans(),
    D=st.booleans(),
    dt_bias=st.booleans(),
    softplus=st.booleans(),
    packed=st.booleans(),
    lead=st.integers(0, 9),
    pitch=st.integers(0, 20),
    buffer_pitch=st.integers(0, 20),
    offset=st.integers(0, 9),
    update=st.booleans(),
    random=st.integers(0, 999),
)
def test_any_layout_is_right_and_touches_nothing_else(kind, served, **more):
    call = make_tokens(*served, **{**KINDS[kind], **more})
    verify(call, call.interpreted())


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 19])
def test_any_number_of_tokens_is_right(tokens):
    call = make_tokens("fp32", tokens=tokens, batch=1, buffer=tokens, **SMALL)
    verify(call, call.interpreted())


@pytest.mark.parametrize("name", ["x", "z"])
@pytest.mark.parametrize("options", [{}, {"packed": True}, MATRIX], ids=["loop", "views", "matrix"])
def test_out_may_be_x_or_z_itself(options, name):
    call = make_tokens("fp32", tokens=3, z=True, **SMALL, **options)
    want = call.interpreted()
    call.tensors["out"] = call[name]
    after = call.interpreted()
    assert same(after["out"], want["out"])
    assert same(after["state"], want["state"])


def test_out_is_not_x_where_a_path_reads_x_again():
    call = make_tokens("fp32", **KINDS["tree"], z=True)
    want = call.interpreted()
    call.tensors["out"] = call["z"]
    assert same(call.interpreted()["out"], want["out"])
    call.tensors["out"] = call["x"]
    before = call.copy()
    for refused in (call.layout, lambda: ssmgen.selective_state_update(**call.arguments())):
        with pytest.raises(ArgumentValueError, match=r"out: found x itself; .* parent_tokens"):
            refused()
    assert all(same(before[name], call[name]) for name in call.tensors)


def test_a_table_of_one_row_may_have_any_stride():
    call = make_tokens("fp32", tokens=2, batch=1, accepted=[2], indices=[[3, 4]], **SMALL)
    for name in ("state_batch_indices", "num_accepted_tokens"):
        table = call[name]
        call.tensors[name] = table.as_strided(table.shape, (2**33, 1)[: table.dim()])
    verify(call, call.interpreted())


# Bits that must agree

PLANS = [
    Plan(algorithm="simple", block_m=8, block_n=32, num_warps=1),
    Plan(algorithm="simple", block_m=16, block_n=32, num_warps=2),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("options", [{}, {"z": True, "tied": False}, {"packed": True}], ids=str)
def test_many_tokens_are_as_many_single_tokens_bit_for_bit(plan, options):
    call = make_tokens("fp32", tokens=5, **SMALL, **options)
    together = call.interpreted(plan)
    single = call.copy()
    for token in range(5):
        after = token_of(single, token).interpreted(plan)
        single.tensors["state"] = after["state"]
        assert same(after["out"], together["out"][:, token])
    assert same(single["state"], together["state"])


@pytest.mark.parametrize("state", ["fp32", "bf16", "fp16"])
def test_a_sequence_of_one_token_is_a_single_token(state):
    call = make_tokens(state, lengths=[1, 1, 1], steps=4, spare=0, **SMALL)
    single = make(state, batch=3, slots=10, indices=None, **SMALL)
    single.tensors["state_batch_indices"] = call["state_batch_indices"]
    one, other = call.interpreted(PLANS[0]), single.interpreted(PLANS[0])
    assert all(same(one[name], other[name]) for name in ("out", "state"))


@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
def test_a_tree_that_is_a_chain_gives_the_bits_of_the_chain(state, rounding):
    chain = make_tokens(state, rounding, tokens=4, buffer=4, **SMALL)
    tree = make_tokens(state, rounding, tokens=4, buffer=4, parents=[[-1, 0, 1, 2]] * 3, **SMALL)
    one, other = chain.interpreted(), tree.interpreted()
    assert all(same(one[name], other[name]) for name in chain.tensors)


TREE = [-1, 0, 1, 0, 3, -1, 1]


@pytest.mark.parametrize("leaf", range(len(TREE)))
def test_a_path_of_a_tree_gives_the_bits_of_the_path_alone(leaf):
    tree = make_tokens("fp32", tokens=len(TREE), batch=1, parents=[TREE], buffer=8, z=True, **SMALL)
    after = tree.interpreted()
    path, token = [], leaf
    while token >= 0:
        path.insert(0, token)
        token = TREE[token]
    found = path_of(tree, path).interpreted()
    assert same(found["out"][:, -1], after["out"][:, leaf])
    entry = int(tree["state_batch_indices"][0])
    for at, token in enumerate(path):
        name = "intermediate_states_buffer"
        assert same(found[name][entry, at], after[name][entry, token])


@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
def test_a_row_alone_gives_the_bits_of_the_row_in_a_batch(state, rounding):
    call = make_tokens(state, rounding, tokens=3, buffer=3, z=True, **SMALL)
    together = call.interpreted()
    for row in range(3):
        alone = row_of(call, row).interpreted()
        slot = int(call["state_batch_indices"][row])
        assert same(alone["out"][0], together["out"][row])
        for name in set(call.tensors) & {"state", "state_scale", "intermediate_states_buffer"}:
            assert same(alone[name][slot], together[name][slot])


def test_no_two_tokens_and_no_two_places_share_their_random_bits():
    """The first token moves the state off what bf16 holds, the others leave it as it is: what is
    stored after each differs by its random bits alone."""
    call = make_tokens(
        "bf16", "stochastic", tokens=4, batch=1, buffer=4, indices=[3], softplus=False,
        dt_bias=False, D=False, dim=64, dstate=64, **SMALL,
    )  # fmt: skip
    call.tensors["A"] = torch.full((2, 1, 1), -1.0).expand(2, 64, 64)
    call.tensors["dt"] = torch.tensor([2.0**-9, 0, 0, 0]).view(1, 4, 1, 1).expand(1, 4, 2, 64)
    call["x"].zero_()
    after = call.interpreted()
    verify(call, after)
    states = [*after["intermediate_states_buffer"][3], after["state"][3]]
    for i, one in enumerate(states):
        for other in states[:i]:
            differ = float((one != other).double().mean())
            # Two rounded independently differ with 2 p (1 - p), a third on average.
            assert 0.2 < differ < 0.5, differ


# Tables that cannot be followed


def broken_rows(call, *rows):
    """After the kernel ran: exactly the outputs of these rows are NaN, the rest is right."""
    after = call.interpreted()
    out = after["out"]
    for row in range(len(out) if out.dim() == 4 else 0):
        assert bool(out[row].isnan().all()) == (row in rows)
    return after


@pytest.mark.parametrize("accepted", [4, 5, 2**31 - 1])
def test_more_accepted_than_columns_is_nan_and_writes_no_state(accepted):
    options = {"tokens": 2, "indices": [[0, 1, 2], [3, 4, 5]], "batch": 2, "buffer": 2, **SMALL}
    call = make_tokens("fp32", accepted=[accepted, 2], entries=[0, 1], **options)
    after = broken_rows(call, 0)
    for name in ("state", "intermediate_states_buffer"):
        changed = (raw(after[name]) != raw(call[name])).flatten(1).any(1).nonzero()[:, 0]
        assert changed.tolist() == [{"state": 4}.get(name, 1)]
    with pytest.raises(ArgumentValueError, match=f"num_accepted_tokens: found {accepted}; .* 3"):
        ssmgen.selective_state_update(**call.copy().arguments())


@pytest.mark.parametrize("accepted", [0, -1, -(2**31)])
def test_none_accepted_starts_from_the_first_column(accepted):
    call = make_tokens("fp32", accepted=[accepted], tokens=2, batch=1, indices=[[4, 1, 2]], **SMALL)
    assert expected(call).written == {4: 1}
    verify(call, call.interpreted())


@pytest.mark.parametrize("parents", [[-1, 1, 0], [-2, 0, 1], [-1, 0, 2**31 - 1], [0, 0, 1]])
def test_a_parent_that_is_no_earlier_token_is_nan_and_writes_no_state(parents):
    call = make_tokens(
        "fp32", tokens=3, batch=2, parents=[[-1, 0, 0], parents], buffer=3, indices=[5, 2], **SMALL
    )
    after = broken_rows(call, 1)
    for name in ("state", "intermediate_states_buffer"):
        changed = (raw(after[name]) != raw(call[name])).flatten(1).any(1).nonzero()[:, 0]
        assert changed.tolist() == [5]
    with pytest.raises(ArgumentValueError, match="parent_tokens: found"):
        ssmgen.selective_state_update(**call.copy().arguments())


@pytest.mark.parametrize(
    ("ends", "nan", "words"),
    [
        ([0, 2, 7, 8], [2, 3, 4, 5, 6], "5 tokens; allowed: cache_steps, 4"),
        ([0, 2, 11, 11], range(2, 8), "11; allowed: 0 to 8"),
        ([-3, 2, 4, 6], [0, 1], "-3; allowed: 0 to 8"),
        ([0, 2, 1, 4], [], "token 1 in two sequences"),
        ([0, 2, 2**31 - 1, 4], range(2, 8), "allowed: 0 to 8"),
        ([-(2**31), 2**31 - 1, 4, 6], [], "allowed: 0 to 8"),
        ([9, 12, 14, 14], [], "allowed: 0 to 8"),
    ],
)
@pytest.mark.parametrize("tree", [False, True])
def test_a_sequence_that_is_too_long_is_nan_and_writes_no_state(ends, nan, words, tree):
    """Sequences that are whole are right; the op on a CPU, and the checked mode, raise."""
    parents = [[-1, 0, 1, 2]] * 3 if tree else None
    call = make_tokens(
        "fp32", lengths=[2, 3, 3], steps=4, spare=0, indices=[0, 1, 2], parents=parents, **SMALL
    )
    call.tensors["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    after = call.interpreted()
    whole = [i for i in range(3) if 0 <= ends[i] < ends[i + 1] <= min(8, ends[i] + 4)]
    touched = sorted({r for i in whole for r in range(ends[i], ends[i + 1])} | set(nan))
    is_nan = after["out"].isnan().flatten(1).all(1)
    before = call["out"].isnan().flatten(1).all(1)
    assert before.all()
    assert is_nan.nonzero()[:, 0].tolist() == [
        row for row in range(8) if row in nan or row not in touched
    ]
    changed = (after["state"] != call["state"]).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert changed == whole
    with pytest.raises(ArgumentValueError, match=f"cu_seqlens: found .*{words}"):
        ssmgen.selective_state_update(**call.copy().arguments())


@settings(max_examples=60)
@given(
    ends=st.lists(st.integers(-5, 14), min_size=4, max_size=4),
    accepted=st.lists(st.integers(-3, 6), min_size=3, max_size=3),
    parents=st.lists(st.integers(-3, 5), min_size=12, max_size=12),
)
def test_whatever_the_tables_say_only_sequences_that_are_whole_write(ends, accepted, parents):
    table = torch.tensor(parents).view(3, 4)
    source = torch.arange(9).view(3, 3)
    call = make_tokens(
        "fp32", lengths=[2, 3, 3], steps=4, spare=0, accepted=accepted, indices=source.tolist(),
        parents=table.tolist(), nheads=1, ngroups=1, dim=8, dstate=8, buffer=4, entries=[0, 1, 2],
    )  # fmt: skip
    call.tensors["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    whole = []
    for i in range(3):
        length = ends[i + 1] - ends[i]
        fits = ends[i] >= 0 and ends[i + 1] <= 8 and 0 < length <= 4
        if fits and accepted[i] <= 3 and all(-1 <= int(table[i, t]) < t for t in range(length)):
            whole.append(i)
    after = call.interpreted()
    changed = (after["state"] != call["state"]).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert changed == [3 * i + max(accepted[i] - 1, 0) for i in whole]
    buffer = "intermediate_states_buffer"
    changed = (raw(after[buffer]) != raw(call[buffer])).flatten(2).any(2).nonzero().tolist()
    assert changed == [[i, t] for i in whole for t in range(ends[i + 1] - ends[i])]


@pytest.mark.parametrize(("state", "rounding"), ROUNDINGS)
def test_a_padded_row_touches_nothing_and_outputs_as_a_zero_state(state, rounding):
    options = {"tokens": 3, "batch": 2, "buffer": 3, "z": True, **SMALL}
    padded = make_tokens(state, rounding, indices=[7, -3], pad=7, **options)
    zero = make_tokens(state, rounding, indices=[0, 1], **options)
    for call in (padded, zero):
        for name in ("state", "state_scale"):
            if name in call.tensors:
                poison = 0x7F if call is padded else 0
                raw(call[name]).fill_(poison)
    if state in SCALED:
        padded["state_scale"].fill_(torch.nan)
    after = padded.interpreted()
    assert same(after["out"], zero.interpreted()["out"])
    assert all(name == "out" or same(after[name], padded[name]) for name in padded.tensors)


def test_the_state_of_an_earlier_token_is_not_read_back_from_where_it_was_rounded():
    """The tree starts over from the slot's state, though token 0 has overwritten the slot."""
    options = {"tokens": 3, "batch": 1, "parents": [[-1, -1, -1]], **SMALL}
    call = make_tokens("bf16", indices=[2], dst=[[2, 2, 2]], **options)
    verify(call, call.interpreted())


def test_the_checked_mode_raises_where_the_kernel_would_give_nan(monkeypatch):
    call = make_tokens("fp32", lengths=[5, 1], steps=4, spare=0, indices=[0, 1], **SMALL)
    before = call.copy()
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    ssmgen.selective_state_update(**call.arguments())
    assert call["out"][:5].isnan().all()
    monkeypatch.setenv("SSMGEN_CHECK", "1")
    with pytest.raises(ArgumentValueError, match="cu_seqlens: found a sequence of 5 tokens"):
        ssmgen.selective_state_update(**before.arguments())
    assert before["out"].isnan().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"indices": [3, 3]}, "state_batch_indices: found slot 3, that two rows write"),
        ({"indices": [1, 2], "dst": [4, 4]}, "dst_.*: found slot 4, that two rows write"),
        ({"indices": [1, 2], "dst": [[4, 5], [6, 4]]}, "dst_.*: found slot 4, that two rows"),
        ({"indices": [1, 2], "dst": [5, 1]}, "^state_.*: found slot 1, that another row writes"),
        ({"buffer": 2, "entries": [5, 5]}, "intermediate_.*: found entry 5, that two rows write"),
        ({"buffer": 2, "indices": [1, 1], "update": False}, "found entry 1, that two rows write"),
        # A slot that is only read, that the row itself writes again, or that is padding.
        ({"indices": [1, 1], "update": False}, None),
        ({"indices": [1, 1], "dst": [4, 5]}, None),
        ({"indices": [1, 2], "dst": [[1, 1], [6, 2]]}, None),
        ({"indices": [-1, -1], "dst": [3, 3], "buffer": 2, "entries": [2, 2]}, None),
        ({"indices": [1, 2], "dst": [-1, -1], "buffer": 2, "entries": [-1, -1]}, None),
        ({"lengths": [2, 0], "steps": 2, "indices": [1, 1]}, None),
    ],
)
def test_the_checked_mode_raises_where_rows_would_race(options, words, monkeypatch):
    call = make_tokens("fp32", **{"tokens": 2, "batch": 2, **SMALL, **options})
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    monkeypatch.setenv("SSMGEN_CHECK", "1")
    before = call.copy()
    if words is None:
        ssmgen.selective_state_update(**call.arguments())
        return
    with pytest.raises(ArgumentValueError, match=words):
        ssmgen.selective_state_update(**call.arguments())
    assert all(same(before[name], call[name]) for name in call.tensors)
