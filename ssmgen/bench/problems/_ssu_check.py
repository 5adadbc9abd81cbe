"""Whether a launch of an `SsuProblem` was right, by fp64.

Bounds are wide enough for kernels built with fast-math. An output may be off by two units of its
dtype; a state element by two units of its storage, by 2^-13 of what was added up to it (a softplus
of the form log(1 + e^v) is off by 2^-14 where dt is 1e-3), and by 2^-24.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ...families.ssu.config import SCALED
from ...reference import dequantise, ssu_step
from ...reference.tables import Rows, read_tables
from ..problem import Launch

if TYPE_CHECKING:
    from .ssu import SsuProblem

__all__ = ["Check"]

Tensor = torch.Tensor
Memory = tuple[Any, Any]  # states, and their scales or None
UNITS = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp32": 2.0**-12}


class Check:
    """One check: some rows of one slot set."""

    def __init__(self, problem: SsuProblem, which: int, rows: int, forgiven: float) -> None:
        self.problem, self.which, self.config = problem, which, problem.config
        self.absolute = 2.0**-24 + forgiven
        arguments = problem.arguments(which)
        self.tables = _tables(arguments)
        self.pool: Memory = (arguments["state"], arguments["state_scale"])
        self.buffer: Memory = (
            arguments["intermediate_states_buffer"],
            arguments["intermediate_state_scales"],
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
        if isinstance(result, Tensor) and result.data_ptr() != out.data_ptr():
            out.copy_(result.view_as(out))
        if not torch.isfinite(out).all():
            return "output not written everywhere"
        return self._wrong_values(start) or self._wrong_places(before)

    def _wrong_values(self, start: Tensor) -> str:
        c, keep, inputs = self.config, self.keep, self.problem.inputs
        x, dt, B, C, z = (self._rows(inputs.get(n)) for n in ("x", "dt", "B", "C", "z"))
        out = self._rows(self.problem.out).double()
        # Of each row the state before its tokens, then after each, and the magnitudes in it.
        states, sums = [start], [start.abs()]
        for token in range(c.ntokens):
            h, terms = states[-1], sums[-1]
            if self.tables.parents is not None:
                parents = (self.tables.parents[keep, token] + 1).tolist()
                h = torch.stack([states[p][i] for i, p in enumerate(parents)])
                terms = torch.stack([sums[p][i] for i, p in enumerate(parents)])
            y, new = ssu_step(
                h, x[:, token], dt[:, token], inputs["A"], B[:, token], C[:, token],
                inputs.get("D"), None if z is None else z[:, token], inputs.get("dt_bias"),
                dt_softplus=c.dt_softplus, compute_dtype=torch.float64,
            )  # fmt: skip
            terms = terms + new.abs()
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
        if state in SCALED:
            # A row's largest element is the largest code, of whose top binade e4m3 has 14 steps.
            largest = {"int16": 32767, "int8": 127, "fp8_e4m3fn": 14}[state]
            return (values.abs().amax(-1, keepdim=True) / largest).expand_as(values)
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

    def _rows(self, tensor: Tensor | None) -> Any:
        """The chosen rows of an input or the output, with an axis of tokens."""
        if tensor is None:
            return None
        shape = (self.problem.batch, self.config.ntokens, *tensor.shape[-2:])
        return tensor.reshape(shape)[self.keep]


def _tables(arguments: dict[str, Any]) -> Rows:
    names = ("state_batch_indices", "dst_state_batch_indices", "intermediate_states_buffer",
             "intermediate_state_indices", "cu_seqlens", "cache_steps", "num_accepted_tokens",
             "parent_tokens")  # fmt: skip
    given = {n: arguments[n] for n in names if arguments.get(n) is not None}
    return read_tables(arguments["x"], len(arguments["state"]), -1, **given)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def _stored(state: Tensor, scale: Tensor | None, at: Tensor) -> Tensor:
    """The states of slots or entries in fp64."""
    # Not every device can index fp8.
    rows = _bytes(state)[at].view(state.dtype)
    return rows.double() if scale is None else dequantise(rows, scale[at], torch.float64)


def _checksums(state: Tensor, scale: Tensor | None) -> Tensor:
    """Of each slot a sum over its bits."""
    total = state.view(torch.int32).flatten(1).sum(-1)
    return total if scale is None else total + scale.view(torch.int32).flatten(1).sum(-1)


def _others(like: Tensor, touched: list[Tensor]) -> Tensor:
    """A mask of all places but those touched."""
    mask = torch.ones(len(like), dtype=torch.bool, device=like.device)
    for places in touched:
        mask[places] = False
    return mask
