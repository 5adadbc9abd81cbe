"""ssu_simple: selective_state_update for one token, written by ssmgen.

arch    sm_120
plan    simple 64x16 warps=1
config  family=ssu dtype=bf16 index_dtype=int32 aligned=False pdl=False dt_dtype=fp32
        weight_dtype=fp32 a_dtype=fp32 state_dtype=fp32 state_scale_t=None rounding=nearest
        philox_rounds=0 dim=64 dstate=16 ntokens=1 has_z=True has_d=True has_dt_bias=True
        dt_softplus=True tie_hdim=False has_dst=False update_state=True seqlens_dtype=None
        accepted_dtype=None parents_dtype=None dst_tokens=False has_intermediate=False
        entry_dtype=None
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
def silu(v):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def ssu_simple(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    out,
    slots,
    state_slot_stride,
    x_row_stride,
    x_head_stride,
    dt_row_stride,
    dt_head_stride,
    dt_dim_stride,
    A_head_stride,
    A_dim_stride,
    A_dstate_stride,
    B_row_stride,
    B_group_stride,
    C_row_stride,
    C_group_stride,
    D_head_stride,
    D_dim_stride,
    z_row_stride,
    z_head_stride,
    dt_bias_head_stride,
    dt_bias_dim_stride,
    out_row_stride,
    out_head_stride,
    slots_stride,
    pad_slot_id,
    group_recip,
):
    DIM: tl.constexpr = 64
    DSTATE: tl.constexpr = 16

    head = tl.program_id(0)
    batch = tl.program_id(1)
    slot = tl.load(slots + batch * slots_stride).to(tl.int64)
    live = (slot >= 0) & (slot != pad_slot_id)
    rows = tl.arange(0, 64)
    cols = tl.arange(0, 16)

    offsets = rows[:, None] * DSTATE + cols[None, :]
    tile = state + head * (DIM * DSTATE) + offsets
    tile += slot * state_slot_stride
    stored = tl.load(tile, mask=live, other=0)

    dt_rows = dt + batch * dt_row_stride + head * dt_head_stride
    dt_ = tl.load(dt_rows + rows * dt_dim_stride).to(tl.float32)
    bias_rows = dt_bias + head * dt_bias_head_stride
    bias_ = tl.load(bias_rows + rows * dt_bias_dim_stride)
    dt_ += bias_.to(tl.float32)
    dt_ = softplus(dt_)
    D_rows = D + head * D_head_stride
    D_ = tl.load(D_rows + rows * D_dim_stride).to(tl.float32)
    A_head = A + head * A_head_stride
    A_offsets = rows[:, None] * A_dim_stride + (cols * A_dstate_stride)[None, :]
    A_ = tl.load(A_head + A_offsets).to(tl.float32)
    decay = tl.exp(A_ * dt_[:, None])
    group = tl.umulhi((2 * head + 1).to(tl.uint32), group_recip).to(tl.int32)
    B_group = B + batch * B_row_stride + group * B_group_stride
    C_group = C + batch * C_row_stride + group * C_group_stride
    B_ = tl.load(B_group + cols).to(tl.float32)
    C_ = tl.load(C_group + cols).to(tl.float32)
    x_rows = x + batch * x_row_stride + head * x_head_stride
    x_ = tl.load(x_rows + rows).to(tl.float32)

    h = stored * decay
    h += (x_ * dt_)[:, None] * B_[None, :]
    y = tl.sum(h * C_[None, :], axis=1)
    y += x_ * D_
    z_rows = z + batch * z_row_stride + head * z_head_stride
    z_ = tl.load(z_rows + rows)
    y *= silu(z_.to(tl.float32))
    out_rows = out + batch * out_row_stride + head * out_head_stride
    tl.store(out_rows + rows, y.to(tl.bfloat16))
    new = h
    tl.store(tile, new, mask=live)
