"""gdn_simple: gated_delta_rule_decode for many tokens, written by ssmgen.

arch    sm_90
plan    simple 16x128 warps=1
config  family=gdn dtype=bf16 index_dtype=int64 aligned=True pdl=False state_dtype=bf16
        state_layout=VK rounding=nearest philox_rounds=0 head_k_dim=128 head_v_dim=64
        gate=softplus kda=False a_dtype=bf16 b_dtype=bf16 a_log_dtype=fp32 has_dt_bias=True
        dt_bias_dtype=fp32 use_qk_l2norm=True grouped=True ntokens=4 has_dst=True
        update_state=True seqlens_dtype=None accepted_dtype=int32 dst_tokens=True
        has_intermediate=True entry_dtype=None
key     ...
"""

import triton
import triton.language as tl


@triton.jit
def softplus(v):
    # log(1 + e^v) = max(v, 0) + log1p(t), t = e^-|v|. The polynomial is log1p(t) / t on [0, 1],
    # minimax of degree 9, relative error 5e-9.
    t = tl.exp(-tl.abs(v))
    p = -0.0032440251670777798 * t + 0.01985146291553974
    p = p * t - 0.05695953592658043
    p = p * t + 0.10603655129671097
    p = p * t - 0.15305592119693756
    p = p * t + 0.1967593878507614
    p = p * t - 0.24954134225845337
    p = p * t + 0.3332996368408203
    p = p * t - 0.4999990165233612
    p = p * t + 1.0
    return tl.maximum(v, 0.0) + p * t


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def halves(t):
    return tl.split(tl.reshape(t, (t.shape[0], t.shape[1] // 2, 2)))


@triton.jit
def row_dot(h, w):
    # <h, w> of each row: the eight columns of a lane in turn, fused, then across lanes.
    w = tl.broadcast_to(w[None, :], h.shape)
    h0_of_2, h1_of_2 = halves(h)
    w0_of_2, w1_of_2 = halves(w)
    h0_of_4, h2_of_4 = halves(h0_of_2)
    h1_of_4, h3_of_4 = halves(h1_of_2)
    w0_of_4, w2_of_4 = halves(w0_of_2)
    w1_of_4, w3_of_4 = halves(w1_of_2)
    h0_of_8, h4_of_8 = halves(h0_of_4)
    h1_of_8, h5_of_8 = halves(h1_of_4)
    h2_of_8, h6_of_8 = halves(h2_of_4)
    h3_of_8, h7_of_8 = halves(h3_of_4)
    w0_of_8, w4_of_8 = halves(w0_of_4)
    w1_of_8, w5_of_8 = halves(w1_of_4)
    w2_of_8, w6_of_8 = halves(w2_of_4)
    w3_of_8, w7_of_8 = halves(w3_of_4)
    s = h0_of_8 * w0_of_8
    s = tl.fma(h1_of_8, w1_of_8, s)
    s = tl.fma(h2_of_8, w2_of_8, s)
    s = tl.fma(h3_of_8, w3_of_8, s)
    s = tl.fma(h4_of_8, w4_of_8, s)
    s = tl.fma(h5_of_8, w5_of_8, s)
    s = tl.fma(h6_of_8, w6_of_8, s)
    s = tl.fma(h7_of_8, w7_of_8, s)
    return tl.sum(s, axis=1)


@triton.jit
def gdn_simple(
    state,
    q,
    k,
    v,
    A_log,
    a,
    dt_bias,
    b,
    out,
    slots,
    dst_slots,
    buffer,
    accepted,
    state_slot_stride,
    state_head_stride,
    q_row_stride,
    q_token_stride,
    q_head_stride,
    k_row_stride,
    k_token_stride,
    k_head_stride,
    v_row_stride,
    v_token_stride,
    v_head_stride,
    v_group_step,
    A_log_stride,
    a_row_stride,
    a_token_stride,
    a_head_stride,
    a_group_step,
    dt_bias_head_stride,
    b_row_stride,
    b_token_stride,
    b_head_stride,
    b_group_step,
    out_row_stride,
    out_token_stride,
    out_head_stride,
    slots_stride,
    slots_column_stride,
    slots_width,
    dst_slots_stride,
    dst_slots_column_stride,
    buffer_entry_stride,
    buffer_token_stride,
    buffer_head_stride,
    accepted_stride,
    pad_slot_id,
    group_recip,
    scale_bits,
):
    K: tl.constexpr = 128

    program = tl.program_id(0)
    head = program // 4
    batch = tl.program_id(1)
    group = tl.umulhi((2 * head + 1).to(tl.uint32), group_recip).to(tl.int32)
    column = tl.maximum(tl.load(accepted + batch * accepted_stride), 1) - 1
    broken = column >= slots_width
    column = tl.minimum(column, slots_width - 1)
    source = slots + batch * slots_stride + column * slots_column_stride
    slot = tl.load(source).to(tl.int64)
    live = (slot >= 0) & (slot != pad_slot_id)
    broken &= live
    live = live & ~broken
    blank = tl.where(broken, float("nan"), 0.0)
    entry = batch.to(tl.int64)

    first = program % 4 * 16
    rows = tl.arange(0, 16)
    cols = tl.arange(0, 128)
    offsets = rows[:, None] * K + cols[None, :]
    tile = state + slot * state_slot_stride + head * state_head_stride + first * K
    h = tl.load(tile + offsets, mask=live, other=0.0).to(tl.float32)
    rate = -tl.exp(tl.load(A_log + head * A_log_stride).to(tl.float32))
    bias = tl.load(dt_bias + head * dt_bias_head_stride).to(tl.float32)
    scale = scale_bits.to(tl.float32, bitcast=True)

    q_head = q + batch * q_row_stride + group * q_head_stride
    k_head = k + batch * k_row_stride + group * k_head_stride
    v_rows = v + batch * v_row_stride + head * v_head_stride + group * v_group_step + first
    a_head = a + batch * a_row_stride + head * a_head_stride + group * a_group_step
    b_head = b + batch * b_row_stride + head * b_head_stride + group * b_group_step
    out_rows = out + batch * out_row_stride + head * out_head_stride + first
    dst_row = dst_slots + batch * dst_slots_stride

    q_at = q_head + cols
    q_next = tl.load(q_at)
    k_at = k_head + cols
    k_next = tl.load(k_at)
    v_next = tl.load(v_rows + rows)
    a_next = tl.load(a_head)
    b_next = tl.load(b_head)
    for token in tl.range(4):
        q_ = q_next.to(tl.float32)
        k_ = k_next.to(tl.float32)
        v_ = v_next.to(tl.float32)
        a_ = a_next.to(tl.float32)
        b_ = b_next.to(tl.float32)
        upcoming = tl.minimum(token + 1, 3)
        q_at = q_head + upcoming * q_token_stride + cols
        q_next = tl.load(q_at)
        k_at = k_head + upcoming * k_token_stride + cols
        k_next = tl.load(k_at)
        v_next = tl.load(v_rows + upcoming * v_token_stride + rows)
        a_next = tl.load(a_head + upcoming * a_token_stride)
        b_next = tl.load(b_head + upcoming * b_token_stride)
        q_ *= tl.rsqrt(tl.sum(q_ * q_, axis=0) + 1e-6) * scale
        k_ *= tl.rsqrt(tl.sum(k_ * k_, axis=0) + 1e-6)
        a_ += bias
        decay = tl.exp(rate * softplus(a_))
        beta = sigmoid(b_)
        h *= decay
        delta = beta * (v_ - row_dot(h, k_))
        h = tl.fma(delta[:, None], k_[None, :], h)
        o = row_dot(h, q_)
        o = tl.where(live, o, blank)
        tl.store(out_rows + token * out_token_stride + rows, o.to(tl.bfloat16))
        dst_at = dst_row + token * dst_slots_column_stride
        dst = tl.load(dst_at, mask=live, other=0).to(tl.int64)
        kept = live & (dst >= 0) & (dst != pad_slot_id)
        tile = state + dst * state_slot_stride + head * state_head_stride + first * K
        tl.store(tile + offsets, h.to(tl.bfloat16), mask=kept)
        noted_tile = buffer + entry * buffer_entry_stride + head * buffer_head_stride + first * K
        noted_tile += token * buffer_token_stride
        tl.store(noted_tile + offsets, h.to(tl.bfloat16), mask=live)
