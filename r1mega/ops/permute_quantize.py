"""Op ``permute_quantize`` and its relatives: tokens to rows sorted by expert in E4M3 (DeepSeek-V3, arXiv 2412.19437, 3.3).

``payload[r], scales[r] = quantise(tokens[row_tokens[r]])``: ``scale = max(amax, 2^-100) / 448``, ``payload = e4m3(x / scale)``, a
scale for 1x128 numbers. By columns, a scale for 128 rows of a column: ``quantize_columns`` of the rows, which are never written.
"""

from __future__ import annotations

import torch

from r1mega.ops.library import FP32_BF16, Case, Op
from r1mega.ops.permute import rows_of
from r1mega.ops.quantize import Quantized, QuantizedBoth, fake_rows, quantize_rows_reference, row_scales
from r1mega.ops.row_map import SITUATIONS, RowMap, routing, row_map_reference, sizes_of


def permute_quantize(tokens_TD: torch.Tensor, row_map: RowMap, power_of_two: bool = False) -> Quantized:
    """Each token, quantised once, to its rows: ``payload_RD`` (float8_e4m3fn) and ``scales`` (fp32, ``[R, ceil(D / 128)]``).

    ``tokens_TD``: bf16 or fp32, any strides. Blocks of 128 numbers along D, the last one shorter where D is no multiple. The scale
    of a block is ``max(amax, 2^-100) / 448`` in fp32, rounded up to a power of two on request; the payload ``e4m3(x * (1 /
    scale))``, product in fp32, to the nearest, ties to even, at most 448 in magnitude. A block with NaN or infinity has a scale
    that is not finite, and reads back as NaN. Padding rows: payload 0 and the scale of a block of zeros.

    ``scales`` has strides ``(1, R4)``, R4 being R rounded up to a multiple of 4 (what DeepGEMM and cuBLAS read as it is), and 0 in
    the rest of its storage. The same bits on every device, but for which NaN it is. No gradient. ``row_map``: from
    :func:`r1mega.ops.row_map.map_rows`.
    """
    return Quantized(*PERMUTE_QUANTIZE.packet(tokens_TD, row_map.row_tokens_R, row_map.token_rows_TK, power_of_two))


def permute_quantize_columns(tokens_TD: torch.Tensor, row_map: RowMap, power_of_two: bool = False) -> Quantized:
    """What the product of an expert's weight gradient reads: payload ``[D, R]``, scales ``[D, ceil(R / 128)]`` in the row layout.

    Bit for bit ``quantize_columns(permute_rows(tokens_TD, row_map), power_of_two)`` in one pass: arguments are those of
    :func:`permute_quantize`, padding rows are zeros. With a map of ``multiple=128`` no block of 128 rows is of two experts.
    """
    return Quantized(*PERMUTE_QUANTIZE_COLUMNS.packet(tokens_TD, row_map.row_tokens_R, row_map.token_rows_TK, power_of_two))


def permute_quantize_both(tokens_TD: torch.Tensor, row_map: RowMap, power_of_two: bool = False) -> QuantizedBoth:
    """:func:`permute_quantize` and :func:`permute_quantize_columns` in one pass, bit for bit."""
    return QuantizedBoth(*PERMUTE_QUANTIZE_BOTH.packet(tokens_TD, row_map.row_tokens_R, row_map.token_rows_TK, power_of_two))


def _reference(tokens, row_tokens, token_rows, power_of_two):
    payload, scale = quantize_rows_reference(tokens, power_of_two)
    scales = row_scales(len(row_tokens), tokens.shape[1], tokens.device)
    if not len(tokens):
        zero = tokens.new_zeros(len(row_tokens), tokens.shape[1])
        payload, scale = quantize_rows_reference(zero, power_of_two)
        scales.copy_(scale)
        return payload, scales
    padding, token = (row_tokens < 0).unsqueeze(1), row_tokens.clamp(min=0)
    rows = torch.where(padding, 0, payload.view(torch.uint8)[token]).view(torch.float8_e4m3fn)
    zero_scale = quantize_rows_reference(tokens.new_zeros(1, 1), power_of_two)[1]
    scales.copy_(torch.where(padding, zero_scale, scale[token]))
    return rows, scales


def _columns_reference(tokens, row_tokens, token_rows, power_of_two):
    return quantize_rows_reference(rows_of(tokens, row_tokens).t(), power_of_two)


def _both_reference(tokens, row_tokens, token_rows, power_of_two):
    arguments = tokens, row_tokens, token_rows, power_of_two
    return *_reference(*arguments), *_columns_reference(*arguments)


def _fake(tokens, row_tokens, token_rows, power_of_two):
    return fake_rows(tokens, row_tokens.shape[0], tokens.shape[1])


def _columns_fake(tokens, row_tokens, token_rows, power_of_two):
    return fake_rows(tokens, tokens.shape[1], row_tokens.shape[0])


def _both_fake(*arguments):
    return *_fake(*arguments), *_columns_fake(*arguments)


def _case(T, E, top_k, D=300, scale=1.0, power_of_two=False, multiple=1, spare=0, not_finite=False, **how):
    def make(dtype, device):
        draw = torch.Generator().manual_seed(T + D)
        tokens = torch.randn(T, D, generator=draw) * torch.rand(T, 1, generator=draw) * scale
        if T and D:
            tokens[0] = 0.0  # blocks of zeros
            tokens[-1, : D // 2] *= 2.0**-120  # below the smallest amax
        if not_finite:
            tokens[1, 3], tokens[2, D - 1], tokens[T // 2, D // 2] = torch.nan, -torch.inf, torch.inf
        chosen = routing(T, E, top_k, device, **how)
        _, _, _, row_tokens, token_rows = row_map_reference(chosen, *sizes_of(chosen, multiple, spare))
        tokens = tokens.to(device, dtype)
        tokens = tokens.t().contiguous().t() if how.get("strided") else tokens
        return tokens, row_tokens, token_rows, power_of_two

    return make


_MORE = (
    ("powers of two", (13, 8, 2), {"power_of_two": True}),
    ("powers of two, padding", (13, 8, 2), {"power_of_two": True, "multiple": 4, "D": 512}),
    ("extreme values", (11, 4, 2), {"scale": 1e30, "D": 256}),
    ("width of none", (6, 4, 2), {"D": 0}),
    ("a last block of 16", (6, 4, 2), {"D": 144}),
    ("odd", (6, 4, 2), {"D": 131}),
    ("rows of several rounds", (5, 4, 2), {"D": 8208}),
)

_COLUMNS = (
    ("blocks of rows", (300, 3, 2), {"multiple": 128, "D": 256}),
    ("blocks of rows, powers of two", (300, 3, 2), {"multiple": 128, "D": 272, "power_of_two": True}),
    ("a short block of rows", (90, 4, 2), {"multiple": 16, "D": 144}),
    ("rows to spare", (70, 2, 1), {"multiple": 128, "spare": 128, "D": 136}),
    ("not finite", (70, 2, 1), {"multiple": 128, "D": 136, "not_finite": True}),
)
"""Beside those of all: rows of several blocks of 128."""
_ROWS_CASES = tuple(Case(name, _case(*sizes, **how)) for name, sizes, how in SITUATIONS + _MORE)
_CASES = _ROWS_CASES + tuple(Case(name, _case(*sizes, **how)) for name, sizes, how in _COLUMNS)

PERMUTE_QUANTIZE = Op(
    "permute_quantize(Tensor tokens, Tensor row_tokens, Tensor token_rows, bool power_of_two) -> (Tensor payload, Tensor scales)",
    _reference,
    _fake,
    cases=_ROWS_CASES,
    dtypes=FP32_BF16,
)
PERMUTE_QUANTIZE_COLUMNS = Op(
    "permute_quantize_columns(Tensor tokens, Tensor row_tokens, Tensor token_rows, bool power_of_two) "
    "-> (Tensor payload_t, Tensor scales_t)",
    _columns_reference,
    _columns_fake,
    cases=_CASES,
    dtypes=FP32_BF16,
)
PERMUTE_QUANTIZE_BOTH = Op(
    "permute_quantize_both(Tensor tokens, Tensor row_tokens, Tensor token_rows, bool power_of_two) "
    "-> (Tensor payload, Tensor scales, Tensor payload_t, Tensor scales_t)",
    _both_reference,
    _both_fake,
    cases=_CASES,
    dtypes=FP32_BF16,
)
OPS = (PERMUTE_QUANTIZE, PERMUTE_QUANTIZE_COLUMNS, PERMUTE_QUANTIZE_BOTH)
