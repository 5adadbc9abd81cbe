"""conv1d_simple: causal convolution, one token a row, written by ssmgen.

arch    sm_90
plan    simple 1x1024 warps=4
config  family=conv1d dtype=bf16 index_dtype=int32 aligned=True pdl=True weight_dtype=bf16
        state_dtype=bf16 width=4 depth=3 has_bias=True activation=silu history=pool
        update_state=True has_initial=False has_dst=False many=False prefill=False
        seqlens_dtype=None accepted_dtype=None counts_dtype=None packed_channels=True
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
    bias,
    out,
    slots,
    x_row_stride,
    out_row_stride,
    state_slot_stride,
    state_column_stride,
    slots_stride,
    dim,
    pad_slot_id,
):
    channels = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    inside = channels < dim
    row = tl.program_id(1)
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    live = (slot >= 0) & (slot != pad_slot_id)

    # The taps of a channel are one word.
    words = tl.load(weight.to(tl.pointer_type(tl.int64)) + channels, mask=inside, other=0)
    w0 = words.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    w1 = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    w2 = (words >> 32).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    w3 = (words >> 48).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    bias_ = tl.load(bias + channels, mask=inside, other=0.0)
    bias_ = bias_.to(tl.float32)
    window = conv_state + slot * state_slot_stride + channels
    ours = inside & live
    h0 = tl.load(window, mask=ours, other=0.0)
    h1 = tl.load(window + state_column_stride, mask=ours, other=0.0)
    h2 = tl.load(window + 2 * state_column_stride, mask=ours, other=0.0)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    x_row = x + row * x_row_stride + channels
    x_ = tl.load(x_row, mask=inside, other=0.0)

    # The threads that write a column need not be those that have read it.
    tl.debug_barrier()
    tl.store(window, h1, mask=ours)
    tl.store(window + state_column_stride, h2, mask=ours)
    tl.store(window + 2 * state_column_stride, x_, mask=ours)

    y = tl.fma(w0, h0.to(tl.float32), bias_)
    y = tl.fma(w1, h1.to(tl.float32), y)
    y = tl.fma(w2, h2.to(tl.float32), y)
    y = tl.fma(w3, x_.to(tl.float32), y)
    y = silu(y)
    out_row = out + row * out_row_stride + channels
    tl.store(out_row, y.to(tl.bfloat16), mask=inside)
