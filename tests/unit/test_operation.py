"""How an operation knows a layout that it has seen: nothing else may pass for it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from ssmgen.ops.operation import _Call

SWITCHES = (True, -1, "auto")


def tensors():
    """Absent in the second place; the third must be aligned."""
    return (
        torch.zeros(4, 8),
        None,
        torch.zeros(3, 16, dtype=torch.bfloat16),
        torch.zeros(2, 6)[:, ::2],
    )


def call_for(given, *, aligned=True, guarded=True):
    at = [i for i, t in enumerate(given) if t is not None]
    call = _Call(
        launch=None, device=0, switches=SWITCHES, at=at, absent=[1], keep=None,
        alignable=[at.index(2)], aligned=aligned, checked=False,
    )  # fmt: skip
    if guarded:
        assert call.guarded(given)
    return call


def replaced(at, tensor):
    changed = list(tensors())
    changed[at] = tensor
    return tuple(changed)


def test_other_tensors_of_the_layout_are_known_by_their_own_addresses():
    call = call_for(tensors())
    others = tensors()
    assert call.addresses(others, SWITCHES) == [t.data_ptr() for t in others if t is not None]


@pytest.mark.parametrize(
    "other",
    [
        replaced(0, torch.zeros(4, 9)),
        replaced(0, torch.zeros(8, 4).t()),
        replaced(0, torch.zeros(4, 8, dtype=torch.int32)),
        replaced(0, torch.zeros(4, 8, device="meta")),
        replaced(0, torch.zeros(4, 8).to_sparse()),
        replaced(0, torch._neg_view(torch.zeros(4, 8))),
        replaced(0, torch.nn.Parameter(torch.zeros(4, 8))),
        replaced(0, None),
        replaced(1, torch.zeros(4, 8)),
        replaced(2, torch.zeros(3 * 16 + 1, dtype=torch.bfloat16)[1:].view(3, 16)),
        replaced(3, [1, 2]),
        (torch.zeros(4, 8), *tensors()[1:3], tensors()[0]),
    ],
    ids=["shape", "strides", "dtype", "device", "layout", "negated", "type", "absent", "given",
         "address", "no tensor", "another"],
)  # fmt: skip
def test_what_differs_is_not_taken_for_it(other):
    call = call_for(tensors())
    assert call.addresses(tensors(), SWITCHES) is not None
    assert call.addresses(other, SWITCHES) is None


@pytest.mark.parametrize("switches", [(False, -1, "auto"), (True, 0, "auto"), (True, -1, "simple")])
def test_other_switches_are_not_taken_for_it(switches):
    assert call_for(tensors()).addresses(tensors(), switches) is None


def test_a_layout_of_unaligned_addresses_knows_only_those():
    unaligned = replaced(2, torch.zeros(3 * 16 + 1, dtype=torch.bfloat16)[1:].view(3, 16))
    call = call_for(unaligned, aligned=False)
    assert call.addresses(unaligned, SWITCHES)
    assert call.addresses(tensors(), SWITCHES) is None


def test_a_call_with_a_tensor_twice_is_left_to_its_full_name():
    first = tensors()[0]
    twice = (first, *tensors()[1:3], first)
    call = call_for(twice, guarded=False)
    assert not call.guarded(twice)
    assert call.addresses(twice, SWITCHES) is None


def test_it_keeps_no_tensor_alive():
    given = tensors()
    call = call_for(given)
    seen = weakref.ref(given[0])
    del given
    gc.collect()
    assert seen() is None
    assert call.addresses(tensors(), SWITCHES)
