"""gdn_simple: gated_delta_rule_decode for many tokens, written by ssmgen.

arch    sm_80
plan    simple 16x128 warps=1
config  family=gdn dtype=bf16 index_dtype=int64 aligned=False pdl=False state_dtype=fp16
        state_layout=KV rounding=stochastic philox_rounds=7 head_k_dim=96 head_v_dim=128
        gate=bounded kda=True a_dtype=bf16 b_dtype=bf16 a_log_dtype=fp32 has_dt_bias=True
        dt_bias_dtype=fp32 use_qk_l2norm=True grouped=False ntokens=4 has_dst=False
        update_state=True seqlens_dtype=int32 accepted_dtype=None dst_tokens=False
        has_intermediate=False entry_dtype=None
key     ...
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def random_words(seed, octet, token, slot, head):
    # Philox-4x32-7, counter (octet, token, slot, head): four words for the eight elements of an
    # octet, two 16-bit halves each, the even element in the low half.
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = octet.to(tl.uint32)
    c1 = tl.zeros_like(c0) + token
    c2 = tl.zeros_like(c0) + slot.to(tl.uint32)
    c3 = tl.zeros_like(c0) + head.to(tl.uint32)
    for _ in tl.static_range(7):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    words = words.reshape(octet.shape[0], octet.shape[1], 4)
    return tl.join(words, words >> 16).reshape(octet.shape[0], octet.shape[1] * 8)


@triton.jit
def round_stochastic(v, bits):
    # On a scale where the subnormals of fp16 are those of fp32, every value drops its 13 low
    # bits. Noise carries a NaN into a zero; adding what was scaled, far below the last bit kept,
    # changes no other value and makes a NaN of it again.
    small = v * 1.925929944387236e-34
    b = small.to(tl.uint32, bitcast=True) + (bits & 0x1FFF) & 0xFFFFE000
    return tl.fma(b.to(tl.float32, bitcast=True), 5.192296858534828e33, small).to(tl.float16)


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
    seed,
    seqlens,
    state_slot_stride,
    state_head_stride,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    A_log_stride,
    a_token_stride,
    a_head_stride,
    a_channel_stride,
    dt_bias_head_stride,
    dt_bias_channel_stride,
    b_token_stride,
    b_head_stride,
    out_token_stride,
    out_head_stride,
    slots_stride,
    total,
    pad_slot_id,
    group_recip,
    scale_bits,
    lower_bound_bits,
):
    K: tl.constexpr = 96
    V: tl.constexpr = 128

    program = tl.program_id(0)
    head = program // 8
    batch = tl.program_id(1)
    group = tl.umulhi((2 * head + 1).to(tl.uint32), group_recip).to(tl.int32)
    begin = tl.load(seqlens + batch)
    end = tl.load(seqlens + batch + 1)
    broken = (begin < 0) | (end > total) | (end - begin > 4)
    begin = tl.minimum(tl.maximum(begin, 0), total).to(tl.int32)
    length = tl.minimum(tl.maximum(end, 0), total).to(tl.int32) - begin
    slot = tl.load(slots + batch * slots_stride).to(tl.int64)
    live = (slot >= 0) & (slot != pad_slot_id)
    broken &= live
    live = live & ~broken & (length > 0)
    blank = tl.where(broken, float("nan"), 0.0)

    first = program % 8 * 16
    rows = tl.arange(0, 16)
    cols = tl.arange(0, 128)
    offsets = rows[:, None] + cols[None, :] * V
    tile = state + slot * state_slot_stride + head * state_head_stride + first
    h = tl.load(tile + offsets, mask=live & (cols < K)[None, :], other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(A_log + head * A_log_stride).to(tl.float32))
    bias_at = dt_bias + head * dt_bias_head_stride + cols * dt_bias_channel_stride
    bias = tl.load(bias_at, mask=cols < K, other=0.0).to(tl.float32)
    scale = scale_bits.to(tl.float32, bitcast=True)
    lower_bound = lower_bound_bits.to(tl.float32, bitcast=True)

    q_head = q + begin * q_token_stride + group * q_head_stride
    k_head = k + begin * k_token_stride + group * k_head_stride
    v_rows = v + begin * v_token_stride + head * v_head_stride + first
    a_head = a + begin * a_token_stride + head * a_head_stride
    b_head = b + begin * b_token_stride + head * b_head_stride
    out_rows = out + begin * out_token_stride + head * out_head_stride + first
    seed_ = tl.load(seed).to(tl.uint64)

    q_at = q_head + cols
    q_next = tl.load(q_at, mask=(length > 0) & (cols < K), other=0.0)
    k_at = k_head + cols
    k_next = tl.load(k_at, mask=(length > 0) & (cols < K), other=0.0)
    v_next = tl.load(v_rows + rows, mask=length > 0, other=0.0)
    a_at = a_head + cols * a_channel_stride
    a_next = tl.load(a_at, mask=(length > 0) & (cols < K), other=0.0)
    b_next = tl.load(b_head, mask=length > 0, other=0.0)
    for token in tl.range(length):
        q_ = q_next.to(tl.float32)
        k_ = k_next.to(tl.float32)
        v_ = v_next.to(tl.float32)
        a_ = a_next.to(tl.float32)
        b_ = b_next.to(tl.float32)
        upcoming = tl.minimum(token + 1, length - 1)
        q_at = q_head + upcoming * q_token_stride + cols
        q_next = tl.load(q_at, mask=cols < K, other=0.0)
        k_at = k_head + upcoming * k_token_stride + cols
        k_next = tl.load(k_at, mask=cols < K, other=0.0)
        v_next = tl.load(v_rows + upcoming * v_token_stride + rows)
        a_at = a_head + upcoming * a_token_stride + cols * a_channel_stride
        a_next = tl.load(a_at, mask=cols < K, other=0.0)
        b_next = tl.load(b_head + upcoming * b_token_stride)
        q_ *= tl.rsqrt(tl.sum(q_ * q_, axis=0) + 1e-6) * scale
        k_ *= tl.rsqrt(tl.sum(k_ * k_, axis=0) + 1e-6)
        a_ += bias
        decay = tl.exp(lower_bound * sigmoid(rate * a_))
        # An infinite rate makes NaN of the zeros beyond K.
        decay = tl.where(cols < K, decay, 1.0)
        beta = sigmoid(b_)
        h *= decay[None, :]
        delta = beta * (v_ - tl.sum(h * k_[None, :], axis=1))
        h = tl.where((cols < K)[None, :], tl.fma(delta[:, None], k_[None, :], h), h)
        o = tl.sum(h * q_[None, :], axis=1)
        o = tl.where(live, o, blank)
        tl.store(out_rows + token * out_token_stride + rows, o.to(tl.bfloat16))
    octet_cols = tl.arange(0, 16)
    octets = (first + rows)[:, None] * 12 + octet_cols[None, :]
    new = round_stochastic(h, random_words(seed_, octets, length - 1, slot, head))
    tl.store(tile + offsets, new, mask=live & (cols < K)[None, :])
