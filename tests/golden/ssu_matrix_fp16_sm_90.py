"""ssu_matrix: selective_state_update for many tokens, written by ssmgen.

arch    sm_90
plan    matrix 32x128 warps=2
config  family=ssu dtype=bf16 index_dtype=int64 aligned=True pdl=False dt_dtype=fp32
        weight_dtype=fp32 a_dtype=fp32 state_dtype=fp16 state_scale_t=None rounding=nearest
        philox_rounds=0 dim=64 dstate=128 ntokens=6 has_z=True has_d=True has_dt_bias=True
        dt_softplus=True tie_hdim=True has_dst=True update_state=True seqlens_dtype=None
        accepted_dtype=None parents_dtype=None dst_tokens=False has_intermediate=False
        entry_dtype=None
key     ...
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

# As newer versions of Triton call them, and as 3.6 does.
renamed = hasattr(async_copy, "async_load")
async_load = async_copy.async_load if renamed else async_copy.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


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
def silu(v):
    return v / (1.0 + gl.exp(-v))


@gluon.jit
def same(v, layout: gl.constexpr):
    # Every lane already holds what it holds in `layout`; the compiler checks that.
    return gl.convert_layout(v, layout, assert_trivial=True)


@gluon.jit
def spread_columns(v):
    # The 16 bytes a lane has of a row become the pairs of its mma fragments.
    v = v.reshape([v.shape[0], 4, 4, 4, 2]).permute(0, 1, 3, 2, 4)
    return v.reshape([v.shape[0], 128])


@gluon.jit
def spread_rows(v):
    # The neighbouring rows a lane has become rows of its mma fragments.
    parts = v.reshape([2, 2, 2, 2, 2, v.shape[1]]).permute(0, 4, 1, 3, 2, 5)
    return parts.reshape([32, v.shape[1]])


@gluon.jit
def gather_rows(v):
    # The inverse of spread_rows.
    parts = v.reshape([2, 2, 2, 2, 2, v.shape[1]]).permute(0, 2, 4, 3, 1, 5)
    return parts.reshape([32, v.shape[1]])


@gluon.jit
def gather_columns(v):
    # The inverse of spread_columns.
    v = v.reshape([v.shape[0], 4, 4, 4, 2]).permute(0, 1, 3, 2, 4)
    return v.reshape([v.shape[0], 128])


@gluon.jit
def transposed_blocks(v):
    # Each 8 x 8 block transposed, in the fragments a warp has of it.
    return gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
        "=r,r",
        [v],
        dtype=v.dtype,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def one_after_another(first, second):
    # (n, tokens) twice -> (n, 2 tokens).
    both = gl.join(first, second).permute(0, 2, 1)
    return both.reshape([first.shape[0], 2 * first.shape[1]])


@gluon.jit
def three_terms(v):
    # fp32 as the sum of three bf16: all of its 24 bits.
    high = v.to(gl.bfloat16)
    rest = v - high.to(gl.float32)
    middle = rest.to(gl.bfloat16)
    return high, middle, (rest - middle.to(gl.float32)).to(gl.bfloat16)


@gluon.jit
def two_terms(v):
    # fp32 to 16 bits and more, four more than the state is rounded to.
    high = v.to(gl.bfloat16)
    return high, (v - high.to(gl.float32)).to(gl.bfloat16)


@gluon.jit
def ssu_matrix(
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
    dst_slots,
    state_slot_stride,
    x_row_stride,
    x_token_stride,
    x_head_stride,
    dt_row_stride,
    dt_token_stride,
    dt_head_stride,
    A_head_stride,
    B_row_stride,
    B_token_stride,
    B_group_stride,
    C_row_stride,
    C_token_stride,
    C_group_stride,
    D_head_stride,
    z_row_stride,
    z_token_stride,
    z_head_stride,
    dt_bias_head_stride,
    out_row_stride,
    out_token_stride,
    out_head_stride,
    slots_stride,
    dst_slots_stride,
    pad_slot_id,
    group_recip,
):
    DIM: gl.constexpr = 64
    DSTATE: gl.constexpr = 128

    program = gl.program_id(0)
    head = program // 2
    batch = gl.program_id(1)

    # The state: 16 bytes a lane, 4 lanes a row, 2 neighbouring rows a lane.
    TILE: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [1, 0], [0, 32], [0, 64]],
        lane_bases=[[0, 8], [0, 16], [4, 0], [2, 0], [8, 0]],
        warp_bases=[[16, 0]],
        block_bases=[],
        shape=[32, 128],
    )
    # B and C: every warp alike, a token for every fourth lane.
    TOKENS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 0]],
        block_bases=[],
        shape=[8, 128],
    )
    # x, z and out: two tokens a lane, rows as in TILE.
    ROWS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [0, 1]],
        lane_bases=[[0, 2], [0, 4], [4, 0], [2, 0], [8, 0]],
        warp_bases=[[16, 0]],
        block_bases=[],
        shape=[32, 8],
    )
    # A token against a token.
    PAIRS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 0]],
        block_bases=[],
        shape=[8, 8],
    )
    COPY_TILE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [2, 1], [1, 0])
    COPY_TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [2, 1], [1, 0])
    SHARED_TILE: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    SHARED_TOKENS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    SHARED_SCALE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [2, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    TO: gl.constexpr = gl.SliceLayout(1, PAIRS)
    FROM: gl.constexpr = gl.SliceLayout(0, PAIRS)
    TOKEN: gl.constexpr = gl.SliceLayout(0, MMA)

    first = program % 2 * 32
    slot = gl.load(slots + batch * slots_stride).to(gl.int64)
    live = (slot >= 0) & (slot != pad_slot_id)
    dst = gl.load(dst_slots + batch * dst_slots_stride).to(gl.int64)
    kept = live & (dst >= 0) & (dst != pad_slot_id)
    group = gl.umulhi((2 * head + 1).to(gl.uint32), group_recip).to(gl.int32)
    B_group = B + batch * B_row_stride + group * B_group_stride
    C_group = C + batch * C_row_stride + group * C_group_stride

    token = gl.arange(0, 8, layout=gl.SliceLayout(1, COPY_TOKENS))
    token = gl.minimum(token, 5)  # the last again, with no weight
    column = gl.arange(0, DSTATE, layout=gl.SliceLayout(0, COPY_TOKENS))
    B_shared = gl.allocate_shared_memory(gl.bfloat16, [8, DSTATE], SHARED_TOKENS)
    B_tokens = B_group + (token * B_token_stride)[:, None] + column[None, :]
    async_load(B_shared, B_tokens)
    C_shared = gl.allocate_shared_memory(gl.bfloat16, [8, DSTATE], SHARED_TOKENS)
    C_tokens = C_group + (token * C_token_stride)[:, None] + column[None, :]
    async_load(C_shared, C_tokens)
    async_copy.commit_group()

    row = gl.arange(0, 32, layout=gl.SliceLayout(1, ROWS))
    token = gl.arange(0, 8, layout=gl.SliceLayout(0, ROWS))
    given = (token < 6)[None, :]
    x_rows = x + batch * x_row_stride + head * x_head_stride + first
    x_ = gl.load(x_rows + row[:, None] + (token * x_token_stride)[None, :], mask=given, other=0.0)
    z_rows = z + batch * z_row_stride + head * z_head_stride + first
    z_ = gl.load(z_rows + row[:, None] + (token * z_token_stride)[None, :], mask=given, other=0.0)
    to = gl.arange(0, 8, layout=TO)
    from_ = gl.arange(0, 8, layout=FROM)
    dt_head = dt + batch * dt_row_stride + head * dt_head_stride
    dt_ = gl.load(dt_head + to * dt_token_stride, mask=to < 6, other=0.0).to(gl.float32)
    dt_ += gl.load(dt_bias + head * dt_bias_head_stride).to(gl.float32)
    A_ = gl.load(A + head * A_head_stride).to(gl.float32)
    D_ = gl.load(D + head * D_head_stride).to(gl.float32)

    pool = state + slot * state_slot_stride + head * (DIM * DSTATE)
    dst_pool = state + dst * state_slot_stride + head * (DIM * DSTATE)
    tile = pool + first * DSTATE
    tile_row = gl.arange(0, 32, layout=gl.SliceLayout(1, COPY_TILE))
    tile_column = gl.arange(0, DSTATE, layout=gl.SliceLayout(0, COPY_TILE))
    offsets = tile_row[:, None] * DSTATE + tile_column[None, :]
    inside = (tile_row >= 0)[:, None] & (tile_column >= 0)[None, :]
    S_shared = gl.allocate_shared_memory(gl.float16, [32, DSTATE], SHARED_TILE)
    # Every other load is under way before the first of the state.
    barrier()
    async_load(S_shared, tile + offsets, mask=inside & live)
    async_copy.commit_group()

    async_copy.wait_group(1)
    B_ = spread_columns(B_shared.load(TOKENS))
    C_ = spread_columns(C_shared.load(TOKENS))
    # C as fp16 after a power of two a token, which `down` takes back in fp32: exact down to 2^-31
    # of the token's largest.
    C_float = C_shared.load(COPY_TOKENS).to(gl.float32)
    exponent = gl.max(gl.abs(C_float), axis=1).to(gl.int32, bitcast=True) >> 23
    exponent = gl.maximum(exponent, 15)
    up = ((268 - exponent) << 23).to(gl.float32, bitcast=True)
    scaled_shared = gl.allocate_shared_memory(gl.float16, [8, DSTATE], SHARED_TOKENS)
    down_shared = gl.allocate_shared_memory(gl.float32, [8], SHARED_SCALE)
    scaled_shared.store((C_float * up[:, None]).to(gl.float16))
    down_shared.store(((exponent - 14) << 23).to(gl.float32, bitcast=True))
    # C_t B_j of every two tokens.
    B_right = same(B_.permute(1, 0), RIGHT)
    # Of the 16 rows of a fragment, 8 repeat the others.
    C_twice = gl.join(C_, C_).permute(2, 0, 1).reshape([16, DSTATE])
    CB = mma_v2(same(C_twice, LEFT), B_right, gl.zeros([16, 8], gl.float32, layout=MMA))
    CB, _ = CB.reshape([2, 8, 8]).permute(1, 2, 0).split()
    CB = same(CB, PAIRS)
    # B with tokens as the axis summed over, twice: one for each of two terms.
    B_across = transposed_blocks(B_).reshape([1, 8, 16, 8]).permute(0, 3, 2, 1)
    B_across = B_across.reshape([8, DSTATE])
    B_twice = gl.join(B_across, B_across).permute(2, 0, 1).reshape([16, DSTATE])
    B_twice = same(B_twice, RIGHT)
    C_ = spread_columns(scaled_shared.load(TOKENS))
    down = down_shared.load(TOKEN)
    C_right = same(C_.permute(1, 0), RIGHT)

    dt_ = softplus(dt_)
    dt_ = gl.where(to < 6, dt_, 0.0)
    dt_from = gl.convert_layout(dt_, FROM)
    # log2 of the decay up to each token as two sums, so that no difference of two cancels:
    # multiples of 2^-12, which add without error, and small rests. 2^-200 is 0 in fp32.
    log = dt_from * (A_ * 1.4426950408889634)
    log = gl.where(log < -200.0, -200.0, log)
    log_high = (log + 3072.0) - 3072.0
    past = from_[None, :] <= to[:, None]
    high_to = gl.sum(gl.where(past, log_high[None, :], 0.0), axis=1)
    rest_to = gl.sum(gl.where(past, (log - log_high)[None, :], 0.0), axis=1)
    high = gl.convert_layout(high_to, FROM)
    rest = gl.convert_layout(rest_to, FROM)
    between = (high_to[:, None] - high[None, :]) + (rest_to[:, None] - rest[None, :])
    weight = gl.where(past, CB * gl.exp2(between) * dt_from[None, :], 0.0)
    weight_high, weight_middle, weight_low = three_terms(weight)
    weight_right = same(one_after_another(weight_high, weight_middle).permute(1, 0), RIGHT)
    weight_low = one_after_another(weight_low, gl.zeros_like(weight_low))
    weight_low = same(weight_low.permute(1, 0), RIGHT)
    decay = same(gl.exp2(high + rest), TOKEN) * down
    high_last = gl.sum(gl.where(from_ == 7, high, 0.0), axis=0)
    rest_last = gl.sum(gl.where(from_ == 7, rest, 0.0), axis=0)
    decay_last = gl.exp2(high_last + rest_last)
    inflow = gl.exp2((high_last - high) + (rest_last - rest)) * dt_from
    inflow = same(inflow, TOKEN)

    x_ = same(spread_rows(x_), MMA)
    x_left = same(one_after_another(x_, x_), LEFT)
    y = mma_v2(x_left, weight_low, gl.zeros([32, 8], gl.float32, layout=MMA))
    y = mma_v2(x_left, weight_right, y)
    x_ = x_.to(gl.float32)
    y += x_ * D_

    async_copy.wait_group(0)
    h = spread_rows(spread_columns(S_shared.load(TILE)))
    seen = gl.zeros([32, 8], gl.float32, layout=MMA)
    seen = mma_v2(same(h, LEFT), C_right, seen)
    y += seen * decay[None, :]
    y *= silu(same(spread_rows(z_), MMA).to(gl.float32))
    y = same(gather_rows(y.to(gl.bfloat16)), ROWS)
    out_rows = out + batch * out_row_stride + head * out_head_stride + first
    out_tokens = out_rows + row[:, None] + (token * out_token_stride)[None, :]
    gl.store(out_tokens, y, mask=given)

    x_high, x_middle = two_terms(x_ * inflow[None, :])
    # Read again: with what the barrier lets go of, more programs fit.
    barrier()
    h = same(spread_rows(spread_columns(S_shared.load(TILE))), MMA).to(gl.float32)
    new = gl.zeros([32, DSTATE], gl.float32, layout=MMA)
    new = mma_v2(same(one_after_another(x_high, x_middle), LEFT), B_twice, new)
    new = (h * decay_last + new).to(gl.float16)
    # Out through shared memory: a store fills whole lines.
    S_shared.store(same(gather_columns(gather_rows(new)), TILE))
    barrier()
    tile = dst_pool + first * DSTATE
    gl.store(tile + offsets, S_shared.load(COPY_TILE), mask=inside & kept)
