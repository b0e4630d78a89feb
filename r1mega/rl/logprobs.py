"""Log-probabilities of given tokens from logits; in: ``logits_BSV``, ``targets_BS``; out: fp32 [B, S]. Draws nothing.

Keeps no fp32 copy of the logits: forward and backward work through blocks of rows, and the backward recomputes the softmax from
the logits and the saved log-sum-exp.
"""

from __future__ import annotations

import torch

from r1mega.config.errors import UserError
from r1mega.model.outputs import Hidden
from r1mega.ops.token_logprobs import token_logprobs as from_hidden

BLOCK_ELEMENTS = 1 << 22
"""Logits in fp32 at once: 16 MiB."""


def token_logprobs(
    output: torch.Tensor | Hidden, targets_BS: torch.Tensor, temperature: float = 1.0, with_entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target under softmax(logits / temperature), and that distribution's entropy.

    ``output``: logits ``[B, S, V]``, any float dtype (the gradient comes back in it), or what they are made of.
    ``targets_BS``: int64 [B, S], already shifted: the target of a position is the token that its logits predict. Returns
    ``(logprobs_BS, entropy_BS)``, fp32, in nats, both computed in fp32; the entropy carries no gradient and, from logits, is 0 with
    ``with_entropy=False``. Peak extra memory: from logits one block of 16 MiB, and in the backward the gradient; from hidden states
    see :func:`r1mega.ops.token_logprobs.token_logprobs`. Raises UserError for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise UserError(f"sampling.temperature: scoring divides by it, above 0; got {temperature}; score greedy responses at 1")
    targets_R = targets_BS.reshape(-1)
    if isinstance(output, Hidden):
        rows = output.hidden_BSD.reshape(-1, output.hidden_BSD.shape[-1])
        made = from_hidden(rows, output.weight_VD, targets_R, output.num_tokens, 1.0 / temperature)
        logprobs_R, entropy_R = made.logprobs_T, made.entropy_T.detach()
    else:
        rows = output.reshape(-1, output.shape[-1])
        logprobs_R, entropy_R = TokenLogprobs.apply(rows, targets_R, float(temperature), with_entropy)
    return logprobs_R.view(targets_BS.shape), entropy_R.view(targets_BS.shape)


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
