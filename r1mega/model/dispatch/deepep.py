"""The dispatcher ``deepep``: tokens move by DeepEP's normal kernels (github.com/deepseek-ai/DeepEP, class ``Buffer``).

A token travels once to each rank that has one of its experts; our permute makes its rows there. The backward pass of DeepEP's
dispatch is its combine, and the other way round. NOT RUN so far, for want of the package: it is written against DeepEP's documented
interface (docs/legacy.md there, which its second version keeps), and only its refusals are tested.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch

from r1mega.config.errors import UserError
from r1mega.device import allocation_device
from r1mega.model.dispatch.contract import Dispatched, ExpertRanks
from r1mega.ops.permute import RowMap, permute, unpermute

INSTEAD = "use dispatcher=alltoall"


def refuse(ranks: ExpertRanks) -> None:
    """Raise UserError that says what of the hardware, the package or the layout is missing."""
    device = allocation_device()
    if device.type == "cpu":
        raise UserError(f"dispatcher: deepep needs Hopper GPUs; got device=cpu; {INSTEAD}")
    major, minor = torch.get_device_module(device).get_device_capability(device)
    if major < 9:
        raise UserError(f"dispatcher: deepep needs GPUs of compute capability 9.0 or above; got {major}.{minor}; {INSTEAD}")
    if importlib.util.find_spec("deep_ep") is None:
        raise UserError(
            "dispatcher: deepep needs the package deep_ep; got none; install github.com/deepseek-ai/DeepEP (it wants NVSHMEM), "
            f"or {INSTEAD}"
        )
    if ranks.expert.size == 1:
        raise UserError(
            f"dispatcher: deepep needs experts on several GPUs; got parallel.expert=1; use parallel.expert=2, or {INSTEAD}"
        )
    if ranks.expert_tensor.size > 1:
        raise UserError(
            f"dispatcher: deepep keeps each expert whole; got parallel.expert_tensor={ranks.expert_tensor.size}; "
            f"use parallel.expert_tensor=1, or {INSTEAD}"
        )


class _Route(NamedTuple):
    handle: Any
    row_map: RowMap


class DeepEPDispatcher:
    """bf16 hidden states, fp32 probabilities, K of ``top_k`` experts a token (the widest token's where it is None)."""

    def __init__(self, ranks: ExpertRanks, sms: int):
        self.ranks, self.sms = ranks, sms

    def dispatch(self, hidden_TD: torch.Tensor, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor) -> Dispatched:
        """See :class:`r1mega.model.dispatch.contract.Dispatcher`."""
        ranks = self.ranks
        if hidden_TD.dtype != torch.bfloat16:
            raise UserError(f"dispatcher: deepep moves bf16; got {hidden_TD.dtype}; use precision=bf16, or {INSTEAD}")
        width = ranks.top_k or max(1, int(routing_map_TE.sum(1).max()) if len(routing_map_TE) else 1)
        chosen_TK, experts_TK = routing_map_TE.to(torch.uint8).topk(width, dim=1)
        weights_TK = probs_TE.float().gather(1, experts_TK)
        experts_TK = torch.where(chosen_TK.bool(), experts_TK, -1)
        buffer = _buffer(ranks.expert.group, hidden_TD.shape[1] * 2, self.sms)
        rows, weights, local_RK, handle = _Out.apply(hidden_TD, weights_TK, experts_TK, buffer, ranks.num_experts)
        # what came: tokens with the numbers of their experts on this rank, -1 for experts elsewhere
        e = ranks.num_local_experts
        column = torch.where(local_RK >= 0, local_RK, e)
        chosen = torch.zeros(len(rows), e + 1, dtype=torch.bool, device=rows.device).scatter(1, column, True)[:, :e]
        probs = torch.zeros(len(rows), e + 1, dtype=weights.dtype, device=rows.device).scatter(1, column, weights)[:, :e]
        got = permute(rows, probs, chosen)
        return Dispatched(got.rows_RD, got.counts_E, got.probs_R, _Route((buffer, handle), got.row_map))

    def combine(self, rows_RD: torch.Tensor, route: _Route) -> torch.Tensor:
        """See :class:`r1mega.model.dispatch.contract.Dispatcher`."""
        return _Back.apply(unpermute(rows_RD, route.row_map), *route.handle)


_buffers: dict[Any, Any] = {}
"""One buffer a group: it holds memory that peers write into, and is made again only where it is too small."""


def _buffer(group: Any, hidden_bytes: int, sms: int) -> Any:
    from deep_ep import Buffer

    Buffer.set_num_sms(sms)
    configs = (Buffer.get_dispatch_config(group.size()), Buffer.get_combine_config(group.size()))
    nvlink = max(config.get_nvl_buffer_size_hint(hidden_bytes, group.size()) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(hidden_bytes, group.size()) for config in configs)
    held = _buffers.get(group)
    if held is None or held.num_nvl_bytes < nvlink or held.num_rdma_bytes < rdma:
        _buffers[group] = Buffer(group, nvlink, rdma)
    return _buffers[group]


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weights_TK, experts_TK, buffer, num_experts):
        per_rank, per_host, per_expert, in_rank, _ = buffer.get_dispatch_layout(experts_TK, num_experts)
        rows, experts, weights, _, handle, _ = buffer.dispatch(
            hidden_TD.contiguous(),
            topk_idx=experts_TK,
            topk_weights=weights_TK,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_host,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(experts)
        return rows, weights, experts, handle

    @staticmethod
    def backward(ctx, grad_rows, grad_weights, *_):
        grad_hidden, grad_weights, _ = ctx.buffer.combine(grad_rows.contiguous(), ctx.handle, topk_weights=grad_weights.float())
        return grad_hidden, grad_weights, None, None, None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sums, buffer, handle):
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(sums.contiguous(), handle)[0]

    @staticmethod
    def backward(ctx, grad_TD):
        return ctx.buffer.dispatch(grad_TD.contiguous(), handle=ctx.handle)[0], None, None
