"""Problems of selective_state_update: a Mamba2 layer's shapes and distributions, for any config."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...families.ssu.config import ITEMSIZE, SCALED, SsuConfig
from ...reference import dequantise, quantise, ssu_step
from ...reference.tables import Rows, read_tables
from ..problem import POOL_BYTES, Launch, Problem

__all__ = ["PROBLEM", "SsuProblem", "moved"]

Tensor = torch.Tensor

# Slot sets beyond these only make the graph longer.
MOST_SETS = 2048
# Elements of a pool that are drawn at once.
CHUNK = 2**24
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int16": torch.int16,
    "int8": torch.int8,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
TABLES = (
    "state_batch_indices",
    "dst_state_batch_indices",
    "intermediate_state_indices",
    "num_accepted_tokens",
)


def groups(nheads: int) -> int:
    """A group for every 16 heads, as Mamba2 models have it: 8 at 128 heads, 1 at 16."""
    return math.gcd(nheads, max(1, nheads // 16))


def moved(config: SsuConfig, batch: int, nheads: int, ngroups: int | None = None) -> int:
    """Bytes that a call must move at least: each byte of its arguments once, states both ways."""
    c, g = config, groups(nheads) if ngroups is None else ngroups
    tokens = batch * c.ntokens
    scale = 4 if c.state_dtype in SCALED else 0
    state = nheads * c.dim * (c.dstate * ITEMSIZE[c.state_dtype] + scale)
    writes = (c.ntokens if c.dst_tokens else 1) * c.update_state + c.ntokens * c.has_intermediate
    total = (1 + writes) * batch * state
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


class SsuProblem(Problem):
    """Calls of selective_state_update.

    x, B and C are views of one packed tensor, as the convolution before them leaves it. With
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
        order = torch.randperm(slots - 1, generator=self._generator, device=self.device) + 1
        table = order.view(self.sets, b, each).to(getattr(torch, c.index_dtype))
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
        packed, out = (
            self._placed(*lead, width)
            for width in (h * c.dim + 2 * g * c.dstate, h * c.dim)
        )  # fmt: skip
        packed.copy_(torch.nn.functional.silu(self._randn(*packed.shape)))
        x, B, C = packed.split([h * c.dim, g * c.dstate, g * c.dstate], dim=-1)
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
            ends = torch.arange(self.batch + 1, device=self.device) * c.ntokens
            self.inputs["cu_seqlens"] = ends.to(getattr(torch, c.seqlens_dtype))
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
            order = torch.randperm(entries, generator=self._generator, device=self.device)
            self.entries = order.view(turns, self.batch).to(getattr(torch, c.entry_dtype))

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=self._generator, device=self.device)
        return low + (high - low) * drawn

    def _integers(self, dtype: str, least: int, count: Tensor) -> Tensor:
        """One of the `count` integers from `least` up, for each of `count`."""
        drawn = torch.rand(count.shape, generator=self._generator, device=self.device)
        return (least + (drawn * count.to(self.device)).floor()).to(getattr(torch, dtype))

    def _placed(self, *shape: int) -> Tensor:
        """Memory of the input dtype, at a multiple of 16 bytes, or not if the config is not."""
        off = 0 if self.config.aligned else 1
        flat = torch.empty(math.prod(shape) + off, dtype=DTYPES[self.config.dtype],
                           device=self.device)  # fmt: skip
        return flat[off:].view(shape)

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

    def launch(self, which: int) -> None:
        from ...ops.ssu import selective_state_update

        selective_state_update(**self.arguments(which))

    def verify(self, launch: Launch, which: int = 0, rows: int = 32, forgiven: float = 0.0) -> str:
        """As `Problem.verify`, with bounds wide enough for kernels built with fast-math.

        An output may be off by two units of its dtype; a state element by two units of its
        storage, by 2^-13 of what was added up to it (a softplus of the form log(1 + e^v) is off
        by 2^-14 where dt is 1e-3), and by 2^-24.
        """
        c = self.config
        arguments = self.arguments(which)
        tables = _tables(arguments)
        keep = self._chosen(tables, rows)
        x, dt, B, C, z = (self._rows(name, keep) for name in ("x", "dt", "B", "C", "z"))
        D, bias = self.inputs.get("D"), self.inputs.get("dt_bias")
        pool, buffer = _pools(arguments)
        # Of each row the state before its tokens, then after each, and the magnitudes in it.
        states = [_stored(*pool, tables.source[keep])]
        sums = [states[0].abs()]
        before = _checksums(*pool)
        self.out.fill_(math.nan)
        for poisoned in buffer:
            if poisoned is not None:
                _bytes(poisoned).fill_(0xFF)

        launch(which)
        if self.out.is_cuda:
            torch.cuda.synchronize()

        if not torch.isfinite(self.out).all():
            return "output not written everywhere"
        out = self.out.reshape(self.batch, c.ntokens, self.nheads, c.dim)[keep].double()
        unit = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp32": 2.0**-12}[c.dtype]
        touched: dict[str, list[Tensor]] = {"pool": [], "buffer": []}
        for token in range(c.ntokens):
            h, terms = states[-1], sums[-1]
            if tables.parents is not None:
                parents = (tables.parents[keep, token] + 1).tolist()
                h = torch.stack([states[p][i] for i, p in enumerate(parents)])
                terms = torch.stack([sums[p][i] for i, p in enumerate(parents)])
            y, new = ssu_step(
                h, x[:, token], dt[:, token], self.inputs["A"], B[:, token], C[:, token], D,
                None if z is None else z[:, token], bias, dt_softplus=c.dt_softplus,
                compute_dtype=torch.float64,
            )  # fmt: skip
            terms = terms + new.abs()
            error = ((out[:, token] - y).abs() - unit * y.abs()).max().item()
            if not error <= 1e-4:
                return f"output{self._of(token)} off by {error:.2e}"
            written: list[tuple[str, Memory, tuple[Tensor, Tensor]]] = []
            if c.update_state:
                written.append(("pool", pool, tables.targets(token)))
            if c.has_intermediate:
                states_, scales = (None if t is None else t[:, token] for t in buffer)
                written.append(("buffer", (states_, scales), tables.entries(token)))
            for name, memory, (among, at) in written:
                touched[name].append(at)
                mine, place = torch.where(among[None] == keep[:, None])
                found = _stored(*memory, at[place])
                allowed = self._unit(new[mine]) * 2 + terms[mine] * 2.0**-13 + 2.0**-24 + forgiven
                share = ((found - new[mine]).abs() / allowed).amax().item() if len(mine) else 0.0
                if not share <= 1:
                    return f"state{self._of(token)} off by {share:.2f} of what is allowed"
            if tables.parents is None:
                states, sums = [new], [terms]
            else:
                states.append(new)
                sums.append(terms)
        changed = before != _checksums(*pool)
        if changed[_others(changed, touched["pool"])].any():
            return "a slot that was not named has changed"
        if buffer[0] is not None:
            blank = torch.tensor([(_bytes(e) == 0xFF).all() for e in buffer[0]])
            if not blank[_others(blank, touched["buffer"]).cpu()].all():
                return "an entry that was not named was written"
        return ""

    def _of(self, token: int) -> str:
        return f" of token {token}" if self.config.many else ""

    def _unit(self, values: Tensor) -> Tensor:
        """The distance of neighbouring numbers of the state's dtype, at most, at `values`."""
        state = self.config.state_dtype
        if state in SCALED:
            # A row's largest element is the largest code, of whose top binade e4m3 has 14 steps.
            largest = {"int16": 32767, "int8": 127, "fp8_e4m3fn": 14}[state]
            return (values.abs().amax(-1, keepdim=True) / largest).expand_as(values)
        return values.abs() * 2.0 ** -{"fp32": 23, "fp16": 10, "bf16": 7}[state]

    def _chosen(self, tables: Rows, rows: int) -> Tensor:
        """`rows` rows of the batch from first to last, and that at the far end of memory."""
        if rows >= self.batch:
            return torch.arange(self.batch, device=self.device)
        chosen = torch.linspace(0, self.batch - 1, rows, device=self.device).long()
        far = [tables.source.argmax()]
        if self.config.has_intermediate:
            among, entries = tables.entries(0)
            far.append(among[entries.argmax()])
        return torch.cat([chosen, torch.stack(far)]).unique()

    def _rows(self, name: str, keep: Tensor) -> Any:
        """An input of the rows of `keep`, with an axis of tokens; None if the config has none."""
        tensor = self.inputs.get(name)
        if tensor is None:
            return None
        return tensor.reshape(self.batch, self.config.ntokens, *tensor.shape[-2:])[keep]


PROBLEM = SsuProblem


def _tables(arguments: dict[str, Any]) -> Rows:
    names = ("state_batch_indices", "dst_state_batch_indices", "intermediate_states_buffer",
             "intermediate_state_indices", "cu_seqlens", "cache_steps", "num_accepted_tokens",
             "parent_tokens")  # fmt: skip
    given = {n: arguments[n] for n in names if arguments.get(n) is not None}
    return read_tables(arguments["x"], len(arguments["state"]), -1, **given)


Memory = tuple[Any, Any]  # states, and their scales or None


def _pools(arguments: dict[str, Any]) -> tuple[Memory, Memory]:
    """The slots, and the intermediate buffer."""
    return (
        (arguments["state"], arguments["state_scale"]),
        (arguments["intermediate_states_buffer"], arguments["intermediate_state_scales"]),
    )


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
        mask[places.to(like.device)] = False
    return mask
