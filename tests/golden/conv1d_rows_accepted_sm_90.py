"""conv1d_simple: causal convolution, several tokens a row, written by ssmgen.

arch    sm_90
plan    simple 4x256 warps=1
config  family=conv1d dtype=bf16 index_dtype=int32 aligned=True pdl=False weight_dtype=bf16
        state_dtype=bf16 width=4 depth=3 has_bias=False activation=silu history=pool
        update_state=True has_initial=False has_dst=False many=True prefill=False
        seqlens_dtype=int32 accepted_dtype=int32 counts_dtype=None packed_channels=True
key     ...
"""

import triton
import triton.language as tl


@triton.jit
def silu(v):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def conv1d_simple(
    x,
    conv_state,
    weight,
    out,
    slots,
    seqlens,
    accepted,
    x_token_stride,
    out_token_stride,
    state_slot_stride,
    state_column_stride,
    slots_stride,
    accepted_stride,
    state_len,
    total,
    dim,
    pad_slot_id,
):
    channels = tl.program_id(0) * 256 + tl.arange(0, 256)
    inside = channels < dim
    row = tl.program_id(1)
    begin = tl.load(seqlens + row)
    end = tl.load(seqlens + row + 1)
    sound = (begin >= 0) & (end <= total)
    begin = tl.minimum(tl.maximum(begin, 0), total).to(tl.int32)
    length = tl.minimum(tl.maximum(end, 0), total).to(tl.int32) - begin
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    live = (slot >= 0) & (slot != pad_slot_id)
    column = tl.maximum(tl.load(accepted + row * accepted_stride), 1) - 1
    sound &= (column <= state_len - 3) & (length <= state_len - 2)
    column = column.to(tl.int32)
    sound |= ~live
    live = live & sound & (length > 0)

    window = conv_state + slot * state_slot_stride + channels
    oldest = window + column * state_column_stride
    ours = inside & live
    h0 = tl.load(oldest, mask=ours, other=0.0)
    h1 = tl.load(oldest + state_column_stride, mask=ours, other=0.0)
    h2 = tl.load(oldest + 2 * state_column_stride, mask=ours, other=0.0)
    # The taps of a channel are one word.
    words = tl.load(weight.to(tl.pointer_type(tl.int64)) + channels, mask=inside, other=0)
    w0 = words.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    w1 = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    w2 = (words >> 32).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    w3 = (words >> 48).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)

    x_row = x + begin * x_token_stride + channels
    out_row = out + begin * out_token_stride + channels
    # The threads that write a column need not be those that have read it.
    tl.debug_barrier()
    tl.store(window, h1, mask=ours)
    tl.store(window + state_column_stride, h2, mask=ours)
    for first in tl.range(0, length, 4):
        at = first + tl.arange(0, 4)
        there = ((at >= 3) & (at < length))[:, None] & inside[None, :]
        place = x_row[None, :] + (at - 3)[:, None] * x_token_stride
        x0 = tl.load(place, mask=there, other=0.0)
        there = ((at >= 2) & (at < length))[:, None] & inside[None, :]
        place = x_row[None, :] + (at - 2)[:, None] * x_token_stride
        x1 = tl.load(place, mask=there, other=0.0)
        there = ((at >= 1) & (at < length))[:, None] & inside[None, :]
        place = x_row[None, :] + (at - 1)[:, None] * x_token_stride
        x2 = tl.load(place, mask=there, other=0.0)
        there = (at < length)[:, None] & inside[None, :]
        place = x_row[None, :] + at[:, None] * x_token_stride
        x3 = tl.load(place, mask=there, other=0.0)
        place = window[None, :] + (at + 2)[:, None] * state_column_stride
        kept_here = (at < length)[:, None] & ours[None, :]
        tl.store(place, x3, mask=kept_here)
        x0 = tl.where((at == 0)[:, None], h0[None, :], x0)
        x0 = tl.where((at == 1)[:, None], h1[None, :], x0)
        x0 = tl.where((at == 2)[:, None], h2[None, :], x0)
        x1 = tl.where((at == 0)[:, None], h1[None, :], x1)
        x1 = tl.where((at == 1)[:, None], h2[None, :], x1)
        x2 = tl.where((at == 0)[:, None], h2[None, :], x2)
        y = w0[None, :] * x0.to(tl.float32)
        y = tl.fma(w1[None, :], x1.to(tl.float32), y)
        y = tl.fma(w2[None, :], x2.to(tl.float32), y)
        y = tl.fma(w3[None, :], x3.to(tl.float32), y)
        y = silu(y)
        y = tl.where(sound, y, float("nan"))
        place = out_row[None, :] + at[:, None] * out_token_stride
        tl.store(place, y.to(tl.bfloat16), mask=there)
