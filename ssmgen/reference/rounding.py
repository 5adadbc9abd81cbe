"""From fp32 values to what the state is stored in, and back.

Float kinds (`round_to`) are stored as they are. Block-scaled kinds (`quantise`) keep one fp32
decode scale per row of `dstate` values. Stochastic rounding takes 16 random bits per element and
is done on the grid of the storage type itself, subnormals included: adding noise below the last
kept bit and truncating rounds up with the probability of the dropped fraction (Croci et al.,
"Stochastic rounding: implementation, error analysis and applications", 2022, section 2).

The formulas need IEEE fp32 subnormals: `torch.set_flush_denormal(True)` breaks them.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentTypeError, ArgumentValueError

__all__ = ["PEAK", "QMAX", "dequantise", "quantise", "round_to"]

QMAX = {torch.int16: 32767.0, torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

# What a row's peak encodes as: a little below the largest code, so that no rounding passes it.
PEAK = {dtype: largest * (1 - 2.0**-21) for dtype, largest in QMAX.items()}
_SMALLEST_PEAK = 2.0**-100
# Powers of two that move the smallest normal number of a storage type onto that of fp32, so that
# its subnormals are fp32 subnormals and the same number of bits is dropped everywhere.
_FP16_TO_FP32 = 2.0**-112
_E4M3_TO_FP32 = 2.0**-120


def round_to(
    values: torch.Tensor, dtype: torch.dtype, bits: torch.Tensor | None = None
) -> torch.Tensor:
    """Round to fp32, bf16 or fp16.

    Args:
        values: any shape, any float dtype; converted to fp32 first.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        bits: integers in [0, 65536) that broadcast to the shape of `values`, for stochastic
            rounding (fp16 uses the low 13); None rounds to nearest, ties to even.

    Returns:
        The shape of `values`, in `dtype`. Overflow goes to infinity; NaN, infinities and the sign
        of zero are kept.

    Raises:
        ArgumentTypeError: `dtype` is not one of the three, or `bits` are not integers.
        ArgumentValueError: `bits` are given for fp32, which drops nothing.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ArgumentTypeError(f"round_to knows float32, bfloat16 and float16, found {dtype}")
    v = values.to(torch.float32)
    if bits is None:
        return v.to(dtype)
    noise = _noise(bits)
    if dtype == torch.bfloat16:
        rounded = ((v.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)
    elif dtype == torch.float16:
        pattern = (v * _FP16_TO_FP32).view(torch.int32) + (noise & 0x1FFF)
        rounded = ((pattern & ~0x1FFF).view(torch.float32) * (1 / _FP16_TO_FP32)).to(dtype)
    else:
        raise ArgumentValueError("stochastic rounding needs a 16- or 8-bit dtype, found float32")
    return rounded.masked_fill(v.isnan(), torch.nan)


def quantise(
    values: torch.Tensor, dtype: torch.dtype, bits: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode rows as int16, int8 or fp8 e4m3 with one fp32 decode scale per row.

    With m = max|v| over the last axis, m' = max(m, 2**-100) and PEAK the largest code less one
    part in 2**21, values are multiplied by ``fp32(PEAK / m')`` and the scale is
    ``fp32(m' * fp32(1 / PEAK))``. A row of
    zeros has scale 1 and zero codes (fp8 keeps the sign of each zero). A row that holds a NaN or
    an infinity is poisoned: its scale is NaN, its codes are unspecified.

    Args:
        values: (..., dstate), any float dtype; converted to fp32 first.
        dtype: torch.int16, torch.int8 or torch.float8_e4m3fn.
        bits: integers in [0, 65536) that broadcast to the shape of `values`, for stochastic
            rounding; None rounds to nearest, ties to even. With bits r, integer kinds take
            the floor of ``(2 * rint(u * 2**15) + r) / 2**16``, int8, or ``rint(u * 2**16 + r) /
            2**16``, int16, with u exact; fp8 adds r to the top 16 of the 20 bits it drops.

    Returns:
        (codes, scale): codes (..., dstate) in `dtype`, scale (...) fp32.

    Raises:
        ArgumentTypeError: `dtype` is not one of the three, or `bits` are not integers.
    """
    largest = _largest(dtype)
    v = values.to(torch.float32)
    peak = v.abs().amax(-1, keepdim=True)
    finite = peak.isfinite()
    nonzero_peak = peak.clamp(min=_SMALLEST_PEAK)
    # Not `largest / nonzero_peak`: torch computes number / tensor as reciprocal times number,
    # which rounds twice.
    encode = torch.div(torch.full_like(nonzero_peak, PEAK[dtype]), nonzero_peak)
    scale = (nonzero_peak * (1 / PEAK[dtype])).masked_fill(peak == 0, 1.0)
    scale = scale.masked_fill(~finite, torch.nan)
    noise = None if bits is None else _noise(bits)
    exact = noise is not None and dtype != torch.float8_e4m3fn
    wide = torch.float64 if exact else torch.float32
    u = (v.to(wide) * encode.to(wide)).masked_fill(~finite, 0.0)
    if dtype == torch.float8_e4m3fn:
        codes = _to_e4m3(u.clamp(-largest, largest), noise)
    elif noise is None:
        codes = u.round().to(dtype)
    else:
        fine = u * 2.0**15
        noisy = fine.round() * 2 + noise if dtype == torch.int8 else (fine * 2 + noise).round()
        codes = (noisy / 65536).floor().to(dtype)
    return codes, scale.squeeze(-1)


def dequantise(
    codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Decode what `quantise` wrote: ``fp32(code) * scale``, rounded to fp32, then to `dtype`.

    Args:
        codes: (..., dstate) int16, int8 or fp8 e4m3.
        scale: (...) fp32.
        dtype: float dtype of the result.

    Returns:
        (..., dstate) in `dtype`; a row with a NaN scale is NaN throughout.

    Raises:
        ArgumentTypeError: the dtype of `codes` is not one of the three.
    """
    _largest(codes.dtype)
    return (codes.to(torch.float32) * scale.to(torch.float32).unsqueeze(-1)).to(dtype)


def _to_e4m3(u: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """fp32 in [-448, 448] to fp8 e4m3; 448 is a code, so noise cannot carry into the NaN code."""
    if noise is None:
        return u.to(torch.float8_e4m3fn)
    pattern = (u * _E4M3_TO_FP32).view(torch.int32)
    magnitude = ((pattern & 0x7FFFFFFF) + (noise << 4)) >> 20
    return (magnitude | ((pattern >> 24) & 0x80)).to(torch.uint8).view(torch.float8_e4m3fn)


def _largest(dtype: torch.dtype) -> float:
    largest = QMAX.get(dtype)
    if largest is None:
        raise ArgumentTypeError(f"block scaling knows int16, int8 and float8_e4m3fn, found {dtype}")
    return largest


def _noise(bits: torch.Tensor) -> torch.Tensor:
    if bits.is_floating_point() or bits.is_complex() or bits.dtype == torch.bool:
        raise ArgumentTypeError(f"random bits must be integers, found {bits.dtype}")
    return bits.to(torch.int32)
