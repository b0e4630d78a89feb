"""The policy's objective: pure functions of log-probabilities, advantages and masks [B, S]; no model, no optimizer, no ranks.

GRPO (DeepSeek-R1 arXiv 2501.12948v1 Eq. 1-2), to be minimised: over the G responses o of a question
    L = mean_o 1/|o| sum_t [ -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef k3 ],   r = pi(o_t) / pi_old(o_t)
    k3 = pi_ref/pi - log(pi_ref/pi) - 1
The sums are over the microbatch that is passed, the divisors those of the whole minibatch: the losses of its microbatches add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1mega.config.errors import UserError
from r1mega.config.knob import above, at_least, knob, one_of
from r1mega.registry import register

if TYPE_CHECKING:
    import torch

    from r1mega.model.outputs import Hidden


@dataclass(frozen=True)
class PolicyStats:
    """Sums over the tokens of one or more microbatches, as 0-d fp64 tensors without gradient.

    ``num_tokens`` tokens that count; ``num_clipped`` those of them whose gradient the clip removed; ``kl_sum`` of k3, in nats;
    ``ratio_max`` the largest ratio (0 without tokens). Reduce ``sums()`` by SUM and ``ratio_max`` by MAX over ranks.
    """

    num_tokens: torch.Tensor
    num_clipped: torch.Tensor
    kl_sum: torch.Tensor
    ratio_max: torch.Tensor

    def __add__(self, other: PolicyStats) -> PolicyStats:
        import torch

        return PolicyStats.of(self.sums() + other.sums(), torch.maximum(self.ratio_max, other.ratio_max))

    def sums(self) -> torch.Tensor:
        """fp64 [3]: num_tokens, num_clipped, kl_sum."""
        import torch

        return torch.stack([self.num_tokens, self.num_clipped, self.kl_sum])

    @staticmethod
    def of(sums_3: torch.Tensor, ratio_max: torch.Tensor) -> PolicyStats:
        """The stats with these (reduced) sums and this maximum."""
        return PolicyStats(*sums_3.unbind(), ratio_max)

    def summary(self) -> dict[str, float]:
        """``clip_share`` and ``kl`` a token, ``ratio_max``, ``num_tokens``."""
        tokens = max(float(self.num_tokens), 1.0)
        return {
            "clip_share": float(self.num_clipped) / tokens,
            "kl": float(self.kl_sum) / tokens,
            "ratio_max": float(self.ratio_max),
            "num_tokens": float(self.num_tokens),
        }


@register("policy_loss", "grpo")
@dataclass(frozen=True)
class GrpoLoss:
    """GRPO's clipped objective with the k3 KL inside the loss; the defaults are R1's."""

    clip_low: float = knob(10.0, "ratio is clipped below 1 - clip_low; from 1 on never (R1: 10)", "1", **above(0))
    clip_high: float = knob(10.0, "ratio is clipped above 1 + clip_high (R1: 10; PPO: 0.2; DAPO: 0.28)", "1", **above(0))
    kl_coef: float = knob(0.001, "weight of the KL to the reference; 0: no reference needed", "1", **at_least(0))
    aggregation: str = knob(
        "sequence",
        "sequence: mean over each response, then over responses (R1); token: mean over all tokens (DAPO)",
        "name",
        **one_of("sequence", "token"),
    )

    def build(self) -> Callable[..., tuple[torch.Tensor, PolicyStats]]:
        """:func:`policy_loss` with this choice's knobs filled in."""

        def loss(logprobs_BS, old_logprobs_BS, ref_logprobs_BS, advantages_B, mask_BS, **sizes):
            return policy_loss(
                logprobs_BS,
                old_logprobs_BS,
                ref_logprobs_BS,
                advantages_B,
                mask_BS,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                kl_coef=self.kl_coef,
                aggregation=self.aggregation,
                **sizes,
            )

        return loss


def policy_loss(
    logprobs_BS: torch.Tensor,
    old_logprobs_BS: torch.Tensor,
    ref_logprobs_BS: torch.Tensor | None,
    advantages_B: torch.Tensor,
    mask_BS: torch.Tensor,
    *,
    num_sequences: float,
    num_tokens: float,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    aggregation: str = "sequence",
    lengths_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, PolicyStats]:
    """One microbatch's share of the minibatch's loss, and its statistics.

    ``logprobs_BS``: the policy's, with gradient; ``old_logprobs_BS``: those of the policy that the rollout came from;
    ``ref_logprobs_BS``: the reference's, None when ``kl_coef`` is 0; all natural logs at the sampling temperature, [B, S].
    ``advantages_B``: [B]. ``mask_BS``: true at response tokens; elsewhere the log-probabilities may be anything.
    ``num_sequences`` and ``num_tokens``: responses and response tokens of the whole minibatch over all microbatches and data
    ranks (aggregation "sequence" divides by the first, "token" by the second). ``lengths_B``: response tokens of each row where
    this rank holds only a part of the sequence (context parallel); default: the mask's own sums.
    Returns the loss (0-d fp32) and :class:`PolicyStats`. Raises UserError for a missing reference or an unknown aggregation.
    """
    import torch

    if kl_coef > 0 and ref_logprobs_BS is None:
        raise UserError(
            f"policy_loss.kl_coef: above 0 needs the reference's logprobs; got {kl_coef} without them; use policy_loss.kl_coef=0"
        )
    mask = mask_BS.bool()

    def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, a.float() - b.float(), 0.0)  # masked places may hold inf or nan: they end here, gradient included

    ratio = torch.exp(difference(logprobs_BS, old_logprobs_BS.detach()))
    advantages = advantages_B.detach().float()[:, None]
    plain = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    per_token = -torch.minimum(plain, clipped)
    k3 = torch.zeros_like(ratio)
    if ref_logprobs_BS is not None:
        log_ref_ratio = difference(ref_logprobs_BS.detach(), logprobs_BS)
        k3 = torch.exp(log_ref_ratio) - log_ref_ratio - 1.0
        if kl_coef > 0:
            per_token = per_token + kl_coef * k3

    if aggregation == "sequence":
        lengths = (mask.sum(dim=1) if lengths_B is None else lengths_B).clamp(min=1).float()
        weights = mask / lengths[:, None] / num_sequences
    elif aggregation == "token":
        weights = mask / float(num_tokens)
    else:
        raise UserError(f"policy_loss.aggregation: one of sequence, token; got {aggregation!r}; use sequence")
    loss = (per_token * weights).sum()

    with torch.no_grad():
        stats = PolicyStats(
            num_tokens=mask.sum().double(),
            num_clipped=((clipped < plain) & mask).sum().double(),
            kl_sum=k3[mask].double().sum(),
            ratio_max=torch.where(mask, ratio, 0.0).amax().double() if ratio.numel() else torch.zeros((), dtype=torch.float64),
        )
    return loss, stats


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
    from r1mega.model.outputs import Hidden
    from r1mega.ops.token_logprobs import token_logprobs as from_hidden
    from r1mega.rl.logprobs import TokenLogprobs

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
