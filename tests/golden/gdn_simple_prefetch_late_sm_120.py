"""gdn_simple: gated_delta_rule_decode for one token, written by ssmgen.

arch    sm_120
plan    simple 16x128 warps=1 late prefetch=512
config  family=gdn dtype=bf16 index_dtype=None aligned=True pdl=True state_dtype=fp16
        state_layout=VK rounding=nearest philox_rounds=0 head_k_dim=128 head_v_dim=128
        gate=softplus kda=False a_dtype=bf16 b_dtype=bf16 a_log_dtype=fp32 has_dt_bias=True
        dt_bias_dtype=fp32 use_qk_l2norm=True grouped=False ntokens=1 has_dst=False
        update_state=True seqlens_dtype=None accepted_dtype=None dst_tokens=False
        has_intermediate=False entry_dtype=None
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
def prefetch(address, wanted):
    # 4096 bytes into the L2.
    tl.inline_asm_elementwise(
        """{
        .reg .pred one, asked;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 one, thread, 0;
        setp.ne.and.u32 asked, $2, 0, one;
        @asked cp.async.bulk.prefetch.L2.global [$1], 4096;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [address.to(tl.int64), wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


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
    state_slot_stride,
    state_head_stride,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    A_log_stride,
    a_row_stride,
    a_head_stride,
    dt_bias_head_stride,
    b_row_stride,
    b_head_stride,
    out_row_stride,
    out_head_stride,
    group_recip,
    scale_bits,
):
    K: tl.constexpr = 128

    program = tl.program_id(0)
    head = program // 8
    batch = tl.program_id(1)
    group = tl.umulhi((2 * head + 1).to(tl.uint32), group_recip).to(tl.int32)
    slot = batch.to(tl.int64)
    rows_ahead = tl.fdiv(512.5, tl.num_programs(0).to(tl.float32)).to(tl.int32)
    later = batch + rows_ahead
    wanted = (rows_ahead > 0) & (later < tl.num_programs(1))
    later_slot = later.to(tl.int64)

    first = program % 8 * 16
    rows = tl.arange(0, 16)
    cols = tl.arange(0, 128)
    rate = -tl.exp(tl.load(A_log + head * A_log_stride).to(tl.float32))
    bias = tl.load(dt_bias + head * dt_bias_head_stride).to(tl.float32)
    scale = scale_bits.to(tl.float32, bitcast=True)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    offsets = rows[:, None] * K + cols[None, :]
    tile = state + slot * state_slot_stride + head * state_head_stride + first * K
    h = tl.load(tile + offsets).to(tl.float32)
    later_state = state + later_slot * state_slot_stride
    prefetch(later_state + head * state_head_stride + first * K, wanted)

    q_head = q + batch * q_row_stride + group * q_head_stride
    k_head = k + batch * k_row_stride + group * k_head_stride
    v_rows = v + batch * v_row_stride + head * v_head_stride + first
    a_head = a + batch * a_row_stride + head * a_head_stride
    b_head = b + batch * b_row_stride + head * b_head_stride
    out_rows = out + batch * out_row_stride + head * out_head_stride + first

    q_at = q_head + cols
    q_ = tl.load(q_at).to(tl.float32)
    k_at = k_head + cols
    k_ = tl.load(k_at).to(tl.float32)
    v_ = tl.load(v_rows + rows).to(tl.float32)
    a_ = tl.load(a_head).to(tl.float32)
    b_ = tl.load(b_head).to(tl.float32)
    q_ *= tl.rsqrt(tl.sum(q_ * q_, axis=0) + 1e-6) * scale
    k_ *= tl.rsqrt(tl.sum(k_ * k_, axis=0) + 1e-6)
    a_ += bias
    decay = tl.exp(rate * softplus(a_))
    beta = sigmoid(b_)
    h *= decay
    delta = beta * (v_ - row_dot(h, k_))
    h = tl.fma(delta[:, None], k_[None, :], h)
    o = row_dot(h, q_)
    tl.store(out_rows + rows, o.to(tl.bfloat16))
    tl.store(tile + offsets, h.to(tl.float16))
