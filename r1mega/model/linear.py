"""Linear layers whose weight gradient can wait: the input's gradient goes on at once, as zero-bubble schedules want it.

They stand in for Megatron's column- and row-parallel layers, ``[S, B, in]`` to ``[S, B, out]``, and keep their weights, names and
collectives. Where the weight's gradient goes, and when, is :mod:`r1mega.model.gradients`' matter.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from r1mega.model.fp8.linear import Fp8Linear
from r1mega.model.fp8.weights import Recipe
from r1mega.model.gradients import weight_gradient
from r1mega.ops.accumulate import accumulate_product_


class _SplitLinear(torch.autograd.Function):
    """``x W^T`` with the tensor axis's collectives: gather before it and reduce-scatter behind the input's gradient, or its sum."""

    @staticmethod
    def forward(ctx, x, weight, sum_input_grad: bool, gathers: bool, group):
        ctx.save_for_backward(x, weight)
        ctx.weight_parameter = weight
        ctx.sum_input_grad, ctx.gathers, ctx.group = sum_input_grad, gathers, group
        return torch.matmul(gathered(x, group) if gathers else x, weight.t())

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        gathers, group, parameter = ctx.gathers, ctx.group, ctx.weight_parameter
        grad_x = grad.matmul(weight)
        if gathers:
            part = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            dist.reduce_scatter_tensor(part, grad_x.contiguous(), group=group)
            grad_x = part
        elif ctx.sum_input_grad:
            grad_x = grad_x.contiguous()
            dist.all_reduce(grad_x, group=group)

        def rows() -> tuple[torch.Tensor, torch.Tensor]:
            whole = gathered(x, group) if gathers else x
            return grad.reshape(-1, grad.shape[-1]), whole.reshape(-1, whole.shape[-1])

        def compute() -> torch.Tensor:
            left, right = rows()
            return left.t().matmul(right)

        def add(out: torch.Tensor, overwrite: bool) -> None:
            accumulate_product_(out, *rows(), overwrite=overwrite)

        grad_weight = weight_gradient(parameter, compute, add) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None, None


def gathered(x_SBD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The whole sequence, of which each tensor rank holds a part."""
    whole = torch.empty((x_SBD.shape[0] * group.size(), *x_SBD.shape[1:]), dtype=x_SBD.dtype, device=x_SBD.device)
    dist.all_gather_into_tensor(whole, x_SBD.contiguous(), group=group)
    return whole


class _Split:
    fp8: Recipe | None = None
    """How the products are in FP8; None: in the dtype of input and weight."""

    def _forward_impl(self, input, weight, bias=None, allreduce_dgrad=False, sequence_parallel=False, tp_group=None, **_):
        """Megatron's seam for the product."""
        if self.fp8 is None:
            output = _SplitLinear.apply(input, weight, allreduce_dgrad, sequence_parallel, tp_group)
        else:
            output = Fp8Linear.apply(input, weight, allreduce_dgrad, sequence_parallel, tp_group, self.fp8)
        return output if bias is None else output + bias


class ColumnLinear(_Split, ColumnParallelLinear):
    """Megatron's column-parallel layer with a weight gradient that can wait."""


class RowLinear(_Split, RowParallelLinear):
    """Megatron's row-parallel layer with a weight gradient that can wait."""


def split_weight_gradients(model: torch.nn.Module) -> None:
    """Make every linear layer of a Megatron model one of these.

    After it is built, since Megatron names its own classes in some slots (the head, MLA's projections down). They add no state.
    """
    ours = {ColumnParallelLinear: ColumnLinear, RowParallelLinear: RowLinear}
    for module in model.modules():
        module.__class__ = ours.get(type(module), type(module))
