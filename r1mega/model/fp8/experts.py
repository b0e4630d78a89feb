"""Routed experts with FP8 products: tokens to rows, two grouped products with SwiGLU between them, rows back to tokens.

Both directions quantise while they permute, so rows exist in FP8 alone; the backward pass keeps the tokens in their own format,
which the layer holds anyway, and the input of SwiGLU in FP8, and recomputes its output (V3 3.3.3). Weight gradients are products of
columns in 128x1 blocks (V3 3.3.2) or, on request, in the tokens' format; either way they are summed in fp32. Nothing waits for a
GPU.
"""

from __future__ import annotations

import torch

from r1mega.model.fp8.products import add_grouped_rows_by_rows_, grouped_rows_by_blocks
from r1mega.model.fp8.weights import Recipe, as_tensor, quantized
from r1mega.model.gradients import Add, weight_gradient
from r1mega.ops.accumulate import accumulate_grouped_
from r1mega.ops.permute import permute_rows, unpermute
from r1mega.ops.permute_quantize import permute_quantize, permute_quantize_both, permute_quantize_columns
from r1mega.ops.quantize import Quantized, quantize_rows
from r1mega.ops.row_map import RowMap
from r1mega.ops.swiglu import swiglu_backward_quantize, swiglu_backward_quantize_columns, swiglu_quantize


class Fp8Experts(torch.autograd.Function):
    """``tokens [T, D]`` and the rows' probabilities ``[R]`` to the sum of each token's answers, ``[T, D]``.

    ``row_map``: rows of each expert filled up to a multiple of 128. ``weight1 [e, 2F, D]``, ``weight2 [e, D, F]``: see
    :class:`r1mega.model.experts.GroupedExperts`.
    """

    @staticmethod
    def forward(ctx, tokens_TD, probs_R, weight1, weight2, row_map: RowMap, recipe: Recipe):
        scale = recipe.power_of_two
        rows = permute_quantize(tokens_TD, row_map, scale)
        hidden = _grouped(rows, quantized(weight1, recipe)[0], row_map, tokens_TD.dtype)
        inner = swiglu_quantize(hidden, None, probs_R, scale)
        answers = _grouped(inner, quantized(weight2, recipe)[0], row_map, tokens_TD.dtype)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(tokens_TD, probs_R, *quantize_rows(hidden, scale), *row_map)
        ctx.weights, ctx.recipe = (weight1, weight2), recipe
        return unpermute(answers, row_map)

    @staticmethod
    def backward(ctx, grad_TD):
        tokens_TD, probs_R, hidden, hidden_scales, *mapped = ctx.saved_tensors
        (weight1, weight2), recipe, row_map = ctx.weights, ctx.recipe, RowMap(*mapped)
        backward = _with_columns if recipe.expert_weight_gradients == "fp8" else _with_rows
        saved = tokens_TD, probs_R, Quantized(hidden, hidden_scales)
        grad_rows, grad_probs_R, adds = backward(grad_TD.contiguous(), saved, (weight1, weight2), row_map, recipe)
        grads = [
            weight_gradient(weight, as_tensor(weight, add), add) if needed else None
            for weight, add, needed in zip((weight1, weight2), adds, ctx.needs_input_grad[2:4], strict=True)
        ]
        return unpermute(grad_rows, row_map), grad_probs_R, *grads, None, None


Backward = tuple[torch.Tensor, torch.Tensor, tuple[Add, Add]]
"""Gradients of the rows and of their probabilities, and what adds those of both weights."""


def _with_columns(grad_TD, saved, weights, row_map: RowMap, recipe: Recipe) -> Backward:
    """Weight gradients from FP8 columns: no row exists in the tokens' format but those that products make."""
    (tokens_TD, probs_R, hidden), (weight1, weight2), scale = saved, weights, recipe.power_of_two
    both = permute_quantize_both(grad_TD, row_map, scale)
    grad_inner = _grouped(Quantized(both.payload, both.scales), quantized(weight2, recipe)[1], row_map, grad_TD.dtype)
    made = swiglu_backward_quantize_columns(grad_inner, *hidden, probs_R, scale)
    grad_rows = _grouped(Quantized(made.payload_R2F, made.scales), quantized(weight1, recipe)[1], row_map, grad_TD.dtype)

    def add1(total: torch.Tensor, overwrite: bool) -> None:
        tokens = permute_quantize_columns(tokens_TD, row_map, scale)
        add_grouped_rows_by_rows_(total, Quantized(made.payload_2FR, made.scales_t), tokens, row_map.ends_E, overwrite)

    def add2(total: torch.Tensor, overwrite: bool) -> None:
        inner = Quantized(made.activation_FR, made.activation_scales_t)
        add_grouped_rows_by_rows_(total, Quantized(both.payload_t, both.scales_t), inner, row_map.ends_E, overwrite)

    return grad_rows, made.grad_probs_R, (add1, add2)


def _with_rows(grad_TD, saved, weights, row_map: RowMap, recipe: Recipe) -> Backward:
    """Weight gradients from rows in the tokens' format."""
    (tokens_TD, probs_R, hidden), (weight1, weight2), scale = saved, weights, recipe.power_of_two
    rows = permute_quantize(grad_TD, row_map, scale)
    grad_inner = _grouped(rows, quantized(weight2, recipe)[1], row_map, grad_TD.dtype)
    made = swiglu_backward_quantize(grad_inner, *hidden, probs_R, scale)
    grad_rows = _grouped(Quantized(made.payload_R2F, made.scales), quantized(weight1, recipe)[1], row_map, grad_TD.dtype)
    ends = row_map.ends_E

    def add1(total: torch.Tensor, overwrite: bool) -> None:
        accumulate_grouped_(total, made.grad_hidden_R2F, permute_rows(tokens_TD, row_map), ends, overwrite=overwrite)

    def add2(total: torch.Tensor, overwrite: bool) -> None:
        accumulate_grouped_(total, permute_rows(grad_TD, row_map), made.activation_RF, ends, overwrite=overwrite)

    return grad_rows, made.grad_probs_R, (add1, add2)


def _grouped(rows: Quantized, weight, row_map: RowMap, dtype: torch.dtype) -> torch.Tensor:
    return grouped_rows_by_blocks(rows, weight, row_map.row_experts_R, row_map.ends_E, dtype)
