"""The selective state update reference, against scalar Python and the promises every op makes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmgen.reference import (
    QMAX,
    dequantise,
    quantise,
    random_bits,
    round_to,
    selective_state_update,
    ssu_step,
)

E4M3 = torch.float8_e4m3fn
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ROUNDABLE = [torch.bfloat16, torch.float16, *QMAX]
STATES = [torch.float32, *ROUNDABLE]


@dataclass
class Case:
    """Arguments of one call; the pool is drawn from the same seed as the rest."""

    nslots: int = 6
    batch: int = 3
    ngroups: int = 1
    ratio: int = 3
    dim: int = 2
    dstate: int = 8
    seed: int = 0
    state_dtype: torch.dtype = torch.float32
    input_dtype: torch.dtype = torch.float32
    with_D: bool = True
    with_z: bool = True
    with_bias: bool = True
    inputs: dict[str, Any] = field(init=False)
    state: torch.Tensor = field(init=False)
    scale: torch.Tensor | None = field(init=False)

    def __post_init__(self):
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(shape, generator=random).to(self.input_dtype)

        nheads = self.ngroups * self.ratio
        rows, weights = (self.batch, nheads, self.dim), (nheads, self.dim)
        self.inputs = {
            "x": normal(*rows),
            "dt": normal(*rows),
            "A": -torch.rand(*weights, self.dstate, generator=random),
            "B": normal(self.batch, self.ngroups, self.dstate),
            "C": normal(self.batch, self.ngroups, self.dstate),
            "D": normal(*weights) if self.with_D else None,
            "z": normal(*rows) if self.with_z else None,
            "dt_bias": normal(*weights) if self.with_bias else None,
        }
        pool = torch.randn((self.nslots, *weights, self.dstate), generator=random)
        if self.state_dtype in QMAX:
            self.state, self.scale = quantise(pool, self.state_dtype)
        else:
            self.state, self.scale = pool.to(self.state_dtype), None

    def run(self, **options):
        options.setdefault("dt_softplus", True)
        return selective_state_update(self.state, **self.inputs, state_scale=self.scale, **options)

    def step(self, h, rows=slice(None), **options):
        options.setdefault("dt_softplus", True)
        per_row = ("x", "dt", "B", "C", "z")
        chosen = {
            name: value[rows] if name in per_row and value is not None else value
            for name, value in self.inputs.items()
        }
        return ssu_step(h, **chosen, **options)

    def decoded(self, slots=slice(None), dtype=torch.float32):
        if self.scale is None:
            return self.state[slots].to(dtype)
        return dequantise(self.state[slots], self.scale[slots], dtype)

    def pool_bits(self):
        """A copy of everything the op may write, as raw bits."""
        return raw(self.state), None if self.scale is None else raw(self.scale)


def raw(tensor):
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.clone().view(view[tensor.dtype.itemsize])


def same(a, b):
    return torch.equal(raw(a), raw(b))


def assert_only_changed(case, before, slots):
    others = [slot for slot in range(case.nslots) if slot not in slots]
    for now, then in zip(case.pool_bits(), before):
        if now is not None:
            assert torch.equal(now[others], then[others])


def scalar_ssu(case, dt_softplus, source, target, pad, checked):
    """The update in Python floats: outputs with their rounding bounds, and the slots written."""
    pool = case.decoded(dtype=torch.float64).tolist()
    args = {k: None if v is None else v.double().tolist() for k, v in case.inputs.items()}
    outputs, bounds, written = [], [], {}
    for row in range(case.batch):
        padded = checked and source[row] == pad
        new_slot = []
        for head in range(case.ngroups * case.ratio):
            group = head // case.ratio
            new_head = []
            for p in range(case.dim):
                x = args["x"][row][head][p]
                step = args["dt"][row][head][p]
                if args["dt_bias"] is not None:
                    step += args["dt_bias"][head][p]
                if dt_softplus:
                    step = math.log(1 + math.exp(step))
                total, size, new_row = 0.0, 0.0, []
                for n in range(case.dstate):
                    old = 0.0 if padded else pool[source[row]][head][p][n]
                    new = math.exp(args["A"][head][p][n] * step) * old
                    new += step * args["B"][row][group][n] * x
                    total += new * args["C"][row][group][n]
                    size += abs(new * args["C"][row][group][n]) + abs(old) + abs(new)
                    new_row.append(new)
                if args["D"] is not None:
                    total += args["D"][head][p] * x
                    size += abs(args["D"][head][p] * x)
                if args["z"] is not None:
                    gate = args["z"][row][head][p]
                    total *= gate / (1 + math.exp(-gate))
                    size *= abs(gate)
                outputs.append(total)
                bounds.append(size)
                new_head.append(new_row)
            new_slot.append(new_head)
        if not padded and target[row] != pad:
            written[target[row]] = new_slot
    shape = tuple(case.inputs["x"].shape)
    as_tensor = {slot: torch.tensor(h, dtype=torch.float64) for slot, h in written.items()}
    return (
        torch.tensor(outputs, dtype=torch.float64).reshape(shape),
        torch.tensor(bounds, dtype=torch.float64).reshape(shape),
        as_tensor,
    )


@st.composite
def calls(draw):
    nslots = draw(st.integers(1, 6))
    batch = draw(st.integers(1, nslots))
    case = Case(
        nslots=nslots,
        batch=batch,
        ngroups=draw(st.integers(1, 2)),
        ratio=draw(st.sampled_from([1, 2, 3])),
        dim=draw(st.integers(1, 3)),
        dstate=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 1000)),
        with_D=draw(st.booleans()),
        with_z=draw(st.booleans()),
        with_bias=draw(st.booleans()),
    )
    pad = draw(st.sampled_from([-1, 0, nslots - 1, 1000]))

    def table():
        order = draw(st.permutations(range(nslots)))[:batch]
        return [pad if draw(st.booleans()) and draw(st.booleans()) else slot for slot in order]

    source = table() if draw(st.booleans()) else None
    target = table() if draw(st.booleans()) else None
    return case, draw(st.booleans()), source, target, pad


@settings(max_examples=120, deadline=None)
@given(calls())
def test_reference_equals_scalar_arithmetic_in_fp64(call):
    case, softplus, source, target, pad = call
    rows = list(range(case.batch))
    expected, size, written = scalar_ssu(
        case,
        softplus,
        source if source is not None else rows,
        target if target is not None else (source if source is not None else rows),
        pad if source is not None or target is not None else None,
        checked=source is not None,
    )
    before = case.pool_bits()
    out = case.run(
        dt_softplus=softplus,
        state_batch_indices=None if source is None else torch.tensor(source),
        dst_state_batch_indices=None if target is None else torch.tensor(target),
        pad_slot_id=pad,
        out=torch.empty(case.inputs["x"].shape, dtype=torch.float64),
        compute_dtype=torch.float64,
    )
    # At most 5 + 5 terms, each after fewer than 30 roundings of 2**-53.
    assert bool(((out - expected).abs() <= 2.0**-46 * (size + 1)).all())
    assert_only_changed(case, before, written)
    for slot, h in written.items():
        # One fp32 rounding of 2**-24, and the fp64 noise that may tip it to the other side.
        error = (case.state[slot].double() - h).abs()
        assert bool((error <= 2.0**-24 * h.abs() * (1 + 2.0**-20) + 2.0**-44).all())


def test_step_returns_the_unrounded_state_in_the_compute_dtype():
    case = Case(batch=2)
    h = case.decoded(slice(0, 2))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        y, h_new = case.step(h, rows=slice(0, 2), compute_dtype=dtype)
        assert y.dtype == h_new.dtype == dtype
    y32, h32 = case.step(h, rows=slice(0, 2))
    y64, h64 = case.step(h, rows=slice(0, 2), compute_dtype=torch.float64)
    assert float((h32 - h64).abs().max()) < 64 * 2.0**-24 * float(h64.abs().max())
    assert not torch.equal(h32.double(), h64)
    assert float((y32 - y64).abs().max()) < 64 * 8 * 2.0**-24 * float(h64.abs().max() + 1) * 8


def test_softplus_is_stable_and_exact_at_both_ends():
    # softplus(v) shows as the new state when the old one, A and B are 0, 0 and 1 and x is 1.
    values = torch.tensor([-800.0, -40.0, -1.0, 0.0, 1.0, 19.9, 20.1, 40.0, 800.0])
    shape = (1, 1, len(values))
    _, h_new = ssu_step(
        torch.zeros(*shape, 1),
        torch.ones(shape),
        values.reshape(shape),
        torch.zeros(1, len(values), 1),
        torch.ones(1, 1, 1),
        torch.ones(1, 1, 1),
        dt_softplus=True,
        compute_dtype=torch.float64,
    )
    for value, found in zip(values.tolist(), h_new.flatten().tolist()):
        exact = max(value, 0.0) + math.log1p(math.exp(-abs(value)))
        assert found == pytest.approx(exact, rel=2.0**-51)
    assert math.isclose(h_new.flatten()[1], math.exp(-40.0), rel_tol=1e-12)


def test_one_a_per_head_expanded_with_stride_zero_equals_a_dense_one():
    dense, expanded = Case(dim=4, dstate=16), Case(dim=4, dstate=16)
    per_head = dense.inputs["A"][:, :1, :1].clone()
    expanded.inputs["A"] = per_head.expand(-1, 4, 16)
    dense.inputs["A"] = per_head.expand(-1, 4, 16).contiguous()
    options = {"compute_dtype": torch.float64}
    assert torch.allclose(dense.run(**options), expanded.run(**options), rtol=2.0**-22, atol=0)
    assert torch.allclose(dense.state, expanded.state, rtol=2.0**-23, atol=0)


# Slots


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("pad", [-1, 4, 99])
def test_padded_row_touches_no_slot_and_outputs_as_a_zero_state(state_dtype, pad):
    case = Case(state_dtype=state_dtype)
    if pad == 4:
        case.state[4] = 1
        if case.scale is not None:
            case.scale[4] = math.nan
        else:
            case.state[4] = math.nan
    before = case.pool_bits()
    zero_state, _ = case.step(torch.zeros(3, 3, 2, 8))
    table = torch.tensor([pad, 2, pad])
    out = case.run(
        state_batch_indices=table, dst_state_batch_indices=torch.tensor([0, 3, 5]), pad_slot_id=pad
    )
    assert same(out[[0, 2]], zero_state[[0, 2]])
    assert not torch.equal(out[1], zero_state[1])
    assert_only_changed(case, before, [3])


def test_a_batch_of_padding_needs_no_slot_at_all():
    case = Case(nslots=0)
    out = case.run(state_batch_indices=torch.full((3,), -1, dtype=torch.int32))
    assert same(out, case.step(torch.zeros(3, 3, 2, 8))[0])


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("source", [None, [1, 2, 0]])
def test_padded_destination_is_not_written(state_dtype, source):
    case, plain = Case(state_dtype=state_dtype), Case(state_dtype=state_dtype)
    before = case.pool_bits()
    table = None if source is None else torch.tensor(source)
    out = case.run(state_batch_indices=table, dst_state_batch_indices=torch.tensor([-1, 5, -1]))
    assert_only_changed(case, before, [5])
    assert not torch.equal(case.pool_bits()[0][5], before[0][5])
    assert same(out, plain.run(state_batch_indices=table))


def test_without_indices_row_i_uses_slot_i_and_no_row_is_padding():
    implicit, explicit = Case(), Case()
    out = implicit.run(pad_slot_id=1)
    assert same(out, explicit.run(state_batch_indices=torch.arange(3)))
    assert same(implicit.state, explicit.state)


@pytest.mark.parametrize("state_dtype", STATES)
def test_destination_is_written_and_source_stays(state_dtype):
    moved, in_place = Case(state_dtype=state_dtype), Case(state_dtype=state_dtype)
    source, target = torch.tensor([0, 2, 1]), torch.tensor([5, 3, 4])
    before = moved.pool_bits()
    out = moved.run(state_batch_indices=source, dst_state_batch_indices=target)
    assert same(out, in_place.run(state_batch_indices=source))
    assert_only_changed(moved, before, [3, 4, 5])
    assert same(moved.state[target], in_place.state[source])
    if moved.scale is not None:
        assert same(moved.scale[target], in_place.scale[source])


@pytest.mark.parametrize("state_dtype", STATES)
def test_all_sources_are_read_before_any_destination_is_written(state_dtype):
    rotated, apart = Case(state_dtype=state_dtype), Case(state_dtype=state_dtype)
    source = torch.tensor([0, 1, 2])
    rotated.run(state_batch_indices=source, dst_state_batch_indices=torch.tensor([1, 2, 0]))
    apart.run(state_batch_indices=source, dst_state_batch_indices=torch.tensor([3, 4, 5]))
    assert same(rotated.state[[1, 2, 0]], apart.state[[3, 4, 5]])
    if rotated.scale is not None:
        assert same(rotated.scale[[1, 2, 0]], apart.scale[[3, 4, 5]])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_column_zero_of_a_table_is_used_in_either_index_dtype(index_dtype):
    flat, table = Case(), Case()
    source, target = torch.tensor([3, -1, 0]), torch.tensor([1, 2, 4])
    wide = torch.full((3, 4), 777, dtype=index_dtype)
    wide_target = wide.clone()
    wide[:, 0], wide_target[:, 0] = source, target
    out = table.run(state_batch_indices=wide, dst_state_batch_indices=wide_target)
    assert same(out, flat.run(state_batch_indices=source, dst_state_batch_indices=target))
    assert same(table.state, flat.state)


@pytest.mark.parametrize("state_dtype", STATES)
def test_slots_may_lie_apart_and_what_is_between_them_is_not_touched(state_dtype):
    packed, apart = Case(state_dtype=state_dtype), Case(state_dtype=state_dtype)
    wide = torch.zeros(6, 2, *packed.state.shape[1:]).to(state_dtype)
    raw_view = wide.view(torch.uint8) if state_dtype == E4M3 else wide
    raw_view[:, 0] = packed.state.view(raw_view.dtype)
    apart.state = wide[:, 0]
    between = raw(wide[:, 1].contiguous())
    table = torch.tensor([4, 0, 3])
    assert same(apart.run(state_batch_indices=table), packed.run(state_batch_indices=table))
    assert same(apart.state.contiguous(), packed.state)
    assert torch.equal(raw(wide[:, 1].contiguous()), between)


@pytest.mark.parametrize("state_dtype", STATES)
def test_disabled_update_gives_the_output_and_writes_nothing(state_dtype):
    disabled, enabled = Case(state_dtype=state_dtype), Case(state_dtype=state_dtype)
    before = disabled.pool_bits()
    table = torch.tensor([2, -1, 5])
    out = disabled.run(state_batch_indices=table, disable_state_update=True)
    assert_only_changed(disabled, before, [])
    assert same(out, enabled.run(state_batch_indices=table))


@pytest.mark.parametrize("state_dtype", STATES)
def test_a_batch_of_none_gives_an_empty_output_and_writes_nothing(state_dtype):
    case = Case(batch=0, state_dtype=state_dtype)
    before = case.pool_bits()
    seed = None if state_dtype == torch.float32 else 1
    for table in (None, torch.empty(0, dtype=torch.int32)):
        assert case.run(state_batch_indices=table, rand_seed=seed).shape == (0, 3, 2)
    assert_only_changed(case, before, [])


# Storage


@pytest.mark.parametrize("seed", [None, 7, torch.tensor([7])])
@pytest.mark.parametrize("state_dtype", STATES)
def test_the_stored_state_is_the_rounded_new_state(state_dtype, seed):
    if state_dtype == torch.float32 and seed is not None:
        seed = None
    case = Case(state_dtype=state_dtype, dim=3, dstate=12)
    source, target = torch.tensor([1, 4, 0]), torch.tensor([4, 2, 5])
    y, h_new = case.step(case.decoded(source))
    bits = None if seed is None else random_bits(7, target, 3, 3, 12, 5)
    out = case.run(
        state_batch_indices=source,
        dst_state_batch_indices=target,
        rand_seed=seed,
        philox_rounds=5,
    )
    assert same(out, y)
    if case.scale is None:
        assert same(case.state[target], round_to(h_new, state_dtype, bits))
    else:
        codes, scale = quantise(h_new, state_dtype, bits)
        assert same(case.state[target], codes)
        assert same(case.scale[target], scale)


@pytest.mark.parametrize("state_dtype", STATES)
def test_a_written_state_reads_back_within_one_step_of_its_storage(state_dtype):
    case = Case(state_dtype=state_dtype)
    _, h_new = case.step(case.decoded(slice(0, 3)))
    case.run()
    step = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, E4M3: 2.0**-4}
    if state_dtype in step:
        bound = h_new.abs() * step[state_dtype] + 2.0**-10 * h_new.abs().amax(-1, True) / 448
    else:
        bound = h_new.abs().amax(-1, True) / QMAX[state_dtype] / 2
    error = (case.decoded(slice(0, 3)) - h_new).abs()
    assert bool((error <= bound * (1 + 2.0**-6) * (state_dtype != torch.float32)).all())


@pytest.mark.parametrize("state_dtype", ROUNDABLE)
def test_random_bits_belong_to_the_written_slot_and_not_to_the_one_read(state_dtype):
    def stored(source, target, seed=3):
        case = Case(batch=1, state_dtype=state_dtype, dim=8, dstate=32)
        case.state[1] = case.state[0].clone()
        if case.scale is not None:
            case.scale[1] = case.scale[0]
        case.run(
            state_batch_indices=torch.tensor([source]),
            dst_state_batch_indices=torch.tensor([target]),
            rand_seed=seed,
        )
        return case.state[target]

    assert same(stored(0, 4), stored(1, 4))
    assert not same(stored(0, 4), stored(0, 5))
    assert not same(stored(0, 4), stored(0, 4, seed=4))


@pytest.mark.parametrize("state_dtype", STATES)
def test_a_row_alone_gives_the_bits_of_the_row_in_a_batch(state_dtype):
    seed = None if state_dtype == torch.float32 else 5
    together = Case(nslots=9, batch=7, dim=5, dstate=24, state_dtype=state_dtype)
    table = torch.tensor([8, 1, -1, 0, 3, 7, 2])
    out = together.run(state_batch_indices=table, rand_seed=seed)
    for row in range(7):
        alone = Case(nslots=9, batch=7, dim=5, dstate=24, state_dtype=state_dtype)
        for name in ("x", "dt", "B", "C", "z"):
            alone.inputs[name] = alone.inputs[name][row : row + 1]
        found = alone.run(state_batch_indices=table[row : row + 1], rand_seed=seed)
        assert same(found[0], out[row])
        if int(table[row]) >= 0:
            assert same(alone.state[int(table[row])], together.state[int(table[row])])


@pytest.mark.parametrize("state_dtype", list(QMAX))
def test_a_poisoned_row_stays_nan_and_spoils_no_other_row(state_dtype):
    case = Case(state_dtype=state_dtype)
    case.scale[0, 1, 1] = math.nan
    out = case.run()
    poisoned = torch.zeros(3, 3, 2, dtype=torch.bool)
    poisoned[0, 1, 1] = True
    assert torch.equal(out.isnan(), poisoned)
    assert torch.equal(case.scale[:3].isnan(), poisoned)


def test_a_nan_in_the_input_poisons_its_own_rows_of_a_scaled_state():
    case = Case(state_dtype=torch.int8)
    case.inputs["x"][1, 2, 0] = math.nan
    out = case.run(rand_seed=1)
    assert out.isnan().nonzero().tolist() == [[1, 2, 0]]
    assert case.scale.isnan().nonzero().tolist() == [[1, 2, 0]]


# Output and inputs


@pytest.mark.parametrize("input_dtype", FLOATS)
def test_out_is_written_and_returned_and_inputs_stay(input_dtype):
    given_, made = Case(input_dtype=input_dtype), Case(input_dtype=input_dtype)
    copies = {k: v.clone() for k, v in given_.inputs.items() if v is not None}
    out = torch.full((3, 3, 2), math.nan, dtype=input_dtype)
    assert given_.run(out=out) is out
    fresh = made.run()
    assert fresh.dtype == input_dtype
    assert same(out, fresh)
    assert all(same(given_.inputs[name], copy) for name, copy in copies.items())


@pytest.mark.parametrize("name", ["x", "z"])
def test_out_may_be_an_input(name):
    aliased, apart = Case(), Case()
    assert same(aliased.run(out=aliased.inputs[name]), apart.run())


def test_dt_may_be_one_number_per_head_expanded_with_stride_zero():
    expanded, dense = Case(dim=4), Case(dim=4)
    per_head = dense.inputs["dt"][..., :1].clone()
    expanded.inputs["dt"] = per_head.expand(-1, -1, 4)
    dense.inputs["dt"] = per_head.expand(-1, -1, 4).contiguous()
    assert same(expanded.run(), dense.run())
    assert same(expanded.state, dense.state)


# Errors


@pytest.mark.parametrize(
    ("state_dtype", "options", "error", "text"),
    [
        (torch.float32, {"rand_seed": 1}, ValueError, "rand_seed"),
        (torch.bfloat16, {"rand_seed": 1, "philox_rounds": 0}, ValueError, "rounds"),
        (torch.float16, {"rand_seed": torch.tensor([1, 2])}, ValueError, "rand_seed"),
        (torch.float32, {"out": torch.zeros(3, 3, 3)}, ValueError, "out"),
        (torch.float32, {"state_batch_indices": torch.tensor([0, 6, 1])}, ValueError, "slot 6"),
        (torch.int8, {"dst_state_batch_indices": torch.tensor([0, 1, 9])}, ValueError, "slot 9"),
    ],
)
def test_a_refused_call_has_written_nothing(state_dtype, options, error, text):
    case = Case(state_dtype=state_dtype)
    before = case.pool_bits()
    out = options.setdefault("out", torch.zeros(3, 3, 2))
    with pytest.raises(error, match=text):
        case.run(**options)
    assert_only_changed(case, before, [])
    assert not bool(out.any())


def test_scales_are_asked_for_and_refused_by_the_state_dtype():
    scaled = Case(state_dtype=torch.int16)
    scaled.scale = None
    with pytest.raises(ValueError, match="needs state_scale"):
        scaled.run()
    plain = Case(state_dtype=torch.float16)
    plain.scale = torch.ones(6, 3, 2)
    with pytest.raises(ValueError, match="takes no state_scale"):
        plain.run()


def test_an_unknown_state_dtype_is_refused_by_name():
    case = Case()
    case.state = case.state.double()
    with pytest.raises(TypeError, match="float64"):
        case.run()


def test_heads_must_divide_into_groups():
    case = Case()
    case.inputs["B"] = case.inputs["B"].repeat(1, 2, 1)
    case.inputs["C"] = case.inputs["C"].repeat(1, 2, 1)
    with pytest.raises(ValueError, match="multiple of ngroups"):
        case.run()
