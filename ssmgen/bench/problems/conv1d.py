"""Problems of causal_conv1d_update and causal_conv1d_fn, for any config."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from ...families.conv1d.config import ITEMSIZE, Conv1dConfig
from ...reference import conv1d as reference
from ..problem import POOL_BYTES, Launch
from ._check import UNITS
from ._inputs import DTYPES, Drawn, integers_of

__all__ = ["PROBLEM", "Conv1dProblem", "moved"]

Tensor = torch.Tensor

# Slot sets beyond these only make the graph longer. Windows are small: with fewer the pool of one
# row of a shard of a layer would stay in the L2.
MOST_SETS = 2**14
# Tokens of a row where there are several and nothing is said.
TOKENS = 4
# What causal_conv1d_fn calls the tensors of the contract.
NAMES_IN_PREFILL = {"conv_state": "conv_states", "conv_state_indices": "cache_indices"}


def columns(config: Conv1dConfig, tokens: int) -> int:
    """Columns of a slot of the pool: `depth`, and room for drafts where some were accepted."""
    assert config.depth is not None
    # The step before had as many tokens, or drafts where this one has none.
    return config.depth + (max(2, tokens) - 1 if config.accepted_dtype else 0)


def moved(config: Conv1dConfig, batch: int, dim: int, tokens: int) -> int:
    """Bytes that a call must move at least: each byte of its arguments once, of windows the
    columns that are read and those that are written."""
    c = config
    assert c.depth is not None
    assert c.state_dtype is not None
    total = 2 * batch * tokens * dim * ITEMSIZE[c.dtype]
    total += dim * (c.width + c.has_bias) * ITEMSIZE[c.weight_dtype]
    # A window that moves loses its oldest columns; those that are no taps are not read either.
    unread = min(tokens, c.depth - c.width + 1)
    reads = {"pool": c.depth - unread, "rows": c.width - 1, None: 0}[c.history]
    writes = c.depth
    if c.accepted_dtype:
        writes = c.width - 2 + tokens
    elif c.counts_dtype:
        writes = min(tokens, c.depth)
    total += batch * dim * (reads + writes * c.update_state) * ITEMSIZE[c.state_dtype]
    size = {"int32": 4, "int64": 8, None: 0}
    total += batch * size[c.index_dtype] * (1 + c.has_dst)
    total += batch * (size[c.accepted_dtype] + size[c.counts_dtype] + c.has_initial)
    return total + (batch + 1) * size[c.seqlens_dtype]


class Conv1dProblem(Drawn):
    """Calls of causal_conv1d_update, or of causal_conv1d_fn if the config is one of prefill.

    `nheads` is the number of channels. Rows have `tokens` tokens each, with a table of sequences
    as without one. All columns of all windows hold numbers, and all sequences have a past.
    """

    config: Conv1dConfig

    def __init__(
        self,
        config: Conv1dConfig,
        batch: int,
        nheads: int,
        *,
        tokens: int | None = None,
        device: str = "cuda",
        pool_bytes: int = POOL_BYTES,
        seed: int = 20,
    ) -> None:
        self.config, self.batch, self.nheads, self.device = config, batch, nheads, device
        self.tokens = (TOKENS if config.many else 1) if tokens is None else tokens
        self._generator = torch.Generator(device).manual_seed(seed)
        self._columns = columns(config, self.tokens)
        assert config.state_dtype is not None
        row = nheads * self._columns * ITEMSIZE[config.state_dtype]
        self.sets = min(MOST_SETS, max(2, -(-pool_bytes // (batch * row))))
        self._make_pool()
        self._make_inputs()

    @property
    def bytes(self) -> int:
        return moved(self.config, self.batch, self.nheads, self.tokens)

    def _make_pool(self) -> None:
        """The windows, and which slots each set reads (`sources`) and writes (`targets`)."""
        c, b = self.config, self.batch
        self.pool = self.sources = self.targets = None
        if not c.has_pool:
            return
        each = 1 + c.has_dst
        # Slot 0 is left alone: some engines keep it for padding.
        slots = 1 + self.sets * b * each
        self.pool = self._windows(slots, self._columns)
        if c.index_dtype is None:
            return
        table = (self._order(slots - 1) + 1).view(self.sets, each, b)
        table = table.to(integers_of(c.index_dtype))
        self.sources = table[:, 0]
        if c.has_dst:
            self.targets = table[:, 1]

    def _windows(self, count: int, length: int) -> Tensor:
        """(count, dim, length) with the channels, or the columns, side by side."""
        c, dim = self.config, self.nheads
        assert c.state_dtype is not None
        # A column of its own would be channels side by side.
        shape = (length, dim) if c.packed_channels else (dim, max(2, length))
        memory = torch.empty(count, *shape, dtype=DTYPES[c.state_dtype], device=self.device)
        # What is stored are inputs, in a wider dtype perhaps.
        step = max(1, 2**24 // math.prod(shape))
        for first in range(0, count, step):
            part = memory[first : first + step]
            part.copy_(self._randn(*part.shape).to(DTYPES[c.dtype]))
        return memory.transpose(1, 2) if c.packed_channels else memory[..., :length]

    def _make_inputs(self) -> None:
        c, b, dim, tokens = self.config, self.batch, self.nheads, self.tokens
        x = self._placed(b * tokens, dim)
        x.copy_(self._randn(*x.shape))
        self.x, self.out = (self._shaped(flat) for flat in (x, torch.empty_like(x)))
        weight = DTYPES[c.weight_dtype]
        self.inputs = {"x": self.x, "weight": (0.5 * self._randn(dim, c.width)).to(weight)}
        if c.has_bias:
            self.inputs["bias"] = (0.1 * self._randn(dim)).to(weight)
        if c.history == "rows":
            self.inputs["initial_states"] = self._windows(b, c.width - 1)
        if c.has_initial:
            self.inputs["has_initial_state"] = torch.ones(b, dtype=torch.bool, device=self.device)
        if c.seqlens_dtype:
            self.inputs["query_start_loc"] = self._ends(c.seqlens_dtype, tokens)
        if c.accepted_dtype:
            most = torch.full((b,), self._columns - c.width + 2)
            self.inputs["num_accepted_tokens"] = self._integers(c.accepted_dtype, 1, most)
        if c.counts_dtype:
            many = torch.full((b,), 4096)
            self.inputs["cache_seqlens"] = self._integers(c.counts_dtype, 0, many)
        self.alignment = "left"
        if c.counts_dtype:
            self.alignment = "circular"
        elif c.depth != c.width - 1:
            self.alignment = "right"

    def _shaped(self, flat: Tensor) -> Tensor:
        """(tokens of all rows, dim) as the op takes it."""
        c = self.config
        if c.seqlens_dtype:
            return flat.t() if c.prefill else flat
        return flat.unflatten(0, (self.batch, self.tokens)).transpose(1, 2) if c.many else flat

    def arguments(self, which: int) -> dict[str, Any]:
        """By the names of the contract; `prefill` says which of the two ops it is."""
        found: dict[str, Any] = dict(self.inputs)
        if self.pool is not None:
            found["conv_state"] = self.pool
            if self.sources is None:
                # Row i has slot i, so each set is a pool of its own.
                mine = slice(1 + which * self.batch, 1 + (which + 1) * self.batch)
                found["conv_state"] = self.pool[mine]
            else:
                found["conv_state_indices"] = self.sources[which]
        if self.targets is not None:
            found["dst_state_indices"] = self.targets[which]
        return {
            **found,
            "out": self.out,
            "activation": self.config.activation,
            "alignment": self.alignment,
            "pdl": self.config.pdl,
            "prefill": self.config.prefill,
        }

    def call(self, which: int) -> Callable[[], Any]:
        from ...ops import conv1d as ops

        op: Any = ops.causal_conv1d_fn if self.config.prefill else ops.causal_conv1d_update
        return functools.partial(op, **self._named(which))

    def _named(self, which: int) -> dict[str, Any]:
        """The arguments as the op calls them."""
        names = NAMES_IN_PREFILL if self.config.prefill else {}
        found = self.arguments(which)
        del found["prefill"]
        return {names.get(name, name): value for name, value in found.items()}

    def verify(self, launch: Launch, which: int = 0, rows: int = 32, forgiven: float = 0.0) -> str:
        """As of any problem; windows hold inputs, so every bit of the pool is compared, and all
        rows are. `forgiven` is of outputs."""
        given = self._named(which)
        del given["pdl"]
        exact = torch.full(self.out.shape, math.nan, dtype=torch.float64, device=self.device)
        want = None if self.pool is None else self.pool.clone()
        if want is not None:
            name = NAMES_IN_PREFILL["conv_state"] if self.config.prefill else "conv_state"
            given[name] = want
            if self.sources is None:
                given[name] = want[1 + which * self.batch : 1 + (which + 1) * self.batch]
        refer = reference.causal_conv1d_update
        if self.config.prefill:
            refer = reference.causal_conv1d_fn  # type: ignore[assignment]
        refer(**{**given, "out": exact}, compute_dtype=torch.float64)
        self.out.fill_(math.nan)
        result = launch(which)
        if self.out.is_cuda:
            torch.cuda.synchronize()
        if isinstance(result, Tensor) and result.data_ptr() != self.out.data_ptr():
            self.out.copy_(result.view_as(self.out))
        if not torch.isfinite(self.out).all():
            return "output not written everywhere"
        found = self.out.double()
        error = ((found - exact).abs() - UNITS[self.config.dtype] * exact.abs()).max().item()
        if not error <= 1e-4 + forgiven:
            return f"output off by {error:.2e}"
        return self._wrong_places(which, want)

    def _wrong_places(self, which: int, want: Tensor | None) -> str:
        if want is None or self.pool is None:
            return ""
        kinds = {2: torch.int16, 4: torch.int32}
        kind = kinds[want.element_size()]
        differs = (self.pool.view(kind) != want.view(kind)).flatten(1).any(1)
        if self.targets is not None:
            mine = self.targets[which].long()
        elif self.sources is not None:
            mine = self.sources[which].long()
        else:
            mine = 1 + which * self.batch + torch.arange(self.batch, device=self.device)
        if differs[mine].any():
            return f"state of {int(differs[mine].sum())} rows wrong"
        return "a slot that was not named has changed" if differs.any() else ""


PROBLEM = Conv1dProblem
