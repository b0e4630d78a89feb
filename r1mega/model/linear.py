"""Linear layers whose weight gradient can wait: the input's gradient goes on at once, as zero-bubble schedules want it.

They stand in for Megatron's column- and row-parallel layers, ``[S, B, in]`` to ``[S, B, out]``, and keep their weights, names and
collectives. Inside :meth:`WeightGradients.collect` a backward pass leaves out the weights (arXiv 2401.10241, section 2);
:meth:`WeightGradients.run` makes up for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from r1mega.ops.accumulate import accumulate_product_
from r1mega.ops.library import FP32_BF16


class WeightGradients:
    """Weight gradients that are still to be computed, by a key (stage and microbatch)."""

    def __init__(self):
        self._waiting: dict[Hashable, list[Callable[[], None]]] = {}
        self._key: Hashable = None

    @contextlib.contextmanager
    def collect(self, key: Hashable) -> Iterator[None]:
        """Inside, backward passes leave their weight gradients here under ``key``."""
        global _collecting
        self._key, before, _collecting = key, _collecting, self
        self._waiting.setdefault(key, [])
        try:
            yield
        finally:
            _collecting = before

    def add(self, compute: Callable[[], None]) -> None:
        """Keep ``compute``, which adds one weight's gradient where it belongs (:func:`accumulate`)."""
        self._waiting[self._key].append(compute)

    def run(self, key: Hashable) -> None:
        """Compute what waits under ``key``, in the order of the backward pass. Raises KeyError for a key that never collected."""
        with torch.no_grad():
            for compute in self._waiting.pop(key):
                compute()

    def __len__(self) -> int:
        return len(self._waiting)


# A module's name and no thread's own: autograd runs the backward pass of a GPU in a thread of its own.
_collecting: WeightGradients | None = None


def deferred() -> WeightGradients | None:
    """Who collects weight gradients now; None: they are computed in the backward pass."""
    return _collecting


def accumulate(weight: torch.nn.Parameter, grad: torch.Tensor) -> None:
    """Add ``grad`` to the weight's ``main_grad`` (Megatron's fp32 buffer) or, without one, to its ``grad``."""
    if hasattr(weight, "main_grad"):
        weight.main_grad.add_(grad)
    elif weight.grad is None:
        weight.grad = grad
    else:
        weight.grad.add_(grad)


def weight_gradient(
    weight: torch.nn.Parameter, compute: Callable[[], torch.Tensor], add: Callable[[torch.Tensor], None]
) -> torch.Tensor | None:
    """What a backward pass returns for ``weight``: ``compute()``, or None where the gradient is added to its place, now or later.

    ``add(out)`` adds the same to a float32 tensor in place; it serves weights with Megatron's ``main_grad``, which so never have a
    gradient as a tensor of its own. None and not Megatron's mark ``grad_added_to_main_grad``: under the mark its hook drops all of
    ``weight.grad``, and with it what another user of a shared weight (a tied embedding) has returned; without it the hook adds
    that, and nothing for us. The hook has to find a tensor only where DDP overlaps its sums with the backward pass, which ours
    does not.
    """
    main_grad = getattr(weight, "main_grad", None)
    in_place = main_grad is not None and main_grad.dtype == torch.float32 and weight.dtype in FP32_BF16

    def put() -> None:
        if in_place:
            add(main_grad)
        else:
            accumulate(weight, compute())

    later = deferred()
    if later is not None:
        later.add(put)
        return None
    if in_place:
        add(main_grad)
        return None
    return compute()


class _SplitLinear(torch.autograd.Function):
    """``x W^T`` with the tensor axis's collectives: gather before it and reduce-scatter behind the input's gradient, or its sum."""

    @staticmethod
    def forward(ctx, x, weight, sum_input_grad: bool, gathers: bool, group):
        ctx.save_for_backward(x, weight)
        ctx.weight_parameter = weight
        ctx.sum_input_grad, ctx.gathers, ctx.group = sum_input_grad, gathers, group
        return torch.matmul(_gathered(x, group) if gathers else x, weight.t())

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
            whole = _gathered(x, group) if gathers else x
            return grad.reshape(-1, grad.shape[-1]), whole.reshape(-1, whole.shape[-1])

        def compute() -> torch.Tensor:
            left, right = rows()
            return left.t().matmul(right)

        def add(out: torch.Tensor) -> None:
            accumulate_product_(out, *rows())

        grad_weight = weight_gradient(parameter, compute, add) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None, None


def _gathered(x_SBD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The whole sequence, of which each tensor rank holds a part."""
    whole = torch.empty((x_SBD.shape[0] * group.size(), *x_SBD.shape[1:]), dtype=x_SBD.dtype, device=x_SBD.device)
    dist.all_gather_into_tensor(whole, x_SBD.contiguous(), group=group)
    return whole


class _Split:
    def _forward_impl(self, input, weight, bias=None, allreduce_dgrad=False, sequence_parallel=False, tp_group=None, **_):
        """Megatron's seam for the product."""
        output = _SplitLinear.apply(input, weight, allreduce_dgrad, sequence_parallel, tp_group)
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
