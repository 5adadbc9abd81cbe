"""A server that decodes speculatively with an op of ours; there is no model behind it.

Every request has a true sequence of inputs. A step gives a row the next true token and 0 to
`drafts` draft tokens, of which a random number are the true ones that follow and the others are
noise. What the server gathers is the output at every accepted position, which must not depend on
the drafts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

import ssmgen
from ssmgen.reference import ssu_step

NHEADS, NGROUPS = 4, 2
SIZES = {
    "x": (NHEADS, 0),
    "z": (NHEADS, 0),
    "dt": (NHEADS, 0),
    "B": (NGROUPS, 1),
    "C": (NGROUPS, 1),
}
MUTATIONS = ("accepted dropped", "accepted dropped in mixed batches", "slots not reset")


@dataclass
class Request:
    """Its true inputs, and how far it is."""

    name: int
    inputs: dict[str, torch.Tensor]
    prompt: int
    arrives: int
    slots: list[int] = field(default_factory=list)
    done: int = 0
    accepted: int = 1

    @property
    def length(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass
class Server:
    """`keep`: the state after each token goes to a slot of its own ("slots"), or to the buffer,
    from which the accepted one is copied ("buffered"). `mutation`: a bug, by name.
    """

    drafts: int
    keep: str = "slots"
    mutation: str | None = None
    state: torch.dtype = torch.float32
    device: str = "cpu"
    pdl: bool = False
    dim: int = 8
    dstate: int = 16
    requests: int = 7
    rows: int = 3
    seed: int = 0
    steps: int = 4  # the most tokens of a row

    def __post_init__(self) -> None:
        gen = torch.Generator().manual_seed(self.seed)
        self.noise = gen
        self.random = random.Random(self.seed)
        plan = random.Random(self.seed)
        arrival = 0
        self.waiting = []
        for name in range(self.requests):
            arrival += plan.randrange(3)
            prompt, more = plan.randint(1, 9), plan.randint(3, 12)
            self.waiting.append(Request(name, self.tokens(prompt + more), prompt, arrival))
        self.weights = self.make_weights(gen)
        each = self.steps if self.keep == "slots" else 1
        self.free = torch.randperm(self.rows * each + 2, generator=gen).tolist()
        count = (len(self.free), NHEADS, self.dim, self.dstate)
        # Whatever is read before it is written shows as NaN.
        self.pool = torch.full(count, torch.nan, dtype=self.state, device=self.device)
        self.buffer = torch.full(
            (self.rows, self.steps, *count[1:]), torch.nan, dtype=self.state, device=self.device
        )
        self.weights = {n: self.moved(t) for n, t in self.weights.items()}
        self.running: list[Request] = []
        self.outputs: dict[tuple[int, int], torch.Tensor] = {}

    def make_weights(self, gen: torch.Generator) -> dict[str, torch.Tensor]:
        """What the op takes besides the inputs of tokens."""
        shape = (NHEADS, self.dim)
        return {
            "A": -torch.rand(NHEADS, generator=gen)[:, None, None].expand(*shape, self.dstate),
            "D": torch.randn(NHEADS, generator=gen)[:, None].expand(shape),
            "dt_bias": torch.zeros(NHEADS)[:, None].expand(shape),
        }

    def gathered(self, work: Any) -> dict[str, torch.Tensor]:
        """The inputs of all tokens of a step, one after the other."""
        names = work[0][1]
        inputs = {n: torch.cat([tokens[n] for _, tokens, _ in work]).to(self.device) for n in names}
        return {n: t.expand(inputs["x"].shape) if n == "dt" else t for n, t in inputs.items()}

    def update(self, **arguments: Any) -> torch.Tensor:
        """The op, on the pool."""
        return ssmgen.selective_state_update(self.pool, **arguments, **self.weights)

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device, with its strides of 0."""
        if 0 not in tensor.stride():
            return tensor.to(self.device)
        one = tensor[(slice(None),) + (slice(0, 1),) * (tensor.dim() - 1)]
        return one.to(self.device).expand(tensor.shape)

    def tokens(self, count: int) -> dict[str, torch.Tensor]:
        """Inputs of so many tokens; dt is one value per head."""
        sizes = (self.dim, self.dstate)
        found = {n: torch.randn(count, heads, sizes[axis], generator=self.noise)
                 for n, (heads, axis) in SIZES.items()}  # fmt: skip
        found["dt"] = 0.05 + 0.2 * torch.rand(count, NHEADS, 1, generator=self.noise)
        return found

    def admit(self, now: int) -> None:
        while self.waiting and self.waiting[0].arrives <= now and len(self.running) < self.rows:
            request = self.waiting.pop(0)
            each = self.steps if self.keep == "slots" else 1
            request.slots = [self.free.pop(0) for _ in range(each)]
            if self.mutation != "slots not reset":
                self.pool[request.slots] = 0
            self.running.append(request)

    def drafted(self, request: Request) -> tuple[dict[str, torch.Tensor], int]:
        """The tokens of a step, and how many of them are true."""
        left = request.prompt - request.done
        if left > 0:
            count = true = min(left, self.steps)
        else:
            room = min(self.drafts, request.length - request.done - 1)
            drafts = self.random.randint(0, room)
            count, true = 1 + drafts, 1 + self.random.randint(0, drafts)
        tokens = self.tokens(count)
        for name, noise in tokens.items():
            noise[:true] = request.inputs[name][request.done : request.done + true]
        return tokens, true

    def step(self, now: int) -> None:
        self.admit(now)
        self.random.shuffle(self.running)
        work = [(request, *self.drafted(request)) for request in self.running]
        if not work:
            return
        lengths = [len(next(iter(tokens.values()))) for _, tokens, _ in work]
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        mixed = len({length > 1 for length in lengths}) > 1
        dropped = self.mutation == "accepted dropped" or (
            self.mutation == "accepted dropped in mixed batches" and mixed
        )
        update = self.slots if self.keep == "slots" else self.buffered
        y = update(work, dropped, cu_seqlens=ends.to(self.device), cache_steps=self.steps,
                   pdl=self.pdl, **self.gathered(work))  # fmt: skip
        for (request, _, true), begin in zip(work, ends.tolist()):
            for i in range(true):
                self.outputs[request.name, request.done + i] = y[begin + i].cpu()
            request.done += true
            if request.done == request.length:
                self.running.remove(request)
                self.free.extend(request.slots)

    def table(self, rows: list[Any]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=self.device)

    def slots(self, work: Any, dropped: bool, **arguments: Any) -> torch.Tensor:
        """The state after token t is in column t of the table; the next step starts from the
        column of the last accepted one."""
        source = self.table([request.slots for request, _, _ in work])
        accepted = self.table([1 if dropped else request.accepted for request, _, _ in work])
        for request, _, true in work:
            request.accepted = true
        return self.update(
            **arguments, state_batch_indices=source, dst_state_batch_indices=source,
            num_accepted_tokens=accepted,
        )  # fmt: skip

    def buffered(self, work: Any, dropped: bool, **arguments: Any) -> torch.Tensor:
        """A request has one slot, into which the state of the last accepted token is copied."""
        entries = list(range(len(work)))
        self.random.shuffle(entries)
        y = self.update(
            **arguments, disable_state_update=True,
            state_batch_indices=self.table([request.slots[0] for request, _, _ in work]),
            intermediate_states_buffer=self.buffer, intermediate_state_indices=self.table(entries),
        )  # fmt: skip
        for (request, _, true), entry in zip(work, entries):
            self.pool[request.slots[0]] = self.buffer[entry, 0 if dropped else true - 1]
        return y

    def run(self) -> dict[tuple[int, int], torch.Tensor]:
        now = 0
        while self.waiting or self.running:
            self.step(now)
            now += 1
        return self.outputs


def exact(server: Server) -> dict[tuple[int, int], torch.Tensor]:
    """The same outputs in fp64, request by request and token by token, without any server."""
    weights = {n: t.cpu().double() for n, t in server.weights.items()}
    found = {}
    for request in server.waiting:
        h = torch.zeros(1, NHEADS, server.dim, server.dstate, dtype=torch.float64)
        for at in range(request.length):
            token = {n: t[at : at + 1].double() for n, t in request.inputs.items()}
            token["dt"] = token["dt"].expand(token["x"].shape)
            y, h = ssu_step(h, **token, **weights, compute_dtype=torch.float64)
            found[request.name, at] = y[0]
    return found


def assert_same_outputs(found: Any, wanted: Any) -> None:
    """Equality of bits, at every position of every request."""
    assert found.keys() == wanted.keys()
    wrong = [at for at in sorted(found) if not torch.equal(found[at], wanted[at])]
    assert not wrong, (
        f"{len(wrong)} of {len(found)} outputs differ, first (request, token) {wrong[0]}"
    )


def assert_close(found: Any, wanted: Any, relative: float) -> None:
    """Within `relative` of the largest output."""
    assert found.keys() == wanted.keys()
    peak = max(float(y.abs().max()) for y in wanted.values())
    worst = max(float((found[at].double() - wanted[at]).abs().max()) for at in found)
    assert worst <= relative * peak, f"off by {worst / peak} of the largest output"
