"""DeepSeek's FP8 weights: E4M3 numbers with one fp32 scale a block of 128x128.

    weight[o, i] = payload[o, i] * scale[o // 128, i // 128]        scale = largest |weight| of the block / 448

The DeepSeek-V3 report (section 3.3) scales weights by blocks of 128x128 so that each block's largest magnitude meets E4M3's largest
number, 448; README_WEIGHTS of its repository says how it is stored: the payload as ``weight``, the scales as ``weight_scale_inv``
fp32 ``[ceil(O/128), ceil(I/128)]``, to be multiplied with; ragged edges count as filled up with zeros. V3.1's scales
(``scale_fmt: ue8m0``) are powers of two: the next one at or above largest / 448.

A block of zeros gets scale 1: largest / 448 would be 0, and dividing by it no number; every scale gives the same zeros, and 1 is a
power of two as well. E4M3 has no infinity; its two NaN codes (0x7f, 0xff) are refused, as weights that are not finite are.

bf16 keeps eight significant bits and E4M3 has four, so payload -> bf16 -> payload under the same scales returns every bit, while
payload * scale is a normal number (scale from 2**-117 on). Without the scales it does where the block's payload has a 448 or -448.

Work goes by bands of whole blocks' rows that stay in the processor's cache: besides the result, memory holds a few MB. Payloads are
read by their bits: torch's own conversion is ten times slower on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from r1mega.config.errors import UserError

BLOCK = 128
LARGEST = 448.0
"""E4M3's largest number."""
OVERFLOW = 464.0
"""Halfway to what would come next: from here on E4M3 has no number to round to."""
BAND = 1 << 18
"""Numbers of a band at most, but a row of blocks at least: 1 MB as fp32."""
E4M3 = torch.float8_e4m3fn
BITS = (1 << 31) - 1
"""Of an fp32 number but for its sign."""
SIGN_AND_MAGNITUDE = (1 << 31 | 0x7F << 20) - (1 << 32)
"""Where an fp32 number has the bits of an E4M3 one: bit 31, and 26 to 20."""
SHIFT = 2.0**120
"""E4M3's exponent counts from 7, fp32's from 127."""


def dequantise(payload: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, where: str = "weight") -> torch.Tensor:
    """``payload`` e4m3 ``[O, I]`` times ``scale`` fp32 ``[ceil(O/128), ceil(I/128)]``, in fp32, rounded once to ``dtype``.

    Raises UserError, naming ``where``, for NaN codes, scales that are negative or not finite, a zero scale on numbers that are not
    zero, other shapes or dtypes, and results beyond ``dtype``.
    """
    _check(payload, scale, where)
    if payload.dtype != E4M3:
        raise UserError(f"{where}: an FP8 payload is {E4M3}; got {payload.dtype}; use the tensor as it is")
    if scale.numel() and float(scale.max()) * LARGEST > torch.finfo(dtype).max:
        raise UserError(f"{where}: payload times scale fits {dtype}; got a scale of {float(scale.max()):g}; use dtype=fp32")
    result = torch.empty(payload.shape, dtype=dtype)
    bits = payload.view(torch.int8)
    has_zero, is_small = bool((scale == 0).any()), bool((scale < 128).all())
    for rows, blocks, band in _bands(payload.shape):
        whole = band.view(torch.int32)
        part = whole[: rows.stop - rows.start, : payload.shape[1]]
        part.copy_(bits[rows])  # the sign bit fills up what is left of the eight bits
        part.bitwise_left_shift_(20)  # exponent and mantissa where fp32 has their lowest bits, the sign where it has its own
        part.bitwise_and_(SIGN_AND_MAGNITUDE)
        if bits[rows].numel() and int(bits[rows].bitwise_and(0x7F).amax()) == 0x7F:
            raise UserError(f"{where}: E4M3 numbers; got a NaN code in rows {rows.start} to {rows.stop - 1}; fetch the file again")
        tiles, factor = _tiles(band), scale[blocks, None, :, None]
        if has_zero and bool(((factor == 0) & (tiles != 0)).any()):
            raise UserError(
                f"{where}: a block of scale 0 is zero; got other numbers at rows from {rows.start}; fetch the file again"
            )
        if is_small:
            tiles.mul_(factor * SHIFT)  # the same bits in one go: a power of two rounds nothing
        else:
            tiles.mul_(SHIFT).mul_(factor)
        result[rows].copy_(band[: rows.stop - rows.start, : payload.shape[1]])
    return result


def quantise(weight: torch.Tensor, *, power_of_two: bool, where: str = "weight") -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` ``[O, I]`` to payload e4m3 ``[O, I]`` and scales fp32. Raises UserError for numbers that are not finite."""
    _check(weight, None, where)
    return _quantise(weight, None, power_of_two, where)


def quantise_with(weight: torch.Tensor, scale: torch.Tensor, where: str = "weight") -> torch.Tensor:
    """The payload of ``weight`` under given scales. Raises UserError for numbers not finite or beyond 448 times their scale."""
    _check(weight, scale, where)
    return _quantise(weight, scale, False, where)[0]


def _quantise(
    weight: torch.Tensor, given: torch.Tensor | None, power_of_two: bool, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    payload = torch.empty(weight.shape, dtype=E4M3)
    scale = torch.empty(_blocks(weight.shape), dtype=torch.float32) if given is None else given
    for rows, blocks, band in _bands(weight.shape):
        part = band[: rows.stop - rows.start, : weight.shape[1]]
        part.copy_(weight[rows])
        tiles = _tiles(band)
        # magnitudes as integers: fp32 without its sign is ordered as its bits are, infinity and NaN above all
        largest = (tiles.view(torch.int32) & BITS).amax(1).amax(-1).view(torch.float32)
        if not bool(torch.isfinite(largest).all()):
            raise UserError(f"{where}: finite numbers; got inf or nan in rows {rows.start} to {rows.stop - 1}; mend the checkpoint")
        if given is None:
            scale[blocks] = _scale_of(largest, power_of_two)
        elif bool((largest >= OVERFLOW * scale[blocks]).logical_and(largest > 0).any()):
            raise UserError(
                f"{where}: numbers within {LARGEST:g} times their scale; got larger ones in rows {rows.start} to {rows.stop - 1}; "
                "quantise without the given scales"
            )
        factor = scale[blocks, None, :, None]
        tiles.div_(torch.where(factor == 0, 1.0, factor))
        payload[rows].copy_(part)
    return payload, scale


def _scale_of(largest: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)  # a subnormal one would lose digits
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # mantissa from 0.5 up to below 1
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return torch.where(largest == 0, 1.0, scale)


def _blocks(shape: torch.Size) -> tuple[int, int]:
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def _bands(shape: torch.Size) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(rows, rows of blocks, fp32 memory for them that is zero at the ragged edges) over a tensor of ``shape``."""
    down, across = _blocks(shape)
    each = max(BAND // max(across * BLOCK * BLOCK, 1), 1)
    memory = torch.zeros(each * BLOCK, across * BLOCK)
    for first in range(0, down, each):
        blocks = slice(first, min(first + each, down))
        rows = slice(first * BLOCK, min(blocks.stop * BLOCK, shape[0]))
        band = memory[: (blocks.stop - blocks.start) * BLOCK]
        if rows.stop - rows.start < len(band):
            band[rows.stop - rows.start :].zero_()
        yield rows, blocks, band


def _tiles(band: torch.Tensor) -> torch.Tensor:
    """``[rows of blocks, 128, columns of blocks, 128]``."""
    return band.view(len(band) // BLOCK, BLOCK, band.shape[1] // BLOCK, BLOCK)


def _check(weight: torch.Tensor, scale: torch.Tensor | None, where: str) -> None:
    if weight.dim() != 2:
        raise UserError(f"{where}: FP8 blocks are of a matrix; got shape {list(weight.shape)}; keep it in bf16")
    if scale is None:
        return
    blocks = _blocks(weight.shape)
    if scale.dtype != torch.float32 or tuple(scale.shape) != blocks:
        raise UserError(
            f"{where}: scales are fp32 {list(blocks)} for {list(weight.shape)}; got {scale.dtype} {list(scale.shape)}; "
            "take the scales of these files"
        )
    if scale.numel() and not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise UserError(f"{where}: scales are finite and not negative; got others; fetch the file again")
