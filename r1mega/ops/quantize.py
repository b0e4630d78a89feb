"""Ops of block-scaled E4M3: quantisation by rows, columns and blocks, and back.

    scale = max(largest |x| of the block, 2**-100) / 448        payload = e4m3(x * (1 / scale))

as DeepSeek-V3 trains (arXiv 2412.19437, section 3.3): activations in blocks of 1x128, weights in blocks of 128x128. All of it is in
fp32, rounded to the nearest, ties to even, so that every device gives the same bits. ``power_of_two``: scales rounded up to one.
The row layout of scales, ``[M, ceil(K/128)]`` of strides (1, M rounded up to 4), is what grouped products read without a copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from r1mega.ops.library import FP32_BF16, Case, Op

BLOCK = 128
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""E4M3's largest number."""
SMALLEST_AMAX = 2.0**-100
MAGNITUDE = 0x7FFFFFFF
"""An fp32 number's bits without the sign: they order as magnitudes do, NaN above all."""


class Quantized(NamedTuple):
    """``payload`` float8_e4m3fn and ``scales`` fp32: a number is its payload times its block's scale."""

    payload: torch.Tensor
    scales: torch.Tensor


class QuantizedBoth(NamedTuple):
    """A matrix quantised, and its transpose quantised."""

    payload: torch.Tensor
    scales: torch.Tensor
    payload_t: torch.Tensor
    scales_t: torch.Tensor


def quantize_rows(x_MK: torch.Tensor, power_of_two: bool = False) -> Quantized:
    """``x`` bf16 or fp32 ``[M, K]`` in blocks of 1x128: payload ``[M, K]``, scales ``[M, ceil(K/128)]`` in the row layout.

    The last block of a row may be short. A block of zeros has the scale ``2**-100 / 448``, rounded up on request. A block that
    holds NaN or infinity has a scale of NaN or infinity, its NaN the code 0x7f; all of it is NaN when read back. No gradient. Any
    strides; sizes of 0 too. The same bits on every device.
    """
    return Quantized(*QUANTIZE_ROWS.packet(x_MK, power_of_two))


def quantize_columns(x_MK: torch.Tensor, power_of_two: bool = False) -> Quantized:
    """``quantize_rows`` of ``x.t()``: blocks of 128 rows, payload ``[K, M]``, scales ``[K, ceil(M/128)]`` in the row layout. What
    the product of a weight's gradient reads."""
    return Quantized(*QUANTIZE_COLUMNS.packet(x_MK, power_of_two))


def quantize_both(x_MK: torch.Tensor, power_of_two: bool = False) -> QuantizedBoth:
    """``quantize_rows`` and ``quantize_columns`` of ``x``, which is read once."""
    return QuantizedBoth(*QUANTIZE_BOTH.packet(x_MK, power_of_two))


def quantize_blocks(x_NK: torch.Tensor, power_of_two: bool = False, transposed: bool = False) -> QuantizedBoth:
    """``x`` bf16 or fp32 ``[N, K]`` or stacked ``[E, N, K]`` in blocks of 128x128: payload as x, scales ``[..., ceil(N/128),
    ceil(K/128)]`` contiguous.

    ``transposed``: the transpose too, of the same scales and payload: ``payload_t`` ``[..., K, N]``, ``scales_t`` ``[...,
    ceil(K/128), ceil(N/128)]``; otherwise both are empty, ``[0]``. Blocks at the edges may be short. Special values as in
    ``quantize_rows``. The same bits as ``r1mega.train.convert.fp8.quantise`` for ``power_of_two``, but for blocks of zeros, whose
    scale there is 1, and blocks of nothing above 2**-100; without it the scales are the same, and a payload of a number that lies
    between two E4M3 numbers may be the other one: division there, here a product with the reciprocal.
    """
    return QuantizedBoth(*QUANTIZE_BLOCKS.packet(x_NK, power_of_two, transposed))


def dequantize_rows(payload_MK: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """``payload * scale`` of 1x128 blocks, ``[M, K]``: the product in fp32, rounded once to ``dtype`` (bf16 or fp32).

    ``scales`` ``[M, ceil(K/128)]`` of any strides. NaN has the bits of ``torch.nan``. No gradient.
    """
    return DEQUANTIZE_ROWS.packet(payload_MK, scales, dtype)


def requantize_columns(payload_MK: torch.Tensor, scales: torch.Tensor, power_of_two: bool = False) -> Quantized:
    """``quantize_columns`` of ``dequantize_rows`` in fp32, in one pass: an activation kept in FP8 to what its weight's gradient
    reads. Payload ``[K, M]``, scales ``[K, ceil(M/128)]`` in the row layout."""
    return Quantized(*REQUANTIZE_COLUMNS.packet(payload_MK, scales, power_of_two))


def row_scales(M: int, K: int, device: torch.device | None = None) -> torch.Tensor:
    """Zeros in the row layout: ``[M, ceil(K/128)]`` fp32 of strides (1, M rounded up to a multiple of 4)."""
    return _row_layout(torch.zeros(_blocks(K), -(-M // 4) * 4, device=device), M)


def quantize_rows_reference(x: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_rows`` in plain torch, for references of other ops too."""
    M, K = x.shape
    tiles = F.pad(x.float(), (0, _blocks(K) * BLOCK - K)).view(M, _blocks(K), BLOCK)
    scale = _scale_of((tiles.view(torch.int32) & MAGNITUDE).amax(-1), power_of_two)
    payload = _payload(tiles, scale.unsqueeze(-1)).view(M, _blocks(K) * BLOCK)[:, :K].contiguous()
    scales = row_scales(M, K, x.device)
    scales.copy_(scale)
    return payload.view(E4M3), scales


def _row_layout(memory: torch.Tensor, M: int) -> torch.Tensor:
    return memory.t()[:M]


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _scale_of(magnitudes: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """Of the bits of the largest magnitudes."""
    amax = magnitudes.view(torch.float32).clamp(min=SMALLEST_AMAX)
    scale = amax / torch.full_like(amax, LARGEST)  # by a tensor: a GPU multiplies with a number's reciprocal
    if power_of_two:
        bits = scale.view(torch.int32)
        up = torch.where(bits & 0x007FFFFF != 0, (bits & 0x7F800000) + 0x00800000, bits)
        scale = torch.where(bits >= 0x7F800000, bits, up).view(torch.float32)
    return _one_nan(scale)


def _payload(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The codes as uint8, whose copies are fast."""
    return _one_nan((x * scale.reciprocal()).clamp(-LARGEST, LARGEST)).to(E4M3).view(torch.uint8)


def _one_nan(x: torch.Tensor) -> torch.Tensor:
    """NaN of one code, whatever the device made."""
    return torch.where(x.isnan(), torch.nan, x)


def _quantize_columns_reference(x, power_of_two):
    return quantize_rows_reference(x.t(), power_of_two)


def _quantize_both_reference(x, power_of_two):
    return *quantize_rows_reference(x, power_of_two), *quantize_rows_reference(x.t(), power_of_two)


def _quantize_blocks_reference(x, power_of_two, transposed):
    N, K = x.shape[-2:]
    down, across = _blocks(N), _blocks(K)
    padded = F.pad(x.float(), (0, across * BLOCK - K, 0, down * BLOCK - N))
    tiles = padded.view(*x.shape[:-2], down, BLOCK, across, BLOCK)
    scales = _scale_of((tiles.view(torch.int32) & MAGNITUDE).amax((-3, -1)), power_of_two)
    codes = _payload(tiles, scales.unsqueeze(-1).unsqueeze(-3)).view(padded.shape)[..., :N, :K].contiguous()
    if not transposed:
        return codes.view(E4M3), scales, x.new_empty(0, dtype=E4M3), x.new_empty(0, dtype=torch.float32)
    turned = (part.transpose(-1, -2).contiguous() for part in (codes, scales))
    return codes.view(E4M3), scales, next(turned).view(E4M3), next(turned)


def _products(payload, scales):
    M, K = payload.shape
    spread = scales.unsqueeze(-1).expand(M, _blocks(K), BLOCK).reshape(M, _blocks(K) * BLOCK)
    return payload.float() * spread[:, :K]


def _dequantize_rows_reference(payload, scales, dtype):
    return _one_nan(_products(payload, scales).to(dtype))


def _requantize_columns_reference(payload, scales, power_of_two):
    return quantize_rows_reference(_products(payload, scales).t(), power_of_two)


def fake_rows(x: torch.Tensor, M: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Payload and scales of ``[M, K]`` by rows, on x's device and not filled."""
    memory = x.new_empty(_blocks(K), -(-M // 4) * 4, dtype=torch.float32)
    return x.new_empty(M, K, dtype=E4M3), _row_layout(memory, M)


def _quantize_rows_fake(x, power_of_two):
    return fake_rows(x, *x.shape)


def _quantize_columns_fake(x, power_of_two):
    return fake_rows(x, x.shape[1], x.shape[0])


def _quantize_both_fake(x, power_of_two):
    return *_quantize_rows_fake(x, power_of_two), *_quantize_columns_fake(x, power_of_two)


def _quantize_blocks_fake(x, power_of_two, transposed):
    *stack, N, K = x.shape
    payload, scales = x.new_empty(x.shape, dtype=E4M3), x.new_empty(*stack, _blocks(N), _blocks(K), dtype=torch.float32)
    if not transposed:
        return payload, scales, payload.new_empty(0), scales.new_empty(0)
    return payload, scales, payload.new_empty(*stack, K, N), scales.new_empty(*stack, _blocks(K), _blocks(N))


def _dequantize_rows_fake(payload, scales, dtype):
    return payload.new_empty(payload.shape, dtype=dtype)


def _requantize_columns_fake(payload, scales, power_of_two):
    return _quantize_columns_fake(payload, power_of_two)


def sample(M: int, K: int, dtype: torch.dtype, device: torch.device, kind: str = "") -> torch.Tensor:
    """Numbers for cases, the same each time. ``kind``: what is special about them."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1000 * M + K))
    if kind == "ties":  # 448 in each row and column of a block, so a scale of 1, and numbers halfway between two of E4M3
        x = torch.arange(M * K).view(M, K).remainder(16) * 8 + 132.0
        x[:, ::BLOCK], x[::BLOCK, :] = 448.0, -448.0
    elif kind == "extreme values":
        x = x * torch.logspace(-36, 36, max(1, M * K)).view(M, K)[:, torch.arange(K).flip(0)]
    elif kind == "zeros":
        x = torch.zeros(M, K) * torch.where(torch.arange(K) % 2 == 0, 1.0, -1.0)
    elif kind == "not finite":
        x[0, 0], x[M // 2, K // 2], x[M - 1, K - 1], x[1, K - 1] = torch.nan, torch.inf, -torch.inf, -torch.nan
    x = x.to(device, dtype)
    return torch.stack([x, x], dim=-1)[..., 0].t().contiguous().t() if kind == "non-contiguous" else x


SHAPES = (
    ("ordinary", (128, 256), ""),
    ("no rows", (0, 256), ""),
    ("no columns", (5, 0), ""),
    ("one row", (1, 384), ""),
    ("one number", (1, 1), ""),
    ("ragged", (150, 200), ""),
    ("ragged and aligned", (144, 272), ""),
    ("odd", (131, 129), ""),
    ("non-contiguous", (70, 130), "non-contiguous"),
    ("extreme values", (132, 144), "extreme values"),
    ("zeros", (6, 130), "zeros"),
    ("ties", (130, 256), "ties"),
    ("not finite", (140, 264), "not finite"),
)


def _cases(make) -> tuple[Case, ...]:
    """Each with scales as they come, and some with powers of two."""
    plain = tuple(Case(name, make(shape, kind, False)) for name, shape, kind in SHAPES)
    chosen = ("ragged", "extreme values", "ties", "not finite")
    powers = tuple(Case(f"{name}, powers of two", make(shape, kind, True)) for name, shape, kind in SHAPES if name in chosen)
    return plain + powers


def _of_numbers(shape, kind, power_of_two):
    return lambda dtype, device: (sample(*shape, dtype, device, kind), power_of_two)


def _of_blocks(shape, kind, power_of_two):
    return lambda dtype, device: (sample(*shape, dtype, device, kind), power_of_two, kind != "zeros")


def _of_stack(count, N, K, transposed):
    return lambda dtype, device: (sample(count * N, K, dtype, device).view(count, N, K), False, transposed)


def _of_quantized(shape, kind, power_of_two):
    def make(dtype, device):
        payload, scales = quantize_rows_reference(sample(*shape, dtype, device, kind), False)
        if kind == "non-contiguous":
            payload, scales = payload.t().contiguous().t(), scales.contiguous()
        return payload, scales, power_of_two

    return make


def _to_dequantize(shape, kind, power_of_two):
    return lambda dtype, device: (*_of_quantized(shape, kind, power_of_two)(dtype, device)[:2], dtype)


_STACKS = (
    Case("stacked", _of_stack(3, 130, 136, True)),
    Case("stacked, not transposed", _of_stack(2, 144, 256, False)),
    Case("no matrices", _of_stack(0, 130, 128, True)),
)

QUANTIZE_ROWS = Op(
    "quantize_rows(Tensor x, bool power_of_two) -> (Tensor payload, Tensor scales)",
    quantize_rows_reference,
    _quantize_rows_fake,
    cases=_cases(_of_numbers),
    dtypes=FP32_BF16,
)
QUANTIZE_COLUMNS = Op(
    "quantize_columns(Tensor x, bool power_of_two) -> (Tensor payload_t, Tensor scales_t)",
    _quantize_columns_reference,
    _quantize_columns_fake,
    cases=_cases(_of_numbers),
    dtypes=FP32_BF16,
)
QUANTIZE_BOTH = Op(
    "quantize_both(Tensor x, bool power_of_two) -> (Tensor payload, Tensor scales, Tensor payload_t, Tensor scales_t)",
    _quantize_both_reference,
    _quantize_both_fake,
    cases=_cases(_of_numbers),
    dtypes=FP32_BF16,
)
QUANTIZE_BLOCKS = Op(
    "quantize_blocks(Tensor x, bool power_of_two, bool transposed) "
    "-> (Tensor payload, Tensor scales, Tensor payload_t, Tensor scales_t)",
    _quantize_blocks_reference,
    _quantize_blocks_fake,
    cases=_cases(_of_blocks) + _STACKS,
    dtypes=FP32_BF16,
)
DEQUANTIZE_ROWS = Op(
    "dequantize_rows(Tensor payload, Tensor scales, ScalarType dtype) -> Tensor x",
    _dequantize_rows_reference,
    _dequantize_rows_fake,
    cases=_cases(_to_dequantize)[: len(SHAPES)],
    dtypes=FP32_BF16,
)
REQUANTIZE_COLUMNS = Op(
    "requantize_columns(Tensor payload, Tensor scales, bool power_of_two) -> (Tensor payload_t, Tensor scales_t)",
    _requantize_columns_reference,
    _requantize_columns_fake,
    cases=_cases(_of_quantized),
    dtypes=FP32_BF16,
)
OPS = (QUANTIZE_ROWS, QUANTIZE_COLUMNS, QUANTIZE_BOTH, QUANTIZE_BLOCKS, DEQUANTIZE_ROWS, REQUANTIZE_COLUMNS)
