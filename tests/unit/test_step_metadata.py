"""DecodeMetadata: every row in one partition with its own count, one upload, no wait."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from steps import DRAFTS, ROWS, STEP, TABLES, TOKENS, Ops, metadata, parts, whole_memory

import ssmgen
from ssmgen.errors import ArgumentTypeError, ArgumentValueError


@st.composite
def steps(draw, pad_slot_id=-1):
    """Arguments of `build`: up to ROWS rows of any kind, distinct slots, short table rows too."""
    count = draw(st.integers(0, ROWS))
    prefill = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    tokens = [draw(st.integers(1, 6 if chunk else DRAFTS + 1)) for chunk in prefill]
    accepted = [draw(st.integers(1, DRAFTS + 1)) for _ in range(count)]
    first = [chunk and draw(st.booleans()) for chunk in prefill]
    free = draw(st.permutations(range(1, (DRAFTS + 1) * ROWS + 1)))
    slots = []
    for chunk, n, taken in zip(prefill, tokens, accepted):
        least = max(taken, 1 if chunk else n)
        size = draw(st.integers(least, DRAFTS + 1))
        slots.append([free.pop() for _ in range(size)])
    return {
        "slots": slots, "tokens": tokens, "accepted": accepted, "prefill": prefill, "first": first,
    }  # fmt: skip


@given(step=steps(), data=st.data())
@pytest.mark.parametrize("pad_slot_id", [-1, 0])
def test_every_row_is_in_one_partition_with_its_own_count_and_slots(step, data, pad_slot_id):
    count = len(step["tokens"])
    plain = sum(n == 1 and not c for n, c in zip(step["tokens"], step["prefill"]))
    verify = sum(n > 1 and not c for n, c in zip(step["tokens"], step["prefill"]))
    padding = {
        "plain_rows": data.draw(st.none() | st.integers(plain, ROWS)),
        "verify_rows": data.draw(st.none() | st.integers(verify, ROWS)),
    }
    meta = metadata(pad_slot_id=pad_slot_id).build(**step, **padding)
    starts = np.cumsum([0, *step["tokens"]])
    assert meta.num_tokens == starts[-1]
    assert meta.first_slots.tolist() == [row[0] for row in step["slots"]]
    rows_seen, tokens_seen = [], []
    for kind, part in parts(meta).items():
        rows_seen += part.rows.tolist()
        tokens_seen += part.tokens.tolist()
        bounds = part.cu_seqlens.tolist()
        for i, row in enumerate(part.rows):
            slots, n = step["slots"][row], step["accepted"][row]
            if step["first"][row]:
                n = 1
            assert kind == (
                "prefill"
                if step["prefill"][row]
                else "verify"
                if step["tokens"][row] > 1
                else "plain"
            )
            filled = slots + [pad_slot_id] * (DRAFTS + 1 - len(slots))
            assert part.slots[i].tolist() == filled
            assert part.num_accepted_tokens[i] == n
            assert part.read_slots[i] == slots[n - 1]
            assert part.write_slots[i] == slots[0]
            assert part.has_initial_state[i] == (not step["first"][row])
            own = part.tokens[bounds[i] : bounds[i + 1]].tolist()
            assert own == list(range(starts[row], starts[row + 1]))
            assert len(own) <= part.longest
        for i in range(len(part.rows), part.batch):
            assert part.slots[i].tolist() == [pad_slot_id] * (DRAFTS + 1)
            assert part.read_slots[i] == part.write_slots[i] == pad_slot_id
            assert part.num_accepted_tokens[i] == 1
            assert not part.has_initial_state[i]
            assert bounds[i] == bounds[i + 1] == bounds[len(part.rows)]
        assert part.batch == len(part.write_slots) == len(bounds) - 1
        wanted = padding.get(f"{kind}_rows")
        assert part.batch == (len(part.rows) if wanted is None else wanted)
        assert part.ntokens == len(part.tokens)
        assert bool(part) == (part.batch > 0)
    assert sorted(rows_seen) == list(range(count))
    assert sorted(tokens_seen) == list(range(meta.padded_tokens))


@given(step=steps(), data=st.data())
def test_what_is_taken_is_put_back_where_it_was(step, data):
    meta = metadata().build(**step, plain_rows=data.draw(st.sampled_from([None, ROWS])),
                            verify_rows=data.draw(st.sampled_from([None, ROWS])))  # fmt: skip
    x = torch.arange(meta.padded_tokens * 2.0).view(-1, 2)
    out = torch.full_like(x, torch.nan)
    for part in parts(meta).values():
        assert torch.equal(part.take(x), x[part.tokens])
        part.put(out, part.take(x))
    assert torch.equal(out, x)


@given(step=steps())
def test_counts_in_a_table_of_the_device_give_the_same_tables(step):
    meta, other = metadata(), metadata()
    table = torch.full(((DRAFTS + 1) * ROWS + 1,), -7, dtype=torch.int32)
    for slots, n in zip(step["slots"], step["accepted"]):
        table[slots[0]] = n
    meta.build(**step, plain_rows=ROWS, verify_rows=ROWS)
    other.build(**step | {"accepted": table}, plain_rows=ROWS, verify_rows=ROWS)
    for part, same in zip(parts(meta).values(), parts(other).values()):
        for name in TABLES:
            assert torch.equal(getattr(part, name), getattr(same, name)), name


def test_a_count_on_the_device_outside_the_table_is_clamped_to_it():
    for n, column in ((0, 0), (-5, 0), (3, 2), (4, 2), (99, 2)):
        counts = torch.tensor([0, n, 0, 0], dtype=torch.int32)
        meta = metadata().build([[1, 2, 3]], [1], accepted=counts)
        assert meta.plain.read_slots.tolist() == [column + 1]
        assert meta.plain.num_accepted_tokens.tolist() == [column + 1]


def test_the_three_partitions_of_a_step():
    """By hand: rows of every kind between each other."""
    meta = metadata().build(
        slots=[[10, 11, 12, 13], [20, 21, 22, 23], 3 * [30], [40, 41, 42, 43], [50]],
        tokens=[1, 3, 5, 1, 1],
        accepted=[3, 2, 1, 1, 1],
        prefill=[False, False, True, False, True],
        first=[False, False, True, False, False],
    )
    assert meta.plain.rows.tolist() == [0, 3]
    assert meta.plain.read_slots.tolist() == [12, 40]
    assert meta.plain.write_slots.tolist() == [10, 40]
    assert meta.plain.num_accepted_tokens.tolist() == [3, 1]
    assert meta.plain.tokens.tolist() == [0, 9]
    assert meta.verify.rows.tolist() == [1]
    assert meta.verify.read_slots.tolist() == [21]
    assert meta.verify.tokens.tolist() == [1, 2, 3]
    assert meta.verify.longest == DRAFTS + 1
    assert meta.prefill.rows.tolist() == [2, 4]
    assert meta.prefill.cu_seqlens.tolist() == [0, 5, 6]
    assert meta.prefill.has_initial_state.tolist() == [False, True]
    assert meta.prefill.longest == TOKENS


def test_arguments_of_the_ops():
    meta = metadata().build([[1, 2], [3, 4], [5]], [1, 2, 4], prefill=[0, 0, 1])
    assert set(meta.plain.recurrent) == {
        "state_batch_indices", "dst_state_batch_indices", "pad_slot_id"}  # fmt: skip
    assert meta.verify.recurrent["state_batch_indices"] is meta.verify.slots
    assert meta.verify.recurrent["cache_steps"] == DRAFTS + 1
    assert meta.prefill.recurrent["cache_steps"] == TOKENS
    histories = torch.zeros(9, 2, 6)
    plain, verify, prefill = (part.conv(histories) for part in parts(meta).values())
    assert plain["conv_state"] is verify["conv_state"] is prefill["conv_states"] is histories
    assert plain["num_accepted_tokens"] is meta.plain.num_accepted_tokens
    assert verify["query_start_loc"] is meta.verify.cu_seqlens
    assert prefill["has_initial_state"] is meta.prefill.has_initial_state
    assert "query_start_loc" not in plain
    assert prefill["num_accepted_tokens"] is meta.prefill.num_accepted_tokens


@pytest.mark.parametrize("counts", ["host", "table"])
def test_a_prompt_chunk_that_follows_drafts_has_its_history_where_they_left_it(counts):
    histories = torch.arange(10 * 2 * 6.0).view(10, 2, 6)
    accepted = [1, 3, 2]
    table = torch.tensor([0, 1, 0, 0, 0, 3, 0, 0, 2, 0])
    meta = metadata().build(
        [[1], [5, 6, 7], [8, 9]], [2, 2, 2], prefill=3 * [True], first=[0, 0, 1],
        accepted=accepted if counts == "host" else table,
    )  # fmt: skip
    pasts = torch.stack([histories[1, :, :3], histories[5, :, 2:5], torch.zeros(2, 3)])
    x, weight = torch.arange(1.0, 13).view(2, 6), torch.ones(2, 4)
    out = ssmgen.causal_conv1d_fn(x, weight=weight, **meta.prefill.conv(histories))
    for i, past in enumerate(pasts):
        whole = torch.cat([past, x[:, 2 * i : 2 * i + 2]], dim=1)
        assert torch.equal(out[:, 2 * i : 2 * i + 2], whole.unfold(1, 4, 1).sum(2))
        assert torch.equal(histories[[1, 5, 8][i], :, :3], whole[:, 2:])


@pytest.mark.parametrize("counts", ["host", "table"])
def test_the_tables_drive_selective_state_update(counts):
    """A row without drafts that follows one with drafts starts from what was accepted."""
    pool = ssmgen.StatePool([ssmgen.LayerSpec(state=(2, 8, 16))], 12)
    pool.register("accepted", reset=1, of="request")
    meta = metadata(pool=pool)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 2, 8, generator=gen)
    B, C = torch.randn(2, 2, 4, 1, 16, generator=gen)
    A = -torch.rand(2, 1, 1, generator=gen).expand(2, 8, 16)
    dt = torch.full((1, 1), 0.5).expand(2, 8)
    rows = [pool.alloc(4), pool.alloc(4)]

    def run(tokens, accepted, begin):
        meta.build(rows, tokens, accepted=pool.table("accepted") if counts == "table" else accepted)
        taken = [(r, b + t) for r, (n, b) in enumerate(zip(tokens, begin)) for t in range(n)]
        flat = [torch.stack([t[r, i] for r, i in taken]) for t in (x, B, C)]
        out = torch.zeros_like(flat[0])
        for part in (meta.plain, meta.verify, meta.prefill):
            if part:
                x_, B_, C_ = map(part.take, flat)
                y = ssmgen.selective_state_update(
                    pool.state(0), x_, dt.expand(len(x_), 2, 8), A, B_, C_, **part.recurrent
                )
                part.put(out, y)
        return out

    run([3, 2], [1, 1], [0, 0])
    pool.table("accepted").index_copy_(0, meta.first_slots, torch.tensor([2, 2], dtype=torch.int32))
    out = run([1, 2], [2, 2], [2, 2])

    state = torch.zeros(2, 2, 8, 16)
    for t in range(3):
        y = ssmgen.selective_state_update(state, x[:, t], dt.expand(2, 2, 8), A, B[:, t], C[:, t])
    assert torch.equal(out[:2], y)


def test_a_step_is_one_upload_and_a_layer_none():
    meta = metadata()
    with Ops() as building:
        meta.build(**STEP, plain_rows=4, verify_rows=2)
    assert building.copies == [meta.plain.slots.untyped_storage().data_ptr()]
    assert not {"index_copy_", "scatter_", "index_put_", *Ops.WAITS} & set(building.names)
    x, histories = torch.randn(meta.padded_tokens, 5), torch.zeros(12, 2, 6)
    with Ops() as layer:
        for part in parts(meta).values():
            assert part.recurrent
            assert part.conv(histories)
            part.put(x, part.take(x))
    assert not layer.copies
    assert set(layer.names) == {"index_select", "index_copy_"}


def test_counts_on_the_device_are_not_waited_for_either():
    meta = metadata()
    counts = torch.ones(12, dtype=torch.int32)
    with Ops() as ops:
        meta.build(**STEP | {"accepted": counts}, plain_rows=4, verify_rows=2)
    assert not set(Ops.WAITS) - {"_to_copy"} & set(ops.names)
    assert set(ops.copies) == {meta.plain.slots.untyped_storage().data_ptr()}


@given(one=steps(), two=steps())
def test_tables_stay_at_their_addresses(one, two):
    meta = metadata()

    def addresses(step):
        meta.build(**step, plain_rows=ROWS, verify_rows=ROWS)
        return [getattr(p, name).data_ptr() for p in (meta.plain, meta.verify) for name in TABLES]

    assert addresses(one) == addresses(two)


@given(one=steps(), two=steps())
def test_a_step_of_the_same_padded_sizes_takes_the_same_path_through_x(one, two):
    """What a CUDA graph has captured must serve the next step of its sizes."""
    names = ("slots", "tokens", "accepted")
    meta = metadata()
    found = []
    for step in (one, two):
        decodes = [at for at, chunk in enumerate(step["prefill"]) if not chunk]
        step = {name: [step[name][at] for at in decodes] for name in names}
        meta.build(**step, plain_rows=ROWS, verify_rows=ROWS)
        found.append([(p.whole, p.batch, p.ntokens, p.longest) for p in (meta.plain, meta.verify)])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"accepted": [0, 1, 1, 1]}, ArgumentValueError, "found 0 in row 0; allowed: 1 to 4"),
        ({"accepted": [5, 1, 1, 1]}, ArgumentValueError, "accepted: found 5 in row 0"),
        ({"accepted": [1, 1, 1, 2]}, ArgumentValueError,
         r"slots: found \[10, -1, -1, -1\] in row 3; allowed: no padding"),
        ({"accepted": [1.0, 1, 1, 1]}, ArgumentTypeError, "accepted: found float64 values"),
        ({"accepted": torch.ones(12, 1, dtype=torch.int32)}, ArgumentValueError,
         r"found torch.int32 of shape \(12, 1\) on cpu; allowed: \(slots,\) int32 or int64 on cpu"),
        ({"accepted": torch.ones(12)}, ArgumentValueError, "found torch.float32 of shape"),
        ({"accepted": torch.ones(12, dtype=torch.int32, device="meta")}, ArgumentValueError,
         r"accepted: found torch.int32 of shape \(12,\) on meta; allowed: .* on cpu"),
        ({"accepted": torch.ones(10, dtype=torch.int32)}, ArgumentValueError,
         r"accepted: found .* of shape \(10,\) .*; allowed: .* of at least 11 slots"),
        ({"slots": [[1, 2, -1, 4], [5, 6, 7, 8], [9], [10]]}, ArgumentValueError,
         r"slots: found \[1, 2, -1, 4\] in row 0; allowed: padding, -1, after the slots"),
        ({"slots": [[1, 2, 3, 4], [5, 6, 7, 8], [-1, 9], [10]]}, ArgumentValueError,
         r"found \[-1, 9, -1, -1\] in row 2; allowed: padding, -1, after the slots"),
        ({"slots": [[1, 2, 3, 4], [5, 6, 7, 8], [9], [2**32 + 10]]}, ArgumentValueError,
         "slots: found 1 to 4294967306; allowed: an int32"),
        ({"slots": [[1, 2, 3, 4], [5, 6, 7, 8], [9], [1.5]]}, ArgumentTypeError,
         "slots: found float64 values"),
        ({"slots": [[1, 2, 3, 4], [5, 6, 7, 8], [9], 10]}, ArgumentTypeError,
         "slots: found rows that are no lists"),
        ({"tokens": [[1], [4], [6], [1]]}, ArgumentValueError, r"tokens: found shape \(4, 1\)"),
        ({"tokens": 4}, ArgumentValueError, r"tokens: found shape \(\); allowed: \(rows,\)"),
        ({"prefill": [[False], [False], [True], [False]]}, ArgumentValueError,
         r"prefill: found shape \(4, 1\)"),
        ({"accepted": [1, 1, 1]}, ArgumentValueError, r"accepted: found shape \(3,\)"),
        ({"tokens": [1, 5, 6, 1]}, ArgumentValueError, "found 5 in row 1; allowed: at most 4"),
        ({"tokens": [1, 4, 6, 2]}, ArgumentValueError, "in row 3; allowed: no padding"),
        ({"tokens": [0, 4, 6, 1]}, ArgumentValueError, "found 0 in row 0; allowed: at least 1"),
        ({"tokens": [1, 4, 65, 1]}, ArgumentValueError, "found 65 of prefill rows; allowed: 64"),
        ({"first": [True, 0, 0, 0]}, ArgumentValueError, "found True in row 0; allowed: False"),
        ({"prefill": [True]}, ArgumentValueError, r"prefill: found shape \(1,\)"),
        ({"slots": [[1], [2]]}, ArgumentValueError, "slots: found 2 rows of up to 1; allowed: 4"),
        ({"slots": np.zeros((4, 5), np.int32)}, ArgumentValueError, r"slots: found shape \(4, 5\)"),
        ({"plain_rows": 1}, ArgumentValueError, "plain_rows: found 1; allowed: 2, the plain rows"),
        ({"verify_rows": 9}, ArgumentValueError, "verify_rows: found 9; allowed: 1, .* to 8"),
    ],
)  # fmt: skip
def test_a_step_that_cannot_be_is_refused_and_the_last_one_stays(change, error, message):
    meta = metadata().build(**STEP)
    before = [meta.plain, whole_memory(meta).clone(), meta.padded_tokens]
    with pytest.raises(error, match=message), Ops() as ops:
        meta.build(**STEP | change)
    assert not ops.copies
    assert meta.plain is before[0]
    assert torch.equal(whole_memory(meta), before[1])
    assert meta.padded_tokens == before[2]


def test_more_rows_than_there_is_room_for_are_refused():
    meta = metadata(max_rows=2)
    with pytest.raises(
        ArgumentValueError, match="tokens: found 3 plain rows; allowed: 2, max_rows"
    ):
        meta.build([1, 2, 3], [1, 1, 1])


def test_a_prompt_of_any_length_has_one_kernel():
    """The bound of sequences is a constant of the kernel."""
    from ssmgen.families.gdn.contract import layout

    meta, configs = metadata(), set()
    state = torch.zeros(4, 2, 16, 8)
    for tokens in (1, 2, 5, 6, 33, 64):
        meta.build([1, 2], [tokens, 1], prefill=[True, False])
        inputs = {n: torch.zeros(tokens, *shape) for n, shape in
                  (("q", (1, 8)), ("k", (1, 8)), ("v", (2, 16)), ("a", (2,)), ("b", (2,)),
                   ("out", (2, 16)))}  # fmt: skip
        described = layout(state=state, A_log=torch.zeros(2), **inputs, **meta.prefill.recurrent)
        configs.add(described.config)
    assert len(configs) == 1


@pytest.mark.parametrize("rows", [64, 127, 300])
def test_tables_are_the_same_however_large_they_may_be(rows):
    step = STEP | {"prefill": [False, True, True, False], "tokens": [1, 4, 6, 4],
                   "slots": [[1, 2, 3, 4], [5, 6, 7, 8], [9], [10, 11, 12, 13]]}  # fmt: skip
    meta, other = metadata().build(**step), metadata(max_rows=rows).build(**step)
    for part, same in zip(parts(meta).values(), parts(other).values()):
        for name in TABLES:
            assert torch.equal(getattr(part, name), getattr(same, name)), name
        assert part.rows.tolist() == same.rows.tolist()


@given(step=steps(), data=st.data())
def test_lists_tuples_and_arrays_give_the_same_tables(step, data):
    wide = [row + [-1] * (DRAFTS + 1 - len(row)) for row in step["slots"]]
    as_arrays = {name: np.array(values) for name, values in step.items() if name != "slots"}
    as_arrays["slots"] = np.array(wide, np.int32).reshape(-1, DRAFTS + 1)
    as_tuples = {name: tuple(values) for name, values in step.items()}
    if not step["tokens"]:
        as_arrays = {name: values.astype(int) for name, values in as_arrays.items()}
    meta = metadata().build(**step)
    for other in (metadata().build(**as_arrays), metadata().build(**as_tuples)):
        for part, same in zip(parts(meta).values(), parts(other).values()):
            for name in TABLES:
                assert torch.equal(getattr(part, name), getattr(same, name)), name


def test_a_partition_without_rows_has_bounds():
    """Whatever the step before, or nobody, left in the memory that is uploaded."""
    meta = metadata()
    for staging in meta._tables._ring._ring:
        staging.bytes.fill(7)
    for step in (STEP, {"slots": [], "tokens": []}, {"slots": [9], "tokens": [1]}):
        meta.build(**step)
        for part in parts(meta).values():
            assert part.cu_seqlens[0] == 0
            assert len(part.cu_seqlens) == part.batch + 1


def test_slots_may_be_a_list_an_array_or_one_a_row():
    meta = metadata()
    for slots in ([4, 7], np.array([4, 7]), [[4], [7]], np.array([[4, 5], [7, 8]]), ((4, 5), (7,))):
        assert meta.build(slots, [1, 1]).plain.write_slots.tolist() == [4, 7]
    assert not meta.build([], []).plain


def test_drafts_need_columns_of_every_conv_history():
    pool = ssmgen.StatePool([ssmgen.LayerSpec(conv=(2, 5), conv_width=4)], 5)
    with pytest.raises(ArgumentValueError, match="drafts: found 4 slots in a row; allowed: 1 to 3"):
        metadata(pool=pool)
    assert metadata(pool=pool, drafts=2).columns == 3
