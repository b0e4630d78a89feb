"""Log-probabilities of given tokens from logits; in: ``logits_BSV``, ``targets_BS``; out: fp32 [B, S]. Draws nothing.

Keeps no fp32 copy of the logits: forward and backward work through blocks of rows, and the backward recomputes the softmax from
the logits and the saved log-sum-exp.
"""

from __future__ import annotations

import torch

BLOCK_ELEMENTS = 1 << 22
"""Logits in fp32 at once: 16 MiB."""


class TokenLogprobs(torch.autograd.Function):
    """log softmax(z / temperature)[target] and that distribution's entropy, both fp32; the gradient is the first one's alone."""

    @staticmethod
    def forward(ctx, logits_RV: torch.Tensor, targets_R: torch.Tensor, temperature: float, with_entropy: bool):
        num_rows, vocab_size = logits_RV.shape
        lse_R = torch.empty(num_rows, dtype=torch.float32, device=logits_RV.device)
        logprobs_R, entropy_R = torch.empty_like(lse_R), torch.zeros_like(lse_R)
        for rows in _blocks(num_rows, vocab_size):
            scaled = logits_RV[rows].float() / temperature
            lse_R[rows] = torch.logsumexp(scaled, dim=-1)
            logprobs_R[rows] = scaled.gather(1, targets_R[rows, None]).squeeze(1) - lse_R[rows]
            if with_entropy:
                # H = lse - E[z]. A logit of -inf has probability 0 and adds 0, where the product would be nan.
                probs = torch.exp(scaled - lse_R[rows, None])
                entropy_R[rows] = lse_R[rows] - torch.where(probs > 0, probs * scaled, 0.0).sum(dim=-1)
        ctx.save_for_backward(logits_RV, targets_R, lse_R)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_R)
        return logprobs_R, entropy_R

    @staticmethod
    def backward(ctx, grad_R: torch.Tensor, _grad_entropy):
        logits_RV, targets_R, lse_R = ctx.saved_tensors
        grad_RV = torch.empty_like(logits_RV)
        grad_R = grad_R.float() / ctx.temperature
        for rows in _blocks(*logits_RV.shape):
            block = torch.exp(logits_RV[rows].float() / ctx.temperature - lse_R[rows, None]).mul_(-grad_R[rows, None])
            block.scatter_add_(1, targets_R[rows, None], grad_R[rows, None])
            grad_RV[rows] = block
        return grad_RV, None, None, None


def _blocks(num_rows: int, vocab_size: int) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS // vocab_size)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
