"""conv1d_simple: causal convolution, sequences in chunks, written by ssmgen.

arch    sm_80
plan    simple 16x256 warps=4
config  family=conv1d dtype=fp16 index_dtype=int32 aligned=True pdl=False weight_dtype=fp32
        state_dtype=fp16 width=4 depth=4 has_bias=False activation=None history=pool
        update_state=True has_initial=True has_dst=False many=True prefill=True
        seqlens_dtype=int32 accepted_dtype=None counts_dtype=None packed_channels=False
key     ...
"""

import triton
import triton.language as tl


@triton.jit
def conv1d_simple(
    x,
    conv_state,
    weight,
    out,
    slots,
    has_initial,
    seqlens,
    x_token_stride,
    out_token_stride,
    state_slot_stride,
    state_column_stride,
    state_dim_stride,
    slots_stride,
    has_initial_stride,
    rows,
    total,
    dim,
    pad_slot_id,
):
    channels = tl.program_id(1) * 256 + tl.arange(0, 256)
    inside = channels < dim
    taps = weight + channels * 4
    w0 = tl.load(taps, mask=inside, other=0.0)
    w1 = tl.load(taps + 1, mask=inside, other=0.0)
    w2 = tl.load(taps + 2, mask=inside, other=0.0)
    w3 = tl.load(taps + 3, mask=inside, other=0.0)

    # Chunks are counted from sequence to sequence, whatever the order of their tokens in x.
    chunk = tl.program_id(0).to(tl.int64)
    counted = tl.full([], 0, tl.int64)
    for start in tl.range(0, rows, 128):
        each = start + tl.arange(0, 128)
        begins = tl.load(seqlens + each, mask=each < rows, other=0)
        ends = tl.load(seqlens + each + 1, mask=each < rows, other=0)
        begins = tl.minimum(tl.maximum(begins, 0), total)
        lengths = tl.maximum(tl.minimum(ends, total) - begins, 0).to(tl.int64)
        chunks = (lengths + 15) // 16
        before = counted + tl.cumsum(chunks, axis=0) - chunks
        counted += tl.sum(chunks, axis=0)
        while chunk < counted:
            row = start + tl.sum((before + chunks <= chunk).to(tl.int32), axis=0)
            begin = tl.load(seqlens + row)
            end = tl.load(seqlens + row + 1)
            sound = (begin >= 0) & (end <= total)
            begin = tl.minimum(tl.maximum(begin, 0), total).to(tl.int32)
            length = tl.minimum(tl.maximum(end, 0), total).to(tl.int32) - begin
            since = tl.max(tl.where(before <= chunk, before, 0), axis=0)
            first = (chunk - since).to(tl.int32) * 16
            slot = tl.load(slots + row * slots_stride).to(tl.int64)
            live = (slot >= 0) & (slot != pad_slot_id)
            sound |= ~live
            x_row = x + begin * x_token_stride + channels
            out_row = out + begin * out_token_stride + channels
            at = first + tl.arange(0, 16)
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
            if first == 0:
                live = live & sound
                continued = live & (tl.load(has_initial + row * has_initial_stride) != 0)
                window = conv_state + slot * state_slot_stride + channels * state_dim_stride
                readable = inside & continued
                writable = inside & live
                h1 = tl.load(window + state_column_stride, mask=readable, other=0.0)
                h2 = tl.load(window + 2 * state_column_stride, mask=readable, other=0.0)
                h3 = tl.load(window + 3 * state_column_stride, mask=readable, other=0.0)
                rest = window + length * state_column_stride
                short = readable & (length < 4)
                old0 = tl.load(rest, mask=short, other=0.0)
                short = readable & (length < 3)
                old1 = tl.load(rest + state_column_stride, mask=short, other=0.0)
                short = readable & (length < 2)
                old2 = tl.load(rest + 2 * state_column_stride, mask=short, other=0.0)
                x0 = tl.where((at == 0)[:, None], h1[None, :], x0)
                x0 = tl.where((at == 1)[:, None], h2[None, :], x0)
                x0 = tl.where((at == 2)[:, None], h3[None, :], x0)
                x1 = tl.where((at == 0)[:, None], h2[None, :], x1)
                x1 = tl.where((at == 1)[:, None], h3[None, :], x1)
                x2 = tl.where((at == 0)[:, None], h3[None, :], x2)
                # The threads that write a column need not be those that have read it.
                tl.debug_barrier()
                last = x_row + (length - 4) * x_token_stride
                new = tl.load(last, mask=writable & (length >= 4), other=0.0)
                new = tl.where(length < 4, old0, new)
                tl.store(window, new, mask=writable)
                new = tl.load(last + x_token_stride, mask=writable & (length >= 3), other=0.0)
                new = tl.where(length < 3, old1, new)
                tl.store(window + state_column_stride, new, mask=writable)
                new = tl.load(last + 2 * x_token_stride, mask=writable & (length >= 2), other=0.0)
                new = tl.where(length < 2, old2, new)
                tl.store(window + 2 * state_column_stride, new, mask=writable)
                new = tl.load(last + 3 * x_token_stride, mask=writable, other=0.0)
                tl.store(window + 3 * state_column_stride, new, mask=writable)
            y = w0[None, :] * x0.to(tl.float32)
            y = tl.fma(w1[None, :], x1.to(tl.float32), y)
            y = tl.fma(w2[None, :], x2.to(tl.float32), y)
            y = tl.fma(w3[None, :], x3.to(tl.float32), y)
            y = tl.where(sound, y, float("nan"))
            place = out_row[None, :] + at[:, None] * out_token_stride
            tl.store(place, y.to(tl.float16), mask=there)
            chunk += tl.num_programs(0)
