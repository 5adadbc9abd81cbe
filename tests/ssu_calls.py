"""Calls of selective_state_update: built in every layout, run in the interpreter, and verified.

`verify` derives its bounds from the arithmetic of one fp32 evaluation. Rounding is monotone for
fixed random bits, so what is stored must lie between the rounded ends of the interval in which the
kernel's fp32 value lies; where the two ends agree, the stored bits are determined.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

from ssmgen import Plan
from ssmgen.families.ssu.contract import layout, normalise
from ssmgen.interpreter import interpret
from ssmgen.reference import PEAK, QMAX, quantise, random_bits, round_to, ssu_step

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int16": torch.int16,
    "int8": torch.int8,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
SCALED = ("int16", "int8", "fp8_e4m3fn")
ALGORITHMS = ("simple", "vertical", "horizontal")
ROUNDINGS = [
    (state, rounding)
    for state in DTYPES
    for rounding in ("nearest", "stochastic")
    if (state, rounding) != ("fp32", "stochastic")
]
SERVED = [
    (algorithm, state, rounding)
    for algorithm in ALGORITHMS
    for state, rounding in ROUNDINGS
    if algorithm != "horizontal" or state not in SCALED
]

U = 2.0**-24  # unit roundoff of fp32


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bits, as integers of the same size."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        tensor.dtype.itemsize
    ])  # fmt: skip


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of bits."""
    return torch.equal(raw(a), raw(b))


def storage(tensor: torch.Tensor) -> torch.Tensor:
    """Every byte of the memory behind a view."""
    whole = torch.empty(0, dtype=torch.uint8)
    return whole.set_(tensor.untyped_storage())  # type: ignore[call-overload]


@dataclass
class Call:
    """Tensors by argument name, and the switches, of one call."""

    tensors: dict[str, torch.Tensor]
    switches: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def copy(self) -> Call:
        """The same values, strides and storage offsets in other memory."""
        return copy.deepcopy(self)

    def layout(self) -> Any:
        return layout(**self.tensors, **self.switches)

    @property
    def views(self) -> dict[str, torch.Tensor]:
        return normalise(self.tensors)

    def interpreted(self, plan: Plan | None = None, arch: str = "sm_90") -> Call:
        """A copy after the generated kernel has run on it."""
        after = self.copy()
        interpret(after.layout(), after.tensors, plan=plan, arch=arch)
        return after

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of the op."""
        return {**self.tensors, **self.switches}


def moved(call: Call, device: Any) -> Call:
    """The same values, strides, offsets and shared storages on another device."""
    storages: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.untyped_storage()
        if whole.data_ptr() not in storages:
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(whole)
            storages[whole.data_ptr()] = flat.to(device, copy=True)
        view = torch.empty(0, dtype=tensor.dtype, device=device)
        memory = storages[whole.data_ptr()].untyped_storage()
        return view.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())

    return type(call)({n: move(t) for n, t in call.tensors.items()}, copy.copy(call.switches))


def digest(*tensors: torch.Tensor) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(raw(tensor.contiguous()).cpu().numpy().tobytes())
    return total.hexdigest()


def _pool(values: torch.Tensor, pitch: int, offset: int) -> torch.Tensor:
    """`values` with slots `pitch` elements further apart than packed, starting at `offset`."""
    step = values.stride(0) + pitch
    memory = torch.zeros(offset + len(values) * step, dtype=torch.float32).to(values.dtype)
    view = memory.as_strided(values.shape, (step, *values.stride()[1:]), offset)
    raw(view).copy_(raw(values))
    return view


def make(
    state: str = "fp32",
    rounding: str = "nearest",
    *,
    batch: int = 3,
    slots: int = 6,
    nheads: int = 4,
    ngroups: int = 2,
    dim: int = 16,
    dstate: int = 32,
    dtype: str = "bf16",
    weight_dtype: str = "fp32",
    dt_dtype: str | None = None,
    a_dtype: str = "fp32",
    tied: bool = True,
    z: bool = False,
    D: bool = True,
    dt_bias: bool = True,
    softplus: bool = True,
    indices: list[int] | str | None = "random",
    index_dtype: str = "int64",
    index_width: int = 0,
    dst: list[int] | None = None,
    pad: int = -1,
    rounds: int = 10,
    headless: bool = False,
    token: bool = False,
    packed: bool = False,
    lead: int = 0,
    pitch: int = 0,
    scale_pitch: int = 0,
    scale_axis: bool = False,
    offset: int = 0,
    update: bool = True,
    algorithm: str = "auto",
    pdl: bool = False,
    random: int = 0,
) -> Call:
    """One call. `packed`: x, B, C, z and dt are views of one projection that starts after `lead`
    elements. `offset`: elements by which the pool's address is off its allocation. `pitch`,
    `scale_pitch`: elements between slots. `headless`: Mamba1 layout; `nheads` is then 1.
    """
    gen = torch.Generator().manual_seed(random)
    io, weight = DTYPES[dtype], DTYPES[weight_dtype]
    if headless:
        nheads = ngroups = 1
        tied = False

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=gen)

    rows, cols = (batch, nheads, dim), (batch, ngroups, dstate)
    sizes = {"z": rows, "x": rows, "B": cols, "C": cols, "dt": (batch, nheads, 1 if tied else dim)}
    if not z:
        del sizes["z"]
    values = {name: randn(*shape) for name, shape in sizes.items()}
    # With softplus dt' is as in a trained model; without it, it must be positive.
    centred = dt_bias and softplus
    values["dt"] = uniform(*((-1.0, 1.0) if centred else (1e-3, 1e-1)), *sizes["dt"])
    if packed:
        dt_dtype = dtype
        widths = [shape[1] * shape[2] for shape in sizes.values()]
        projection = torch.zeros(batch, lead + sum(widths), dtype=io)
        tensors, at = {}, lead
        for (name, shape), width in zip(sizes.items(), widths):
            tensors[name] = projection[:, at : at + width].unflatten(1, shape[1:])
            tensors[name].copy_(values[name])
            at += width
    else:
        tensors = {name: value.to(io) for name, value in values.items()}
        tensors["dt"] = values["dt"].to(DTYPES[dt_dtype or weight_dtype])
    tensors["dt"] = tensors["dt"].expand(rows)

    per_head = (nheads, 1) if tied else (nheads, dim)
    step = torch.exp(uniform(-6.9, -2.3, *per_head))
    bias = step + torch.log(-torch.expm1(-step)) if softplus else step
    weights = {"D": uniform(0.5, 1.5, *per_head), "dt_bias": bias}
    if D:
        tensors["D"] = weights["D"].to(weight).expand(nheads, dim)
    if dt_bias:
        tensors["dt_bias"] = weights["dt_bias"].to(weight).expand(nheads, dim)
    a_shape = (nheads, 1, 1) if tied else (nheads, dim, dstate)
    tensors["A"] = (-uniform(1, 16, *a_shape)).to(DTYPES[a_dtype]).expand(nheads, dim, dstate)

    values_h = randn(slots, nheads, dim, dstate)
    if state in SCALED:
        codes, scale = quantise(values_h, DTYPES[state])
        tensors["state"] = _pool(codes, pitch, offset)
        tensors["state_scale"] = _pool(scale, scale_pitch, 0)
    else:
        tensors["state"] = _pool(values_h.to(DTYPES[state]), pitch, offset)
    tensors["out"] = torch.full(rows, torch.nan).to(io)

    if indices == "random":
        indices = torch.randperm(slots, generator=gen)[:batch].tolist()
    for name, table in (("state_batch_indices", indices), ("dst_state_batch_indices", dst)):
        if table is not None:
            column = torch.tensor(table, dtype=getattr(torch, index_dtype))
            if index_width:
                wide = torch.full((batch, index_width), 10**6, dtype=column.dtype)
                wide[:, 0] = column
                column = wide
            tensors[name] = column
    if rounding == "stochastic":
        tensors["rand_seed"] = torch.randint(-(2**62), 2**62, (1,), generator=gen)

    if headless:
        axis = {"state": 1, "state_scale": 1, "x": 1, "dt": 1, "z": 1, "out": 1, "B": 1, "C": 1,
                "A": 0, "D": 0, "dt_bias": 0}  # fmt: skip
        tensors = {n: t.select(axis[n], 0) if n in axis else t for n, t in tensors.items()}
    if token:
        for name in ("x", "dt", "B", "C", "z", "out"):
            if name in tensors:
                tensors[name] = tensors[name].unsqueeze(1)
    if scale_axis and "state_scale" in tensors:
        tensors["state_scale"] = tensors["state_scale"].unsqueeze(-1)
    switches = {"dt_softplus": softplus, "pad_slot_id": pad, "disable_state_update": not update,
                "philox_rounds": rounds, "algorithm": algorithm, "pdl": pdl}  # fmt: skip
    return Call(tensors, switches)


@dataclass
class Expected:
    """Of each token of each row, in fp64: results and how far an fp32 evaluation may be off.

    A token's place is its index in the leading axes of x, flattened.
    """

    y: torch.Tensor
    y_error: torch.Tensor
    h: torch.Tensor
    h_error: torch.Tensor
    places: list[int]  # of the tokens of all rows
    token: dict[int, int]  # place -> token within its row
    written: dict[int, int]  # slot -> place
    entries: dict[tuple[int, int], int]  # (entry, token) of the intermediate buffer -> place


def decoded(views: dict[str, torch.Tensor]) -> torch.Tensor:
    """The pool's values in fp64."""
    values = views["state"].double()
    return (
        values * views["state_scale"].double().unsqueeze(-1) if "state_scale" in views else values
    )


def _table(views: dict[str, torch.Tensor], name: str) -> list[Any] | None:
    return views[name].tolist() if name in views else None


def expected(call: Call) -> Expected:
    """What `call` must give."""
    v = call.views
    pad, softplus = call.switches["pad_slot_id"], call.switches["dt_softplus"]
    dense = v["x"].dim() == 4
    ntokens = v["x"].shape[1] if dense else call.switches.get("cache_steps") or 1
    ends = _table(v, "cu_seqlens") or list(range(0, len(v["x"]) * ntokens + 1, ntokens))
    batch = len(ends) - 1
    lengths = [ends[i + 1] - ends[i] for i in range(batch)]
    indices = _table(v, "state_batch_indices")
    accepted = _table(v, "num_accepted_tokens")
    source = list(range(batch))
    if indices is not None:
        source = [n if accepted is None else n[max(accepted[i] - 1, 0) if lengths[i] else 0]
                  for i, n in enumerate(indices)]  # fmt: skip

    def named(slot: int) -> bool:
        return slot >= 0 and slot != pad

    live = [indices is None or named(slot) for slot in source]
    parents = _table(v, "parent_tokens")
    target = _table(v, "dst_state_batch_indices")
    entry = _table(v, "intermediate_state_indices") or source
    update = not call.switches["disable_state_update"]

    start = torch.zeros(batch, *v["state"].shape[1:], dtype=torch.float64)
    for i in range(batch):
        if live[i] and lengths[i]:
            start[i] = decoded({n: v[n][source[i]] for n in ("state", "state_scale") if n in v})
    flat = {n: v[n].flatten(0, 1) if dense else v[n] for n in ("x", "dt", "B", "C", "z") if n in v}
    count = len(flat["x"])
    y, y_error = torch.zeros(2, *flat["x"].shape, dtype=torch.float64)
    h, h_error = torch.zeros(2, count, *v["state"].shape[1:], dtype=torch.float64)
    found = Expected(y, y_error, h, h_error, [], {}, {}, {})
    for token in range(max(lengths, default=0)):
        rows = [i for i in range(batch) if lengths[i] > token]
        at = [ends[i] + token for i in rows]
        names = ("x", "dt", "B", "C", "z")
        inputs = {n: flat[n][at].double() if n in v else None for n in names}
        inputs |= {n: v[n].double() if n in v else None for n in ("A", "D", "dt_bias")}
        # Each row's state before this token, and how far it may be off.
        before, off = start[rows], torch.zeros_like(start[rows])
        for k, i in enumerate(rows):
            parent = parents[i][token] if parents else token - 1
            if parent >= 0:
                before[k], off[k] = h[ends[i] + parent], h_error[ends[i] + parent]
        y[at], h[at] = ssu_step(before, **inputs, dt_softplus=softplus, compute_dtype=torch.float64)
        h_error[at] = _state_error(before, off, h[at], inputs, softplus)
        y_error[at] = _output_error(y[at], h[at], h_error[at], inputs)
        for i, place in zip(rows, at):
            found.places.append(place)
            found.token[place] = token
            if not live[i]:
                continue
            slot: Any = source[i] if target is None else target[i]
            each = isinstance(slot, list) and ntokens > 1
            slot = slot[token if each else 0] if isinstance(slot, list) else slot
            if update and (each or token + 1 == lengths[i]) and (target is None or named(slot)):
                found.written[slot] = place
            padded = "intermediate_state_indices" in v and not named(entry[i])
            if "intermediate_states_buffer" in v and not padded:
                found.entries[entry[i], token] = place
    return found


def _per_head(t: torch.Tensor, nheads: int) -> torch.Tensor:
    return t.repeat_interleave(nheads // t.shape[1], dim=1).unsqueeze(2)


def _step_size(inputs: dict[str, Any], softplus: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """dt' and its relative error."""
    v = inputs["dt"] if inputs["dt_bias"] is None else inputs["dt"] + inputs["dt_bias"]
    if not softplus:
        return v, torch.full_like(v, U)
    # softplus(v) >= sigmoid(v), so an error of U|v| in v is at most U|v| relative; e^-|v| adds as
    # much again; the polynomial and the two sums below 64 roundings.
    return torch.nn.functional.softplus(v, threshold=1e9), U * (2 * v.abs() + 64)


def _state_error(
    h: torch.Tensor, off: torch.Tensor, h_new: torch.Tensor, inputs: dict[str, Any], softplus: bool
) -> torch.Tensor:
    """How far h' may be off if h is by `off`."""
    step, relative = (t.unsqueeze(-1) for t in _step_size(inputs, softplus))
    exponent = (inputs["A"] * step).abs()
    decay = torch.exp(-exponent) if bool((inputs["A"] <= 0).all()) else torch.exp(exponent)
    decay_error = exponent * (relative + 3 * U) + 4 * U
    inflow = step * inputs["x"].unsqueeze(-1) * _per_head(inputs["B"], h.shape[1])
    kept = (decay * h).abs() * (decay_error + 4 * U) + 2.0**-126 * h.abs()
    kept = kept + decay * off * (1 + decay_error + 4 * U)
    return kept + inflow.abs() * (relative + 4 * U) + 2 * U * h_new.abs() + 2.0**-140


def _output_error(
    y: torch.Tensor, h_new: torch.Tensor, h_error: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    C = _per_head(inputs["C"], h_new.shape[1])
    error = (C.abs() * h_error).sum(-1) + (C.shape[-1] + 3) * U * (h_new * C).abs().sum(-1)
    if inputs["D"] is not None:
        error = error + 3 * U * (inputs["D"] * inputs["x"]).abs()
    if inputs["z"] is not None:
        z = inputs["z"]
        error = error * torch.nn.functional.silu(z).abs() + y.abs() * (2 * z.abs() + 10) * U
    return error + U * y.abs() + 2.0**-120


@dataclass
class Verdict:
    """Share of the stored elements whose bits the bounds determine."""

    determined: float


def verify(before: Call, after: Call, want: Expected | None = None) -> Verdict:
    """Assert that `after` is what a correct kernel makes of `before`."""
    want = want or expected(before)
    was, now = before.views, after.views
    places = want.places
    out = now["out"].flatten(0, now["out"].dim() - 3)[places]
    y, y_error = want.y[places], want.y_error[places]
    low, high = ((y + s * y_error).float().to(out.dtype) for s in (-1, 1))
    wrong = ~((low <= out) & (out <= high))
    assert not wrong.any(), report("out", wrong, out, low, high)

    # Every state written: in which memory, where, and after which token.
    pools = ["state", "state_scale"], ["intermediate_states_buffer", "intermediate_state_scales"]
    found: list[tuple[list[str], Any, int]] = [(pools[0], *item) for item in want.written.items()]
    found += [(pools[1], *item) for item in want.entries.items()]
    share = 1.0
    if found:
        rows = [place for _, _, place in found]
        bits = None
        if "rand_seed" in before.tensors:
            sizes, rounds = was["state"].shape[1:], before.switches["philox_rounds"]
            bits = torch.cat([
                random_bits(before["rand_seed"], torch.tensor([at if names is pools[0] else at[0]]),
                            *sizes, rounds, want.token[place], names is pools[1])
                for names, at, place in found
            ])  # fmt: skip
        h, error = want.h[rows], want.h_error[rows]
        codes = torch.stack([raw(now[names[0]])[at] for names, at, _ in found])
        codes = codes.view(now["state"].dtype)
        if "state_scale" in now:
            scale = torch.stack([now[names[1]][at] for names, at, _ in found])
            share = _verify_scaled(codes, scale, h, error, bits)
        else:
            low, high = (round_to((h + s * error).float(), codes.dtype, bits) for s in (-1, 1))
            wrong = ~((low <= codes) & (codes <= high))
            assert not wrong.any(), report("state", wrong, codes, low, high)
            share = float((low == high).double().mean())
    may_change: dict[str, list[Any]] = {"out": places}
    for names, at, _ in found:
        for name in names:
            may_change.setdefault(name, []).append(at)
    for name in before.tensors:
        assert_untouched(name, was, now, may_change.get(name, []), before, after)
    return Verdict(share)


def report(name: str, wrong: torch.Tensor, found: Any, low: Any, high: Any) -> str:
    at = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {at}: found "
        f"{found[at].item()}, allowed {low[at].item()} to {high[at].item()}"
    )


def assert_untouched(
    name: str, was: Any, now: Any, written: list[Any], before: Call, after: Call
) -> None:
    """No byte of the argument's memory has changed but where it was written."""
    memory = storage(before.tensors[name]).clone()
    original = torch.empty(0, dtype=before.tensors[name].dtype)
    view = original.set_(
        memory.untyped_storage(), was[name].storage_offset(), was[name].shape, was[name].stride()
    )
    for at in written:
        if name == "out" and view.dim() == 4:
            at = (at // view.shape[1], at % view.shape[1])
        raw(view)[at] = raw(now[name])[at]
    assert torch.equal(memory, storage(after.tensors[name])), f"{name}: memory was touched"


def _verify_scaled(
    codes: torch.Tensor,
    scale: torch.Tensor,
    h: torch.Tensor,
    error: torch.Tensor,
    bits: torch.Tensor | None,
) -> float:
    """Check codes and scales of rows; the share of codes that the bounds determine."""
    largest = QMAX[codes.dtype]
    peak = h.abs().amax(-1, keepdim=True)
    encode = PEAK[codes.dtype] / peak
    relative = error.amax(-1, keepdim=True) / peak + 4 * U
    off = (scale.double().unsqueeze(-1) * encode - 1).abs()
    assert bool((off <= relative).all()), f"state_scale: off by {float(off.max() / U)} roundings"
    u = h * encode
    slack = error * encode + u.abs() * relative + 2.0**-29
    if codes.dtype == torch.float8_e4m3fn:
        low, high = (_to_e4m3(u + s * slack, bits) for s in (-1, 1))
    else:
        # Half a step of the grid that random bits are added on.
        slack = slack + 2.0 ** (-16 if codes.dtype == torch.int8 else -17)
        shift = 0.5 if bits is None else bits.double() / 65536
        if bits is None:
            low, high = (torch.round(u + s * slack) for s in (-1, 1))
        else:
            low, high = (torch.floor(u + s * slack + shift) for s in (-1, 1))
        low, high = low.clamp(-largest, largest), high.clamp(-largest, largest)
    value = codes.double()
    wrong = ~((low <= value) & (value <= high))
    assert not wrong.any(), report("state", wrong, value, low, high)
    return float((low == high).double().mean())


_E4M3 = torch.arange(0x7F).to(torch.uint8).view(torch.float8_e4m3fn).double()


def _to_e4m3(u: torch.Tensor, bits: torch.Tensor | None) -> torch.Tensor:
    """fp64 to e4m3 values, by looking for the neighbours."""
    magnitude = u.abs().clamp(max=448.0)
    below = (torch.searchsorted(_E4M3, magnitude, right=True) - 1).clamp(max=len(_E4M3) - 2)
    part = (magnitude - _E4M3[below]) / (_E4M3[below + 1] - _E4M3[below])
    if bits is None:
        up = (part > 0.5) | ((part == 0.5) & (below % 2 == 1))
    else:
        up = part >= 1 - bits.double() / 65536
    return _E4M3[below + up.long()] * u.sign()
