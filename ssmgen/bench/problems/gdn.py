"""Problems of gated_delta_rule_decode: a gated delta net's shapes and distributions, for any
config.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...errors import ArgumentValueError
from ...families.gdn.config import ITEMSIZE, GdnConfig
from ...families.gdn.packing import split_qkv
from ...reference.gdn import delta_gates, delta_step
from ...reference.tables import Rows, read_tables
from ..grid import key_heads
from ..problem import POOL_BYTES
from ._inputs import DTYPES, SlotProblem, integers_of, states_written

__all__ = ["PROBLEM", "GdnProblem", "moved"]

Tensor = torch.Tensor

# Slot sets beyond these only make the graph longer.
MOST_SETS = 2048
# Elements of a pool that are drawn at once.
CHUNK = 2**24
LOWER_BOUND = -5.0
TABLES = ("state_batch_indices", "dst_state_batch_indices", "intermediate_states_buffer",
          "intermediate_state_indices", "cu_seqlens", "cache_steps",
          "num_accepted_tokens")  # fmt: skip
# What the op takes where nothing is said.
SWITCHES = {
    "lower_bound": None,
    "use_qk_l2norm": True,
    "disable_state_update": False,
    "philox_rounds": 10,
    "cache_steps": 0,
    "algorithm": "auto",
    "pdl": False,
}


def moved(config: GdnConfig, batch: int, nheads: int, k_heads: int) -> int:
    """Bytes that a call must move at least: each byte of its arguments once, states both ways."""
    c = config
    tokens = batch * c.ntokens
    state = nheads * c.head_v_dim * c.head_k_dim * ITEMSIZE[c.state_dtype]
    targets = c.ntokens if c.dst_tokens else 1
    total = (1 + states_written(c)) * batch * state
    channels = c.head_k_dim if c.kda else 1
    inputs = 2 * k_heads * c.head_k_dim + 2 * nheads * c.head_v_dim
    total += tokens * inputs * ITEMSIZE[c.dtype]
    total += tokens * nheads * (channels * ITEMSIZE[c.a_dtype] + ITEMSIZE[c.b_dtype])
    if c.gate != "given":
        total += nheads * ITEMSIZE[c.a_log_dtype]
        total += c.has_dt_bias * nheads * channels * ITEMSIZE[c.dt_bias_dtype]
    size = {"int32": 4, "int64": 8, None: 0}
    # The slot of one source a row, unless it is among the destinations.
    shared = bool(c.dst_tokens and c.accepted_dtype)
    total += batch * size[c.index_dtype] * (c.has_dst * targets + (not shared))
    total += batch * (size[c.entry_dtype] + size[c.accepted_dtype])
    total += (batch + 1) * size[c.seqlens_dtype]
    return total + 8 * (c.rounding == "stochastic")


class GdnProblem(SlotProblem):
    """Calls of gated_delta_rule_decode.

    q, k and v are views of one tensor, `packed`, as the convolution before them leaves it; in
    shares of key heads if the config is `grouped`. With several tokens every row has
    ``config.ntokens`` of them. With accepted tokens and a destination for each token a row reads
    one of the slots that it writes, as a step that verifies drafts does.
    """

    config: GdnConfig

    def __init__(
        self,
        config: GdnConfig,
        batch: int,
        nheads: int,
        *,
        k_heads: int | None = None,
        device: str = "cuda",
        pool_bytes: int = POOL_BYTES,
        seed: int = 20,
    ) -> None:
        self.config, self.batch, self.nheads = config, batch, nheads
        self.k_heads = key_heads(nheads) if k_heads is None else k_heads
        if config.grouped and 1 in (self.k_heads, nheads // self.k_heads):
            raise ArgumentValueError(
                f"bench: {self.k_heads} key heads for {nheads} value heads are in no groups; "
                "grouped needs several heads of several"
            )
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        c = config
        self._lead: tuple[int, ...] = (batch,)
        if c.seqlens_dtype:
            self._lead = (batch * c.ntokens,)
        elif c.many:
            self._lead = (batch, c.ntokens)
        row = nheads * c.head_v_dim * c.head_k_dim * ITEMSIZE[c.state_dtype]
        self.sets = min(MOST_SETS, max(2, -(-pool_bytes // (batch * row))))
        self._make_pool()
        self._make_inputs()
        self._make_buffer(max(1, -(-pool_bytes // (batch * c.ntokens * row))))
        self.seed = None
        if c.rounding == "stochastic":
            self.seed = torch.tensor([20261121], device=device, dtype=torch.int64)

    @property
    def bytes(self) -> int:
        return moved(self.config, self.batch, self.nheads, self.k_heads)

    def _make_pool(self) -> None:
        """The states, and which slots each set reads (`sources`) and writes (`targets`)."""
        c, b = self.config, self.batch
        # The step before had as many tokens, or drafts where this one has none.
        width = max(2, c.ntokens) if c.accepted_dtype else 1
        targets = (c.ntokens if c.dst_tokens else 1) if c.has_dst else 0
        shared = bool(c.dst_tokens and c.accepted_dtype)
        each = width if shared else width + targets
        # Slot 0 is left alone: some engines keep it for padding.
        slots = 1 + self.sets * b * each
        self.pool = self._states(slots)
        step = max(1, CHUNK // self.pool[0].numel())
        for first in range(0, slots, step):
            part = self.pool[first : first + step]
            part.copy_(self._randn(*part.shape))
        self.sources = self.targets = None
        if c.index_dtype is None:
            return
        order = (self._order(slots - 1) + 1).view(self.sets, b, each)
        table = order.to(integers_of(c.index_dtype))
        sources = table[..., :width]
        self.sources = (sources if c.accepted_dtype else sources[..., 0]).contiguous()
        if shared:
            self.targets = self.sources
        elif c.has_dst:
            found = table[..., width:]
            self.targets = (found if c.dst_tokens else found[..., 0]).contiguous()

    def _states(self, *lead: int) -> Tensor:
        """Memory of (V, K) matrices in the layout of the config."""
        c = self.config
        sizes = (c.head_v_dim, c.head_k_dim)
        if c.state_layout == "KV":
            sizes = sizes[::-1]
        shape = (*lead, self.nheads, *sizes)
        memory = torch.empty(shape, dtype=DTYPES[c.state_dtype], device=self.device)
        return memory if c.state_layout == "VK" else memory.transpose(-1, -2)

    def _make_inputs(self) -> None:
        c, n, h, lead = self.config, self.nheads, self.k_heads, self._lead
        k_dim, v_dim = c.head_k_dim, c.head_v_dim
        self.packed = self._placed(*lead, 2 * h * k_dim + n * v_dim)
        self.packed.copy_(torch.nn.functional.silu(self._randn(*self.packed.shape)))
        packing = "interleaved" if c.grouped else "flat"
        q, k, v = split_qkv(self.packed, h, n, k_dim, v_dim, packing)
        if not c.use_qk_l2norm:
            # A longer key makes the rule diverge.
            k.copy_(torch.nn.functional.normalize(k.float(), dim=-1))
        self.inputs = {"q": q, "k": k, "v": v}
        own = (n, k_dim) if c.kda else (n,)
        # The step is log-uniform in [1e-3, 1e-1], the rate uniform in [1, 16], as layers start.
        step, rate = self._uniform(-6.907755, -2.302585, *own).exp(), self._uniform(1, 16, n)
        a, b = 0.1 * self._randn(*lead, *own), self._randn(*lead, n)
        bias = step + torch.log(-torch.expm1(-step))
        gates = {"a": a if c.has_dt_bias else a + bias, "b": b, "A_log": rate.log()}
        if c.gate == "given":
            g = -(rate[:, None] if c.kda else rate) * step * a.exp()
            gates = {"g": g, "beta": b.sigmoid()}
        elif c.has_dt_bias:
            gates["dt_bias"] = bias
        dtypes = {"a": c.a_dtype, "g": c.a_dtype, "b": c.b_dtype, "beta": c.b_dtype,
                  "A_log": c.a_log_dtype, "dt_bias": c.dt_bias_dtype}  # fmt: skip
        for name, values in gates.items():
            self.inputs[name] = values.to(DTYPES[dtypes[name]])
        if c.seqlens_dtype:
            self.inputs["cu_seqlens"] = self._ends(c.seqlens_dtype, c.ntokens)
        if c.accepted_dtype:
            assert self.sources is not None
            most = torch.full((self.batch,), self.sources.shape[-1])
            self.inputs["num_accepted_tokens"] = self._integers(c.accepted_dtype, 1, most)
        self.out = torch.empty(*lead, n, v_dim, dtype=DTYPES[c.dtype], device=self.device)

    def _make_buffer(self, turns: int) -> None:
        """The intermediate states: `turns` sets of entries, in turn."""
        c = self.config
        self.buffer = self.entries = None
        if not c.has_intermediate:
            return
        self._turns = min(self.sets, turns)
        self.buffer = self._states(self._turns * self.batch, c.ntokens)
        if c.entry_dtype:
            order = self._order(len(self.buffer)).view(self._turns, self.batch)
            self.entries = order.to(integers_of(c.entry_dtype))

    def arguments(self, which: int) -> dict[str, Any]:
        c = self.config
        pool, buffer = self.pool, self.buffer
        found: dict[str, Any] = {}
        if self.sources is None:
            # Row i has slot i, so each set is a pool of its own.
            pool = pool[1 + which * self.batch : 1 + (which + 1) * self.batch]
        else:
            found["state_batch_indices"] = self.sources[which]
        if self.targets is not None:
            found["dst_state_batch_indices"] = self.targets[which]
        if self.entries is not None:
            found["intermediate_state_indices"] = self.entries[which % self._turns]
        elif buffer is not None:
            first = which % self._turns * self.batch
            buffer = buffer[first : first + self.batch]
        return {
            "state": pool,
            **self.inputs,
            **found,
            "intermediate_states_buffer": buffer,
            "out": self.out,
            "rand_seed": self.seed,
            "lower_bound": LOWER_BOUND if c.gate == "bounded" else None,
            "use_qk_l2norm": c.use_qk_l2norm,
            "disable_state_update": not c.update_state,
            "philox_rounds": c.philox_rounds or 10,
            "cache_steps": c.ntokens if c.seqlens_dtype else 0,
            "algorithm": c.algorithm,
            "pdl": c.pdl,
        }

    def call(self, which: int) -> Callable[[], Any]:
        from ...ops.gdn import gated_delta_rule_decode

        given = {
            name: value
            for name, value in self.arguments(which).items()
            if value is not None and (name not in SWITCHES or value != SWITCHES[name])
        }
        return functools.partial(gated_delta_rule_decode, **given)

    def rows(self, arguments: dict[str, Any]) -> Rows:
        given = {name: arguments[name] for name in TABLES if arguments.get(name) is not None}
        return read_tables(
            arguments["q"], len(arguments["state"]), -1, entries_are_rows=True, **given
        )

    def step(self, keep: Tensor, token: int, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, n, inputs = self.config, self.nheads, self.inputs

        def rows(name: str, *own: int) -> Tensor:
            return inputs[name].reshape(self.batch, c.ntokens, *own)[keep, token].double()

        channels = (c.head_k_dim,) if c.kda else ()
        if c.gate == "given":
            g, beta = rows("g", n, *channels), rows("beta", n)
        else:
            g, beta = delta_gates(
                inputs["A_log"], rows("a", n, *channels), inputs.get("dt_bias"), rows("b", n),
                lower_bound=LOWER_BOUND if c.gate == "bounded" else None,
                compute_dtype=torch.float64,
            )  # fmt: skip
        q, k = (rows(name, self.k_heads, c.head_k_dim) for name in ("q", "k"))
        v = rows("v", n, c.head_v_dim)
        options: dict[str, Any] = {
            "use_qk_l2norm": c.use_qk_l2norm, "compute_dtype": torch.float64,
        }  # fmt: skip
        y, new = delta_step(state, q, k, v, g, beta, **options)
        # With nothing of one sign the rule adds up magnitudes.
        _, magnitude = delta_step(state.abs(), q, k.abs(), -v.abs(), g, -beta, **options)
        return y, new, magnitude.maximum(new.abs())


PROBLEM = GdnProblem
