"""Two requests of a Mamba2 layer in a StatePool: one drafts, one does not, and then the other way.

Drafts are verified several tokens at once; what a step accepts decides where the next step of that
request begins. DecodeMetadata has that for all layers, and the layer only passes it on. In the end
the request gives the same bits as without any drafts. Runs on a GPU or on a CPU.
"""

from __future__ import annotations

import torch

import ssmgen

NHEADS, DIM, DSTATE, DRAFTS = 4, 16, 32, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Layer:
    """The recurrent part of a layer. It decides nothing about slots."""

    def __init__(self, pool: ssmgen.StatePool, index: int) -> None:
        self.pool, self.index = pool, index
        self.A = -torch.rand(NHEADS, 1, 1, device=DEVICE).expand(NHEADS, DIM, DSTATE)

    def __call__(self, meta: ssmgen.DecodeMetadata, x, dt, B, C) -> torch.Tensor:
        out = torch.empty_like(x)
        for part in (meta.plain, meta.verify, meta.prefill):
            if part:
                y = ssmgen.selective_state_update(
                    self.pool.state(self.index), part.take(x), part.take(dt).expand(-1, -1, DIM),
                    self.A, part.take(B), part.take(C), dt_softplus=True, precision="exact",
                    **part.recurrent,
                )  # fmt: skip
                part.put(out, y)
        return out


def tokens(count: int) -> list[torch.Tensor]:
    """Inputs of so many tokens: x, dt, B, C."""
    shapes = (NHEADS, DIM), (NHEADS, 1), (1, DSTATE), (1, DSTATE)
    return [torch.randn(count, *shape, device=DEVICE) for shape in shapes]


def main() -> None:
    layers = [ssmgen.LayerSpec(state=(NHEADS, DIM, DSTATE), conv=(96, 3 + DRAFTS))] * 2
    pool = ssmgen.StatePool(layers, slots=16, device=DEVICE)
    meta = ssmgen.DecodeMetadata(pool, max_rows=8, max_tokens=64, drafts=DRAFTS)
    layer = Layer(pool, 1)
    print(f"{pool.slots} slots of {pool.slot_nbytes} bytes, all layers in one")

    # Request a has 9 true tokens; b's do not matter.
    true = tokens(9)
    a, b = pool.alloc(DRAFTS + 1, zero=0), pool.alloc(DRAFTS + 1, zero=0)
    found = []

    def step(counts, accepted, begin, right, prefill=None, first=None, track=None):
        """One step; `right` of a's tokens, from `begin` on, are true, and its other ones drafts
        that are rejected."""
        meta.build([a, b], counts, accepted=accepted, prefill=prefill, first=first, track=track)
        inputs = tokens(meta.padded_tokens)
        for noise, t in zip(inputs, true):
            noise[:right] = t[begin : begin + right]
        found.extend(layer(meta, *inputs)[:right])

    both = [True, True]
    step([4, 6], [1, 1], begin=0, right=4, prefill=both, first=both)  # prompts
    step([3, 1], [1, 1], begin=4, right=2)  # a drafts two tokens, of which one is right
    [saved] = pool.alloc()
    step([1, 3], [2, 1], begin=6, right=1, track=[saved, meta.pad_slot_id])  # now b drafts
    meta.checkpoint([1, 3])

    # a is preempted, and comes back in other slots, from the one that was tracked.
    host = pool.offload([saved])
    pool.free([*a, saved])
    a = pool.reload(host) + pool.alloc(DRAFTS, zero=0)
    step([2, 1], [1, 3], begin=7, right=2)

    # The same tokens one after the other.
    alone = pool.alloc()
    for at, y in enumerate(found):
        meta.build([alone], [1])
        wanted = layer(meta, *(t[at : at + 1] for t in true))[0]
        print(f"token {at}: {'same bits' if torch.equal(y, wanted) else 'different'}")
        assert torch.equal(y, wanted)


if __name__ == "__main__":
    main()
