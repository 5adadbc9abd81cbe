"""The oracle of causal_conv1d against torch's own convolution, and against itself."""

from __future__ import annotations

import pytest
import torch
from conv_calls import make_conv
from ssu_calls import same

from ssmgen.errors import ArgumentValueError
from ssmgen.reference import causal_conv1d, causal_conv1d_fn, causal_conv1d_update

F64 = {"compute_dtype": torch.float64}


def padded(x, weight, bias, activation):
    """torch's convolution of (batch, dim, tokens) in fp64, with a past of zeros."""
    dim, width = weight.shape
    y = torch.nn.functional.conv1d(
        x.double(), weight.double()[:, None], None if bias is None else bias.double(),
        padding=width - 1, groups=dim,
    )  # fmt: skip
    y = y[:, :, : x.shape[2]]
    return torch.nn.functional.silu(y) if activation else y


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6])
@pytest.mark.parametrize(("bias", "activation"), [(True, "silu"), (False, None)])
def test_the_formula_is_that_of_torch(width, bias, activation):
    call = make_conv("prefill_dense", width=width, bias=bias, tokens=9, dtype="fp32", pool=False)
    x, weight, bias = call["x"], call["weight"], call.tensors.get("bias")
    want = padded(x, weight, bias, activation)
    v = torch.nn.functional.pad(x, (width - 1, 0))
    found = causal_conv1d(v, weight, bias, activation, **F64)
    assert torch.allclose(found, want, rtol=1e-12, atol=1e-12)
    whole = causal_conv1d_fn(x.double(), weight, bias, activation=activation, **F64)
    assert torch.allclose(whole, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("alignment", "state_len"),
    [("left", 3), ("left", 7), ("right", 3), ("right", 6), ("circular", 3), ("circular", 5)],
)
@pytest.mark.parametrize("parts", [[1] * 9, [2, 3, 4], [9], [5, 1, 3]], ids=str)
def test_updates_in_any_parts_are_the_whole_convolution(alignment, state_len, parts):
    call = make_conv("prefill_dense", tokens=9, dtype="fp32", pool=False)
    x, weight, bias = call["x"].double(), call["weight"], call["bias"]
    state = torch.zeros(5, 16, state_len, dtype=torch.float64)
    slots = torch.tensor([4, 0, 2])
    found, done = [], 0
    for tokens in parts:
        counts = {"cache_seqlens": torch.full((3,), done)} if alignment == "circular" else {}
        found.append(causal_conv1d_update(
            x[:, :, done : done + tokens], state, weight, bias, "silu", conv_state_indices=slots,
            alignment=alignment, **counts, **F64,
        ))  # fmt: skip
        done += tokens
    assert torch.allclose(torch.cat(found, 2), padded(x, weight, bias, "silu"), atol=1e-12)
    held = state[slots]
    if alignment == "circular":
        held = held.roll(-(done % state_len), 2)
    last = {"left": held[:, :, :3], "right": held[:, :, -3:], "circular": held[:, :, -3:]}
    assert torch.equal(last[alignment], x[:, :, -3:])
    if alignment == "right":
        assert torch.equal(held, x[:, :, -state_len:])
    assert not state[[1, 3]].any()


def test_speculation_keeps_what_was_accepted():
    weight, x = torch.randn(8, 4), torch.randn(1, 8, 12)
    state = torch.zeros(1, 8, 7)
    want = padded(x, weight, None, None)
    done, accepted = 0, 1
    for drafts, right in [(3, 2), (0, 0), (2, 0), (0, 0), (3, 3), (0, 0)]:
        tokens = x[:, :, done : done + 1 + drafts].clone()
        tokens[:, :, 1 + right :] += 1
        y = causal_conv1d_update(tokens, state, weight, alignment="left",
                                 num_accepted_tokens=torch.tensor([accepted]), **F64)  # fmt: skip
        accepted = right + 1
        close = torch.allclose(y[:, :, :accepted].double(), want[:, :, done : done + accepted],
                               atol=1e-5)  # fmt: skip
        assert close
        done += accepted


def test_a_row_without_tokens_touches_nothing():
    call = make_conv("varlen", lengths=[0, 2, 0], spare=1)
    before = call.copy()
    call.refer()
    slots = call["conv_state_indices"]
    for row in (0, 2):
        assert same(call["conv_state"][slots[row]], before["conv_state"][slots[row]])
    assert call["out"].isnan().any(1).tolist() == [True, False, False, True]


WRONG = {
    "conv_state_indices: slot 9 lies outside": {"indices": [1, 9, 2]},
    "dst_state_indices: slot 9": {"dst": [1, 2, 9], "indices": [4, 5, 6]},
    "num_accepted_tokens: found 5; allowed: at most 4": {"accepted": [1, 2, 5], "state_len": 6},
    "query_start_loc: found a row of 5; allowed: at most 4": {
        "form": "varlen", "lengths": [1, 5, 1], "accepted": [1] * 3, "state_len": 6},
    "cache_seqlens: found -1": {"counts": [1, -1, 2]},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_table_that_cannot_be_followed_is_an_error_and_nothing_is_written(message):
    call = make_conv(**WRONG[message])
    before = call.copy()
    with pytest.raises(ArgumentValueError, match=message):
        call.refer()
    assert same(call["out"], before["out"])
    assert same(call["conv_state"], before["conv_state"])


@pytest.mark.parametrize(
    ("ends", "message"),
    [([0, 2, 99, 99], "found 99; allowed: 0 to 7"), ([-1, 2, 3, 3], "found -1; allowed: 0 to 7"),
     ([0, 2, 1, 7], "found token 1 in two sequences"), ([0, 5, 0, 4], "found token 0 in two")],
)  # fmt: skip
def test_sequences_outside_of_x_or_that_share_tokens_are_an_error(ends, message):
    call = make_conv("prefill")
    call["query_start_loc"].copy_(torch.tensor(ends))
    with pytest.raises(ArgumentValueError, match=f"query_start_loc.*{message}"):
        call.refer()
