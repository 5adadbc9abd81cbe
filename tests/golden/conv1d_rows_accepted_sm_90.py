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

    # The taps of a channel are one word.
    words = tl.load(weight.to(tl.pointer_type(tl.int64)) + channels, mask=inside, other=0)
    w0 = words.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    w1 = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    w2 = (words >> 32).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    w3 = (words >> 48).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    x_row = x + begin * x_token_stride + channels
    x0 = tl.load(x_row, mask=inside & (length > 0), other=0.0)
    more1 = length > 1
    x1 = tl.load(x_row + x_token_stride, mask=inside & more1, other=0.0)
    more2 = length > 2
    x2 = tl.load(x_row + 2 * x_token_stride, mask=inside & more2, other=0.0)
    more3 = length > 3
    x3 = tl.load(x_row + 3 * x_token_stride, mask=inside & more3, other=0.0)
    window = conv_state + slot * state_slot_stride + channels
    oldest = window + column * state_column_stride
    ours = inside & live
    h0 = tl.load(oldest, mask=ours, other=0.0)
    h1 = tl.load(oldest + state_column_stride, mask=ours, other=0.0)
    h2 = tl.load(oldest + 2 * state_column_stride, mask=ours, other=0.0)
    w0 = tl.where(sound, w0, float("nan"))

    # The threads that write a column need not be those that have read it.
    tl.debug_barrier()
    # A branch, so that nothing is computed before all of this has been asked for.
    if length > 0:
        tl.store(window, h1, mask=ours)
        tl.store(window + state_column_stride, h2, mask=ours)
        out_row = out + begin * out_token_stride + channels
        place = window + 2 * state_column_stride
        tl.store(place, x0, mask=ours)
        y = w0 * h0.to(tl.float32)
        y = tl.fma(w1, h1.to(tl.float32), y)
        y = tl.fma(w2, h2.to(tl.float32), y)
        y = tl.fma(w3, x0.to(tl.float32), y)
        y = silu(y)
        tl.store(out_row, y.to(tl.bfloat16), mask=inside)
        tl.store(place + state_column_stride, x1, mask=ours & more1)
        y = w0 * h1.to(tl.float32)
        y = tl.fma(w1, h2.to(tl.float32), y)
        y = tl.fma(w2, x0.to(tl.float32), y)
        y = tl.fma(w3, x1.to(tl.float32), y)
        y = silu(y)
        tl.store(out_row + out_token_stride, y.to(tl.bfloat16), mask=inside & more1)
        tl.store(place + 2 * state_column_stride, x2, mask=ours & more2)
        y = w0 * h2.to(tl.float32)
        y = tl.fma(w1, x0.to(tl.float32), y)
        y = tl.fma(w2, x1.to(tl.float32), y)
        y = tl.fma(w3, x2.to(tl.float32), y)
        y = silu(y)
        tl.store(out_row + 2 * out_token_stride, y.to(tl.bfloat16), mask=inside & more2)
        tl.store(place + 3 * state_column_stride, x3, mask=ours & more3)
        y = w0 * x0.to(tl.float32)
        y = tl.fma(w1, x1.to(tl.float32), y)
        y = tl.fma(w2, x2.to(tl.float32), y)
        y = tl.fma(w3, x3.to(tl.float32), y)
        y = silu(y)
        tl.store(out_row + 3 * out_token_stride, y.to(tl.bfloat16), mask=inside & more3)
        h0 = x1
        h1 = x2
        h2 = x3
        for first in tl.range(4, length, 4):
            x_block = x_row + first * x_token_stride
            x0 = tl.load(x_block, mask=inside, other=0.0)
            more1 = first + 1 < length
            x1 = tl.load(x_block + x_token_stride, mask=inside & more1, other=0.0)
            more2 = first + 2 < length
            x2 = tl.load(x_block + 2 * x_token_stride, mask=inside & more2, other=0.0)
            more3 = first + 3 < length
            x3 = tl.load(x_block + 3 * x_token_stride, mask=inside & more3, other=0.0)
            out_block = out_row + first * out_token_stride
            place = window + (first + 2) * state_column_stride
            tl.store(place, x0, mask=ours)
            y = w0 * h0.to(tl.float32)
            y = tl.fma(w1, h1.to(tl.float32), y)
            y = tl.fma(w2, h2.to(tl.float32), y)
            y = tl.fma(w3, x0.to(tl.float32), y)
            y = silu(y)
            tl.store(out_block, y.to(tl.bfloat16), mask=inside)
            tl.store(place + state_column_stride, x1, mask=ours & more1)
            y = w0 * h1.to(tl.float32)
            y = tl.fma(w1, h2.to(tl.float32), y)
            y = tl.fma(w2, x0.to(tl.float32), y)
            y = tl.fma(w3, x1.to(tl.float32), y)
            y = silu(y)
            tl.store(out_block + out_token_stride, y.to(tl.bfloat16), mask=inside & more1)
            tl.store(place + 2 * state_column_stride, x2, mask=ours & more2)
            y = w0 * h2.to(tl.float32)
            y = tl.fma(w1, x0.to(tl.float32), y)
            y = tl.fma(w2, x1.to(tl.float32), y)
            y = tl.fma(w3, x2.to(tl.float32), y)
            y = silu(y)
            tl.store(out_block + 2 * out_token_stride, y.to(tl.bfloat16), mask=inside & more2)
            tl.store(place + 3 * state_column_stride, x3, mask=ours & more3)
            y = w0 * x0.to(tl.float32)
            y = tl.fma(w1, x1.to(tl.float32), y)
            y = tl.fma(w2, x2.to(tl.float32), y)
            y = tl.fma(w3, x3.to(tl.float32), y)
            y = silu(y)
            tl.store(out_block + 3 * out_token_stride, y.to(tl.bfloat16), mask=inside & more3)
            h0 = x1
            h1 = x2
            h2 = x3
