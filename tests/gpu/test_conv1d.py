"""causal_conv1d on a GPU, at the sizes of Qwen3-Next: every promise of docs/conv1d.md on the real
kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_calls import ConvCall, make_conv, verify_conv
from ssu_calls import digest, make, moved, same

import ssmgen
from ssmgen.ops import conv1d

pytestmark = pytest.mark.gpu

DIM = 8192  # 2 x 16 heads of q and k, 32 of v, of 128
FORMS = ("one", "dense", "varlen", "prefill", "prefill_dense")
FLAGS = {"prefill": [True, False, True], "prefill_dense": [True, True, False]}


def run(call: ConvCall, **options: Any) -> Any:
    """What the op makes of `call` on the GPU, back on the CPU."""
    device = moved(call, "cuda")
    result = device.op(**{**device.arguments(), **options})
    assert result.data_ptr() == device["out"].data_ptr()
    return moved(device, "cpu")


def check(form: str = "one", **options: Any) -> Any:
    call = make_conv(form, **options)
    after = run(call)
    verify_conv(call, after)
    return call, after


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_width_is_right(form, width):
    check(form, width=width, dim=DIM, initial=FLAGS.get(form))


@pytest.mark.parametrize("dim", [6144, 8192, 10240, 12288])
@pytest.mark.parametrize("batch", [1, 4, 40])
def test_one_token_is_right_at_every_size_and_plan(dim, batch):
    check(dim=dim, batch=batch, bias=False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "types",
    [{"dtype": "fp16"}, {"dtype": "fp32"}, {"state_dtype": "fp32"}, {"weight_dtype": "fp32"},
     {"bias": False, "activation": None}],
    ids=str,
)  # fmt: skip
def test_every_dtype_is_right(form, types):
    check(form, dim=2048, initial=FLAGS.get(form), **types)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "layout",
    [
        {"order": "length"}, {"order": "length", "state_len": 4, "alignment": "right"},
        {"order": "loose", "pitch": 5, "offset": 3}, {"pitch": 3, "offset": 1}, {"pitch": 64},
        {"gap": 4096}, {"gap": 3, "lead": 1}, {"weight_order": "channels"}, {"dim": 1021},
        {"alignment": "right", "state_len": 9}, {"alignment": "left", "state_len": 9},
    ],
    ids=str,
)  # fmt: skip
def test_every_layout_is_right(form, layout):
    check(form, **{"dim": 1024, **layout}, initial=FLAGS.get(form))


@pytest.mark.parametrize("form", ["one", "dense", "varlen"])
@pytest.mark.parametrize("state_len", [3, 4, 7])
def test_circular_windows_are_right(form, state_len):
    check(form, dim=DIM, counts=[0, 2, 1000], state_len=state_len, tokens=5)


@pytest.mark.parametrize("width", [2, 4, 6])
def test_accepted_tokens_are_right_in_a_mixed_batch(width):
    state_len = width - 1 + 7
    lengths = [1, 8, 1, 3, 5, 1, 0, 8]
    accepted = [8, 1, 3, 8, 2, 1, 4, 0]
    check("varlen", dim=DIM, width=width, state_len=state_len, lengths=lengths, accepted=accepted)
    check("one", dim=DIM, batch=8, width=width, state_len=state_len, accepted=accepted)


@pytest.mark.parametrize("form", FORMS)
def test_padded_rows_touch_no_slot(form):
    # The pool holds NaN in every slot and column that is not a row's past.
    _, after = check(form, dim=DIM, indices=[-1, 4, -1], initial=FLAGS.get(form))
    assert torch.isfinite(after["out"].float()).all()
    _, after = check(form, dim=DIM, indices=[-1, -1, -1])
    assert after["conv_state"].isnan().all()


def test_rows_that_cannot_be_followed_are_nan_and_write_nothing():
    call = make_conv("varlen", dim=DIM, lengths=[1, 5, 2], accepted=[1, 1, 9], state_len=6)
    after = run(call)
    assert after["out"].isnan().all(1).tolist() == [False] + [True] * 7
    slots = call["conv_state_indices"]
    for row in (1, 2):
        assert same(after["conv_state"][slots[row]], call["conv_state"][slots[row]])


@pytest.mark.parametrize(
    "lengths", [[4096], [1] * 300, [0, 1000, 1, 15, 16, 17, 0, 333], [700, 2, 700]], ids=str
)
def test_prefills_of_any_lengths_are_right(lengths):
    flags = [i % 3 != 1 for i in range(len(lengths))]
    check("prefill", dim=1024, lengths=lengths, initial=flags, spare=3)


def test_prefill_has_the_bits_of_updates_and_many_tokens_those_of_single_calls():
    call = make_conv("prefill", dim=DIM, lengths=[5, 1, 70], initial=[True] * 3)
    whole = run(call)
    update = call.copy()
    del update.tensors["has_initial_state"]
    update.switches["prefill"] = False
    for name in ("x", "out"):
        update.tensors[name] = update[name].t()
    many = run(update)
    assert same(many["out"], whole["out"].t())
    assert same(many["conv_state"], whole["conv_state"])

    device = moved(update, "cuda")
    slots = device["conv_state_indices"]
    state = device["conv_state"]
    weights = {n: device[n] for n in ("weight", "bias")}
    for row, (begin, end) in enumerate(((0, 5), (5, 6), (6, 76))):
        for token in range(begin, end):
            y = ssmgen.causal_conv1d_update(
                device["x"][token : token + 1], state, **weights, activation="silu",
                conv_state_indices=slots[row : row + 1],
            )  # fmt: skip
            assert same(y.cpu(), many["out"][token : token + 1])
    assert same(state.cpu(), many["conv_state"])


def test_a_row_alone_gives_the_bits_it_gives_in_a_batch():
    call = make_conv(dim=DIM, batch=8)
    whole = run(call)
    for row in range(8):
        alone = call.copy()
        for name in ("x", "out", "conv_state_indices"):
            alone.tensors[name] = alone[name][row : row + 1]
        one = run(alone)
        slot = int(call["conv_state_indices"][row])
        assert same(one["out"], whole["out"][row : row + 1])
        assert same(one["conv_state"][slot], whole["conv_state"][slot])


@pytest.mark.parametrize("form", FORMS)
def test_two_launches_and_dependent_launches_give_equal_bits(form):
    call = make_conv(form, dim=DIM, initial=FLAGS.get(form))
    found = {digest(*(run(call, pdl=pdl)[n] for n in ("out", "conv_state")))
             for pdl in (False, True, False, True)}  # fmt: skip
    assert len(found) == 1


@pytest.mark.parametrize("order", ["channels", "length", "loose"])
@pytest.mark.parametrize("form", ["one", "dense"])
def test_no_window_is_written_before_it_is_read(form, order):
    # A thousand steps on the same windows: one read out of order would stay in them.
    call = make_conv(form, dim=DIM, batch=16, tokens=2, order=order, dtype="bf16")
    device = moved(call, "cuda")
    steps = torch.randn(1000, *call["x"].shape, device="cuda", dtype=torch.bfloat16)
    arguments = device.arguments()
    for step in steps:
        device.op(**{**arguments, "x": step})
    last = steps[-3:] if form == "one" else steps[-2:]
    want = last.permute(1, 2, 0) if form == "one" else torch.cat(last.unbind(), 2)[:, :, -3:]
    slots = device["conv_state_indices"].long()
    assert same(device["conv_state"][slots].contiguous(), want.contiguous())


def test_a_pool_of_more_than_two_to_the_31_elements_is_addressed():
    slots = 2**31 // (DIM * 3) + 40
    call = make_conv(dim=DIM, indices=[0, 1, 2], slots=3)
    far = moved(call, "cuda")
    pool = torch.zeros(slots, 3, DIM, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    where = torch.tensor([5, slots - 30, slots - 1], device="cuda")
    pool[where] = far["conv_state"]
    ssmgen.causal_conv1d_update(
        **{**far.arguments(), "conv_state": pool, "conv_state_indices": where}
    )
    near = run(call)
    assert same(pool[where].cpu().contiguous(), near["conv_state"].contiguous())
    assert same(far["out"].cpu(), near["out"])
    pool[where] = 0
    assert not pool.any()


def test_out_may_be_x_where_a_row_has_one_token():
    call = make_conv(dim=DIM, batch=5)
    wanted = run(call)
    device = moved(call, "cuda")
    ssmgen.causal_conv1d_update(**{**device.arguments(), "out": device["x"]})
    assert same(device["x"].cpu(), wanted["out"])


# Graphs, tracing, chains


@pytest.mark.parametrize("pdl", [False, True])
def test_a_captured_graph_follows_its_tables_and_inputs(pdl):
    first = make_conv("varlen", dim=DIM, lengths=[2, 1, 3], accepted=[1, 2, 3], state_len=6)
    other = make_conv("varlen", dim=DIM, lengths=[1, 4, 1], accepted=[4, 1, 2], state_len=6,
                      random=7)  # fmt: skip
    device = moved(first, "cuda")
    arguments = {**device.arguments(), "pdl": pdl}
    device.op(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        device.op(**arguments)
    for call in (other, first):
        for name, tensor in device.tensors.items():
            tensor.copy_(call[name])
        graph.replay()
        verify_conv(call, moved(device, "cpu"))


def test_a_chain_of_dependent_launches_has_the_results_of_plain_ones():
    heads, groups, dim, dstate, batch = 32, 2, 64, 128, 4
    ssu = moved(make("fp16", nheads=heads, ngroups=groups, dim=dim, dstate=dstate, batch=batch,
                     slots=9), "cuda")  # fmt: skip
    width = heads * dim + 2 * groups * dstate
    conv = moved(make_conv(dim=width, batch=batch), "cuda")
    start = {name: call[name].clone() for name, call in (("state", ssu), ("conv_state", conv))}
    project = torch.randn(width, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    inputs = torch.randn(batch, width, device="cuda", dtype=torch.bfloat16)

    def step(pdl: bool) -> torch.Tensor:
        mixed = inputs @ project
        y = ssmgen.causal_conv1d_update(**{**conv.arguments(), "x": mixed, "pdl": pdl})
        x, B, C = y.split([heads * dim, groups * dstate, groups * dstate], 1)
        return ssmgen.selective_state_update(
            **{**ssu.arguments(), "pdl": pdl, "x": x.unflatten(1, (heads, dim)),
               "B": B.unflatten(1, (groups, dstate)), "C": C.unflatten(1, (groups, dstate))}
        )  # fmt: skip

    def outcome(pdl: bool) -> str:
        for name, call in (("state", ssu), ("conv_state", conv)):
            call[name].copy_(start[name])
        step(pdl)  # loads the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(5):
                y = step(pdl)
        for name, call in (("state", ssu), ("conv_state", conv)):
            call[name].copy_(start[name])
        graph.replay()
        torch.cuda.synchronize()
        return digest(y, ssu["state"], conv["conv_state"][conv["conv_state_indices"].long()])

    assert outcome(True) == outcome(False)


@pytest.mark.parametrize("form", ["one", "varlen", "prefill"])
def test_opcheck_and_compile(form):
    call = make_conv(form, dim=256, initial=FLAGS.get(form))
    for name in ("conv_state", "out"):
        call[name].nan_to_num_(0.5)
    wanted = run(call)
    device = moved(call, "cuda")
    operation = conv1d.prefill if call.prefill else conv1d.update
    op = (
        torch.ops.ssmgen.causal_conv1d_fn if call.prefill else torch.ops.ssmgen.causal_conv1d_update
    )
    tensors = [device.tensors.get(n) for n in operation.tensors]
    switches = [device.switches[n] for n in operation.switches]
    torch.library.opcheck(op.default, (*tensors, *switches))

    torch._dynamo.reset()
    compiled = moved(call, "cuda")
    y = torch.compile(compiled.op, fullgraph=True)(**compiled.arguments())
    assert same(y.cpu().contiguous(), wanted["out"].contiguous())
    assert same(compiled["conv_state"].cpu().contiguous(), wanted["conv_state"].contiguous())


def test_a_bound_kernel_launches_what_the_op_does():
    for form in ("one", "prefill"):
        call = make_conv(form, dim=DIM, initial=FLAGS.get(form))
        wanted = run(call)
        device = moved(call, "cuda")
        switch = {"pad_slot_id": -1}
        ssmgen.get_kernel(call.layout().config).bind(**device.tensors, **switch)()
        torch.cuda.synchronize()
        assert same(device["out"].cpu().contiguous(), wanted["out"].contiguous())
        assert same(device["conv_state"].cpu().contiguous(), wanted["conv_state"].contiguous())
