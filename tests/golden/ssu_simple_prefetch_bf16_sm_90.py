"""ssu_simple: selective_state_update for one token, written by ssmgen.

arch    sm_90
plan    simple 16x128 warps=1 prefetch=2048
config  family=ssu dtype=bf16 index_dtype=int64 aligned=True pdl=False dt_dtype=fp32
        weight_dtype=fp32 a_dtype=fp32 state_dtype=bf16 state_scale_t=None rounding=nearest
        philox_rounds=0 dim=64 dstate=128 ntokens=1 has_z=False has_d=True has_dt_bias=True
        dt_softplus=True tie_hdim=True has_dst=True update_state=True seqlens_dtype=None
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
def ssu_simple(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    out,
    slots,
    dst_slots,
    state_slot_stride,
    x_row_stride,
    x_head_stride,
    dt_row_stride,
    dt_head_stride,
    A_head_stride,
    B_row_stride,
    B_group_stride,
    C_row_stride,
    C_group_stride,
    D_head_stride,
    dt_bias_head_stride,
    out_row_stride,
    out_head_stride,
    slots_stride,
    dst_slots_stride,
    pad_slot_id,
    group_recip,
):
    DIM: tl.constexpr = 64
    DSTATE: tl.constexpr = 128

    program = tl.program_id(0)
    head = program // 4
    batch = tl.program_id(1)
    slot = tl.load(slots + batch * slots_stride).to(tl.int64)
    live = (slot >= 0) & (slot != pad_slot_id)
    dst = tl.load(dst_slots + batch * dst_slots_stride).to(tl.int64)
    kept = live & (dst >= 0) & (dst != pad_slot_id)
    rows_ahead = tl.fdiv(2048.5, tl.num_programs(0).to(tl.float32)).to(tl.int32)
    later = batch + rows_ahead
    wanted = (rows_ahead > 0) & (later < tl.num_programs(1))
    later_slot = tl.load(slots + later * slots_stride, mask=wanted, other=-1).to(tl.int64)
    wanted = (later_slot >= 0) & (later_slot != pad_slot_id)
    first = program % 4 * 16
    rows = tl.arange(0, 16)
    cols = tl.arange(0, 128)

    offsets = rows[:, None] * DSTATE + cols[None, :]
    tile = state + head * (DIM * DSTATE) + first * DSTATE + offsets
    tile += slot * state_slot_stride
    stored = tl.load(tile, mask=live, other=0)
    later_state = state + later_slot * state_slot_stride
    prefetch(later_state + head * (DIM * DSTATE) + first * DSTATE, wanted)

    dt_ = tl.load(dt + batch * dt_row_stride + head * dt_head_stride).to(tl.float32)
    dt_ += tl.load(dt_bias + head * dt_bias_head_stride).to(tl.float32)
    dt_ = softplus(dt_)
    decay = tl.exp(tl.load(A + head * A_head_stride).to(tl.float32) * dt_)
    D_ = tl.load(D + head * D_head_stride).to(tl.float32)
    group = tl.umulhi((2 * head + 1).to(tl.uint32), group_recip).to(tl.int32)
    B_group = B + batch * B_row_stride + group * B_group_stride
    C_group = C + batch * C_row_stride + group * C_group_stride
    B_ = tl.load(B_group + cols).to(tl.float32)
    C_ = tl.load(C_group + cols).to(tl.float32)
    x_rows = x + batch * x_row_stride + head * x_head_stride + first
    x_ = tl.load(x_rows + rows).to(tl.float32)

    h = stored.to(tl.float32) * decay
    h += (x_ * dt_)[:, None] * B_[None, :]
    y = tl.sum(h * C_[None, :], axis=1)
    y += x_ * D_
    out_rows = out + batch * out_row_stride + head * out_head_stride + first
    tl.store(out_rows + rows, y.to(tl.bfloat16))
    new = h.to(tl.bfloat16)
    tile = state + head * (DIM * DSTATE) + first * DSTATE + offsets
    tile += dst * state_slot_stride
    tl.store(tile, new, mask=kept)
