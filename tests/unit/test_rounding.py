"""Rounding to storage types, against grids of the types' own values."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmgen.reference import PEAK, QMAX, dequantise, quantise, random_bits, round_to

E4M3 = torch.float8_e4m3fn
HALVES = [torch.float16, torch.bfloat16]
SCALED = list(QMAX)
INTEGERS = [torch.int16, torch.int8]
INF = float("inf")
NAN = float("nan")
FLT_MAX = float(np.finfo(np.float32).max)

# Two-sided normal bound whose false-alarm rate is 1e-9 for a test; seeds are fixed besides.
Z_BOUND = 6.11


def grid_of(dtype):
    """Magnitudes in code order, as fp64, ended by the step after the largest finite one."""
    if dtype == E4M3:
        finite = torch.arange(0x7F).to(torch.uint8).view(E4M3).double()
        return torch.cat([finite, torch.tensor([480.0], dtype=torch.float64)])
    codes, after = {torch.float16: (0x7C00, 2.0**16), torch.bfloat16: (0x7F80, 2.0**128)}[dtype]
    finite = torch.arange(codes).to(torch.int16).view(dtype).double()
    return torch.cat([finite, torch.tensor([after], dtype=torch.float64)])


def code_of(rounded):
    """Position in the grid, sign dropped."""
    if rounded.dtype == E4M3:
        return (rounded.view(torch.uint8) & 0x7F).long()
    return (rounded.view(torch.int16) & 0x7FFF).long()


def neighbours(values, dtype):
    """Position of the grid value at or below |v|, and how far |v| is from it, in steps."""
    grid = grid_of(dtype)
    magnitude = values.double().abs()
    below = (torch.searchsorted(grid, magnitude, right=True) - 1).clamp(max=len(grid) - 2)
    return below, (magnitude - grid[below]) / (grid[below + 1] - grid[below])


def fp32_values(exponents, per_exponent, seed):
    """Random signed fp32 values, `per_exponent` in each binade."""
    random = torch.Generator().manual_seed(seed)
    exponents = torch.tensor(list(exponents), dtype=torch.float64).unsqueeze(1)
    mantissa = 1 + torch.randint(0, 1 << 23, (len(exponents), per_exponent), generator=random) / (
        torch.tensor(2.0**23, dtype=torch.float64)
    )
    sign = 1 - 2 * torch.randint(0, 2, mantissa.shape, generator=random)
    return (sign * mantissa * 2.0**exponents).flatten().to(torch.float32)


def with_unit_scale(values, dtype):
    """The values as one row in which a code is its own value, because the peak is PEAK."""
    return torch.cat([values, torch.tensor([PEAK[dtype]])])


def same_bits(a, b):
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(view), b.view(view))


# Nearest


@pytest.mark.parametrize("dtype", HALVES)
def test_nearest_rounds_every_midpoint_to_even_and_its_fp32_neighbours_to_their_side(dtype):
    grid = grid_of(dtype)
    middle = ((grid[:-1] + grid[1:]) / 2).to(torch.float32)
    code = torch.arange(len(middle))
    up = torch.nextafter(middle, torch.tensor(INF))
    down = torch.nextafter(middle, torch.tensor(0.0))
    for sign in (1, -1):
        assert torch.equal(code_of(round_to(sign * middle, dtype)), code + code % 2)
        assert torch.equal(code_of(round_to(sign * up, dtype)), code + 1)
        assert torch.equal(code_of(round_to(sign * down, dtype)), code)


def test_nearest_e4m3_rounds_every_midpoint_to_even_and_its_fp32_neighbours_to_their_side():
    grid = grid_of(E4M3)[:-1]
    middle = ((grid[:-1] + grid[1:]) / 2).to(torch.float32)
    code = torch.arange(len(middle))
    up = torch.nextafter(middle, torch.tensor(INF))
    down = torch.nextafter(middle, torch.tensor(0.0))
    for values, expected in ((middle, code + code % 2), (up, code + 1), (down, code)):
        for sign in (1, -1):
            codes, scale = quantise(with_unit_scale(sign * values, E4M3), E4M3)
            assert torch.equal(code_of(codes)[:-1], expected)
            assert float(scale) == np.float32(PEAK[E4M3]) * np.float32(1 / PEAK[E4M3])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_nearest_integers_round_ties_to_even(dtype):
    values = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.4999, 3.5001, 126.5])
    codes, _ = quantise(with_unit_scale(values, dtype), dtype)
    assert codes[:-1].tolist() == [-2, -2, 0, 0, 2, 2, 3, 4, 126]


def test_fp32_storage_keeps_every_bit():
    pattern = torch.tensor([0, 1, 0x7FFFFF, 0x7F7FFFFF, 0x7F800000, -(2**31), -1 << 23, 1 << 23])
    values = pattern.to(torch.int32).view(torch.float32)
    assert same_bits(round_to(values, torch.float32), values)


def test_fp64_values_are_rounded_to_fp32_first():
    just_above_a_tie = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)
    assert float(round_to(just_above_a_tie, torch.float16)) == 1.0


# Stochastic: float kinds


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("noise", [0, 1, 0x1FFF, 0x8000, 0xFFFF])
def test_a_value_of_the_storage_type_is_exact_under_any_random_bits(dtype, noise):
    stored = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    rounded = round_to(stored.float(), dtype, torch.tensor(noise))
    number = ~stored.isnan()
    assert same_bits(rounded[number], stored[number])
    assert bool(rounded[~number].isnan().all())


@pytest.mark.parametrize("noise", [0, 1, 0x8000, 0xFFFF])
def test_an_e4m3_value_is_exact_under_any_random_bits(noise):
    stored = torch.arange(256).to(torch.uint8)
    stored = stored[(stored & 0x7F) < 0x7E].view(E4M3)
    codes, _ = quantise(with_unit_scale(stored.float(), E4M3), E4M3, torch.tensor(noise))
    assert same_bits(codes[:-1], stored)


def check_every_noise(codes, below, fraction, steps):
    """`codes` (noise, value) lie on the two neighbours, rise with noise, and rise often enough."""
    rises = codes - below
    assert int(rises.min()) >= 0
    assert int(rises.max()) <= 1
    assert bool((rises[1:] >= rises[:-1]).all())
    assert torch.equal(rises.sum(0).double(), steps(fraction))


def test_fp16_rises_for_exactly_the_dropped_fraction_of_all_random_bits():
    # Below the fp16 subnormal step of 2**-24 the value itself is first rounded to 2**-37.
    edges = torch.tensor([65504.0, 65519.0, 65520.0, 65535.996, 2.0**-14, 2.0**-24, 2.0**-25])
    values = torch.cat([fp32_values(range(-42, 16), 5, seed=1), edges, -edges])
    noise = torch.arange(8192).unsqueeze(1)
    rounded = round_to(values.expand(8192, -1), torch.float16, noise)
    below, fraction = neighbours(values, torch.float16)
    check_every_noise(code_of(rounded), below, fraction, lambda f: (f * 8192).round())
    assert bool((torch.signbit(rounded) == torch.signbit(values)).all())


def test_fp16_ignores_all_but_thirteen_random_bits():
    values = fp32_values(range(-30, 16), 20, seed=2)
    noise = torch.arange(len(values)) * 37
    low = round_to(values, torch.float16, noise & 0x1FFF)
    assert same_bits(low, round_to(values, torch.float16, noise & 0x1FFF | 0xE000))


def test_fp16_overflows_to_infinity_from_65536_on():
    values = torch.cat([torch.tensor([65536.0, FLT_MAX]), fp32_values(range(16, 128), 3, 3).abs()])
    for noise in (0, 0x1FFF):
        for sign in (1, -1):
            rounded = round_to(sign * values, torch.float16, torch.tensor(noise))
            assert bool((rounded == sign * INF).all())


def test_bf16_rises_for_exactly_the_dropped_fraction_of_all_random_bits():
    subnormal = torch.tensor([1, 2, 0x7FFF, 0x8001, 0x7FFFFF], dtype=torch.int32)
    top = torch.tensor([0x7F7F0001, 0x7F7F8000, 0x7F7FFFFF], dtype=torch.int32)
    values = torch.cat(
        [fp32_values(range(-126, 128, 6), 1, seed=4), torch.cat([subnormal, top]).view(torch.float)]
    )
    noise = torch.arange(65536).unsqueeze(1)
    rounded = round_to(values.expand(65536, -1), torch.bfloat16, noise)
    below, fraction = neighbours(values, torch.bfloat16)
    check_every_noise(code_of(rounded), below, fraction, lambda f: f * 65536)
    assert bool((torch.signbit(rounded) == torch.signbit(values)).all())


def test_e4m3_rises_for_the_dropped_fraction_of_all_random_bits():
    # 16 random bits against 20 dropped ones: the count is the fraction in 65536ths, rounded down.
    edges = torch.tensor([447.9, 433.0, 2.0**-6, 2.0**-9, 2.0**-10, 0.0155])
    values = with_unit_scale(torch.cat([fp32_values(range(-22, 8), 1, seed=5), edges]), E4M3)
    noise = torch.arange(65536).unsqueeze(1)
    codes, _ = quantise(values.expand(65536, -1), E4M3, noise)
    below, fraction = neighbours(values, E4M3)
    check_every_noise(
        code_of(codes), below, fraction, lambda f: ((f * 2.0**20).round() / 16).floor()
    )
    negative = (codes.view(torch.uint8) >> 7).bool()
    assert bool((negative == torch.signbit(values)).all())


@pytest.mark.parametrize("noise", [0, 0x1FFF, 0xFFFF])
@pytest.mark.parametrize("dtype", HALVES)
def test_nan_infinity_and_signed_zero_survive_stochastic_rounding(dtype, noise):
    bits = torch.tensor(noise)
    pattern = [0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0x7F80FFFF, -1, -(1 << 23) + 1]
    nans = torch.tensor(pattern, dtype=torch.int32).view(torch.float32)
    assert bool(round_to(nans, dtype, bits).isnan().all())
    values = torch.tensor([INF, -INF, 0.0, -0.0])
    assert same_bits(round_to(values, dtype, bits), values.to(dtype))


def test_a_value_that_underflows_keeps_its_sign():
    tiny = torch.tensor([2.0**-149, -(2.0**-149)])
    for dtype in HALVES:
        rounded = round_to(tiny, dtype, torch.tensor(0))
        assert same_bits(rounded, torch.tensor([0.0, -0.0]).to(dtype))


def test_fp32_refuses_random_bits():
    with pytest.raises(ValueError, match="float32"):
        round_to(torch.ones(1), torch.float32, torch.tensor(0))


# Stochastic: integers


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_rise_for_exactly_the_fraction_of_all_random_bits(dtype):
    limit = PEAK[dtype]
    random = torch.Generator().manual_seed(6)
    spread = (torch.rand(24, generator=random) * 2 - 1) * limit
    edges = torch.tensor([0.0, -0.0, 0.5, -0.5, 2.0**-16, 2.0**-17, -(2.0**-17), -(2.0**-30), 0.1])
    values = with_unit_scale(torch.cat([spread, edges]), dtype)
    noise = torch.arange(65536).unsqueeze(1)
    codes, _ = quantise(values.expand(65536, -1), dtype, noise)
    floor_ = values.double().floor()
    fraction = values.double() - floor_
    rises = {
        torch.int8: lambda f: (f * 32768).round() * 2,
        # Half a step more is noise enough with the largest: 65535.5 is rounded to 65536.
        torch.int16: lambda f: (f * 65536 + 0.5).floor(),
    }
    check_every_noise(codes.double(), floor_, fraction, rises[dtype])


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(INTEGERS),
    st.floats(-1, 1, width=32),
    st.floats(2.0**-110, 2.0**120, width=32),
    st.integers(-2, 2),
)
def test_integer_codes_follow_the_formula_in_exact_arithmetic(dtype, share, peak, offset):
    value = np.float32(share * peak)
    limit = int(QMAX[dtype])
    encode = np.float32(PEAK[dtype]) / max(np.float32(peak), np.float32(2.0**-100))
    exact = Fraction(float(value)) * Fraction(float(encode))
    noise = min(max(-round(exact * 65536) % 65536 + offset, 0), 65535)
    finer = exact * 32768
    noisy = 2 * round(finer) + noise if dtype == torch.int8 else round(2 * finer + noise)
    row = torch.tensor([float(value), peak])
    codes, _ = quantise(row, dtype, torch.tensor([noise, 65535]))
    assert int(codes[0]) == noisy // 65536
    assert max(abs(int(code)) for code in codes) <= limit


# Block scales


@pytest.mark.parametrize("bits", [None, torch.tensor(0), torch.tensor(65535)])
@pytest.mark.parametrize("dtype", SCALED)
def test_a_row_of_zeros_has_scale_one_and_zero_codes(dtype, bits):
    codes, scale = quantise(torch.tensor([[0.0, -0.0, 0.0], [1.0, 0.0, -1.0]]), dtype, bits)
    assert float(scale[0]) == 1.0
    assert bool((codes[0].float() == 0).all())
    assert float(scale[1]) != 1.0


@pytest.mark.parametrize("bits", [None, torch.tensor(0), torch.tensor(65535)])
@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_a_row_with_nan_or_infinity_decodes_to_nan_and_spoils_no_other_row(dtype, bits, poison):
    values = torch.tensor([[1.0, 2.0, 3.0], [1.0, poison, 0.0], [3.0, 2.0, 1.0]])
    codes, scale = quantise(values, dtype, bits)
    assert scale.isnan().tolist() == [False, True, False]
    decoded = dequantise(codes, scale)
    assert bool(decoded[1].isnan().all())
    assert not bool(decoded[[0, 2]].isnan().any())


@pytest.mark.parametrize("dtype", SCALED)
def test_scale_is_peak_times_the_rounded_reciprocal_of_the_largest_code(dtype):
    peaks = fp32_values(range(-130, 128), 4, seed=7)
    _, scale = quantise(torch.stack([peaks, peaks / 3], dim=-1), dtype)
    floor_ = np.maximum(np.abs(peaks.numpy()), np.float32(2.0**-100))
    expected = floor_ * np.float32(1 / PEAK[dtype])
    assert same_bits(scale, torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", SCALED)
def test_the_encode_factor_is_the_correctly_rounded_quotient(dtype):
    # A factor that is one unit in the last place off moves an int16 product by up to 0.004, so
    # some of these codes change.
    peaks = fp32_values(range(-20, 20), 50, seed=8).abs()
    shares = torch.rand(len(peaks), 64, generator=torch.Generator().manual_seed(9))
    values = torch.cat([shares * peaks.unsqueeze(1), peaks.unsqueeze(1)], dim=1)
    codes, _ = quantise(values, dtype)
    encode = np.float32(PEAK[dtype]) / peaks.numpy()
    u = torch.from_numpy(values.numpy() * encode[:, None])
    limit = QMAX[dtype]
    if dtype == E4M3:
        expected = u.clamp(-limit, limit).to(dtype)
    else:
        expected = torch.from_numpy(np.rint(u.numpy())).to(dtype)
    assert torch.equal(codes.float(), expected.float())


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize(
    "peak", [FLT_MAX * (1 - 2.0**-20), 1.0, 3e-5, 2.0**-99, 2.0**-100, 2.0**-101, 2.0**-149]
)
def test_decoding_comes_back_within_half_a_step(dtype, peak):
    random = torch.Generator().manual_seed(10)
    shares = torch.rand(4, 64, generator=random) * 2 - 1
    shares[:, 0] = 1.0
    values = shares * peak
    codes, scale = quantise(values, dtype)
    decoded = dequantise(codes, scale, torch.float64)
    # Half a step of the storage, and the four fp32 roundings of encoding and decoding.
    step = scale.double().unsqueeze(-1)
    magnitude = values.double().abs()
    half = torch.maximum(magnitude / 16, step * 2.0**-10) if dtype == E4M3 else step / 2
    assert bool(
        ((decoded - values.double()).abs() <= half * (1 + 2.0**-20) + magnitude / 2**22).all()
    )


@pytest.mark.parametrize("dtype", SCALED)
def test_the_peak_of_a_row_takes_the_largest_code(dtype):
    peaks = fp32_values(range(-99, 127), 4, seed=11)
    for bits in (None, torch.tensor(0x8000)):
        codes, _ = quantise(torch.stack([peaks, peaks * 0.25], dim=-1), dtype, bits)
        assert bool((codes[:, 0].float().abs() >= QMAX[dtype] - 1).all())
        assert bool((codes[:, 0].float().abs() <= QMAX[dtype]).all())
    nearest, _ = quantise(torch.stack([peaks, peaks * 0.25], dim=-1), dtype)
    assert bool((nearest[:, 0].float().abs() == QMAX[dtype]).all())


@pytest.mark.parametrize("dtype", SCALED)
def test_codes_never_leave_the_range_and_never_are_nan(dtype):
    values = torch.randn(512, 32, generator=torch.Generator().manual_seed(12)) * 1e3
    values[:, 0] = values.abs().amax(1)
    for noise in (0, 0x7FFF, 0xFFFF):
        codes, _ = quantise(values, dtype, torch.tensor(noise))
        assert bool((codes.float().abs() <= QMAX[dtype]).all())


@pytest.mark.parametrize("dtype", SCALED)
def test_a_row_is_encoded_alone(dtype):
    values = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(13))
    bits = random_bits(1, torch.arange(5), 1, 3, 16).squeeze(1)
    codes, scale = quantise(values, dtype, bits)
    for i in range(5):
        alone, alone_scale = quantise(values[i, 1], dtype, bits[i, 1])
        assert same_bits(codes[i, 1], alone)
        assert torch.equal(scale[i, 1], alone_scale)


def test_decoding_is_one_fp32_product_whatever_the_result_dtype():
    codes = torch.tensor([[32767, -1, 3]], dtype=torch.int16)
    scale = torch.tensor([0.1])
    expected = torch.from_numpy(codes.numpy().astype(np.float32) * np.float32(0.1))
    assert torch.equal(dequantise(codes, scale), expected)
    assert torch.equal(dequantise(codes, scale, torch.float64), expected.double())


# Unbiasedness with the bits that kernels use


def z_scores(up, fraction, sign):
    """Of the count of rises, plain and signed, against independent draws of probability f."""
    deviation = (up.double() - fraction).flatten()
    spread = (fraction * (1 - fraction)).sum().sqrt()
    return float(deviation.sum() / spread), float((deviation * sign.flatten()).sum() / spread)


@pytest.mark.parametrize("dtype", [*HALVES, *SCALED])
def test_stochastic_rounding_with_philox_bits_is_unbiased(dtype):
    shape = (8, 8, 32, 128)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(14))
    bits = random_bits(99, torch.arange(8), *shape[1:])
    if dtype in HALVES:
        below, fraction = neighbours(values, dtype)
        up = code_of(round_to(values, dtype, bits)) - below
    else:
        codes, _ = quantise(values, dtype, bits)
        peak = values.abs().amax(-1, keepdim=True).double()
        u = values.double() * (PEAK[dtype] / peak)
        if dtype == E4M3:
            below, fraction = neighbours(u, dtype)
            up = code_of(codes) - below
        else:
            below = u.floor()
            fraction = u - below
            up = codes.double() - below
    plain, signed = z_scores(up, fraction, values.sign())
    assert abs(plain) < Z_BOUND
    assert abs(signed) < Z_BOUND


def test_small_increments_survive_stochastic_rounding_and_not_nearest():
    # 1 + k/4096 for 256 steps: each step is 1/32 of the bf16 step of 2**-7, so nearest never moves.
    # The sum of 4096 independent walks has standard deviation below sqrt(256 * p) * 2**-7 each.
    nearest = torch.ones(4096, dtype=torch.bfloat16)
    walk = torch.ones(4096, dtype=torch.bfloat16)
    for token in range(256):
        bits = random_bits(5, torch.arange(1), 1, 32, 128, token=token).flatten()
        nearest = round_to(nearest.float() + 2.0**-12, torch.bfloat16)
        walk = round_to(walk.float() + 2.0**-12, torch.bfloat16, bits)
    assert bool((nearest == 1).all())
    deviation = (256 / 32) ** 0.5 * 2.0**-7 / 4096**0.5
    assert abs(float(walk.double().mean()) - 1.0625) < Z_BOUND * deviation


# Errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.int8, E4M3, torch.int32])
def test_round_to_names_a_dtype_it_does_not_know(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        round_to(torch.ones(2), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.uint8])
def test_quantise_and_dequantise_name_a_dtype_they_do_not_know(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        quantise(torch.ones(2), dtype)
    with pytest.raises(TypeError, match=str(dtype)):
        dequantise(torch.ones(2).to(dtype), torch.ones(()))


def test_random_bits_must_be_integers():
    with pytest.raises(TypeError, match="integers"):
        round_to(torch.ones(2), torch.float16, torch.ones(2))
    with pytest.raises(TypeError, match="integers"):
        quantise(torch.ones(2), torch.int8, torch.ones(2))
