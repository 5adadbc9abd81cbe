"""How an operation knows a layout that it has seen: nothing else may pass for it."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref

import pytest
import torch
from ssu_calls import make
from ssu_tokens import make_tokens
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ssmgen
from ssmgen.errors import ArgumentValueError
from ssmgen.ops import operation, ssu
from ssmgen.ops.operation import _Call

SWITCHES = (True, -1, "auto")


class Recorded:
    """A launch that notes what it was asked for, in order."""

    def __init__(self):
        self.done = []

    def fill(self, *addresses):
        self.done.append(("fill", addresses))

    def start(self, stream):
        self.done.append(("start", stream))

    def __call__(self, stream, *addresses):
        self.fill(*addresses)
        self.start(stream)


@pytest.fixture(autouse=True)
def device_0(monkeypatch):
    monkeypatch.setattr(operation, "_current_device", lambda: 0)
    monkeypatch.setattr(operation, "_current_stream", lambda device: 70 + device)


def tensors():
    """Absent in the second place; the third must be aligned."""
    return (
        torch.zeros(4, 8),
        None,
        torch.zeros(3, 16, dtype=torch.bfloat16),
        torch.zeros(2, 6)[:, ::2],
    )


def call_for(given, *, aligned=True, guarded=True, used=None):
    at = [i for i, t in enumerate(given) if t is not None]
    recorded = Recorded()
    call = _Call(
        launch=recorded, device=0, switches=SWITCHES, at=at, absent=[1],
        used=at if used is None else used, alignable=[2], aligned=aligned, check=None,
    )  # fmt: skip
    call.recorded = recorded
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
    assert call.launched(others, SWITCHES)
    addresses = tuple(t.data_ptr() for t in others if t is not None)
    assert call.recorded.done == [("fill", addresses), ("start", 70)]


def test_the_kernel_is_given_the_addresses_that_it_takes_in_its_order():
    call = call_for(tensors(), used=[3, 0])
    others = tensors()
    assert call.launched(others, SWITCHES)
    assert call.recorded.done[0] == ("fill", (others[3].data_ptr(), others[0].data_ptr()))


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
    assert call.launched(tensors(), SWITCHES)
    assert not call.launched(other, SWITCHES)
    assert len(call.recorded.done) == 2


@pytest.mark.parametrize("switches", [(False, -1, "auto"), (True, 0, "auto"), (True, -1, "simple")])
def test_other_switches_are_not_taken_for_it(switches):
    assert not call_for(tensors()).launched(tensors(), switches)


def test_a_layout_of_unaligned_addresses_knows_only_those():
    unaligned = replaced(2, torch.zeros(3 * 16 + 1, dtype=torch.bfloat16)[1:].view(3, 16))
    call = call_for(unaligned, aligned=False)
    assert call.launched(unaligned, SWITCHES)
    assert not call.launched(tensors(), SWITCHES)


def test_a_call_with_a_tensor_twice_is_left_to_its_full_name():
    first = tensors()[0]
    twice = (first, *tensors()[1:3], first)
    call = call_for(twice, guarded=False)
    assert not call.guarded(twice)
    assert not call.launched(twice, SWITCHES)


def test_code_is_compiled_once_for_calls_of_the_same_tensors():
    """It takes as long as thirty calls; that a layout is new it must not show."""
    operation._recall.cache_clear()
    for rows in range(1, 9):
        given = tuple(t if t is None else torch.zeros(rows, *t.shape[1:]) for t in tensors())
        assert call_for(given).launched(given, SWITCHES)
    assert operation._recall.cache_info().misses == 1


def test_it_keeps_no_tensor_alive():
    given = tensors()
    call = call_for(given)
    seen = weakref.ref(given[0])
    del given
    gc.collect()
    assert seen() is None
    assert call.launched(tensors(), SWITCHES)


@pytest.fixture
def known(monkeypatch):
    """Have this thread know the layout of a call, on device 0, with a launch that is recorded.

    The tensors are on the CPU: what is not known runs there, and is not recorded.
    """
    monkeypatch.setattr(ssu.operation, "_seen", operation._Seen())

    def know(call, *, device=0, unused=(), checked=False):
        described = {**dict.fromkeys(ssu.operation.tensors), **call.tensors}
        switches = {"cache_steps": 0, "precision": "fast", **call.switches}
        given = tuple(described[n] for n in ssu.operation.tensors)
        at = [i for i, t in enumerate(given) if t is not None]
        used = [n for n in ssu.operation.tensors if n in call.tensors and n not in unused]
        launch = Recorded()
        seen = _Call(
            launch=launch, device=device,
            switches=tuple(switches[n] for n in ssu.operation.switches), at=at,
            absent=[i for i, t in enumerate(given) if t is None],
            used=[ssu.operation.tensors.index(n) for n in used],
            alignable=[], aligned=True, check=ssu.operation._read if checked else None,
        )  # fmt: skip
        assert seen.guarded(given)
        ssu.operation._seen.recent = [seen]
        return launch, tuple(call.tensors[n].data_ptr() for n in used)

    return know


def test_a_known_call_launches_its_addresses_on_the_current_stream(known):
    call = make("fp32")
    launch, addresses = known(call)
    assert ssmgen.selective_state_update(**call.arguments()) is call["out"]
    assert launch.done == [("fill", addresses), ("start", 70)]


def test_of_a_known_call_only_what_the_kernel_has_is_launched(known):
    call = make("fp32")
    launch, addresses = known(call, unused=["dt_bias"])
    ssmgen.selective_state_update(**call.arguments())
    assert launch.done == [("fill", addresses), ("start", 70)]


def test_a_known_call_on_another_device_is_launched_there(known, monkeypatch):
    call = make("fp32")
    launch, addresses = known(call, device=1)

    @contextlib.contextmanager
    def entered(device):
        launch.done.append(("enter", device))
        yield
        launch.done.append(("leave", device))

    monkeypatch.setattr(torch.cuda, "device", entered)
    ssmgen.selective_state_update(**call.arguments())
    assert launch.done == [("enter", 1), ("fill", addresses), ("start", 71), ("leave", 1)]


def test_under_ssmgen_check_a_known_call_is_checked_before_it_is_launched(known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    call = make("fp32")
    launch, _ = known(call, checked=True)
    call["state_batch_indices"][0] = len(call["state"])
    with pytest.raises(ArgumentValueError, match="state_batch_indices"):
        ssmgen.selective_state_update(**call.arguments())
    assert not launch.done


def test_under_ssmgen_check_a_graph_that_is_captured_reads_no_values(known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call = make("fp32")
    launch, _ = known(call, checked=True)
    call["state_batch_indices"][0] = len(call["state"])
    ssmgen.selective_state_update(**call.arguments())
    assert len(launch.done) == 2


def test_a_path_of_a_tree_over_x_is_refused_whatever_layouts_are_known(monkeypatch):
    applied = []
    monkeypatch.setattr(ssu.operation, "apply", lambda *arguments: applied.append(arguments))
    call = make_tokens("fp32", tokens=3, parents=[[-1, 0, 1]] * 3)
    ssmgen.selective_state_update(**call.arguments())
    assert len(applied) == 1
    with pytest.raises(ArgumentValueError, match="out: found x itself"):
        ssmgen.selective_state_update(**{**call.arguments(), "out": call["x"]})
    assert len(applied) == 1


def test_a_call_goes_when_nothing_holds_it():
    """Kernels are many, and the collector of a server may be off."""
    gc.disable()
    try:
        seen = weakref.ref(call_for(tensors()))
        assert seen() is None
    finally:
        gc.enable()


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def traced(step):
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True, backend="eager")()


def batched(step):
    def one(x):
        step()
        return x

    torch.vmap(one)(torch.zeros(2))


def faked():
    return FakeTensorMode(allow_non_fake_inputs=True)


def under(mode):
    def run(step):
        with mode():
            step()

    return run


@pytest.mark.parametrize(
    "how", [traced, batched, under(Dispatched), under(Called), under(faked)],
    ids=["compile", "functorch", "dispatch mode", "function mode", "fake mode"],
)  # fmt: skip
def test_a_known_call_that_others_watch_goes_through_the_dispatcher(known, how):
    call = make("fp32")
    launch, _ = known(call)
    ssmgen.selective_state_update(**call.arguments())
    assert len(launch.done) == 2
    how(lambda: ssmgen.selective_state_update(**call.arguments()))
    assert len(launch.done) == 2


def test_an_unknown_call_inside_a_transform_goes_through_the_dispatcher(monkeypatch):
    asked = []
    monkeypatch.setattr(ssu.operation, "_dispatch", lambda *arguments: asked.append(arguments))
    call = make("fp32")
    ssmgen.selective_state_update(**call.arguments())
    assert not asked
    batched(lambda: ssmgen.selective_state_update(**call.arguments()))
    assert len(asked) == 1


def test_what_one_thread_has_seen_another_has_not(known):
    call = make("fp32")
    launch, _ = known(call)
    other = threading.Thread(target=lambda: ssmgen.selective_state_update(**call.arguments()))
    other.start()
    other.join()
    assert not launch.done
    ssmgen.selective_state_update(**call.arguments())
    assert launch.done
