"""Problems of selective_state_update: a Mamba2 layer's shapes and distributions, for any config."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from ...families.ssu.config import ITEMSIZE, SCALED, SsuConfig
from ...reference import quantise, ssu_step
from ...reference.tables import Rows, read_tables
from ..problem import POOL_BYTES
from ._inputs import DTYPES, SlotProblem, integers_of, states_written

__all__ = ["PROBLEM", "SsuProblem", "moved"]

Tensor = torch.Tensor

# Slot sets beyond these only make the graph longer.
MOST_SETS = 2048
# Elements of a pool that are drawn at once.
CHUNK = 2**24
TABLES = ("state_batch_indices", "dst_state_batch_indices", "intermediate_states_buffer",
          "intermediate_state_indices", "cu_seqlens", "cache_steps", "num_accepted_tokens",
          "parent_tokens")  # fmt: skip
# What the op takes where nothing is said.
SWITCHES = {
    "dt_softplus": False,
    "disable_state_update": False,
    "philox_rounds": 10,
    "cache_steps": 0,
    "algorithm": "auto",
    "pdl": False,
    "precision": "fast",
}


def groups(nheads: int) -> int:
    """A group for every 16 heads, as Mamba2 models have it: 8 at 128 heads, 1 at 16."""
    return math.gcd(nheads, max(1, nheads // 16))


def moved(config: SsuConfig, batch: int, nheads: int, ngroups: int | None = None) -> int:
    """Bytes that a call must move at least: each byte of its arguments once, states both ways."""
    c, g = config, groups(nheads) if ngroups is None else ngroups
    tokens = batch * c.ntokens
    scale = 4 if c.state_dtype in SCALED else 0
    state = nheads * c.dim * (c.dstate * ITEMSIZE[c.state_dtype] + scale)
    total = (1 + states_written(c)) * batch * state
    inner, per = nheads * c.dim, 1 if c.tie_hdim else c.dim
    total += tokens * ((2 + c.has_z) * inner + 2 * g * c.dstate) * ITEMSIZE[c.dtype]
    total += tokens * nheads * per * ITEMSIZE[c.dt_dtype or c.weight_dtype]
    total += nheads * (1 if c.tie_hdim else c.dim * c.dstate) * ITEMSIZE[c.a_dtype]
    total += (c.has_d + c.has_dt_bias) * nheads * per * ITEMSIZE[c.weight_dtype]
    size = {"int32": 4, "int64": 8, None: 0}
    total += batch * size[c.index_dtype] * (1 + c.has_dst * (c.ntokens if c.dst_tokens else 1))
    total += batch * (size[c.entry_dtype] + size[c.accepted_dtype])
    total += tokens * size[c.parents_dtype]
    total += (batch + 1) * size[c.seqlens_dtype]
    return total + 8 * (c.rounding == "stochastic")


class SsuProblem(SlotProblem):
    """Calls of selective_state_update.

    x, B and C are views of one tensor, `packed`, as the convolution before them leaves it. With
    several tokens every row has ``config.ntokens`` of them.
    """

    config: SsuConfig

    def __init__(
        self,
        config: SsuConfig,
        batch: int,
        nheads: int,
        *,
        ngroups: int | None = None,
        device: str = "cuda",
        pool_bytes: int = POOL_BYTES,
        seed: int = 20,
    ) -> None:
        self.config, self.batch, self.nheads = config, batch, nheads
        self.ngroups = groups(nheads) if ngroups is None else ngroups
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        c = config
        row = nheads * c.dim * c.dstate * ITEMSIZE[c.state_dtype]
        self.sets = min(MOST_SETS, max(2, -(-pool_bytes // (batch * row))))
        self._make_pool()
        self._make_inputs()
        self._make_buffer(max(1, -(-pool_bytes // (batch * c.ntokens * row))))
        self.seed = None
        if c.rounding == "stochastic":
            self.seed = torch.tensor([20261121], device=device, dtype=torch.int64)

    @property
    def bytes(self) -> int:
        return moved(self.config, self.batch, self.nheads, self.ngroups)

    def _make_pool(self) -> None:
        """The states, and which slots each set reads (`sources`) and writes (`targets`)."""
        c, b = self.config, self.batch
        self._width = c.ntokens if c.accepted_dtype else 1
        targets = (c.ntokens if c.dst_tokens else 1) if c.has_dst else 0
        each = self._width + targets
        # Slot 0 is left alone: some engines keep it for padding.
        slots = 1 + self.sets * b * each
        self.pool, self.scale = self._states(slots)
        self.sources = self.targets = None
        if c.index_dtype is None:
            return
        order = self._order(slots - 1) + 1
        table = order.view(self.sets, b, each).to(integers_of(c.index_dtype))
        sources, targets = table.split([self._width, targets], dim=-1)
        self.sources = (sources if c.accepted_dtype else sources[..., 0]).contiguous()
        if c.has_dst:
            self.targets = (targets if c.dst_tokens else targets[..., 0]).contiguous()

    def _states(self, slots: int) -> tuple[Tensor, Tensor | None]:
        c = self.config
        shape = (self.nheads, c.dim, c.dstate)
        pool = torch.empty(slots, *shape, dtype=DTYPES[c.state_dtype], device=self.device)
        scale = None
        if c.state_dtype in SCALED:
            scale = torch.empty(slots, *shape[:2], device=self.device)
        step = max(1, CHUNK // math.prod(shape))
        for first in range(0, slots, step):
            part = slice(first, min(first + step, slots))
            values = self._randn(part.stop - first, *shape)
            if scale is None:
                pool[part] = values
            else:
                pool[part], scale[part] = quantise(values, pool.dtype)
        return pool, scale

    def _make_inputs(self) -> None:
        c, h, g = self.config, self.nheads, self.ngroups
        lead: tuple[int, ...] = (self.batch,)
        if c.seqlens_dtype:
            lead = (self.batch * c.ntokens,)
        elif c.many:
            lead = (self.batch, c.ntokens)
        dtype, weight = DTYPES[c.dtype], DTYPES[c.weight_dtype]
        self.packed, out = (
            self._placed(*lead, width)
            for width in (h * c.dim + 2 * g * c.dstate, h * c.dim)
        )  # fmt: skip
        self.packed.copy_(torch.nn.functional.silu(self._randn(*self.packed.shape)))
        x, B, C = self.packed.split([h * c.dim, g * c.dstate, g * c.dstate], dim=-1)
        per = 1 if c.tie_hdim else c.dim
        # The step is log-uniform in [1e-3, 1e-1], A uniform in [-16, -1]: Mamba2's own
        # initialisation. It comes from dt_bias, through the inverse of softplus, or from dt.
        step = self._uniform(-6.907755, -2.302585, h, per).exp()
        dt, bias = 0.1 * self._randn(*lead, h, per), step + torch.log(-torch.expm1(-step))
        if not c.dt_softplus:
            dt, bias = step * dt.exp(), 0.1 * step
        elif not c.has_dt_bias:
            dt = dt + bias
        rate = self._uniform(-16, -1, h, per, 1 if c.tie_hdim else c.dstate)
        self.inputs = {
            "x": x.unflatten(-1, (h, c.dim)),
            "dt": dt.to(DTYPES[c.dt_dtype or c.weight_dtype]).expand(*lead, h, c.dim),
            "A": rate.to(DTYPES[c.a_dtype]).expand(h, c.dim, c.dstate),
            "B": B.unflatten(-1, (g, c.dstate)),
            "C": C.unflatten(-1, (g, c.dstate)),
        }
        if c.has_d:
            self.inputs["D"] = self._uniform(0.5, 1.5, h, per).to(weight).expand(h, c.dim)
        if c.has_z:
            self.inputs["z"] = self._randn(*lead, h, c.dim).to(dtype)
        if c.has_dt_bias:
            self.inputs["dt_bias"] = bias.to(weight).expand(h, c.dim)
        if c.seqlens_dtype:
            self.inputs["cu_seqlens"] = self._ends(c.seqlens_dtype, c.ntokens)
        if c.accepted_dtype:
            self.inputs["num_accepted_tokens"] = self._integers(
                c.accepted_dtype, 1, torch.full((self.batch,), c.ntokens)
            )
        if c.parents_dtype:
            earlier = torch.arange(1, c.ntokens + 1).expand(self.batch, -1)
            self.inputs["parent_tokens"] = self._integers(c.parents_dtype, -1, earlier)
        self.out = out.unflatten(-1, (h, c.dim))

    def _make_buffer(self, turns: int) -> None:
        """The intermediate states; `turns` sets of entries, in turn, where entries are named."""
        c = self.config
        self.buffer = self.buffer_scale = None
        if not c.has_intermediate:
            return
        turns = min(self.sets, turns)
        entries = turns * self.batch if c.entry_dtype else len(self.pool)
        shape = (entries, c.ntokens, self.nheads, c.dim, c.dstate)
        self.buffer = torch.empty(shape, dtype=self.pool.dtype, device=self.device)
        if self.scale is not None:
            self.buffer_scale = torch.empty(shape[:-1], device=self.device)
        if c.entry_dtype:
            order = self._order(entries)
            self.entries = order.view(turns, self.batch).to(integers_of(c.entry_dtype))

    def arguments(self, which: int) -> dict[str, Any]:
        c = self.config
        pool: dict[str, Any] = {"state": self.pool, "state_scale": self.scale}
        buffer: dict[str, Any] = {
            "intermediate_states_buffer": self.buffer,
            "intermediate_state_scales": self.buffer_scale,
        }
        if self.sources is None:
            # Row i has slot i, so each set is a pool of its own.
            mine = slice(1 + which * self.batch, 1 + (which + 1) * self.batch)
            pool = {n: None if t is None else t[mine] for n, t in pool.items()}
            if not c.entry_dtype:
                buffer = {n: None if t is None else t[mine] for n, t in buffer.items()}
        else:
            pool["state_batch_indices"] = self.sources[which]
        if self.targets is not None:
            pool["dst_state_batch_indices"] = self.targets[which]
        if c.entry_dtype:
            buffer["intermediate_state_indices"] = self.entries[which % len(self.entries)]
        return {
            **pool,
            **self.inputs,
            **buffer,
            "out": self.out,
            "rand_seed": self.seed,
            "dt_softplus": c.dt_softplus,
            "disable_state_update": not c.update_state,
            "philox_rounds": c.philox_rounds or 10,
            "cache_steps": c.ntokens if c.seqlens_dtype else 0,
            "algorithm": c.algorithm,
            "pdl": c.pdl,
            "precision": c.precision,
        }

    def call(self, which: int) -> Callable[[], Any]:
        from ...ops.ssu import selective_state_update

        given = {
            name: value
            for name, value in self.arguments(which).items()
            if value is not None and value != SWITCHES.get(name)
        }
        return functools.partial(selective_state_update, **given)

    def rows(self, arguments: dict[str, Any]) -> Rows:
        given = {name: arguments[name] for name in TABLES if arguments.get(name) is not None}
        return read_tables(arguments["x"], len(arguments["state"]), -1, **given)

    def step(self, keep: Tensor, token: int, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, inputs = self.config, self.inputs

        def rows(name: str) -> Any:
            if name not in inputs:
                return None
            shape = (self.batch, c.ntokens, *inputs[name].shape[-2:])
            return inputs[name].reshape(shape)[keep, token]

        y, new = ssu_step(
            state, rows("x"), rows("dt"), inputs["A"], rows("B"), rows("C"), inputs.get("D"),
            rows("z"), inputs.get("dt_bias"), dt_softplus=c.dt_softplus,
            compute_dtype=torch.float64,
        )  # fmt: skip
        return y, new, new.abs()


PROBLEM = SsuProblem
