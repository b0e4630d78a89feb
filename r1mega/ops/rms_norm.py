"""Ops ``rms_norm``, its backward, and ``rms_norm_quantize``: the root-mean-square norm (arXiv 1910.07467) over the last dimension.

    y = x * rstd * weight        rstd = 1 / sqrt(mean(x^2) + eps)

All in fp32 (fp64 for fp64), rounded once. Sums have one order, written out in ``csrc/rms_norm/op.h`` and below: values and
gradients have the same bits on every device, with the C++ library and without it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from r1mega.ops.library import FP32_BF16, Case, Op
from r1mega.ops.quantize import quantize_rows_reference, row_scales

PIECE = 256
"""Numbers of a row that are summed together."""
MOST_WIDTH = 64 * PIECE
ROW_RUN, ROW_RUNS, GROUP_LANES = 8, 4, 32
"""Rows summed one after the other; runs of a group; sums over groups at a time."""


class Normed(NamedTuple):
    """``y`` like x; ``rstd`` of each row, fp32 (fp64 for fp64)."""

    y: torch.Tensor
    rstd: torch.Tensor


class NormedQuantized(NamedTuple):
    """In blocks of 1x128: payload float8_e4m3fn ``[M, D]``, scales ``[M, ceil(D/128)]`` in the row layout, rstd ``[M]``."""

    payload: torch.Tensor
    scales: torch.Tensor
    rstd: torch.Tensor


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> Normed:
    """``x * rstd * weight`` of ``x`` ``[..., D]`` in bf16, fp32 or fp64, D from 1 to 16,384, any strides; y contiguous in x's
    dtype.

    ``weight`` of any floating dtype. fp32 throughout, rounded once at the end; ``rstd`` is for the backward and has no gradient.
    Gradients: ``grad_x`` in x's dtype, ``grad_weight`` in the weight's, summed over rows in fp32. A row that holds NaN is NaN; one
    that holds an infinity has rstd 0: NaN there and 0 elsewhere. The same bits each time and on every device, but for NaN's.
    """
    return Normed(*RMS_NORM.packet(x, weight_D, eps))


def rms_norm_quantize(x_MD: torch.Tensor, weight_D: torch.Tensor, eps: float, power_of_two: bool = False) -> NormedQuantized:
    """The norm of ``x`` bf16 or fp32 ``[M, D]`` in blocks of 1x128, quantised from its fp32 values as ``quantize_rows`` does, in
    one pass and without y. No gradient of its own: ``rms_norm_backward`` takes x and rstd. The same bits on every device."""
    return NormedQuantized(*RMS_NORM_QUANTIZE.packet(x_MD, weight_D, eps, power_of_two))


def _fold(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, a power of two wide, halves first."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def _row_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension: 8 neighbours, 32 of those, then the pieces of 256, each halves first."""
    pieces = -(-x.shape[-1] // PIECE)
    x = F.pad(x, (0, pieces * PIECE - x.shape[-1])).unflatten(-1, (pieces, 32, 8))
    x = _fold(_fold(x))
    return _fold(F.pad(x, (0, (1 << (pieces - 1).bit_length()) - pieces))) + 0.0  # never -0


def _sum_rows(x_RD: torch.Tensor) -> torch.Tensor:
    """The sum over rows: runs of 8 and groups of 4 runs one after the other, then every 32nd group, then those 32 halves first."""
    if x_RD.shape[0] == 0:
        return x_RD.sum(0)
    width = x_RD.shape[1]
    for size in (ROW_RUN, ROW_RUNS, None):
        each = size or max(1, -(-x_RD.shape[0] // GROUP_LANES))
        filled = F.pad(x_RD, (0, 0, 0, (-x_RD.shape[0]) % (each if size else each * GROUP_LANES)))
        count = filled.shape[0] // each
        parts = filled.view(count, each, width).unbind(1) if size else filled.view(each, GROUP_LANES, width).unbind(0)
        x_RD = torch.zeros_like(parts[0])
        for part in parts:
            x_RD = x_RD + part
    return _fold(x_RD.t())


def _divided(x: torch.Tensor, by: int) -> torch.Tensor:
    return x / torch.full_like(x, by)  # by a tensor: a GPU multiplies with a number's reciprocal


def _inverse_root(x: torch.Tensor) -> torch.Tensor:
    """``1 / sqrt(x)``, root and quotient each rounded to the nearest: of torch's, rsqrt does that on a CPU, where sqrt is MKL's,
    and sqrt on a GPU, where rsqrt is an approximation."""
    return x.rsqrt() if x.device.type == "cpu" else x.sqrt().reciprocal()


def _in_sums(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _norm(x, weight, eps):
    wide, weight = _in_sums(x), weight.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    squares = _divided(_row_sum(wide * wide), x.shape[-1])
    rstd = _inverse_root(squares + eps)
    return wide * rstd.unsqueeze(-1) * weight, rstd


def _rms_norm_reference(x, weight, eps):
    y, rstd = _norm(x, weight, eps)
    return y.to(x.dtype).contiguous(), rstd.detach()


def _rms_norm_fake(x, weight, eps):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _rms_norm_setup(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _rms_norm_backward(ctx, grad, _):
    x, weight, rstd = ctx.saved_tensors
    return *RMS_NORM_BACKWARD.packet(grad, x, weight, rstd), None


def _rms_norm_backward_reference(grad, x, weight, rstd):
    wide, of_y = _in_sums(x), _in_sums(grad)
    normed = wide * rstd.unsqueeze(-1)
    weighted = of_y * weight.to(rstd.dtype)
    mean = _divided(_row_sum(weighted * normed), x.shape[-1]).unsqueeze(-1)
    grad_x = ((weighted - normed * mean) * rstd.unsqueeze(-1)).to(x.dtype).contiguous()
    return grad_x, _sum_rows((of_y * normed).reshape(-1, x.shape[-1])).to(weight.dtype)


def _rms_norm_backward_fake(grad, x, weight, rstd):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _rms_norm_quantize_reference(x, weight, eps, power_of_two):
    y, rstd = _norm(x, weight, eps)
    return *quantize_rows_reference(y, power_of_two), rstd


def _rms_norm_quantize_fake(x, weight, eps, power_of_two):
    scales = row_scales(*x.shape, device=x.device)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scales, x.new_empty(x.shape[0], dtype=torch.float32)


def _numbers(shape, kind, dtype, device, weight_dtype=None):
    """x, a weight and a gradient, the same each time."""
    draw = torch.Generator().manual_seed(sum(shape))
    x, grad = torch.randn(*shape, generator=draw), torch.randn(*shape, generator=draw)
    weight = 1 + torch.randn(shape[-1], generator=draw) / 4
    if kind == "extreme values":  # rows of very different sizes; squares stay within fp32
        x = x * torch.logspace(-18, 18, shape[0]).view(-1, *[1] * (len(shape) - 1))
    elif kind == "ties":
        x, grad, weight = (torch.ones_like(one) for one in (x, grad, weight))
    x, grad = x.to(device, dtype), grad.to(device, dtype)
    if kind == "part of wider rows":
        x, grad = torch.cat([x, grad], dim=-1)[..., : shape[-1]], torch.cat([grad, x], dim=-1)[..., : shape[-1]]
    elif kind == "non-contiguous":
        x, grad = (one.transpose(0, -1).contiguous().transpose(0, -1) for one in (x, grad))
    return x, weight.to(device, weight_dtype or dtype), grad


SHAPES = (
    ("ordinary", (6, 256), ""),
    ("empty", (0, 16), ""),
    ("one row", (1, 512), ""),
    ("one number", (1,), ""),
    ("width of one", (3, 1), ""),
    ("ragged", (2, 5, 19), ""),
    ("more rows than a group", (75, 8), ""),
    ("more groups than lanes", (1100, 3), ""),
    ("wide", (3, 1544), ""),
    ("widest", (2, MOST_WIDTH), ""),
    ("odd", (4, 4099), ""),
    ("non-contiguous", (7, 3, 24), "non-contiguous"),
    ("part of wider rows", (5, 2, 136), "part of wider rows"),
    ("extreme values", (9, 264), "extreme values"),
    ("ties", (4, 130), "ties"),
)


def _forward(shape, kind):
    return lambda dtype, device: (*_numbers(shape, kind, dtype, device)[:2], 1e-6)


def _fp32_weight(dtype, device):
    """As the optimizer's own copy is; beside fp64 numbers, whose gradients are checked by differences, of fp64."""
    return *_numbers((5, 128), "", dtype, device, torch.float64 if dtype == torch.float64 else torch.float32)[:2], 1e-5


def _backward(shape, kind):
    def make(dtype, device):
        x, weight, grad = _numbers(shape, kind, dtype, device)
        return grad, x, weight, _norm(x, weight, 1e-6)[1]

    return make


def _quantize(shape, kind, power_of_two):
    return lambda dtype, device: (*_numbers(shape, kind, dtype, device)[:2], 1e-6, power_of_two)


def _not_finite(dtype, device):
    x, weight, _ = _numbers((6, 392), "", dtype, device)
    x[1, 3], x[3, 200] = torch.nan, torch.inf
    return x, weight, 1e-6, False


_MATRICES = tuple(one for one in SHAPES if len(one[1]) == 2)

RMS_NORM = Op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    _rms_norm_reference,
    _rms_norm_fake,
    _rms_norm_setup,
    _rms_norm_backward,
    (*(Case(name, _forward(shape, kind)) for name, shape, kind in SHAPES), Case("weight of fp32", _fp32_weight)),
)
RMS_NORM_BACKWARD = Op(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor grad_x, Tensor grad_weight)",
    _rms_norm_backward_reference,
    _rms_norm_backward_fake,
    cases=tuple(Case(name, _backward(shape, kind)) for name, shape, kind in SHAPES),
)
RMS_NORM_QUANTIZE = Op(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps, bool power_of_two) -> (Tensor payload, Tensor scales, Tensor rstd)",
    _rms_norm_quantize_reference,
    _rms_norm_quantize_fake,
    cases=(
        *(Case(name, _quantize(shape, kind, False)) for name, shape, kind in _MATRICES),
        Case("powers of two", _quantize((9, 400), "extreme values", True)),
        Case("not finite", _not_finite),
    ),
    dtypes=FP32_BF16,
)
OPS = (RMS_NORM, RMS_NORM_BACKWARD, RMS_NORM_QUANTIZE)
