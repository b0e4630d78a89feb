"""The head of the model and its loss: cross entropy of a token over the whole vocabulary, of which each tensor rank has columns.

In: hidden states ``[S, B, D]`` and labels ``[B, S]``; out: fp32 losses ``[B, S]``. Two ways, the same numbers but for the order of
sums: logits are kept, in the model's dtype, and become their gradient in place; or (``fused_loss``) they are made a piece of the
vocabulary at a time in either direction, and no tensor of ``[S, B, V]`` exists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from r1mega.model.fp8.weights import as_tensor
from r1mega.model.gradients import deferred, weight_gradient
from r1mega.model.linear import ColumnLinear, gathered
from r1mega.ops.accumulate import accumulate_product_
from r1mega.ops.cross_entropy import combine_log_sums, cross_entropy, cross_entropy_backward_

PIECE_LOGITS = 1 << 27
"""Logits that the fused loss holds at once, 256 MiB in bf16; of 512 words at least."""


class Head(ColumnLinear):
    """Megatron's output layer. ``passes_hidden``: give the hidden states on, for a loss that makes the logits itself."""

    passes_hidden = False

    def forward(self, input_, weight=None, runtime_gather_output=None):
        """``[S, B, D]`` to logits ``[S, B, V / tensor]``, or to itself; and no bias."""
        if self.passes_hidden:
            return input_, None
        return super().forward(input_, weight, runtime_gather_output)


class LanguageModel(GPTModel):
    """Megatron's model with our loss, MTP's too. ``fused_loss``: losses without logits of the whole vocabulary."""

    fused_loss = False

    def forward(self, *args, labels: torch.Tensor | None = None, **kwargs):
        """Megatron's."""
        with self.without_logits() if self.fused_loss and labels is not None else contextlib.nullcontext():
            return super().forward(*args, labels=labels, **kwargs)

    @contextlib.contextmanager
    def without_logits(self) -> Iterator[None]:
        """Inside, the head passes its input on."""
        if not self.post_process:
            yield
            return
        self.output_layer.passes_hidden = True
        try:
            yield
        finally:
            self.output_layer.passes_hidden = False

    def head_weight(self) -> torch.Tensor:
        """``[V / tensor, D]``, the embedding's where the two are tied."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Labels ``[B, S]`` and logits ``[S, B, V / tensor]``, or the hidden states in their place, to losses ``[B, S]``."""
        labels_SB, group, head = labels.transpose(0, 1).contiguous(), self.pg_collection.tp, self.output_layer
        if head.passes_hidden:
            losses_SB = _FusedLosses.apply(logits, self.head_weight(), labels_SB, head.sequence_parallel, group)
        else:
            losses_SB = _Losses.apply(logits, labels_SB, group)
        return losses_SB.transpose(0, 1).contiguous()


class _Losses(torch.autograd.Function):
    """From logits; the backward pass writes their gradient over them."""

    @staticmethod
    def forward(ctx, logits_SBV, labels_SB, group):
        rows, labels = logits_SBV.reshape(-1, logits_SBV.shape[-1]), labels_SB.view(-1)
        ctx.first = group.rank() * rows.shape[1]
        log_sum, target = _over_ranks(*cross_entropy(rows, labels, ctx.first), group)
        ctx.save_for_backward(logits_SBV, labels, log_sum)
        ctx.used = False
        return (log_sum - target).view(labels_SB.shape)

    @staticmethod
    def backward(ctx, grad_SB):
        if ctx.used:
            raise RuntimeError("cross entropy: one backward pass, whose gradient lies where the logits were; got a second")
        ctx.used = True
        logits_SBV, labels, log_sum = ctx.saved_tensors
        rows = logits_SBV.reshape(-1, logits_SBV.shape[-1])
        cross_entropy_backward_(rows, labels, log_sum, grad_SB.reshape(-1).to(log_sum.dtype), ctx.first)
        return rows.view(logits_SBV.shape), None, None


class _FusedLosses(torch.autograd.Function):
    """From hidden states and the head's weight; both directions make the logits, a piece of the vocabulary at a time.

    Costs a fourth product of the head's size. The hidden states' gradient is summed over pieces in fp32.
    """

    @staticmethod
    def forward(ctx, hidden_SBD, weight, labels_SB, gathers: bool, group):
        ctx.weight, ctx.gathers, ctx.group = weight, gathers, group
        ctx.first = group.rank() * weight.shape[0]
        rows, labels = _rows(hidden_SBD, gathers, group), labels_SB.view(-1)
        parts = [cross_entropy(rows.mm(weight[piece].t()), labels, ctx.first + piece.start) for piece in _pieces(rows, weight)]
        here = combine_log_sums(torch.stack([part.log_sum_T for part in parts]))
        log_sum, target = _over_ranks(here, torch.stack([part.target_T for part in parts]).sum(0), group)
        ctx.save_for_backward(hidden_SBD, weight, labels, log_sum)
        return (log_sum - target).view(labels_SB.shape)

    @staticmethod
    def backward(ctx, grad_SB):
        hidden_SBD, weight, labels, log_sum = ctx.saved_tensors
        parameter, group = ctx.weight, ctx.group
        grad = grad_SB.reshape(-1).to(log_sum.dtype)
        rows = _rows(hidden_SBD, ctx.gathers, group)
        grad_rows = torch.zeros(rows.shape, dtype=log_sum.dtype, device=rows.device)

        def walk(total: torch.Tensor | None, overwrite: bool, *, to_hidden: bool) -> None:
            """Adds the weight's gradient to ``total``, the hidden states' to ``grad_rows``, where they are wanted."""
            for piece in _pieces(rows, weight):
                grads = rows.mm(weight[piece].t())
                cross_entropy_backward_(grads, labels, log_sum, grad, ctx.first + piece.start)
                if to_hidden:
                    accumulate_product_(grad_rows, grads.t(), weight[piece])
                if total is not None:
                    accumulate_product_(total[piece], grads, rows, overwrite=overwrite)

        apart = not ctx.needs_input_grad[1] or deferred() is not None  # else one walk makes both, now
        if apart:
            walk(None, False, to_hidden=True)

        def add(total: torch.Tensor, overwrite: bool) -> None:
            walk(total, overwrite, to_hidden=not apart)

        grad_weight = weight_gradient(parameter, as_tensor(weight, add), add) if ctx.needs_input_grad[1] else None
        grad_hidden = grad_rows.to(hidden_SBD.dtype)
        if ctx.gathers:
            part = torch.empty_like(hidden_SBD)
            dist.reduce_scatter_tensor(part, grad_hidden.view(-1, *hidden_SBD.shape[1:]), group=group)
            grad_hidden = part
        elif group.size() > 1:
            dist.all_reduce(grad_hidden, group=group)
        return grad_hidden.view(hidden_SBD.shape), grad_weight, None, None, None


def _rows(hidden_SBD: torch.Tensor, gathers: bool, group: dist.ProcessGroup) -> torch.Tensor:
    whole = gathered(hidden_SBD, group) if gathers else hidden_SBD
    return whole.reshape(-1, whole.shape[-1])


def _pieces(rows: torch.Tensor, weight: torch.Tensor) -> Iterator[slice]:
    """Words whose logits are made together; all pieces about as wide, whole multiples of 128 words."""
    words = len(weight)
    most = max(512, PIECE_LOGITS // max(1, len(rows)) // 128 * 128)
    count = -(-words // most)
    size = -(-words // count // 128) * 128
    return (slice(first, min(first + size, words)) for first in range(0, words, size))


def _over_ranks(log_sum: torch.Tensor, target: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the whole vocabulary from this tensor rank's columns."""
    if group.size() == 1:
        return log_sum, target
    both = torch.stack([log_sum, target])
    parts = both.new_empty(group.size() * len(both), both.shape[1])
    dist.all_gather_into_tensor(parts, both, group=group)
    return combine_log_sums(parts[0::2]), parts[1::2].sum(0)
