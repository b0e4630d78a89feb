"""Ops ``token_logprobs`` and its backward: a token's log-probability and the entropy, without the logits of the whole vocabulary.

With ``z = scale weight hidden`` and ``p = softmax(z)``: ``logprob = log p[target]`` and ``entropy = -sum_j p[j] log p[j]``. The
logits are made a piece of the vocabulary at a time and folded into each token's sums; the backward makes them again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1mega.ops.library import Case, Op


class TokenLogprobs(NamedTuple):
    """Natural logs, ``[T]``: the targets' log-probabilities, the entropies of the distributions, ``log sum_j e^z[j]``."""

    logprobs_T: torch.Tensor
    entropy_T: torch.Tensor
    log_sum_T: torch.Tensor


def token_logprobs(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor, num_tokens: int | None = None, scale: float = 1.0
) -> TokenLogprobs:
    """``log softmax(scale hidden weight^T)[target]`` and that distribution's entropy, with gradients to hidden and weight.

    ``hidden_TD``, ``weight_VD``: both bfloat16, float32 or float64, any strides, T of 0 or more. ``targets_T``: int64, 0 to
    ``num_tokens - 1``; on a CPU others raise IndexError, elsewhere they give NaN. ``num_tokens``: rows of the weight from there on
    are padding, which no token is (None: none are); their gradient is 0. ``scale``: one over a temperature, above 0. Results are
    float32 (float64 for float64).

    Logits are products summed in fp32 and not rounded to bf16. Sums over the vocabulary are in fp32 relative to the largest logit
    so far, so that no logit is too large, and the entropy does not suffer from the logits' size. A logit of -inf has probability 0
    and adds 0; a row with NaN or +inf gives NaN. With ``g`` and ``k`` the gradients of logprob and entropy,

        dL/dz[j] = scale (g (1[j = target] - p[j]) - k p[j] (log p[j] + entropy)),

    rounded to the operands' dtype for the two products that follow, whose sums are in fp32; the gradients are rounded once.
    ``log_sum_T`` has no gradient. At most 256 MiB of logits are held on a GPU, 8 MiB on a CPU, or 512 columns. Nothing waits for
    the device. The same input gives the same bits.
    """
    return TokenLogprobs(
        *TOKEN_LOGPROBS.packet(hidden_TD, weight_VD, targets_T, len(weight_VD) if num_tokens is None else num_tokens, scale)
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reference(hidden, weight, targets, num_tokens, scale):
    wide = _wide(hidden.dtype)
    logits = hidden.mm(weight[:num_tokens].t()).to(wide) * scale  # as plain torch has them: of bf16 operands rounded to bf16
    log_sum = torch.logsumexp(logits, dim=-1)
    logp = torch.log_softmax(logits, dim=-1)
    logprobs = logp.gather(1, targets.unsqueeze(1)).squeeze(1)
    # a logit of -inf adds 0, and its gradient is 0
    possible = logp != -torch.inf
    entropy = -torch.where(possible, logp.exp() * torch.where(possible, logp, 0.0), 0.0).sum(-1)
    return logprobs, entropy, log_sum.detach()


def _fake(hidden, weight, targets, num_tokens, scale):
    return tuple(hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype)) for _ in range(3))


def _setup(ctx, inputs, output):
    hidden, weight, targets, ctx.num_tokens, ctx.scale = inputs
    _, entropy, log_sum = output
    ctx.mark_non_differentiable(log_sum)
    ctx.save_for_backward(hidden, weight, targets, log_sum, entropy)


def _backward(ctx, grad_logprobs, grad_entropy, _grad_log_sum):
    grads = TOKEN_LOGPROBS_BACKWARD.packet(grad_logprobs, grad_entropy, *ctx.saved_tensors, ctx.num_tokens, ctx.scale)
    return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None


def _backward_reference(grad_logprobs, grad_entropy, hidden, weight, targets, log_sum, entropy, num_tokens, scale):
    used = weight[:num_tokens]
    logp = hidden.mm(used.t()).to(_wide(hidden.dtype)) * scale - log_sum.unsqueeze(1)
    grads = grad_logprobs.unsqueeze(1) + grad_entropy.unsqueeze(1) * (logp.clamp(min=-1000.0) + entropy.unsqueeze(1))
    grads = -logp.exp() * grads
    grads.scatter_add_(1, targets.unsqueeze(1), grad_logprobs.unsqueeze(1))
    grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    grads = (grads * scale).to(hidden.dtype)
    grad_weight[:num_tokens] = grads.t().mm(hidden)
    return grads.mm(used), grad_weight


def _backward_fake(grad_logprobs, grad_entropy, hidden, weight, targets, log_sum, entropy, num_tokens, scale):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _case(
    T: int, D: int, V: int, *, padding: int = 0, strided: bool = False, scale: float = 1.0, ties: bool = False, by: float = 1.0
):
    """``padding``: rows of the weight that are no token; ``scale``: of the logits; ``ties``: each twice; ``by``: the op's scale."""

    def make(dtype, device):
        draw = torch.Generator().manual_seed(T + 10 * D + 100 * V)
        hidden, weight = torch.randn(T, D, generator=draw), torch.randn(V, D, generator=draw) * (scale / max(D, 1) ** 0.5)
        targets = torch.randint(0, V - padding, (T,), generator=draw)
        if ties:
            weight = weight[: V // 2].repeat(2, 1)
        if strided:
            hidden, weight = hidden.t().contiguous().t(), torch.stack([weight, weight], dim=-1)[..., 0]
        return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device), V - padding, by

    return make


def _backward_case(*sizes: int, **how):
    def make(dtype, device):
        hidden, weight, targets, num_tokens, by = _case(*sizes, **how)(dtype, device)
        with torch.no_grad():
            wide = _wide(hidden.dtype)
            _, entropy, log_sum = _reference(hidden.to(wide), weight.to(wide), targets, num_tokens, by)
        draw = torch.Generator().manual_seed(3)
        grads = (torch.randn(len(hidden), generator=draw).to(device, log_sum.dtype) for _ in range(2))
        return *grads, hidden, weight, targets, log_sum, entropy, num_tokens, by

    return make


_SITUATIONS = (
    ("ordinary", (13, 16, 40), {}),
    ("empty", (0, 8, 24), {}),
    ("one row", (1, 8, 24), {}),
    ("odd sizes", (7, 5, 37), {}),
    ("padding", (6, 8, 40), {"padding": 9}),
    ("a temperature", (6, 8, 40), {"by": 1.0 / 0.6}),
    ("one token", (4, 8, 3), {"padding": 2}),
    ("non-contiguous", (9, 6, 21), {"strided": True}),
    ("extreme values", (11, 8, 30), {"scale": 1e3}),
    ("ties", (5, 8, 16), {"ties": True}),
    ("several pieces", (3, 4, 3000), {"padding": 100}),
    ("pieces of many tokens", (5000, 3, 1100), {}),
)
TOKEN_LOGPROBS = Op(
    "token_logprobs(Tensor hidden, Tensor weight, Tensor targets, int num_tokens, float scale) "
    "-> (Tensor logprobs, Tensor entropy, Tensor log_sum)",
    _reference,
    _fake,
    _setup,
    _backward,
    tuple(Case(name, _case(*sizes, **how)) for name, sizes, how in _SITUATIONS),
    exact=False,
)
TOKEN_LOGPROBS_BACKWARD = Op(
    "token_logprobs_backward(Tensor grad_logprobs, Tensor grad_entropy, Tensor hidden, Tensor weight, Tensor targets, "
    "Tensor log_sum, Tensor entropy, int num_tokens, float scale) -> (Tensor grad_hidden, Tensor grad_weight)",
    _backward_reference,
    _backward_fake,
    cases=tuple(Case(name, _backward_case(*sizes, **how)) for name, sizes, how in _SITUATIONS),
    exact=False,
)
OPS = (TOKEN_LOGPROBS, TOKEN_LOGPROBS_BACKWARD)
