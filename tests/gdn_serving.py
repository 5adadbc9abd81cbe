"""The server of tests/serving.py on gated_delta_rule_decode.

With `plain`, rows without drafts take the one-token kernel beside the others' many: they start from
the slot of the last accepted token all the same, and nothing is copied. A mutation then is a bug of
that kernel's rows alone, as serving systems had it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from serving import Server

import ssmgen
from ssmgen.reference import delta_gates, delta_step

H, HV = 2, 4


@dataclass
class GdnServer(Server):
    """`dim`: V; `dstate`: K."""

    plain: bool = False

    def make_weights(self, gen: torch.Generator) -> dict[str, torch.Tensor]:
        return {
            "A_log": torch.log(0.05 + torch.rand(HV, generator=gen)),
            "dt_bias": torch.randn(HV, generator=gen),
        }

    def tokens(self, count: int) -> dict[str, torch.Tensor]:
        sizes = {"q": (H, self.dstate), "k": (H, self.dstate), "v": (HV, self.dim), "a": (HV,),
                 "b": (HV,)}  # fmt: skip
        return {n: torch.randn(count, *size, generator=self.noise) for n, size in sizes.items()}

    def update(self, **arguments: Any) -> torch.Tensor:
        return ssmgen.gated_delta_rule_decode(self.pool, **arguments, **self.weights)

    def slots(self, work: Any, dropped: bool, **arguments: Any) -> torch.Tensor:
        if not self.plain:
            return super().slots(work, dropped, **arguments)
        ends = arguments.pop("cu_seqlens").tolist()
        steps = arguments.pop("cache_steps")
        inputs = {n: arguments.pop(n) for n in work[0][1]}
        y = torch.empty_like(inputs["v"])
        rows = [i for i in range(len(work)) if ends[i + 1] - ends[i] == 1]
        if rows:
            at = [ends[i] for i in rows]
            table = self.table([work[i][0].slots for i in rows])
            accepted = [1 if dropped else work[i][0].accepted for i in rows]
            for i in rows:
                work[i][0].accepted = 1
            y[at] = self.update(
                **{n: t[at] for n, t in inputs.items()}, **arguments, state_batch_indices=table,
                dst_state_batch_indices=table[:, 0], num_accepted_tokens=self.table(accepted),
            )  # fmt: skip
        rest = [i for i in range(len(work)) if i not in rows]
        if rest:
            at = [place for i in rest for place in range(ends[i], ends[i + 1])]
            lengths = torch.tensor([0, *(ends[i + 1] - ends[i] for i in rest)])
            y[at] = super().slots(
                [work[i] for i in rest], False, **{n: t[at] for n, t in inputs.items()},
                cu_seqlens=lengths.cumsum(0).to(torch.int32).to(self.device), cache_steps=steps,
                **arguments,
            )  # fmt: skip
        return y


def exact(server: GdnServer) -> dict[tuple[int, int], torch.Tensor]:
    """The same outputs in fp64, request by request and token by token, without any server."""
    weights = {n: t.cpu().double() for n, t in server.weights.items()}
    found = {}
    for request in server.waiting:
        S = torch.zeros(1, HV, server.dim, server.dstate, dtype=torch.float64)
        for at in range(request.length):
            one = {n: t[at : at + 1].double() for n, t in request.inputs.items()}
            g, beta = delta_gates(weights["A_log"], one["a"], weights["dt_bias"], one["b"],
                                  compute_dtype=torch.float64)  # fmt: skip
            o, S = delta_step(S, one["q"], one["k"], one["v"], g, beta, compute_dtype=torch.float64)
            found[request.name, at] = o[0]
    return found
