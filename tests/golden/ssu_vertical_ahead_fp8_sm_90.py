"""ssu_vertical: selective_state_update for one token, written by ssmgen.

arch    sm_90
plan    vertical 16x128 warps=2 stages=1
config  family=ssu dtype=bf16 index_dtype=int64 aligned=True pdl=False dt_dtype=fp32
        weight_dtype=fp32 a_dtype=fp32 state_dtype=fp8_e4m3fn state_scale_t=fp32
        rounding=stochastic philox_rounds=10 dim=64 dstate=128 ntokens=1 has_z=True has_d=True
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
def silu(v):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def random_words(seed, octet, token, slot, head):
    # Philox-4x32-10, counter (octet, token, slot, head): four words for the eight elements of an
    # octet, two 16-bit halves each, the even element in the low half.
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = octet.to(tl.uint32)
    c1 = tl.zeros_like(c0) + token
    c2 = tl.zeros_like(c0) + slot.to(tl.uint32)
    c3 = tl.zeros_like(c0) + head.to(tl.uint32)
    for _ in tl.static_range(10):
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
def encode_state(h, encode, bits):
    # On a scale where the subnormals of e4m3 are those of fp32, every value drops 20 bits.
    # Even elements take the low half of a word, odd ones the high half.
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 u<4>, r<4>, n<4>;
        mul.rn.f32 u0, $1, $5;
        abs.f32 r0, u0;
        mul.rn.f32 r0, r0, 0f03800000;
        prmt.b32 n0, $9, 0, 0x4104;
        mad.lo.u32 r0, r0, 16, n0;
        lop3.b32 u0, r0, u0, 0x7FFFFFFF, 0xE4;
        mul.rn.f32 u1, $2, $6;
        abs.f32 r1, u1;
        mul.rn.f32 r1, r1, 0f03800000;
        prmt.b32 n1, $10, 0, 0x4324;
        mad.lo.u32 r1, r1, 16, n1;
        lop3.b32 u1, r1, u1, 0x7FFFFFFF, 0xE4;
        mul.rn.f32 u2, $3, $7;
        abs.f32 r2, u2;
        mul.rn.f32 r2, r2, 0f03800000;
        prmt.b32 n2, $11, 0, 0x4104;
        mad.lo.u32 r2, r2, 16, n2;
        lop3.b32 u2, r2, u2, 0x7FFFFFFF, 0xE4;
        mul.rn.f32 u3, $4, $8;
        abs.f32 r3, u3;
        mul.rn.f32 r3, r3, 0f03800000;
        prmt.b32 n3, $12, 0, 0x4324;
        mad.lo.u32 r3, r3, 16, n3;
        lop3.b32 u3, r3, u3, 0x7FFFFFFF, 0xE4;
        prmt.b32 u0, u0, u1, 0x73;
        prmt.b32 u2, u2, u3, 0x73;
        prmt.b32 $0, u0, u2, 0x5410;
        }""",
        "=r,r,r,r,r,r,r,r,r,r,r,r,r",
        [h, encode, bits],
        dtype=tl.uint8,
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
    z,
    dt_bias,
    out,
    slots,
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
    z_row_stride,
    z_head_stride,
    dt_bias_head_stride,
    out_row_stride,
    out_head_stride,
    slots_stride,
    pad_slot_id,
    group_recip,
):
    DIM: tl.constexpr = 64
    DSTATE: tl.constexpr = 128

    head = tl.program_id(0)
    batch = tl.program_id(1)
    slot = tl.load(slots + batch * slots_stride).to(tl.int64)
    live = (slot >= 0) & (slot != pad_slot_id)
    rows = tl.arange(0, 16)
    cols = tl.arange(0, 128)
    pool_scale = state_scale + slot * scale_slot_stride + head * DIM

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

    offsets = rows[:, None] * DSTATE + cols[None, :]
    first = 0
    first_tile = state + head * (DIM * DSTATE) + first * DSTATE + offsets
    first_tile += slot * state_slot_stride
    stored_next = tl.load(first_tile, mask=live, other=0)
    scale_next = tl.load(pool_scale + first + rows, mask=live, other=1.0)
    x_rows = x + batch * x_row_stride + head * x_head_stride
    x_next = tl.load(x_rows + rows)
    z_rows = z + batch * z_row_stride + head * z_head_stride
    z_next = tl.load(z_rows + rows)
    for step in tl.range(4, num_stages=1, loop_unroll_factor=2):
        first = step * 16
        upcoming = tl.minimum(step + 1, 3) * 16
        tile = first_tile + step * 16 * DSTATE
        stored = stored_next
        scale = scale_next
        stored_next = tl.load(first_tile + upcoming * DSTATE, mask=live, other=0)
        scale_next = tl.load(pool_scale + upcoming + rows, mask=live, other=1.0)
        x_ = x_next.to(tl.float32)
        x_next = tl.load(x_rows + upcoming + rows)
        z_ = z_next.to(tl.float32)
        z_next = tl.load(z_rows + upcoming + rows)
        h = stored.to(tl.float8e4nv, bitcast=True).to(tl.float32) * (scale * decay)[:, None]
        h += (x_ * dt_)[:, None] * B_[None, :]
        y = tl.sum(h * C_[None, :], axis=1)
        y += x_ * D_
        y *= silu(z_)
        out_rows = out + batch * out_row_stride + head * out_head_stride + first
        tl.store(out_rows + rows, y.to(tl.bfloat16))
        octets = (first + rows)[:, None] * (DSTATE // 8) + tl.arange(0, 8)[None, :] * 2
        bits = random_bits(seed_, octets, 0, slot, head)
        encode, scale = row_scale(h)
        new = encode_state(h, encode[:, None], bits)
        tl.store(tile, new, mask=live)
        tl.store(pool_scale + first + rows, scale, mask=live)
