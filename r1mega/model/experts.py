"""The routed experts of a MoE layer, as two stacked weights; how they are checkpointed in logical order whatever the layout.

Expert i: ``down_i(silu(gate_i x) * up_i x * prob)``. Takes the slot of Megatron's ``experts``. Experts may be cut along ``F`` over
the ranks of ``expert_tensor``; then each rank gives its part of the answers, and the dispatcher sums the parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule

from r1mega.device import allocation_device
from r1mega.model.fp8.experts import Fp8Experts
from r1mega.model.fp8.weights import Recipe
from r1mega.model.gradients import weight_gradient
from r1mega.ops.accumulate import accumulate_grouped_, accumulate_product_
from r1mega.ops.permute import permute_probs, permute_rows
from r1mega.ops.quantize import BLOCK
from r1mega.ops.row_map import RowMap, map_rows
from r1mega.ops.swiglu import SWIGLU_BACKWARD, swiglu


def _drawn_by_rank(groups) -> contextlib.AbstractContextManager:
    """Inside, ranks with other experts, or other parts of them, draw other numbers, and ranks with the same ones the same."""
    if groups.ep.size() * groups.expt_tp.size() == 1:
        return contextlib.nullcontext()
    return get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name())


class GroupedExperts(MegatronModule):
    """This rank's ``e`` routed experts as two stacked weights, so that a layer is two parameters whatever ``e`` is.

    ``weight1``: ``[e, 2f, D]`` (gate rows of this rank's part, then its up rows), ``weight2``: ``[e, D, f]``; ``f`` is ``F`` over
    the size of ``expert_tensor``. ``placement``: the logical expert of each slot, all ranks' slots in order, ``(0, 1, ..., E - 1)``
    at first; whoever sets it also moves weights and moments (by saving before and loading after: checkpoints are in logical order).
    ``fp8``: how the products are in FP8; None: in the weights' dtype.
    """

    fp8: Recipe | None = None

    def __init__(self, num_local_experts: int, config, submodules=None, pg_collection=None):
        super().__init__(config)
        self.num_local_experts = num_local_experts
        self.expert_parallel_group = pg_collection.ep
        self.expert_tensor_group = pg_collection.expt_tp
        self.expert_data_group = pg_collection.expt_dp
        self.placement = tuple(range(num_local_experts * pg_collection.ep.size()))
        width, hidden = config.moe_ffn_hidden_size // pg_collection.expt_tp.size(), config.hidden_size
        device = "meta" if config.init_model_with_meta_device else allocation_device()
        shapes = {"weight1": (num_local_experts, 2 * width, hidden), "weight2": (num_local_experts, hidden, width)}
        inits = {"weight1": config.init_method, "weight2": config.output_layer_init_method}
        for name, shape in shapes.items():
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
            if config.perform_initialization and not weight.is_meta:
                with _drawn_by_rank(pg_collection):
                    for expert in weight.data:
                        inits[name](expert)
            # Megatron: reduced over the expert-data axis, not the data axis where experts or tensor ranks cut the tokens.
            # The same in every layout, so that the optimizer has the same parts in every layout and checkpoints move between them.
            weight.allreduce = False
            # No two ranks hold the same shard of an expert's gradient, tensor ranks included: all count in the gradient's norm.
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
            self.register_parameter(name, weight)

    def local_experts(self) -> tuple[int, ...]:
        """The logical experts of this rank's slots."""
        first = self.expert_parallel_group.rank() * self.num_local_experts
        return self.placement[first : first + self.num_local_experts]

    def forward(self, rows_RD: torch.Tensor, tokens_per_expert: torch.Tensor, probs_R: torch.Tensor):
        """``rows_RD``: tokens sorted by local slot; ``tokens_per_expert``: int64 ``[e]``, sum R. Returns ``([R, D], None)``.

        Weight gradients are put off where :func:`r1mega.model.gradients.deferred` has a store while the backward pass runs.
        """
        if self.fp8 is not None:
            # each row is a token of one expert; experts want whole blocks of rows
            row_map = map_rows(_of_local_expert(tokens_per_expert, len(rows_RD)), 1, BLOCK)
            return self._in_fp8(rows_RD, permute_rows(probs_R.unsqueeze(1), row_map).squeeze(1), row_map), None
        if rows_RD.is_cuda and rows_RD.dtype == torch.bfloat16 and len(rows_RD):
            offsets = tokens_per_expert.to(rows_RD.device).cumsum(0).to(torch.int32)
            hidden = _GroupedLinears.apply(self.weight1, rows_RD, offsets)
            return _ActivatedLinears.apply(self.weight2, hidden, probs_R, offsets), None
        counts = tokens_per_expert.tolist()
        hidden = _Linears.apply(self.weight1, *rows_RD.split(counts))
        inner = [swiglu(part, probs) for part, probs in zip(hidden, probs_R.split(counts), strict=True)]
        return torch.cat(_Linears.apply(self.weight2, *inner)), None

    def on_tokens(
        self, tokens_TD: torch.Tensor, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor, top_k: int | None
    ) -> torch.Tensor:
        """Where all experts are here and products are in FP8: the sum of each token's answers, ``[T, D]``.

        As dispatch, :meth:`forward` and combine, in one; tokens are quantised while they go to their rows. ``top_k``: experts of a
        token, see :func:`r1mega.ops.row_map.map_rows`.
        """
        row_map = map_rows(routing_map_TE, top_k, BLOCK)
        return self._in_fp8(tokens_TD, permute_probs(probs_TE, row_map), row_map)

    def _in_fp8(self, tokens_TD: torch.Tensor, probs_R: torch.Tensor, row_map: RowMap) -> torch.Tensor:
        return Fp8Experts.apply(tokens_TD, probs_R, self.weight1, self.weight2, row_map, self.fp8)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Both stacks as parts of the global ``[E, 2F, D]`` (all gate rows first) and ``[E, D, F]``, by logical expert.

        A factory a weight: Megatron's optimizer asks it for the same parts of its moments.
        """
        replica = (0, 0, self.expert_data_group.rank())
        return {
            prefix + name: ShardedTensorFactory(
                prefix + name, getattr(self, name), self._parts(name, tuple(sharded_offsets)), _stack(name), replica
            )
            for name in ("weight1", "weight2")
        }

    def _parts(self, name: str, outer: tuple) -> Callable:
        experts, ahead = self.local_experts(), len(outer)
        part, parts = self.expert_tensor_group.rank(), self.expert_tensor_group.size()

        @torch.no_grad()
        def build(key: str, stack: torch.Tensor, replica_id, flattened_range=None) -> list[ShardedTensor]:
            def shard(tensor: torch.Tensor, expert: int, axis: int, index: int, of: int) -> ShardedTensor:
                where = (*outer, (ahead, expert, len(self.placement)), (ahead + axis, index, of))
                return ShardedTensor.from_rank_offsets(key, tensor, *where, replica_id=replica_id, prepend_axis_num=ahead)

            shards = []
            for expert, own in zip(experts, stack.split(1), strict=True):
                if name == "weight2":
                    shards.append(shard(own, expert, 2, part, parts))
                    continue
                gate, up = own.chunk(2, dim=1)
                shards += [shard(gate, expert, 1, part, 2 * parts), shard(up, expert, 1, parts + part, 2 * parts)]
            return shards

        return build

    def backward_dw(self) -> None:
        """Megatron's hook for weight gradients that its own modules put off; ours go through :mod:`r1mega.model.gradients`."""


def _of_local_expert(tokens_per_expert: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Bool ``[R, e]``: the expert of rows that are sorted by it."""
    ends = tokens_per_expert.cumsum(0)
    row = torch.arange(num_rows, device=ends.device).unsqueeze(1)
    return (row >= ends - tokens_per_expert) & (row < ends)


def _stack(name: str) -> Callable:
    """The inverse of a factory's parts: what was loaded, as this rank's stack."""

    @torch.no_grad()
    def merge(parts: list[torch.Tensor]) -> torch.Tensor:
        if name == "weight1":
            parts = [torch.cat(pair, dim=1) for pair in zip(parts[::2], parts[1::2], strict=True)]
        return torch.cat(parts)

    return merge


class _Linears(torch.autograd.Function):
    """``F.linear(rows_i, weight[i])`` for each expert, one node, so that the stack's gradient is made once."""

    @staticmethod
    def forward(ctx, weight, *rows):
        ctx.weight = weight  # the parameter itself: what is saved for backward comes back as another object
        ctx.save_for_backward(*rows)
        return tuple(F.linear(part, own) for part, own in zip(rows, weight.unbind(0), strict=True))

    @staticmethod
    def backward(ctx, *grads):
        weight, rows = ctx.weight, ctx.saved_tensors
        grad_rows = [grad.mm(own) for grad, own in zip(grads, weight.detach().unbind(0), strict=True)]

        def compute() -> torch.Tensor:
            return torch.stack([grad.t().mm(part) for grad, part in zip(grads, rows, strict=True)])

        def add(out: torch.Tensor, overwrite: bool) -> None:
            for own, grad, part in zip(out.unbind(0), grads, rows, strict=True):
                accumulate_product_(own, grad, part, overwrite=overwrite)

        return weight_gradient(weight, compute, add) if ctx.needs_input_grad[0] else None, *grad_rows


class _GroupedLinears(torch.autograd.Function):
    """The same in one kernel for all experts; ``offsets``: int32 ``[e]``, the end of each expert's rows."""

    @staticmethod
    def forward(ctx, weight, rows, offsets):
        ctx.weight = weight
        ctx.save_for_backward(rows, offsets)
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)

    @staticmethod
    def backward(ctx, grad):
        weight, (rows, offsets), grad = ctx.weight, ctx.saved_tensors, grad.contiguous()
        grad_rows = F.grouped_mm(grad, weight.detach(), offs=offsets)

        def compute() -> torch.Tensor:
            return F.grouped_mm(grad.t(), rows, offs=offsets)

        def add(out: torch.Tensor, overwrite: bool) -> None:
            accumulate_grouped_(out, grad, rows, offsets, overwrite=overwrite)

        return weight_gradient(weight, compute, add) if ctx.needs_input_grad[0] else None, grad_rows, None


class _ActivatedLinears(torch.autograd.Function):
    """SwiGLU, then :class:`_GroupedLinears`: the activation is made again in the backward pass instead of kept (V3 3.3.3)."""

    @staticmethod
    def forward(ctx, weight, hidden, probs, offsets):
        ctx.weight = weight
        ctx.save_for_backward(hidden, probs, offsets)
        return F.grouped_mm(swiglu(hidden, probs), weight.transpose(1, 2), offs=offsets)

    @staticmethod
    def backward(ctx, grad):
        weight, (hidden, probs, offsets), grad = ctx.weight, ctx.saved_tensors, grad.contiguous()
        grad_hidden, grad_probs = SWIGLU_BACKWARD.packet(F.grouped_mm(grad, weight.detach(), offs=offsets), hidden, probs)

        def compute() -> torch.Tensor:
            return F.grouped_mm(grad.t(), swiglu(hidden, probs), offs=offsets)

        def add(out: torch.Tensor, overwrite: bool) -> None:
            accumulate_grouped_(out, grad, swiglu(hidden, probs), offsets, overwrite=overwrite)

        grad_weight = weight_gradient(weight, compute, add) if ctx.needs_input_grad[0] else None
        return grad_weight, grad_hidden, grad_probs, None
