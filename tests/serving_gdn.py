"""A server of a gated delta net with StatePool and DecodeMetadata; there is no model behind it.

The inputs of a request are a function of its name and the position alone; a rejected draft has
noise instead. What the server gathers is the output at every accepted position, which must be what
decoding token by token gives, whatever was drafted, batched, preempted or moved.

The ops of a layer are those of `steps`: `Steps`, in plain PyTorch, or whatever has functions of the
same names and arguments, such as ssmgen itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from gdn_steps import Model, Steps, delta_step

import ssmgen
from ssmgen.serving.partition import Partition

Tensor = torch.Tensor


# What a wrong policy loses of rows without drafts. "homogeneous only" has the right tables only
# where no row of the step has drafts.
POLICIES = ("original bug", "state only", "conv only", "homogeneous only")


def keeps(what: str, policy: str | None, mixed: bool) -> bool:
    """Whether a policy, None for the right one, counts accepted tokens for the state or the conv of
    rows without drafts; `mixed`: other rows of the step have some."""
    return policy in (None, f"{what} only") or (policy == "homogeneous only" and not mixed)


@dataclass(eq=False)
class Request:
    """`inputs`: x (length, layers, channels), a, b (length, layers, HV). `turns`: prompt tokens and
    decoded tokens, in turn."""

    name: int
    inputs: dict[str, Tensor]
    turns: list[tuple[int, int]]
    arrives: int
    slots: list[int] = field(default_factory=list)
    host: Any = None
    done: int = 0
    accepted: int = 1

    @property
    def length(self) -> int:
        return len(self.inputs["x"])

    def prompt_left(self) -> int:
        """Prompt tokens until the next that is decoded; 0: the next is decoded."""
        at = 0
        for prompt, decoded in self.turns:
            if self.done < at + prompt:
                return at + prompt - self.done
            at += prompt + decoded
            if self.done < at:
                return 0
        return 0

    def decode_left(self) -> int:
        """Tokens until the next prompt token or the end."""
        at = 0
        for prompt, decoded in self.turns:
            at += prompt + decoded
            if self.done < at:
                return at - self.done
        return 0


@dataclass
class Server:
    """`uniform`: in a step either all decoding rows have drafts or none has. `moves`: requests are
    preempted (checkpointed, or taken whole, to the host) and come back elsewhere, and the pool
    grows. `counts`: accepted counts come from the "host" or from a side "table" on the device.

    `keep` is how the recurrent op knows where a row starts. "slots": by the arguments of
    `Partition.recurrent`. "columns": the kernel of one token takes the column itself, from all
    slots and the count. "sequences": rows without drafts go to the kernel of several tokens.
    "buffer": a request has its state in one slot; of a row with drafts the states after each token
    go to the intermediate buffer, and the accepted one is copied.

    `begin`: steps say which rows begin a prompt."""

    drafts: int = 3
    policy: str | None = None
    uniform: bool = False
    moves: bool = False
    counts: str = "host"
    padded: bool = False
    pad_slot_id: int = -1
    transposed: bool = False
    dtype: torch.dtype = torch.float32
    state: torch.dtype | None = None
    keep: str = "slots"
    begin: bool = True
    pdl: bool = False
    device: str = "cpu"
    model: Model = field(default_factory=Model)
    steps: Any = field(default_factory=Steps)
    requests: int = 10
    rows: int = 5
    turns: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        model, plan = self.model, random.Random(self.seed)
        self.random = random.Random(f"{self.seed} {self.drafts} {self.uniform}")
        self.noise = torch.Generator().manual_seed(self.seed + 1)
        arrival, self.waiting = 0, []
        for name in range(self.requests):
            arrival += plan.randrange(3)
            turns = [(plan.randint(1, 7), plan.randint(3, 10)) for _ in range(self.turns)]
            gen = torch.Generator().manual_seed(1000 * self.seed + name)
            inputs = self.tokens(sum(map(sum, turns)), gen)
            self.waiting.append(Request(name, inputs, turns, arrival))
        gen = torch.Generator().manual_seed(self.seed)
        self.weight = self.random_tensor(gen, model.layers, model.channels, model.width) / 2
        self.A_log, self.dt_bias = self.random_tensor(gen, 2, model.layers, model.HV)
        spec = ssmgen.LayerSpec(
            state=(model.HV, model.V, model.K), state_dtype=self.state or self.dtype,
            conv=(model.channels, model.width - 1 + self.drafts), conv_dtype=self.dtype,
            conv_width=model.width, state_transposed=self.transposed,
            conv_transposed=self.transposed,
        )  # fmt: skip
        self.pool = ssmgen.StatePool(
            [spec] * model.layers, self.rows * (self.drafts + 1) + 3, self.device,
            pad_slot_id=self.pad_slot_id,
        )  # fmt: skip
        self.pool.register("accepted", reset=1, of="request")
        buffers = (model.layers, self.rows, self.drafts + 1, model.HV, model.V, model.K)
        self.buffers = torch.full(
            buffers, torch.nan, dtype=self.state or self.dtype, device=self.device
        )
        self.shuffle_free_slots()
        self.metadata = ssmgen.DecodeMetadata(
            self.pool, max_rows=self.rows, max_tokens=4 * self.rows, drafts=self.drafts
        )
        self.running: list[Request] = []
        self.suspended: list[Request] = []
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.seen = {"plain": 0, "verify": 0, "prefill": 0, "plain after drafts": 0,
                     "prefill after drafts": 0, "mixed": 0, "moved": 0, "tracked": 0}  # fmt: skip

    def random_tensor(self, gen: torch.Generator, *shape: int) -> Tensor:
        found = torch.randn(*shape, generator=gen, dtype=torch.float64)
        return found.to(self.device, self.dtype)

    def tokens(self, count: int, gen: torch.Generator) -> dict[str, Tensor]:
        model = self.model
        sizes = {"x": model.channels, "a": model.HV, "b": model.HV}
        return {n: self.random_tensor(gen, count, model.layers, size) for n, size in sizes.items()}

    def shuffle_free_slots(self) -> None:
        slots = self.pool.alloc(self.pool.slots, zero=0)
        self.random.shuffle(slots)
        self.pool.free(slots)

    def admit(self, now: int) -> None:
        while self.suspended and len(self.running) < self.rows and self.random.random() < 0.5:
            request = self.suspended.pop(0)
            request.slots = self.pool.reload(request.host)
            missing = self.drafts + 1 - len(request.slots)
            if missing:
                request.slots += self.pool.alloc(missing, zero=0)
            self.running.append(request)
        while self.waiting and self.waiting[0].arrives <= now and len(self.running) < self.rows:
            request = self.waiting.pop(0)
            # None is read before it is written, but for the first, and a prompt that begins has
            # that zeroed.
            request.slots = self.pool.alloc(self.drafts + 1, zero=0)
            self.running.append(request)

    def move(self) -> None:
        """Preempt some; each comes back in other slots."""
        for request in [r for r in self.running if r.done and self.random.random() < 0.1]:
            self.seen["moved"] += 1
            kind = self.random.choice(["checkpoint", "whole", "fork"])
            if kind == "fork" and self.pool.free_slots < len(request.slots):
                self.pool.resize(self.pool.slots + len(request.slots))
            if kind == "fork":
                n = self.accepted_of(request)
                forked = self.pool.fork(request.slots, n)
                self.pool.free(request.slots)
                request.slots = forked
                continue
            kept = request.slots
            if kind == "checkpoint":
                [saved] = self.pool.alloc()
                self.pool.checkpoint([kept], [saved], [self.accepted_of(request)])
                self.pool.free(kept)
                kept, request.accepted = [saved], 1
            self.suspend(request, kept)

    def suspend(self, request: Request, kept: list[int]) -> None:
        request.host = self.pool.offload(kept)
        self.pool.free(kept)
        self.running.remove(request)
        self.suspended.append(request)

    def track(self) -> list[int]:
        """The slots that some rows of the step are to be tracked in."""
        self.tracked = {}
        for request in self.running:
            if self.moves and self.pool.free_slots and self.random.random() < 0.1:
                [self.tracked[request.name]] = self.pool.alloc(zero=0)
        return [self.tracked.get(r.name, self.pad_slot_id) for r in self.running]

    def resume_from_tracked(self, counts: list[int]) -> None:
        """Give up the slots of tracked requests, for what was tracked of them."""
        if not self.tracked:
            return
        on_device = self.random.random() < 0.5
        self.metadata.checkpoint(torch.tensor(counts).to(self.device) if on_device else counts)
        for request in [r for r in self.running if r.name in self.tracked]:
            saved = self.tracked[request.name]
            self.seen["tracked"] += 1
            self.pool.free(request.slots)
            request.accepted = 1
            self.suspend(request, [saved])

    def accepted_of(self, request: Request) -> int:
        if self.counts == "host":
            return request.accepted
        return int(self.pool.table("accepted")[request.slots[0]])

    def planned(self, request: Request, drafting: bool | None) -> tuple[int, int, bool]:
        """(tokens, how many of them are true, whether they are a prompt chunk)."""
        left = request.prompt_left()
        if left:
            count = min(left, self.random.randint(1, 4))
            return count, count, True
        if drafting is None:
            drafting = self.random.random() < 0.6
        drafts = self.random.randint(1, self.drafts) if drafting else 0
        true = 1 + self.random.randint(0, min(drafts, request.decode_left() - 1))
        return 1 + drafts, true, False

    def step(self, now: int) -> None:
        self.admit(now)
        if self.moves:
            self.move()
        self.random.shuffle(self.running)
        if not self.running:
            return
        drafting: bool | None = None
        if self.drafts == 0 or self.random.random() < 0.2:
            drafting = False
        elif self.uniform:
            drafting = True
        plans = [self.planned(request, drafting) for request in self.running]
        meta = self.build(plans)
        inputs = self.gather(plans, meta.padded_tokens)
        out = torch.zeros(
            meta.padded_tokens, self.model.layers, self.model.HV, self.model.V,
            dtype=self.dtype, device=self.device,
        )  # fmt: skip
        for layer in range(self.model.layers):
            self.layer(layer, {n: t[:, layer] for n, t in inputs.items()}, out[:, layer])
        self.sampled(plans, out)

    def build(self, plans: list[tuple[int, int, bool]]) -> ssmgen.DecodeMetadata:
        plain = [not chunk and count == 1 for count, _, chunk in plans]
        verify = [not chunk and count > 1 for count, _, chunk in plans]
        for request, is_plain, is_verify in zip(self.running, plain, verify):
            kind = "plain" if is_plain else "verify" if is_verify else "prefill"
            self.seen[kind] += 1
            if kind != "verify" and request.accepted > 1:
                self.seen[f"{kind} after drafts"] += 1
        self.seen["mixed"] += any(plain) and any(verify)
        accepted: Any = [request.accepted for request in self.running]
        if self.counts == "table":
            accepted = self.pool.table("accepted")
        return self.metadata.build(
            [request.slots for request in self.running],
            [count for count, _, _ in plans],
            accepted=accepted,
            prefill=[chunk for _, _, chunk in plans],
            first=[
                self.begin and chunk and not r.done for r, (_, _, chunk) in zip(self.running, plans)
            ],
            track=self.track(),
            plain_rows=self.rows if self.padded else None,
            verify_rows=self.rows if self.padded else None,
        )

    def gather(self, plans: list[tuple[int, int, bool]], total: int) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {"x": [], "a": [], "b": []}
        for request, (count, true, _) in zip(self.running, plans):
            tokens = self.tokens(count, self.noise)
            for name, noise in tokens.items():
                noise[:true] = request.inputs[name][request.done : request.done + true]
                found[name].append(noise)
        joined = {name: torch.cat(tensors) for name, tensors in found.items()}
        # What padded tokens hold must not matter.
        return {
            n: torch.cat([t, t.new_full((total - len(t), *t.shape[1:]), torch.nan)])
            for n, t in joined.items()
        }

    def layer(self, layer: int, inputs: dict[str, Tensor], out: Tensor) -> None:
        """What a layer of a model does: it reads the metadata, and nothing else is decided here."""
        meta, steps = self.metadata, self.steps
        conv_state, state = self.pool.conv(layer), self.pool.state(layer)
        weight, A_log, dt_bias = self.weight[layer], self.A_log[layer], self.dt_bias[layer]
        mixed = len(meta.verify.rows) > 0
        pdl = {"pdl": True} if self.pdl else {}
        for part in (meta.plain, meta.verify, meta.prefill):
            if not part:
                continue
            conv = part.conv(conv_state) | pdl
            recurrent = self.recurrent(part, layer, mixed) | pdl
            if part is meta.plain and not keeps("conv", self.policy, mixed):
                conv["num_accepted_tokens"] = torch.ones_like(part.num_accepted_tokens)
            x, a, b = (part.take(inputs[n]) for n in ("x", "a", "b"))
            if part is meta.prefill:
                x = steps.causal_conv1d_fn(x.T, weight=weight, activation="silu", **conv).T
            else:
                x = steps.causal_conv1d_update(x, weight=weight, activation="silu", **conv)
            q, k, v = self.model.split(x)
            y = steps.gated_delta_rule_decode(state, q, k, v, A_log, a, dt_bias, b, **recurrent)
            part.put(out, y)

    def recurrent(self, part: Partition, layer: int, mixed: bool) -> dict[str, Any]:
        """Arguments of the recurrent op, as `keep` and the policy have them."""
        arguments = part.recurrent
        counts = part.num_accepted_tokens
        plain = part.kind == "plain"
        if plain and not keeps("state", self.policy, mixed):
            counts = torch.ones_like(counts)
            arguments["state_batch_indices"] = part.write_slots
        if self.keep == "buffer":
            arguments["state_batch_indices"] = part.write_slots
            if part.kind == "verify":
                del arguments["dst_state_batch_indices"], arguments["num_accepted_tokens"]
                # Not the entries of the rows.
                self.entries = torch.arange(part.batch, device=self.device).flip(0)
                arguments |= {
                    "disable_state_update": True,
                    "intermediate_states_buffer": self.buffers[layer],
                    "intermediate_state_indices": self.entries,
                }
        elif plain and self.keep != "slots":
            arguments |= {"state_batch_indices": part.slots, "num_accepted_tokens": counts}
            if self.keep == "sequences":
                arguments |= {
                    "dst_state_batch_indices": part.slots,
                    "cu_seqlens": part.cu_seqlens,
                    "cache_steps": 4,
                }
        return arguments

    def copy_accepted(self, counts: list[int]) -> None:
        """With `keep` "buffer": the state after the last accepted token, to the slot."""
        rows = self.metadata.verify.rows
        for entry, row in zip(self.entries.tolist(), rows) if len(rows) else ():
            slot, mixed = self.running[row].slots[0], len(self.metadata.plain.rows) > 0
            n = counts[row] if keeps("state", self.policy, mixed) else 1
            for layer in range(self.model.layers):
                self.pool.state(layer)[slot] = self.buffers[layer, entry, n - 1]

    def sampled(self, plans: list[tuple[int, int, bool]], out: Tensor) -> None:
        counts = [1 if chunk else true for _, true, chunk in plans]
        table = self.pool.table("accepted")
        new = torch.tensor(counts, dtype=table.dtype, device=table.device)
        table.index_copy_(0, self.metadata.first_slots, new)
        if self.keep == "buffer":
            self.copy_accepted(counts)
        begin, done = 0, []
        for request, (count, true, _), n in zip(self.running, plans, counts):
            for i in range(true):
                self.outputs[request.name, request.done + i] = out[begin + i].cpu()
            begin += count
            request.done += true
            request.accepted = n
            if request.done == request.length:
                done.append(request)
        self.resume_from_tracked(counts)
        for request in done:
            if request in self.suspended:
                self.suspended.remove(request)
            else:
                self.running.remove(request)
                self.pool.free(request.slots)

    def run(self) -> dict[tuple[int, int], Tensor]:
        now = 0
        while self.waiting or self.running or self.suspended:
            self.step(now)
            now += 1
        return self.outputs


def exact(server: Server) -> dict[tuple[int, int], Tensor]:
    """The same outputs in fp64, request by request and token by token: no pool, no server."""
    model, found = server.model, {}
    weight, A_log, dt_bias = (
        t.cpu().double() for t in (server.weight, server.A_log, server.dt_bias)
    )
    for request in server.waiting:
        inputs = {n: t.cpu().double() for n, t in request.inputs.items()}
        for layer in range(model.layers):
            history = inputs["x"].new_zeros(model.channels, model.width - 1)
            S = inputs["x"].new_zeros(model.HV, model.V, model.K)
            for at in range(request.length):
                window = torch.cat([history, inputs["x"][at, layer, :, None]], 1)
                history = window[:, 1:]
                q, k, v = model.split(Steps().taps(window, weight[layer]))
                a, b = inputs["a"][at, layer], inputs["b"][at, layer]
                S, y = delta_step(S, q[0], k[0], v[0], a, b, A_log[layer], dt_bias[layer])
                found.setdefault((request.name, at), []).append(y)
    return {at: torch.stack(layers) for at, layers in found.items()}
