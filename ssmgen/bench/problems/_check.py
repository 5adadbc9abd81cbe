"""Whether a launch of a `SlotProblem` was right, by fp64.

Bounds are wide enough for kernels built with fast-math. An output may be off by two units of its
dtype; a state element by two units of its storage, by 2^-13 of what was added up to it (a softplus
of the form log(1 + e^v) is off by 2^-14 where dt is 1e-3), and by 2^-24.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ...reference import dequantise
from ..problem import Launch, Returned

if TYPE_CHECKING:
    from ._inputs import SlotProblem

__all__ = ["UNITS", "Check"]

Tensor = torch.Tensor
Memory = tuple[Any, Any]  # states, and their scales or None
UNITS = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp32": 2.0**-12}
# The largest code of a dtype with scales; of the top binade of e4m3 the number of steps.
CODES = {"int16": 32767, "int8": 127, "fp8_e4m3fn": 14}


class Check:
    """One check: some rows of one slot set."""

    def __init__(self, problem: SlotProblem, which: int, rows: int, forgiven: float) -> None:
        self.problem, self.which = problem, which
        self.config: Any = problem.config
        self.absolute = 2.0**-24 + forgiven
        arguments = problem.arguments(which)
        self.tables = problem.rows(arguments)
        self.pool: Memory = (arguments["state"], arguments.get("state_scale"))
        self.buffer: Memory = (
            arguments["intermediate_states_buffer"],
            arguments.get("intermediate_state_scales"),
        )
        self.keep = self._chosen(rows)
        # The places that the rows of the whole batch write.
        self.slots: list[Tensor] = []
        self.entries: list[Tensor] = []

    def run(self, launch: Launch) -> str:
        """What is wrong with ``launch(which)``, or ""."""
        out = self.problem.out
        start = _stored(*self.pool, self.tables.source[self.keep])
        before = _checksums(*self.pool)
        out.fill_(math.nan)
        for poisoned in self.buffer:
            if poisoned is not None:
                _bytes(poisoned).fill_(0xFF)
        result = launch(self.which)
        if out.is_cuda:
            torch.cuda.synchronize()
        if isinstance(result, Returned):
            among, slots = self.tables.targets(self.config.ntokens - 1)
            self.pool[0][slots] = result.states[among].to(self.pool[0].dtype)
            result = result.out
        if isinstance(result, Tensor) and result.data_ptr() != out.data_ptr():
            out.copy_(result.view_as(out))
        if not torch.isfinite(out).all():
            return "output not written everywhere"
        return self._wrong_values(start) or self._wrong_places(before)

    def _wrong_values(self, start: Tensor) -> str:
        c, keep = self.config, self.keep
        shape = (self.problem.batch, c.ntokens, *self.problem.out.shape[-2:])
        out = self.problem.out.reshape(shape)[keep].double()
        # Of each row the state before its tokens, then after each, and the magnitudes in it.
        states, sums = [start], [start.abs()]
        for token in range(c.ntokens):
            h, terms = states[-1], sums[-1]
            if self.tables.parents is not None:
                parents = (self.tables.parents[keep, token] + 1).tolist()
                h = torch.stack([states[p][i] for i, p in enumerate(parents)])
                terms = torch.stack([sums[p][i] for i, p in enumerate(parents)])
            y, new, magnitude = self.problem.step(keep, token, h)
            terms = terms + magnitude
            of = f" of token {token}" if c.many else ""
            error = ((out[:, token] - y).abs() - UNITS[c.dtype] * y.abs()).max().item()
            if not error <= 1e-4:
                return f"output{of} off by {error:.2e}"
            if (share := self._state_share(token, new, terms)) > 1:
                return f"state{of} off by {share:.2f} of what is allowed"
            if self.tables.parents is None:
                states, sums = [new], [terms]
            else:
                states.append(new)
                sums.append(terms)
        return ""

    def _state_share(self, token: int, exact: Tensor, terms: Tensor) -> float:
        """The largest error of the states stored after a token, as a share of what is allowed."""
        stored: list[tuple[Memory, Tensor, Tensor]] = []
        if self.config.update_state:
            among, slots = self.tables.targets(token)
            stored.append((self.pool, among, slots))
            self.slots.append(slots)
        if self.config.has_intermediate:
            among, entries = self.tables.entries(token)
            states, scales = (None if t is None else t[:, token] for t in self.buffer)
            stored.append(((states, scales), among, entries))
            self.entries.append(entries)
        allowed = 2 * self._unit(exact) + terms * 2.0**-13 + self.absolute
        largest = 0.0
        for memory, among, at in stored:
            mine, place = torch.where(among[None] == self.keep[:, None])
            if len(mine):
                off = (_stored(*memory, at[place]) - exact[mine]).abs() / allowed[mine]
                # A NaN is as wrong as can be.
                largest = max(largest, off.nan_to_num(math.inf).max().item())
        return largest

    def _wrong_places(self, before: Tensor) -> str:
        changed = before != _checksums(*self.pool)
        if changed[_others(changed, self.slots)].any():
            return "a slot that was not named has changed"
        if self.buffer[0] is not None:
            blank = torch.stack([(_bytes(entry) == 0xFF).all() for entry in self.buffer[0]])
            if not blank[_others(blank, self.entries)].all():
                return "an entry that was not named was written"
        return ""

    def _unit(self, values: Tensor) -> Tensor:
        """The distance of neighbouring numbers of the state's dtype, at most, at `values`."""
        state = self.config.state_dtype
        if state in CODES:
            return (values.abs().amax(-1, keepdim=True) / CODES[state]).expand_as(values)
        return values.abs() * 2.0 ** -{"fp32": 23, "fp16": 10, "bf16": 7}[state]

    def _chosen(self, rows: int) -> Tensor:
        """`rows` rows of the batch from first to last, and those at the far end of memory."""
        batch, device = self.problem.batch, self.problem.device
        if rows >= batch:
            return torch.arange(batch, device=device)
        chosen = torch.linspace(0, batch - 1, rows, device=device).long()
        far = [self.tables.source.argmax()]
        if self.config.has_intermediate:
            among, entries = self.tables.entries(0)
            far.append(among[entries.argmax()])
        return torch.cat([chosen, torch.stack(far)]).unique()


def _packed(tensor: Tensor) -> Tensor:
    """`tensor` with its packed axis last: a (V, K) matrix may lie as (K, V)."""
    return tensor if tensor.stride(-1) == 1 else tensor.transpose(-1, -2)


def _bytes(tensor: Tensor) -> Tensor:
    return _packed(tensor).view(torch.uint8)


def _stored(state: Tensor, scale: Tensor | None, at: Tensor) -> Tensor:
    """The states of slots or entries in fp64."""
    # Not every device can index fp8.
    rows = _bytes(state)[at].view(state.dtype)
    if state.stride(-1) != 1:
        rows = rows.transpose(-1, -2)
    return rows.double() if scale is None else dequantise(rows, scale[at], torch.float64)


def _checksums(state: Tensor, scale: Tensor | None) -> Tensor:
    """Of each slot a sum over its bits."""
    total = _packed(state).view(torch.int32).flatten(1).sum(-1)
    return total if scale is None else total + scale.view(torch.int32).flatten(1).sum(-1)


def _others(like: Tensor, touched: list[Tensor]) -> Tensor:
    """A mask of all places but those touched."""
    mask = torch.ones(len(like), dtype=torch.bool, device=like.device)
    for places in touched:
        mask[places] = False
    return mask
