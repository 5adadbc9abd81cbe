"""The lives of requests on a StatePool, beside a plain model of what each must hold.

An engine that writes states in two layouts, (V, K) and (K, V), says which in a side table, and
keeps accepted counts and seeds in two more. Every operation first reads what a request holds,
through the pool, and compares it with the model: plain lists of arrays. Half of the steps, tracked
slots and prompts that begin go by the tables of a DecodeMetadata, in which other requests have
rows, too; the others by the slots alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import ssmgen
from ssmgen.errors import PoolExhaustedError

COLUMNS, WIDTH, CHANNELS = 3, 4, 2
HV, V, K = 2, 2, 3
LAYERS = 2
LIVE = WIDTH - 1


@dataclass
class Held:
    """What a request, or a prefix that is kept of one, holds: for each layer the state (HV, V, K),
    its scale, and the history (CHANNELS, LIVE)."""

    states: list[np.ndarray]
    scales: list[np.ndarray]
    histories: list[np.ndarray]
    seed: int

    def of_nobody(self) -> Held:
        """The same as a checkpoint, which has no seed."""
        return Held(self.states, self.scales, self.histories, 0)


def nothing(seed: int) -> Held:
    return Held(
        [np.zeros((HV, V, K))] * LAYERS,
        [np.zeros((HV, V))] * LAYERS,
        [np.zeros((CHANNELS, LIVE))] * LAYERS,
        seed,
    )


class Engine:
    """`requests` have rows of COLUMNS slots, `prefixes` one slot; `hosted` are on the host."""

    def __init__(self, seed: int, slots: int = 24) -> None:
        self.random = random.Random(seed)
        self.values = np.random.default_rng(seed)
        layer = ssmgen.LayerSpec(
            state=(HV, V, K), state_dtype=torch.int16, conv=(CHANNELS, LIVE + COLUMNS - 1),
            conv_dtype=torch.float32, conv_width=WIDTH,
        )  # fmt: skip
        self.pool = ssmgen.StatePool([layer] * LAYERS, slots)
        self.pool.register("layout", dtype=torch.int8, reset=0, of="state")
        self.pool.register("accepted", reset=1, of="request")
        self.pool.register("seed", dtype=torch.int64, reset=0, of="request")
        self.metadata = ssmgen.DecodeMetadata(
            self.pool, max_rows=64, max_tokens=128, drafts=COLUMNS - 1
        )
        self.requests: list[tuple[list[int], Held]] = []
        self.prefixes: list[tuple[list[int], Held]] = []
        self.hosted: list[tuple[Any, Held, str]] = []
        self.done = dict.fromkeys(OPERATIONS, 0)

    # Reading and writing, as kernels do

    def tables(self, name: str) -> np.ndarray:
        return self.pool.table(name).numpy()

    def read(self, slots: list[int]) -> Held:
        n = int(self.tables("accepted")[slots[0]])
        assert 1 <= n <= len(slots), f"slot {slots[0]}: {n} accepted"
        at = slots[n - 1]
        states, scales, histories = [], [], []
        for layer in range(LAYERS):
            state = self.pool.state(layer).numpy()[at]
            if self.tables("layout")[at]:
                state = state.reshape(HV, K, V).swapaxes(1, 2)
            states.append(state)
            scales.append(self.pool.scale(layer).numpy()[at])
            histories.append(self.pool.conv(layer).numpy()[slots[0], :, n - 1 : n - 1 + LIVE])
        return Held(states, scales, histories, int(self.tables("seed")[slots[0]]))

    def expect(self, slots: list[int], held: Held) -> None:
        found = self.read(slots)
        for part in ("states", "scales", "histories"):
            for layer, (is_, must) in enumerate(zip(getattr(found, part), getattr(held, part))):
                assert np.array_equal(is_, must), f"{part} of layer {layer} of {slots} are wrong"
        assert found.seed == held.seed, f"the seed of {slots} is wrong"

    def advance(
        self, at: int, tokens: int, columns: list[int], kv: bool, n: int, track: int | None = None
    ) -> None:
        """Request `at` reads what it holds and takes `tokens` tokens, of which the states after the
        last ``len(columns)`` go to those columns, as (K, V) or (V, K); n are accepted. What that
        comes to also goes to the slot `track`."""
        slots, held = self.requests[at]
        self.expect(slots, held)
        if track is not None or self.random.random() < 0.5:
            begin, written = self.by_tables(at, tokens, len(columns), track)
        else:
            begin, written = self.tables("accepted")[slots[0]] - 1, [slots[c] for c in columns]
        states, scales, histories = [], [], []
        for layer in range(LAYERS):
            new = self.values.standard_normal((CHANNELS, tokens)).astype(np.float32)
            history = self.pool.conv(layer).numpy()[slots[0]]
            window = np.concatenate([history[:, begin : begin + LIVE], new], 1)
            assert np.array_equal(window[:, :LIVE], held.histories[layer]), "the window is wrong"
            keep = LIVE + len(columns) - 1
            history[:, :keep] = window[:, -keep:]
            end = window.shape[1] - len(columns) + n
            histories.append(window[:, end - LIVE : end])
            each = self.values.integers(-99, 99, (len(columns), HV, V, K), np.int16)
            scale = self.values.random((len(columns), HV, V)).astype(np.float32)
            for slot, value, factor in zip(written, each, scale):
                memory = self.pool.state(layer).numpy()[slot]
                memory[:] = value.swapaxes(1, 2).reshape(HV, V, K) if kv else value
                self.pool.scale(layer).numpy()[slot] = factor
            states.append(each[n - 1])
            scales.append(scale[n - 1])
        for slot in written:
            self.tables("layout")[slot] = kv
        self.tables("accepted")[slots[0]] = n
        self.requests[at] = slots, Held(states, scales, histories, held.seed)
        if track is not None:
            # Of rows that are not verify the counts say nothing.
            counts = [self.random.randint(1, COLUMNS) for _ in self.metadata.first_slots]
            if len(columns) > 1:
                counts[self.row] = n
            on_device = self.random.random() < 0.5
            self.metadata.checkpoint(torch.tensor(counts) if on_device else counts)

    def by_tables(
        self, at: int, tokens: int, columns: int, track: int | None
    ) -> tuple[int, list[int]]:
        """Where the history of a request begins and which slots it writes, as the tables of a step
        say it in which others have rows, too. The state it reads must be what it holds."""
        others = [i for i in range(len(self.requests)) if i != at]
        members = [at, *self.random.sample(others, min(len(others), 3))]
        self.random.shuffle(members)
        self.row = row = members.index(at)
        chunk = columns == 1 and (tokens > 1 or self.random.random() < 0.5)
        taken = [tokens if i == at else self.random.randint(1, COLUMNS) for i in members]
        counts = torch.from_numpy(self.tables("accepted"))
        if self.random.random() < 0.5:
            counts = [int(counts[self.requests[i][0][0]]) for i in members]
        meta = self.metadata.build(
            [self.requests[i][0] for i in members], taken, accepted=counts,
            prefill=[i == at and chunk for i in members],
            track=[track if i == at and track is not None else -1 for i in members],
        )  # fmt: skip
        part = meta.prefill if chunk else meta.verify if tokens > 1 else meta.plain
        i = part.rows.tolist().index(row)
        slots, held = self.requests[at]
        found = self.pool.scale(0).numpy()[int(part.read_slots[i])]
        assert np.array_equal(found, held.scales[0]), f"the state read by row {i} is wrong"
        assert part.write_slots[i] == meta.first_slots[row] == slots[0]
        written = part.slots[i, :columns].tolist() if columns > 1 else [int(part.write_slots[i])]
        return int(part.num_accepted_tokens[i]) - 1, written

    # Operations: each does something or, where there is nothing to do it to, returns False

    def any_of(self, those: list) -> int | None:
        return self.random.randrange(len(those)) if those else None

    def allocated(self, call: Callable[[], list[int]], count: int) -> list[int] | None:
        """What it allocates; None, and nothing changed, if fewer than `count` slots are free."""
        free = self.pool.free_slots
        try:
            slots = call()
        except PoolExhaustedError:
            assert self.pool.free_slots == free < count
            return None
        assert len(set(slots)) == len(slots) == free - self.pool.free_slots
        used = {s for s, _ in self.held_slots()}
        assert not used & set(slots), "a slot was handed out twice"
        return slots

    def held_slots(self) -> list[tuple[int, Held]]:
        return [(s, held) for slots, held in (*self.requests, *self.prefixes) for s in slots]

    def alloc(self) -> bool:
        begins = self.random.random() < 0.5
        zero = 0 if begins else 1
        slots = self.allocated(lambda: self.pool.alloc(COLUMNS, zero=zero), COLUMNS)
        if slots is None:
            return False
        if begins:
            self.metadata.build([slots], [1], prefill=[True], first=[True])
        seed = self.random.randrange(1, 2**40)
        # Written as zeros and not known to be: what the pool promises of a new slot.
        self.tables("seed")[slots[0]] = seed
        for layer in range(LAYERS):
            assert not self.pool.scale(layer).numpy()[slots[0]].any(), "a new slot is not zero"
        self.requests.append((slots, nothing(seed)))
        self.expect(*self.requests[-1])
        for slot in slots:
            assert self.tables("layout")[slot] == 0, "a new slot is not reset"
        return True

    def prefill(self) -> bool:
        at = self.any_of(self.requests)
        if at is None:
            return False
        self.advance(at, self.random.randint(1, 5), [0], True, 1)
        return True

    def decode(self) -> bool:
        at = self.any_of(self.requests)
        if at is None:
            return False
        self.advance(at, 1, [0], False, 1)
        return True

    def verify(self) -> bool:
        at = self.any_of(self.requests)
        if at is None:
            return False
        tokens = self.random.randint(2, COLUMNS)
        n = self.random.randint(1, tokens)
        self.advance(at, tokens, list(range(tokens)), self.random.random() < 0.5, n)
        return True

    def track(self) -> bool:
        at = self.any_of(self.requests)
        to = None if at is None else self.allocated(lambda: self.pool.alloc(zero=0), 1)
        if at is None or to is None:
            return False
        if self.random.random() < 0.5:
            kind = self.random.choice(["chunk", "plain", "verify"])
            tokens = 1 if kind == "plain" else self.random.randint(2, COLUMNS)
            columns = list(range(tokens)) if kind == "verify" else [0]
            n = self.random.randint(1, len(columns))
            self.advance(at, tokens, columns, False, n, track=to[0])
            self.prefixes.append((to, self.requests[at][1].of_nobody()))
            self.expect(*self.prefixes[-1])
            return True
        slots, held = self.requests[at]
        n = int(self.tables("accepted")[slots[0]])
        # As a request that had the slot might have left them.
        self.tables("accepted")[to] = COLUMNS
        self.tables("seed")[to] = 5
        on_device = self.random.random() < 0.5
        self.pool.checkpoint([slots], to, torch.tensor([n]) if on_device else [n])
        self.prefixes.append((to, held.of_nobody()))
        self.expect(*self.prefixes[-1])
        return True

    def prefix_hit(self) -> bool:
        at = self.any_of(self.prefixes)
        if at is None:
            return False
        slots, held = self.prefixes[at]
        self.expect(slots, held)
        first = self.allocated(lambda: self.pool.fork(slots), 1)
        if first is None:
            return False
        rest = self.allocated(lambda: self.pool.alloc(COLUMNS - 1, zero=0), COLUMNS - 1)
        if rest is None:
            self.pool.free(first)
            return False
        seed = self.random.randrange(1, 2**40)
        self.tables("seed")[first] = seed
        held = Held(held.states, held.scales, held.histories, seed)
        self.requests.append((first + rest, held))
        self.expect(*self.requests[-1])
        return True

    def fork(self) -> bool:
        at = self.any_of(self.requests)
        if at is None:
            return False
        slots, held = self.requests[at]
        self.expect(slots, held)
        n = self.random.choice([None, int(self.tables("accepted")[slots[0]])])
        twin = self.allocated(lambda: self.pool.fork(slots, n), COLUMNS)
        if twin is None:
            return False
        self.requests.append((twin, held))
        self.expect(twin, held)
        return True

    def copy(self) -> bool:
        if len(self.prefixes) < 2:
            return False
        src, dst = self.random.sample(range(len(self.prefixes)), 2)
        self.pool.copy(self.prefixes[src][0], self.prefixes[dst][0])
        self.prefixes[dst] = self.prefixes[dst][0], self.prefixes[src][1]
        self.expect(*self.prefixes[dst])
        return True

    def free(self) -> bool:
        at = self.any_of(self.requests)
        if at is None or self.random.random() < 0.5:
            return False
        slots, held = self.requests.pop(at)
        self.expect(slots, held)
        self.pool.free(slots)
        return True

    def evict(self) -> bool:
        at = self.any_of(self.prefixes)
        if at is None:
            return False
        slots, held = self.prefixes.pop(at)
        self.expect(slots, held)
        self.pool.free(slots)
        return True

    def offload(self) -> bool:
        kind = self.random.choice(["requests", "prefixes"])
        those = getattr(self, kind)
        at = self.any_of(those)
        if at is None or len(self.hosted) > 5:
            return False
        slots, held = those.pop(at)
        self.expect(slots, held)
        self.hosted.append((self.pool.offload(slots), held, kind))
        self.pool.free(slots)
        return True

    def reload(self) -> bool:
        at = self.any_of(self.hosted)
        if at is None:
            return False
        host, held, kind = self.hosted[at]
        slots = self.allocated(lambda: self.pool.reload(host), len(host))
        if slots is None:
            return False
        self.hosted.pop(at)
        getattr(self, kind).append((slots, held))
        self.expect(slots, held)
        return True

    def resize(self) -> bool:
        if self.pool.slots > 60 or self.random.random() < 0.9:
            return False
        self.pool.resize(self.pool.slots + 1)
        self.audit()
        return True

    def audit(self) -> None:
        """Everything is what the model says, and no slot is lost."""
        for slots, held in (*self.requests, *self.prefixes):
            self.expect(slots, held)
        used = [s for s, _ in self.held_slots()]
        assert len(set(used)) == len(used) == self.pool.slots - self.pool.free_slots
        self.pool.check()

    def run(self, operations: int) -> None:
        """So many operations that did something."""
        for i in range(operations):
            while not getattr(self, name := self.random.choice(OPERATIONS))():
                pass
            self.done[name] += 1
            if i % 100 == 0:
                self.audit()
        self.audit()


OPERATIONS = ("alloc", "prefill", "decode", "verify", "track", "prefix_hit", "fork", "copy", "free",
              "evict", "offload", "reload", "resize")  # fmt: skip
