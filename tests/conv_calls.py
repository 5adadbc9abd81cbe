"""Calls of causal_conv1d: built in every form, run in the interpreter, and verified.

A window holds inputs as they are, so its bits are determined. The bounds of `verify` for the output
come from the arithmetic of one fp32 evaluation.
"""

from __future__ import annotations

from typing import Any

import torch
from ssu_calls import DTYPES, Call, same, storage

import ssmgen
from ssmgen import Arch, Plan
from ssmgen.families import spec
from ssmgen.families.conv1d.contract import layout
from ssmgen.reference import conv1d as reference

U = 2.0**-24  # unit roundoff of fp32
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
PREFILL_NAMES = {"conv_state": "conv_states", "conv_state_indices": "cache_indices"}


class ConvCall(Call):
    """Tensors by the contract's names; `switches` has prefill among them."""

    @property
    def prefill(self) -> bool:
        return self.switches["prefill"]

    def layout(self) -> Any:
        return layout(**self.tensors, **self.switches)

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of the op."""
        names = PREFILL_NAMES if self.prefill else {}
        arguments = {names.get(n, n): t for n, t in self.tensors.items()}
        return {**arguments, **{n: v for n, v in self.switches.items() if n != "prefill"}}

    @property
    def op(self) -> Any:
        return ssmgen.causal_conv1d_fn if self.prefill else ssmgen.causal_conv1d_update

    def interpreted_by(self, block_m: int = 2, block_n: int = 8, arch: str = "sm_90") -> ConvCall:
        """A copy after the kernel has run on it in several programs and, of tokens, blocks."""
        plan = Plan(algorithm="simple", block_m=block_m, block_n=block_n, num_warps=1)
        config = self.layout().config
        return self.interpreted(spec("conv1d").fit(config, plan, Arch.of(arch)), arch)

    def refer(self, **options: Any) -> torch.Tensor:
        """What the reference returns; it writes to this call's tensors."""
        name = "causal_conv1d_fn" if self.prefill else "causal_conv1d_update"
        arguments = {n: v for n, v in self.arguments().items() if n != "pdl"}
        return getattr(reference, name)(**{**arguments, **options})


def _window(slots: int, dim: int, columns: int, order: str, pitch: int, offset: int, dtype: Any):
    """(slots, dim, columns) whose channels, or columns, lie side by side; or neither."""
    inner = {"channels": (1, dim), "length": (columns, 1), "loose": (2 * columns + 1, 2)}[order]
    each = 1 + (dim - 1) * inner[0] + (columns - 1) * inner[1] + pitch
    memory = torch.zeros(offset + slots * each).to(dtype)
    return memory.as_strided((slots, dim, columns), (each, *inner), offset)


def make_conv(
    form: str = "one",
    *,
    batch: int = 3,
    tokens: int = 3,
    lengths: list[int] | None = None,
    spare: int = 0,
    dim: int = 16,
    width: int = 4,
    dtype: str = "bf16",
    state_dtype: str | None = None,
    weight_dtype: str | None = None,
    bias: bool = True,
    activation: str | None = "silu",
    state_len: int | None = None,
    alignment: str | None = "left",
    slots: int | None = None,
    indices: list[int] | str | None = "random",
    index_dtype: str = "int32",
    index_width: int = 0,
    dst: list[int] | None = None,
    pad: int = -1,
    accepted: list[int] | None = None,
    counts: list[int] | None = None,
    initial: list[bool] | str | None = None,
    pool: bool = True,
    order: str = "channels",
    pitch: int = 0,
    offset: int = 0,
    gap: int = 0,
    lead: int = 0,
    weight_order: str = "taps",
    pdl: bool = False,
    random: int = 0,
) -> ConvCall:
    """One call. `form`: one, dense, varlen, prefill (of sequences) or prefill_dense. `spare`:
    tokens of no sequence, before and after. `gap`: channels between the rows of x, which starts
    after `lead` elements. `initial`: flags, or "rows" for initial_states. Every slot and column
    that is not the past of a row holds NaN.
    """
    gen = torch.Generator().manual_seed(random)
    io = DTYPES[dtype]
    state_io, weight_io = DTYPES[state_dtype or dtype], DTYPES[weight_dtype or dtype]
    prefill = form.startswith("prefill")
    varlen = form in ("varlen", "prefill")
    if varlen:
        lengths = [2, 0, 5] if lengths is None else lengths
        batch = len(lengths)
    total = sum(lengths) + 2 * spare if varlen else batch * (1 if form == "one" else tokens)

    memory = torch.full((lead + total * (dim + gap),), torch.nan).to(io)
    x = memory[lead:].view(total, dim + gap)[:, :dim]
    x.copy_(torch.randn(total, dim, generator=gen))
    out = torch.full((total, dim), torch.nan).to(io)
    tensors: dict[str, Any] = {}
    for name, flat in (("x", x), ("out", out)):
        if varlen:
            tensors[name] = flat.t() if prefill else flat
        elif form == "one":
            tensors[name] = flat
        else:
            tensors[name] = flat.unflatten(0, (batch, tokens)).transpose(1, 2)
    weight = torch.randn(dim, width, generator=gen).to(weight_io)
    tensors["weight"] = weight.t().contiguous().t() if weight_order == "channels" else weight
    if bias:
        tensors["bias"] = torch.randn(dim, generator=gen).to(weight_io)
    if varlen:
        ends = torch.tensor([0, *lengths]).cumsum(0) + spare
        tensors["query_start_loc"] = ends.to(getattr(torch, index_dtype))

    slots = 2 * batch + 3 if slots is None else slots
    state_len = width - 1 if state_len is None else state_len
    if indices == "random":
        indices = torch.randperm(slots, generator=gen)[:batch].tolist()
    if not pool:
        indices = None

    def table(values: list[int]) -> torch.Tensor:
        column = torch.tensor(values, dtype=getattr(torch, index_dtype))
        if index_width:
            wide = torch.full((batch, index_width), 10**6, dtype=column.dtype)
            wide[:, 0] = column
            return wide
        return column

    if pool:
        state = _window(slots, dim, state_len, order, pitch, offset, state_io)
        state.fill_(torch.nan)
        for row, slot in enumerate(range(batch) if indices is None else indices):
            fresh = prefill and (not isinstance(initial, list) or not initial[row])
            if slot == pad or not 0 <= slot < slots or fresh:
                continue
            if accepted is not None:
                first = max(accepted[row], 1) - 1
                columns = list(range(first, first + width - 1))
            elif counts is not None:
                columns = [(counts[row] - back) % state_len for back in range(1, width)]
            else:
                columns = list(range(state_len if alignment == "right" else width - 1))
            columns = [column for column in columns if column < state_len]
            values = torch.randn(dim, len(columns), generator=gen).to(io)
            state[slot, :, columns] = values.to(state_io)
        tensors["conv_state"] = state
    if indices is not None:
        tensors["conv_state_indices"] = table(indices)
    if dst is not None:
        tensors["dst_state_indices"] = table(dst)
    for name, values in (("num_accepted_tokens", accepted), ("cache_seqlens", counts)):
        if values is not None:
            tensors[name] = torch.tensor(values, dtype=getattr(torch, index_dtype))
    if initial == "rows":
        rows = _window(batch, dim, width - 1, order, pitch, offset, state_io)
        rows.copy_(torch.randn(batch, dim, width - 1, generator=gen).to(io))
        tensors["initial_states"] = rows
    elif initial is not None:
        tensors["has_initial_state"] = torch.tensor(initial)
    switches = {"activation": activation, "alignment": "circular" if counts else alignment,
                "pad_slot_id": pad, "pdl": pdl, "prefill": prefill}  # fmt: skip
    return ConvCall(tensors, switches)


def verify_conv(before: ConvCall, after: ConvCall) -> None:
    """`after` is what a kernel made of `before`: windows to the bit, outputs within rounding."""
    want = before.copy()
    exact = torch.full(before["out"].shape, torch.nan, dtype=torch.float64)
    want.refer(out=exact, compute_dtype=torch.float64)
    for name, tensor in before.tensors.items():
        if name == "out":
            continue
        expected = want[name] if name == "conv_state" else tensor
        assert torch.equal(storage(after[name]), storage(expected)), name

    # The sum of magnitudes, by the same formula.
    sums = before.copy()
    for name in ("x", "conv_state", "initial_states", "weight", "bias"):
        if name in sums.tensors:
            sums[name].copy_(sums[name].abs())
    magnitude = torch.full_like(exact, torch.nan)
    sums.refer(out=magnitude, compute_dtype=torch.float64, activation=None)

    out = after["out"]
    there = ~exact.isnan()
    ends = before.tensors.get("query_start_loc")
    if ends is None:
        assert there.all()
    else:
        total = exact.shape[1 if before.prefill else 0]
        tokens = ends.clamp(0, total).diff().clamp(min=0).sum()
        assert int(there.sum()) == int(tokens) * len(before["weight"])
    assert same(out[~there].contiguous(), before["out"][~there].contiguous())
    width = before["weight"].shape[1]
    # One rounding a tap and one for the bias; silu has a slope of at most 1.1, and its exponential
    # an error of a few units and of its argument's rounding.
    error = 1.1 * (width + 2) * U * magnitude + exact.abs() * (16 + 4 * magnitude) * U
    error = error + HALF_STEP[out.dtype] * (exact.abs() + error) + 2.0**-25
    found = (out.double() - exact).abs()
    wrong = there & ~(found <= error)
    assert not wrong.any(), f"{int(wrong.sum())} outputs, first at {wrong.nonzero()[0].tolist()}"
