"""ssu_vertical: selective_state_update for one token, written by ssmgen.

arch    sm_90
plan    vertical 16x128 warps=2 stages=2 split=2
config  family=ssu dtype=bf16 index_dtype=int64 aligned=True pdl=False dt_dtype=fp32
        weight_dtype=fp32 a_dtype=fp32 state_dtype=int8 state_scale_t=fp32 rounding=stochastic
        philox_rounds=5 dim=64 dstate=128 ntokens=1 has_z=False has_d=True has_dt_bias=True
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
def random_words(seed, octet, token, slot, head):
    # Philox-4x32-5, counter (octet, token, slot, head): four words for the eight elements of an
    # octet, two 16-bit halves each, the even element in the low half.
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = octet.to(tl.uint32)
    c1 = tl.zeros_like(c0) + token
    c2 = tl.zeros_like(c0) + slot.to(tl.uint32)
    c3 = tl.zeros_like(c0) + head.to(tl.uint32)
    for _ in tl.static_range(5):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return tl.join(tl.join(c0, c2), tl.join(c1, c3))


@triton.jit
def random_bits(seed, octet, token, slot, head):
    # Of each even octet and the odd one after it: a thread has 16 bytes of a row, so it computes
    # the bits of both, and none change hands.
    even = random_words(seed, octet, token, slot, head)
    odd = random_words(seed, octet + 1, token, slot, head)
    words = tl.join(even, odd).permute(0, 1, 4, 2, 3)
    return tl.join(words, words).reshape(octet.shape[0], octet.shape[1] * 16)


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
    # The row's largest magnitude encodes as 127 (1 - 2^-21), so that no rounding passes
    # 127. A zero row has scale 1; a row with inf or NaN has scale NaN, so none is lost.
    peak = tl.reduce(tl.abs(h), 1, max_or_nan)
    bounded = tl.maximum(peak, 7.888609052210118e-31)
    # A quarter of each: their reciprocals are normal numbers.
    encode = 31.749984860420227 * reciprocal(bounded * 0.25)
    scale = bounded * 0.007874019502656579
    scale = tl.where(peak < float("inf"), scale, float("nan"))
    return encode, tl.where(peak == 0.0, 1.0, scale)


@triton.jit
def encode_state(h, encode, bits):
    # The sum has h / scale in its mantissa, in steps of 2^-15. Doubled, and with 16 bits of noise
    # below them, its codes are the bytes above those; 0x80 there undoes the 2^22 of the sum.
    encode *= 32768.0
    # Even elements take the low half of a word, odd ones the high half.
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 u<4>, r<4>;
        fma.rn.f32 u0, $1, $5, 0f4B400000;
        prmt.b32 r0, $9, 0x80, 0x5410;
        mad.lo.u32 u0, u0, 2, r0;
        fma.rn.f32 u1, $2, $6, 0f4B400000;
        prmt.b32 r1, $10, 0x80, 0x5432;
        mad.lo.u32 u1, u1, 2, r1;
        fma.rn.f32 u2, $3, $7, 0f4B400000;
        prmt.b32 r2, $11, 0x80, 0x5410;
        mad.lo.u32 u2, u2, 2, r2;
        fma.rn.f32 u3, $4, $8, 0f4B400000;
        prmt.b32 r3, $12, 0x80, 0x5432;
        mad.lo.u32 u3, u3, 2, r3;
        prmt.b32 u0, u0, u1, 0x62;
        prmt.b32 u2, u2, u3, 0x62;
        prmt.b32 $0, u0, u2, 0x5410;
        }""",
        "=r,r,r,r,r,r,r,r,r,r,r,r,r",
        [h, encode, bits],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def ssu_vertical(
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
    dst_slots,
    seed,
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
    dst_slots_stride,
    pad_slot_id,
    group_recip,
):
    DIM: tl.constexpr = 64
    DSTATE: tl.constexpr = 128

    program = tl.program_id(0)
    head = program // 2
    batch = tl.program_id(1)
    slot = tl.load(slots + batch * slots_stride).to(tl.int64)
    live = (slot >= 0) & (slot != pad_slot_id)
    dst = tl.load(dst_slots + batch * dst_slots_stride).to(tl.int64)
    kept = live & (dst >= 0) & (dst != pad_slot_id)
    rows = tl.arange(0, 16)
    cols = tl.arange(0, 128)
    pool_scale = state_scale + slot * scale_slot_stride + head * DIM
    dst_pool_scale = state_scale + dst * scale_slot_stride + head * DIM

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
    seed_ = tl.load(seed).to(tl.uint64)

    start = program % 2 * 32
    x_rows = x + batch * x_row_stride + head * x_head_stride + start
    x_next = tl.load(x_rows + rows)
    for step in tl.range(2, num_stages=2, loop_unroll_factor=2):
        first = step * 16 + start
        upcoming = tl.minimum(step + 1, 1) * 16
        offsets = rows[:, None] * DSTATE + cols[None, :]
        tile = state + head * (DIM * DSTATE) + first * DSTATE + offsets
        tile += slot * state_slot_stride
        stored = tl.load(tile, mask=live, other=0)
        scale = tl.load(pool_scale + first + rows, mask=live, other=1.0)
        x_ = x_next.to(tl.float32)
        x_next = tl.load(x_rows + upcoming + rows)
        h = stored.to(tl.float32) * (scale * decay)[:, None]
        h += (x_ * dt_)[:, None] * B_[None, :]
        y = tl.sum(h * C_[None, :], axis=1)
        y += x_ * D_
        out_rows = out + batch * out_row_stride + head * out_head_stride + first
        tl.store(out_rows + rows, y.to(tl.bfloat16))
        octets = (first + rows)[:, None] * (DSTATE // 8) + tl.arange(0, 8)[None, :] * 2
        bits = random_bits(seed_, octets, 0, dst, head)
        encode, scale = row_scale(h)
        new = encode_state(h, encode[:, None], bits)
        tile = state + head * (DIM * DSTATE) + first * DSTATE + offsets
        tile += dst * state_slot_stride
        tl.store(tile, new, mask=kept)
        tl.store(dst_pool_scale + first + rows, scale, mask=kept)
