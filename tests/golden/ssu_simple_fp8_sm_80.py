"""ssu_simple: selective_state_update for one token, written by ssmgen.

arch    sm_80
plan    simple 16x128 warps=2
config  family=ssu dtype=bf16 index_dtype=int64 aligned=True pdl=False dt_dtype=fp32
        weight_dtype=fp32 a_dtype=fp32 state_dtype=fp8_e4m3fn state_scale_t=fp32
        rounding=nearest philox_rounds=0 dim=64 dstate=128 ntokens=1 has_z=False has_d=True
        has_dt_bias=True dt_softplus=True tie_hdim=True has_dst=False update_state=True
        seqlens_dtype=None accepted_dtype=None parents_dtype=None dst_tokens=False
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
def decode_fp8(q):
    # e4m3 bits, moved to where fp32 keeps exponent and mantissa; 2^120 is the difference of bias.
    b = q.to(tl.uint32)
    v = ((b & 0x7F) << 20 | (b & 0x80) << 24).to(tl.float32, bitcast=True)
    return tl.where((b & 0x7F) == 0x7F, float("nan"), v * 1.329227995784916e36)


@triton.jit
def max_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reciprocal(v):
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def row_scale(h):
    # The row's largest magnitude encodes as 448 (1 - 2^-21), so that no rounding passes
    # 448. A zero row has scale 1; a row with inf or NaN has scale NaN, so none is lost.
    peak = tl.reduce(tl.abs(h), 1, max_or_nan)
    bounded = tl.maximum(peak, 7.888609052210118e-31)
    # A quarter of each: their reciprocals are normal numbers.
    encode = 111.99994659423828 * reciprocal(bounded * 0.25)
    scale = bounded * 0.0022321439215120214
    scale = tl.where(peak < float("inf"), scale, float("nan"))
    return encode, tl.where(peak == 0.0, 1.0, scale)


@triton.jit
def encode_state(h, encode):
    # On a scale where the subnormals of e4m3 are those of fp32, every value drops 20 bits.
    v = h * encode
    b = (tl.abs(v) * 7.52316384526264e-37).to(tl.uint32, bitcast=True)
    b = (b + 0x7FFFF + ((b >> 20) & 1)) >> 20
    sign = (v.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return (b | sign).to(tl.uint8)


@triton.jit
def ssu_simple(
    state,
    state_scale,
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    out,
    slots,
    state_slot_stride,
    scale_slot_stride,
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
    first = program % 4 * 16
    rows = tl.arange(0, 16)
    cols = tl.arange(0, 128)

    pool_scale = state_scale + slot * scale_slot_stride + head * DIM
    offsets = rows[:, None] * DSTATE + cols[None, :]
    tile = state + head * (DIM * DSTATE) + first * DSTATE + offsets
    tile += slot * state_slot_stride
    stored = tl.load(tile, mask=live, other=0)
    scale = tl.load(pool_scale + first + rows, mask=live, other=1.0)

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

    h = decode_fp8(stored) * (scale * decay)[:, None]
    h += (x_ * dt_)[:, None] * B_[None, :]
    y = tl.sum(h * C_[None, :], axis=1)
    y += x_ * D_
    out_rows = out + batch * out_row_stride + head * out_head_stride + first
    tl.store(out_rows + rows, y.to(tl.bfloat16))
    encode, scale = row_scale(h)
    new = encode_state(h, encode[:, None])
    tl.store(tile, new, mask=live)
    tl.store(pool_scale + first + rows, scale, mask=live)
