"""Calls of gated_delta_rule_decode: built in every layout, run in the interpreter, and verified.

As in `ssu_calls`, bounds come from the arithmetic of one fp32 evaluation, and what is stored must
lie between the rounded ends of the interval in which the kernel's fp32 value lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from ssu_calls import DTYPES, Call, U, assert_untouched, raw, report

from ssmgen.families.gdn.contract import layout, normalise
from ssmgen.families.gdn.packing import split_qkv
from ssmgen.reference import delta_gates, delta_step, random_bits, round_to

STATES = [
    ("fp32", "nearest"),
    ("bf16", "nearest"),
    ("bf16", "stochastic"),
    ("fp16", "nearest"),
    ("fp16", "stochastic"),
]
LAYOUTS = ("VK", "KV")
# One of each kind of call.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without table": {"indices": None, "H": 2, "V": 16, "K": 8},
    "ratio 1": {"H": 2},
    "ratio 3": {"H": 2, "HV": 6, "batch": 2},
    "ratio 4": {"HV": 4},
    "ratio 8": {"HV": 8, "batch": 1},
    "sizes of no power of two": {"K": 24, "V": 40},
    "many columns": {"K": 72, "V": 8, "batch": 2},
    "no bias, no norm, a scale": {"dt_bias": False, "l2norm": False, "scale": 0.3},
    "fp32 inputs, narrow weights": {
        "dtype": "fp32", "a_dtype": "fp32", "b_dtype": "fp16", "a_log_dtype": "bf16",
        "dt_bias_dtype": "bf16",
    },
    "fp16 inputs": {"dtype": "fp16", "a_dtype": "fp16", "b_dtype": "fp16"},
    "bounded": {"gate": "bounded"},
    "given": {"gate": "given", "a_dtype": "fp32"},
    "kda": {"kda": True, "H": 2, "K": 24},
    "kda bounded": {"kda": True, "gate": "bounded"},
    "kda given": {"kda": True, "gate": "given", "a_dtype": "fp32", "dt_bias": False},
    "flat views": {"packing": "flat", "H": 2, "HV": 6, "lead": 3, "batch": 2},
    "interleaved views": {"packing": "interleaved", "H": 2, "HV": 6, "batch": 2},
    "interleaved views of tokens": {
        "packing": "interleaved", "H": 2, "HV": 4, "tokens": 2, "batch": 2,
    },
    "interleaved kda": {"packing": "interleaved", "H": 2, "HV": 4, "kda": True, "batch": 2},
    "pool with gaps": {"pitch": 8, "offset": 3},
    "token axis": {"token_axis": True, "index_dtype": "int32"},
    "split slots": {"indices": [4, -1, 2], "dst": [3, 5, -1]},
    "no update": {"update": False},
    "accepted, one token": {
        "accepted": [0, 1, 3], "indices": [[0, 1, 2], [3, -1, 4], [5, 6, 7]],
        "dst": [8, 9, -1],
    },
    "one token, snapshot": {"buffer": 2, "indices": [5, -1, 3]},
    "tokens": {"tokens": 3},
    "tokens without table": {"tokens": 2, "indices": None},
    "a destination a token": {
        "tokens": 3, "indices": [0, -1, 2], "dst": [[3, -1, 4], [5, 6, 7], [8, 9, 1]],
    },
    "snapshots by row": {"tokens": 3, "buffer": 4, "update": False, "indices": [7, -1, 2]},
    "snapshots by entry": {"tokens": 2, "buffer": 2, "entries": [5, -1, 0]},
    "accepted": {
        "tokens": 2, "accepted": [0, 1, 3], "indices": [[0, 1, 2], [-1, 3, 4], [5, 6, 7]],
        "dst": "source",
    },
    "sequences": {"lengths": [2, 0, 1, 4], "steps": 4, "indices": [3, 1, -1, 0]},
    "sequences without table": {"lengths": [2, 0, 3], "steps": 3, "indices": None},
    "sequences, split slots": {
        "lengths": [2, 0, 1], "steps": 2, "indices": [3, 1, 2], "dst": [7, 8, 9],
    },
    "sequences of one": {"lengths": [1, 0, 1], "steps": 1, "indices": [3, 1, 2]},
    "sequences, accepted, all else": {
        "lengths": [3, 1, 0], "steps": 3, "accepted": [2, 1, 9], "dst": "source", "kda": True,
        "indices": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "buffer": 3, "entries": [4, 1, 0],
    },
    "padding is slot 0": {"pad": 0, "indices": [0, 3, 0], "buffer": 1},
    "negative slots are padding": {
        "pad": 0, "indices": [-7, 3, -(2**40)], "dst": [4, -5, 2], "buffer": 1,
        "entries": [1, -9, 2],
    },
    "a negative destination a token": {
        "tokens": 2, "indices": [-2, 0, 2], "dst": [[3, 1], [5, -6], [-8, 9]], "buffer": 2,
        "entries": [1, -9, 2],
    },
}  # fmt: skip


class GdnCall(Call):
    """A call of this family."""

    def layout(self) -> Any:
        return layout(**self.tensors, **self.switches)

    @property
    def views(self) -> dict[str, torch.Tensor]:
        return normalise(self.tensors)


def _pool(values: torch.Tensor, order: str, pitch: int, offset: int) -> torch.Tensor:
    """`values` (..., V, K) in memory of this order, outermost entries `pitch` elements further
    apart than packed, starting at `offset`."""
    if order == "KV":
        values = values.transpose(-1, -2)
    packed = values.contiguous()
    step = packed.stride(0) + pitch
    memory = torch.zeros(offset + len(packed) * step, dtype=values.dtype)
    raw(memory).fill_(0x7F)
    view = memory.as_strided(packed.shape, (step, *packed.stride()[1:]), offset)
    view.copy_(packed)
    return view.transpose(-1, -2) if order == "KV" else view


def make(
    state: str = "fp32",
    rounding: str = "nearest",
    *,
    batch: int = 3,
    slots: int = 10,
    H: int = 2,
    HV: int = 4,
    K: int = 16,
    V: int = 24,
    tokens: int = 1,
    token_axis: bool = False,
    lengths: list[int] | None = None,
    steps: int = 0,
    spare: int = 2,
    dtype: str = "bf16",
    gate: str = "softplus",
    kda: bool = False,
    a_dtype: str = "bf16",
    b_dtype: str = "bf16",
    a_log_dtype: str = "fp32",
    dt_bias: bool = True,
    dt_bias_dtype: str = "fp32",
    l2norm: bool = True,
    scale: float | None = None,
    packing: str | None = None,
    lead: int = 0,
    trail: int = 5,
    order: str = "VK",
    pitch: int = 0,
    offset: int = 0,
    indices: Any = "random",
    index_dtype: str = "int64",
    table_dtype: str = "int32",
    dst: Any = None,
    accepted: list[int] | None = None,
    buffer: int = 0,
    buffer_entries: int = 6,
    entries: list[int] | None = None,
    pad: int = -1,
    rounds: int = 10,
    update: bool = True,
    pdl: bool = False,
    random: int = 0,
) -> GdnCall:
    """One call. Slots no row reads hold NaN, as do outputs and the buffer.

    `packing`: q, k, v are views of one tensor, with `lead` elements before and `trail` after them,
    and if interleaved a and b of another. `pitch`: elements between slots; `offset`: those before
    the first. `dst`: a column, a table, or "source" for the very table of sources. `buffer`: tokens
    the intermediate buffer has room for, 0: none. `spare`: tokens that belong to no sequence.
    """
    gen = torch.Generator().manual_seed(random)
    rows = batch if lengths is None else len(lengths)
    count = rows * tokens if lengths is None else sum(lengths) + spare
    io, ratio = DTYPES[dtype], HV // H

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen)

    if packing is None:
        q, k, v = randn(count, H, K), randn(count, H, K), randn(count, HV, V)
        q, k, v = q.to(io), k.to(io), v.to(io)
    else:
        width = 2 * H * K + HV * V + (8 * H if packing == "interleaved" else trail)
        packed = randn(count, lead + width).to(io)[:, lead:]
        q, k, v = split_qkv(packed, H, HV, K, V, packing)
    own = (K,) if kda else ()
    t: dict[str, torch.Tensor] = {"q": q, "k": k, "v": v}
    a, b = randn(count, HV, *own).to(DTYPES[a_dtype]), randn(count, HV).to(DTYPES[b_dtype])
    if packing == "interleaved" and not kda and a_dtype == b_dtype:
        ba = torch.cat([b.unflatten(1, (H, ratio)), a.unflatten(1, (H, ratio))], dim=2)
        b, a = ba.split(ratio, dim=2)
    A_log = torch.log(0.05 + torch.rand(HV, generator=gen))
    if gate == "given":
        t["g"], t["beta"] = -torch.nn.functional.softplus(a.float()).to(a.dtype), b.sigmoid()
    else:
        t |= {"A_log": A_log.to(DTYPES[a_log_dtype]), "a": a, "b": b}
        if dt_bias:
            t["dt_bias"] = randn(HV, *own).to(DTYPES[dt_bias_dtype])
    t["out"] = torch.full((count, HV, V), torch.nan, dtype=io)
    if lengths is None:
        for name in t.keys() - {"A_log", "dt_bias"}:
            if tokens > 1 or token_axis:
                t[name] = t[name].unflatten(0, (rows, tokens))
    else:
        t["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(getattr(torch, table_dtype))

    if indices == "random":
        indices = torch.randperm(slots, generator=gen)[:rows].tolist()
    tables = {
        "state_batch_indices": (indices, index_dtype),
        "dst_state_batch_indices": (indices if dst == "source" else dst, index_dtype),
        "intermediate_state_indices": (entries, index_dtype),
        "num_accepted_tokens": (accepted, table_dtype),
    }
    for name, (values, kind) in tables.items():
        if values is not None:
            t[name] = torch.tensor(values, dtype=getattr(torch, kind))
    pool = randn(slots, HV, V, K)
    read = set(_sources(t, rows))
    for slot in range(slots):
        if slot not in read or slot == pad:
            pool[slot] = torch.nan
    t["state"] = _pool(pool.to(DTYPES[state]), order, pitch, offset)
    if rounding == "stochastic":
        t["rand_seed"] = torch.randint(-(2**62), 2**62, (1,), generator=gen)
    if buffer:
        empty = torch.full((buffer_entries, buffer, HV, V, K), torch.nan).to(DTYPES[state])
        t["intermediate_states_buffer"] = _pool(empty, order, pitch, 0)
    switches = {"use_qk_l2norm": l2norm, "pad_slot_id": pad, "disable_state_update": not update,
                "philox_rounds": rounds, "scale": scale, "pdl": pdl, "cache_steps": steps,
                "lower_bound": -5.0 if gate == "bounded" else None}  # fmt: skip
    return GdnCall(t, switches)


def _sources(tensors: dict[str, torch.Tensor], rows: int) -> list[int]:
    """The slot each row reads, whether it is padding or not."""
    if "state_batch_indices" not in tensors:
        return list(range(rows))
    table = tensors["state_batch_indices"].tolist()
    if "num_accepted_tokens" in tensors:
        columns = [max(n - 1, 0) for n in tensors["num_accepted_tokens"].tolist()]
        return [row[min(c, len(row) - 1)] for row, c in zip(table, columns)]
    return [row[0] if isinstance(row, list) else row for row in table]


@dataclass
class Expected:
    """Of each token of each row, in fp64: results and how far an fp32 evaluation may be off.

    A token's place is its index in the leading axes of q, flattened.
    """

    o: torch.Tensor
    o_error: torch.Tensor
    h: torch.Tensor
    h_error: torch.Tensor
    places: list[int]  # of the tokens of all rows
    token: dict[int, int]  # place -> token within its row
    written: dict[int, int]  # slot -> place
    entries: dict[tuple[int, int], int]  # (entry, token) of the intermediate buffer -> place


def expected(call: GdnCall) -> Expected:
    """What `call` must give."""
    v, switches = call.views, call.switches
    pad = switches["pad_slot_id"]
    dense = v["q"].dim() == 4
    ntokens = v["q"].shape[1] if dense else switches["cache_steps"] or 1
    table = call.tensors.get("cu_seqlens")
    ends = list(range(0, len(v["q"]) * ntokens + 1, ntokens)) if table is None else table.tolist()
    batch = len(ends) - 1
    lengths = [ends[i + 1] - ends[i] for i in range(batch)]
    source = _sources(call.tensors, batch)

    def named(slot: int) -> bool:
        return slot >= 0 and slot != pad

    live = ["state_batch_indices" not in v or named(slot) for slot in source]
    target = v["dst_state_batch_indices"].tolist() if "dst_state_batch_indices" in v else None
    entry = list(range(batch))
    if "intermediate_state_indices" in v:
        entry = v["intermediate_state_indices"].tolist()
    value_heads, v_dim, k_dim = v["state"].shape[1:]
    count = ends[-1]

    def flat(name: str, *own: int) -> torch.Tensor:
        return v[name].reshape(-1, *own)[:count].double()

    heads = v["q"].shape[-2]
    decay = "g" if "g" in v else "a"
    channels = (k_dim,) if v[decay].numel() * heads == v["q"].numel() * value_heads else ()
    inputs = {"q": flat("q", heads, k_dim), "k": flat("k", heads, k_dim),
              "v": flat("v", value_heads, v_dim)}  # fmt: skip
    if "g" in v:
        g, g_off = flat("g", value_heads, *channels), torch.zeros(())
        beta, beta_off = flat("beta", value_heads), torch.zeros(())
    else:
        raw_a, raw_b = flat("a", value_heads, *channels), flat("b", value_heads)
        bias = v["dt_bias"].double() if "dt_bias" in v else None
        bound = switches["lower_bound"]
        g, beta = delta_gates(v["A_log"].double(), raw_a, bias, raw_b, lower_bound=bound,
                              compute_dtype=torch.float64)  # fmt: skip
        log = v["A_log"].double().abs()
        log = log[:, None] if channels else log
        total = raw_a if bias is None else raw_a + bias
        # As in ssu_calls: softplus(x) >= sigmoid(x), so an error of U |x| in x is at most U |x|
        # relative, e^-|x| adds as much, the polynomial 64 roundings; exp(A_log) has 2 |A_log| + 4.
        g_off = U * (2 * total.abs() + 2 * log + 70)
        if bound is not None:
            x = (log.exp() * total).abs().maximum(total.abs())
            g_off = U * (x * (2 * log + 10) + 16)
        beta_off = U * (2 * raw_b.abs() + 10)
    start = torch.zeros(batch, value_heads, v_dim, k_dim, dtype=torch.float64)
    for i in range(batch):
        if live[i] and lengths[i]:
            start[i] = v["state"][source[i]].double()
    o, o_error = torch.zeros(2, count, value_heads, v_dim, dtype=torch.float64)
    h, h_error = torch.zeros(2, count, *v["state"].shape[1:], dtype=torch.float64)
    found = Expected(o, o_error, h, h_error, [], {}, {}, {})
    for token in range(max(lengths, default=0)):
        here = [i for i in range(batch) if lengths[i] > token]
        at = [ends[i] + token for i in here]
        before, off = start[here], torch.zeros_like(start[here])
        if token:
            before, off = h[[p - 1 for p in at]], h_error[[p - 1 for p in at]]
        options = {"scale": switches["scale"], "use_qk_l2norm": switches["use_qk_l2norm"]}
        here_in = [inputs[n][at] for n in ("q", "k", "v")] + [g[at], beta[at]]
        o[at], h[at] = delta_step(before, *here_in, **options, compute_dtype=torch.float64)
        offs = [t[at] if t.dim() else t for t in (g_off, beta_off)]
        o_error[at], h_error[at] = _errors(before, off, o[at], h[at], *here_in, *offs, **options)
        for i, place in zip(here, at):
            found.places.append(place)
            found.token[place] = token
            if not live[i]:
                o[place] = o_error[place] = 0
                continue
            slot: Any = source[i] if target is None else target[i]
            each = isinstance(slot, list) and ntokens > 1
            slot = slot[token if each else 0] if isinstance(slot, list) else slot
            last = each or token + 1 == lengths[i]
            if not switches["disable_state_update"] and last and (target is None or named(slot)):
                found.written[slot] = place
            padded = "intermediate_state_indices" in v and not named(entry[i])
            if "intermediate_states_buffer" in v and not padded:
                found.entries[entry[i], token] = place
    return found


def _errors(
    before: torch.Tensor, off: torch.Tensor, o: torch.Tensor, h: torch.Tensor, q: torch.Tensor,
    k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, g_off: torch.Tensor,
    beta_off: torch.Tensor, *, scale: float | None, use_qk_l2norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """How far o and the new state may be off if the state before is by `off`."""
    ratio, k_dim = before.shape[1] // q.shape[1], k.shape[-1]

    def per_value_head(x: torch.Tensor) -> torch.Tensor:
        if use_qk_l2norm:
            x = x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)
        return x.abs().repeat_interleave(ratio, dim=1).unsqueeze(2)

    # Half the error of the sum of squares, that of the reciprocal root, two products.
    k_off = U * (k_dim / 2 + 8) if use_qk_l2norm else 0.0
    q_off = k_off + 3 * U
    query, key = per_value_head(q) * abs(k_dim**-0.5 if scale is None else scale), per_value_head(k)
    decay_off = g.abs() * (g_off + 3 * U) + 4 * U
    decay = torch.exp(g)
    if g.dim() == 2:
        decay, decay_off = decay[..., None], decay_off[..., None]
    decay, decay_off = decay.unsqueeze(-2), decay_off.unsqueeze(-2)
    decayed = (decay * before).abs()
    error = decay * off * (1 + decay_off) + decayed * (decay_off + U) + 2.0**-126
    sum_off = k_off + (k_dim + 2) * U
    predicted_off = (key * error * (1 + k_off) + decayed * key * sum_off).sum(-1)
    signed = torch.exp(g)[..., None, :] if g.dim() == 3 else torch.exp(g)[..., None, None]
    signed_key = k / torch.sqrt((k * k).sum(-1, keepdim=True) + 1e-6) if use_qk_l2norm else k
    signed_key = signed_key.repeat_interleave(ratio, dim=1).unsqueeze(2)
    rest = (v - (signed * before * signed_key).sum(-1)).abs()
    delta = beta.abs().unsqueeze(-1) * rest
    gate_off = (beta_off[..., None] if beta_off.dim() else beta_off) + 3 * U
    delta_off = beta.abs().unsqueeze(-1) * predicted_off + delta * gate_off
    error = error + key * delta_off.unsqueeze(-1) * (1 + k_off)
    error = error + delta.unsqueeze(-1) * key * (k_off + 2 * U) + 2 * U * h.abs()
    error = error * 1.001 + 2.0**-140  # products of two errors
    # S' q and delta (k . q) are summed apart, and may be larger than S'' q.
    terms = (decayed + delta.unsqueeze(-1) * key) * query
    o_error = (query * error * (1 + q_off) + terms * (q_off + k_off + (k_dim + 4) * U)).sum(-1)
    return o_error * 1.001 + U * o.abs() + 2.0**-120, error


def verify(before: GdnCall, after: GdnCall) -> float:
    """Assert that `after` is what a correct kernel makes of `before`; the share of the stored
    elements whose bits the bounds determine."""
    want = expected(before)
    was, now = before.views, after.views
    places = want.places
    out = now["out"].flatten(0, now["out"].dim() - 3)[places]
    o, error = want.o[places], want.o_error[places]
    low, high = ((o + s * error).float().to(out.dtype) for s in (-1, 1))
    wrong = ~((low <= out) & (out <= high))
    assert not wrong.any(), report("out", wrong, out, low, high)

    pool, buffer = "state", "intermediate_states_buffer"
    found: list[tuple[str, Any, int]] = [(pool, *item) for item in want.written.items()]
    found += [(buffer, *item) for item in want.entries.items()]
    share = 1.0
    if found:
        rows = [place for _, _, place in found]
        bits = None
        if "rand_seed" in before.tensors:
            sizes, rounds = was["state"].shape[1:], before.switches["philox_rounds"]
            bits = torch.cat([
                random_bits(before["rand_seed"], torch.tensor([at if name == pool else at[0]]),
                            *sizes, rounds, want.token[place], name == buffer)
                for name, at, place in found
            ])  # fmt: skip
        stored = torch.stack([now[name][at] for name, at, _ in found])
        low, high = (
            round_to((want.h[rows] + s * want.h_error[rows]).float(), stored.dtype, bits)
            for s in (-1, 1)
        )
        wrong = ~((low <= stored) & (stored <= high))
        assert not wrong.any(), report("state", wrong, stored, low, high)
        share = float((low == high).double().mean())
    may_change: dict[str, list[Any]] = {"out": places}
    for name, at, _ in found:
        may_change.setdefault(name, []).append(at)
    for name in before.tensors:
        assert_untouched(name, was, now, may_change.get(name, []), before, after)
    return share


PER_ROW = ("q", "k", "v", "a", "b", "g", "beta", "out")
TABLES = ("state_batch_indices", "dst_state_batch_indices", "intermediate_state_indices",
          "num_accepted_tokens")  # fmt: skip


def row_of(call: GdnCall, row: int) -> GdnCall:
    """The call with one row of the batch alone; for dense calls."""
    alone = call.copy()
    for name in (*PER_ROW, *TABLES, "intermediate_states_buffer"):
        if name == "intermediate_states_buffer" and "intermediate_state_indices" in call.tensors:
            continue
        if name in alone.tensors:
            alone.tensors[name] = alone[name][row : row + 1]
    return alone


def token_of(call: GdnCall, token: int) -> GdnCall:
    """The single-token call of one token of a dense call, on the same pool."""
    one = GdnCall(dict(call.tensors), call.switches)
    for name in PER_ROW:
        if name in one.tensors:
            one.tensors[name] = one[name][:, token]
    return one
