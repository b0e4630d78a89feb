"""Log-probabilities of given tokens from logits; in: ``logits_BSV``, ``targets_BS``; out: fp32 [B, S]. Draws nothing.

Keeps no fp32 copy of the logits: forward and backward work through blocks of rows, and the backward recomputes the softmax from
the logits and the saved log-sum-exp.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from r1mega.config.errors import UserError
from r1mega.model.outputs import Hidden
from r1mega.ops.token_logprobs import token_logprobs as from_hidden

BLOCK_ELEMENTS = 1 << 22
"""Logits in fp32 at once: 16 MiB."""

PRODUCT_ELEMENTS = 1 << 27
"""Logits in fp32 that one product of hidden states gives, where they have a support: 512 MiB."""


def token_logprobs(
    output: torch.Tensor | Hidden,
    targets_BS: torch.Tensor,
    temperature: float = 1.0,
    with_entropy: bool = True,
    support_BSK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target under softmax(logits / temperature), and that distribution's entropy.

    ``output``: logits ``[B, S, V]``, any float dtype (the gradient comes back in it), or what they are made of.
    ``targets_BS``: int64 [B, S], already shifted: the target of a position is the token that its logits predict. Returns
    ``(logprobs_BS, entropy_BS)``, fp32, in nats, both computed in fp32; the entropy carries no gradient and, from logits, is 0 with
    ``with_entropy=False``. Peak extra memory: from logits one block of 16 MiB, and in the backward the gradient; from hidden states
    see :func:`r1mega.ops.token_logprobs.token_logprobs`.

    ``support_BSK``: int [B, S, K], the tokens that each position's was drawn from (top-p, top-k; -1: no token), of which the
    distribution is then made anew: keep-sampling-mask (DeepSeek-V3.2, arXiv 2512.02556). A position without one has all tokens. A
    target outside its support has the log-probability -inf. From hidden states logits are then made a block of rows at a time in
    either direction, in fp32, with a copy of the head's weight in fp32. Raises UserError for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise UserError(f"sampling.temperature: scoring divides by it, above 0; got {temperature}; score greedy responses at 1")
    targets_R = targets_BS.reshape(-1)
    support_RK = None if support_BSK is None else support_BSK.reshape(-1, support_BSK.shape[-1])
    if isinstance(output, Hidden) and support_RK is not None:
        logprobs_R, entropy_R = _of_support(output, targets_R, float(temperature), with_entropy, support_RK)
    elif isinstance(output, Hidden):
        rows = output.hidden_BSD.reshape(-1, output.hidden_BSD.shape[-1])
        made = from_hidden(rows, output.weight_VD, targets_R, output.num_tokens, 1.0 / temperature)
        logprobs_R, entropy_R = made.logprobs_T, made.entropy_T.detach()
    else:
        rows = output.reshape(-1, output.shape[-1])
        logprobs_R, entropy_R = TokenLogprobs.apply(rows, targets_R, float(temperature), with_entropy, support_RK)
    return logprobs_R.view(targets_BS.shape), entropy_R.view(targets_BS.shape)


def _of_support(output: Hidden, targets_R: torch.Tensor, temperature: float, with_entropy: bool, support_RK: torch.Tensor):
    """As :class:`TokenLogprobs`, of fp32 logits that the backward pass makes again: a block of them is there at once."""
    hidden_RD, weight_VD = output.hidden_BSD.reshape(-1, output.hidden_BSD.shape[-1]), output.weight_VD[: output.num_tokens].float()

    def block(hidden, targets, support):
        return TokenLogprobs.apply(hidden.float().mm(weight_VD.t()), targets, temperature, with_entropy, support)

    made = [
        checkpoint(block, hidden_RD[rows], targets_R[rows], support_RK[rows], use_reentrant=False, preserve_rng_state=False)
        for rows in _blocks(len(hidden_RD), len(weight_VD), PRODUCT_ELEMENTS)
    ]
    logprobs, entropies = zip(*made, strict=True) if made else ([targets_R.float()], [targets_R.float()])
    return torch.cat(logprobs), torch.cat(entropies)


def _scaled(logits_RV: torch.Tensor, temperature: float, support_RK: torch.Tensor | None) -> torch.Tensor:
    """z / temperature in fp32, -inf outside the support of rows that have one."""
    scaled = logits_RV.float() / temperature
    if support_RK is None:
        return scaled
    kept = torch.zeros(scaled.shape[0], scaled.shape[1] + 1, dtype=torch.bool, device=scaled.device)
    held = torch.where(support_RK < 0, scaled.shape[1], support_RK).long()  # -1 lands in a column of its own
    kept.scatter_(1, held, True)
    is_whole = (support_RK < 0).all(dim=1, keepdim=True)
    return scaled.masked_fill_(~(kept[:, :-1] | is_whole), float("-inf"))


class TokenLogprobs(torch.autograd.Function):
    """log softmax(z / temperature)[target] and that distribution's entropy, both fp32; the gradient is the first one's alone.

    ``support_RK``: of which tokens the distribution is, see :func:`token_logprobs`; None: of all.
    """

    @staticmethod
    def forward(ctx, logits_RV: torch.Tensor, targets_R: torch.Tensor, temperature: float, with_entropy: bool, support_RK=None):
        num_rows, vocab_size = logits_RV.shape
        lse_R = torch.empty(num_rows, dtype=torch.float32, device=logits_RV.device)
        logprobs_R, entropy_R = torch.empty_like(lse_R), torch.zeros_like(lse_R)
        for rows in _blocks(num_rows, vocab_size):
            scaled = _scaled(logits_RV[rows], temperature, None if support_RK is None else support_RK[rows])
            lse_R[rows] = torch.logsumexp(scaled, dim=-1)
            logprobs_R[rows] = scaled.gather(1, targets_R[rows, None]).squeeze(1) - lse_R[rows]
            if with_entropy:
                # H = lse - E[z]. A logit of -inf has probability 0 and adds 0, where the product would be nan.
                probs = torch.exp(scaled - lse_R[rows, None])
                entropy_R[rows] = lse_R[rows] - torch.where(probs > 0, probs * scaled, 0.0).sum(dim=-1)
        ctx.save_for_backward(logits_RV, targets_R, lse_R, support_RK)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_R)
        return logprobs_R, entropy_R

    @staticmethod
    def backward(ctx, grad_R: torch.Tensor, _grad_entropy):
        logits_RV, targets_R, lse_R, support_RK = ctx.saved_tensors
        grad_RV = torch.empty_like(logits_RV)
        grad_R = grad_R.float() / ctx.temperature
        for rows in _blocks(*logits_RV.shape):
            scaled = _scaled(logits_RV[rows], ctx.temperature, None if support_RK is None else support_RK[rows])
            block = torch.exp(scaled - lse_R[rows, None]).mul_(-grad_R[rows, None])
            block.scatter_add_(1, targets_R[rows, None], grad_R[rows, None])
            grad_RV[rows] = block
        return grad_RV, None, None, None, None


def _blocks(num_rows: int, vocab_size: int, elements: int | None = None) -> list[slice]:
    size = max(1, (elements or BLOCK_ELEMENTS) // vocab_size)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
