"""Rows between the ranks of an axis, with gradients: uneven all-to-all, everybody's rows to everybody, sums of parts.

``splits`` are rows a peer, plain ints, in the order of the axis (Gloo and NCCL both want them on the host). Every function does
nothing on an axis of one rank. Sums over ranks are in fp32 at least and in the order of the ranks, so that they have the same bits
each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from r1mega.mesh import Axis

Splits = Sequence[int]


def exchange_counts(counts: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``[size, n]``, row j for rank j, to ``[size, n]``, row j from rank j. The same n on all ranks; no gradient."""
    if axis.size == 1:
        return counts
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=axis.group)
    return received


def swap(parts: tuple[torch.Tensor, ...], sent: Splits, received: Splits, axis: Axis) -> tuple[torch.Tensor, ...]:
    """Each tensor's rows ``[sum(sent), ...]``, sorted by the rank that they go to, to ``[sum(received), ...]``, sorted by where
    from."""
    return parts if axis.size == 1 else _Swap.apply(tuple(sent), tuple(received), axis, *parts)


def share(parts: tuple[torch.Tensor, ...], counts: Splits, axis: Axis) -> tuple[torch.Tensor, ...]:
    """Each tensor ``[counts[rank], ...]`` to all ranks' ``[sum(counts), ...]``; the gradient is the sum of all ranks' gradients."""
    return parts if axis.size == 1 else _Share.apply(tuple(counts), axis, *parts)


def reduce(rows: torch.Tensor, counts: Splits, axis: Axis) -> torch.Tensor:
    """``[sum(counts), D]``, a part of all ranks' rows, to this rank's ``[counts[rank], D]``, summed over the ranks' parts."""
    return rows if axis.size == 1 else _Reduce.apply(tuple(counts), axis, rows)


def _move(rows: torch.Tensor, sent: Splits, received: Splits, axis: Axis) -> torch.Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=axis.group)
    return out


def _shared(rows: torch.Tensor, counts: Splits, axis: Axis) -> torch.Tensor:
    repeated = rows.unsqueeze(0).expand(axis.size, *rows.shape).reshape(-1, *rows.shape[1:])
    return _move(repeated, [len(rows)] * axis.size, counts, axis)


def _reduced(rows: torch.Tensor, counts: Splits, axis: Axis) -> torch.Tensor:
    own = counts[axis.rank]
    parts = _move(rows, counts, [own] * axis.size, axis).view(axis.size, own, *rows.shape[1:])
    total = parts[0].to(torch.promote_types(rows.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(rows.dtype)


class _Swap(torch.autograd.Function):
    """One node for all tensors, so that every rank's backward pass communicates in the same order."""

    @staticmethod
    def forward(ctx, sent, received, axis, *parts):
        ctx.sent, ctx.received, ctx.axis = sent, received, axis
        return tuple(_move(part, sent, received, axis) for part in parts)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *(_move(grad, ctx.received, ctx.sent, ctx.axis) for grad in grads)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, counts, axis, *parts):
        ctx.counts, ctx.axis = counts, axis
        return tuple(_shared(part, counts, axis) for part in parts)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *(_reduced(grad, ctx.counts, ctx.axis) for grad in grads)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, counts, axis, rows):
        ctx.counts, ctx.axis = counts, axis
        return _reduced(rows, counts, axis)

    @staticmethod
    def backward(ctx, grad):
        return None, None, _shared(grad, ctx.counts, ctx.axis)
