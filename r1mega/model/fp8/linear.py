"""A linear layer with FP8 products: ``y = x W^T``, the gradient of x by the same blocks, that of W by 1x128 blocks of both sides.

The activation is kept in FP8 for the backward pass (V3 3.3.3), under sequence parallelism this rank's part of it; where the
activation is made again (:mod:`r1mega.model.recompute`), so are its numbers in FP8.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from r1mega.model.fp8.products import BLOCK, add_rows_by_rows_, rows_by_blocks
from r1mega.model.fp8.weights import Recipe, as_tensor, quantized
from r1mega.model.gradients import weight_gradient
from r1mega.model.recompute import following
from r1mega.ops.quantize import Quantized, quantize_both, quantize_rows, requantize_columns, row_scales


def fits(weight_shape: tuple[int, ...]) -> bool:
    """True for weights whose two widths are whole blocks."""
    return all(width % BLOCK == 0 for width in weight_shape[-2:])


class Fp8Linear(torch.autograd.Function):
    """``[..., K]`` and ``[N, K]`` to ``[..., N]``, with the tensor axis's collectives as in :mod:`r1mega.model.linear`."""

    @staticmethod
    def forward(ctx, x, weight, sum_input_grad: bool, gathers: bool, group, recipe: Recipe):
        multiple = 1 if gathers else BLOCK
        rows = following(lambda x: quantize_rows(_padded(x.reshape(-1, x.shape[-1]), multiple), recipe.power_of_two), x)
        ctx.save_for_backward(*rows)
        ctx.shape, ctx.dtype, ctx.weight, ctx.recipe = x.shape, x.dtype, weight, recipe
        ctx.sum_input_grad, ctx.gathers, ctx.group = sum_input_grad, gathers, group
        whole = _gathered(rows, group) if gathers else rows
        made = rows_by_blocks(whole, quantized(weight, recipe)[0], x.dtype)
        lines = (x.shape[0] * group.size(), *x.shape[1:-1]) if gathers else x.shape[:-1]
        return made[: math.prod(lines)].view(*lines, weight.shape[0])

    @staticmethod
    def backward(ctx, grad):
        recipe, weight, group = ctx.recipe, ctx.weight, ctx.group
        rows = Quantized(*ctx.saved_tensors)
        flat = _padded(grad.reshape(-1, grad.shape[-1]), BLOCK)
        both = quantize_both(flat, recipe.power_of_two)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = rows_by_blocks(Quantized(both.payload, both.scales), quantized(weight, recipe)[1], ctx.dtype)
            count = math.prod(ctx.shape[:-1])
            if ctx.gathers:
                part = grad_x.new_empty(count, grad_x.shape[1])
                dist.reduce_scatter_tensor(part, grad_x[: count * group.size()], group=group)
                grad_x = part
            elif ctx.sum_input_grad:
                dist.all_reduce(grad_x, group=group)
            grad_x = grad_x[:count].view(ctx.shape)

        def add(total_NK: torch.Tensor, overwrite: bool) -> None:
            whole = _gathered(rows, group) if ctx.gathers else rows
            left = Quantized(both.payload_t, both.scales_t)
            add_rows_by_rows_(total_NK, left, requantize_columns(*whole, recipe.power_of_two), overwrite)

        grad_weight = weight_gradient(weight, as_tensor(weight, add), add) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None, None, None


def _padded(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    """Whole blocks of rows: zeros behind the last one add nothing."""
    missing = -len(rows) % multiple
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _gathered(rows: Quantized, group: dist.ProcessGroup) -> Quantized:
    """All tensor ranks' rows, in FP8 on the way, filled up to whole blocks."""
    size, (count, width) = group.size(), rows.payload.shape
    total = -(-count * size // BLOCK) * BLOCK
    payload = torch.zeros(total, width, dtype=torch.uint8, device=rows.payload.device)
    dist.all_gather_into_tensor(payload[: count * size], rows.payload.view(torch.uint8), group=group)
    scales = torch.empty(count * size, rows.scales.shape[1], dtype=torch.float32, device=payload.device)
    dist.all_gather_into_tensor(scales, rows.scales.contiguous(), group=group)
    laid = row_scales(total, width, payload.device)
    laid[: count * size] = scales
    return Quantized(payload.view(torch.float8_e4m3fn), laid)
