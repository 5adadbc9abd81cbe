"""gdn_simple: gated_delta_rule_decode for one token, written by ssmgen.

arch    sm_90
plan    simple 16x128 warps=1 placed
config  family=gdn dtype=bf16 index_dtype=int64 aligned=True pdl=False state_dtype=fp32
        state_layout=VK rounding=nearest philox_rounds=0 head_k_dim=128 head_v_dim=128
        gate=softplus kda=False a_dtype=bf16 b_dtype=bf16 a_log_dtype=fp32 has_dt_bias=True
        dt_bias_dtype=fp32 use_qk_l2norm=True grouped=False ntokens=1 has_dst=False
        update_state=True seqlens_dtype=None accepted_dtype=None dst_tokens=False
        has_intermediate=False entry_dtype=None
key     ...
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def softplus(v):
    # log(1 + e^v) = max(v, 0) + log1p(t), t = e^-|v|. The polynomial is log1p(t) / t on [0, 1],
    # minimax of degree 9, relative error 5e-9.
    t = gl.exp(-gl.abs(v))
    p = -0.0032440251670777798 * t + 0.01985146291553974
    p = p * t - 0.05695953592658043
    p = p * t + 0.10603655129671097
    p = p * t - 0.15305592119693756
    p = p * t + 0.1967593878507614
    p = p * t - 0.24954134225845337
    p = p * t + 0.3332996368408203
    p = p * t - 0.4999990165233612
    p = p * t + 1.0
    return gl.maximum(v, 0.0) + p * t


@gluon.jit
def sigmoid(v):
    return 1.0 / (1.0 + gl.exp(-v))


@gluon.jit
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
    slots_stride,
    pad_slot_id,
    group_recip,
    scale_bits,
):
    K: gl.constexpr = 128

    program = gl.program_id(0)
    head = program // 8
    batch = gl.program_id(1)
    group = gl.umulhi((2 * head + 1).to(gl.uint32), group_recip).to(gl.int32)
    slot = gl.load(slots + batch * slots_stride).to(gl.int64)
    live = (slot >= 0) & (slot != pad_slot_id)

    first = program % 8 * 16
    TILE: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 1], [1, 0])
    rows = gl.arange(0, 16, layout=gl.SliceLayout(1, TILE))
    cols = gl.arange(0, 128, layout=gl.SliceLayout(0, TILE))
    offsets = rows[:, None] * K + cols[None, :]
    tile = state + slot * state_slot_stride + head * state_head_stride + first * K
    h = gl.load(tile + offsets, mask=live, other=0.0)
    rate = -gl.exp(gl.load(A_log + head * A_log_stride).to(gl.float32))
    bias = gl.load(dt_bias + head * dt_bias_head_stride).to(gl.float32)
    scale = scale_bits.to(gl.float32, bitcast=True)

    q_head = q + batch * q_row_stride + group * q_head_stride
    k_head = k + batch * k_row_stride + group * k_head_stride
    v_rows = v + batch * v_row_stride + head * v_head_stride + first
    a_head = a + batch * a_row_stride + head * a_head_stride
    b_head = b + batch * b_row_stride + head * b_head_stride
    out_rows = out + batch * out_row_stride + head * out_head_stride + first

    q_at = q_head + cols
    q_ = gl.load(q_at).to(gl.float32)
    k_at = k_head + cols
    k_ = gl.load(k_at).to(gl.float32)
    v_ = gl.load(v_rows + rows).to(gl.float32)
    a_ = gl.load(a_head).to(gl.float32)
    b_ = gl.load(b_head).to(gl.float32)
    q_ *= gl.rsqrt(gl.sum(q_ * q_, axis=0) + 1e-6) * scale
    k_ *= gl.rsqrt(gl.sum(k_ * k_, axis=0) + 1e-6)
    a_ += bias
    decay = gl.exp(rate * softplus(a_))
    beta = sigmoid(b_)
    h *= decay
    delta = beta * (v_ - gl.sum(h * k_[None, :], axis=1))
    h = gl.fma(delta[:, None], k_[None, :], h)
    o = gl.sum(h * q_[None, :], axis=1)
    o = gl.where(live, o, 0.0)
    gl.store(out_rows + rows, o.to(gl.bfloat16))
    gl.store(tile + offsets, h, mask=live)
