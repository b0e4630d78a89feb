"""The equations of the policy losses: pure functions of log-probabilities, advantages and masks [B, S].

To be minimised, over tokens t of responses o (DeepSeek-R1 arXiv 2501.12948v1 Eq. 1-2 and what followed it):
    L = sum_{o,t} share [ -w gain + kl_coef kl ]
    gain   clipped: min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), where A < 0 at least dual_clip A (arXiv 1912.09729)
           weighted: sg(clip(r, ...)) A log pi (CISPO, arXiv 2506.13585)
    r      token: pi/pi_old; sequence: s = (pi(o)/pi_old(o))^(1/|o|) (GSPO, arXiv 2507.18071), in each token's place as
           sg(s) pi/sg(pi) (its GSPO-token), whose value and gradient, summed over the response, are those of s
    A      the response's advantage, less distill_coef sg(log pi/pi_teacher) (on-policy distillation)
    w      1; or pi_old/pi_rollout of the token, or its product over the response: min(., C) (truncated importance sampling), 0
           outside [low, high] (IcePop, masked importance sampling), or as it is: the behaviour term of decoupled PPO (AReaL,
           arXiv 2505.24298); 0 for a vetoed response, and for one with A < 0 and mean log pi_rollout/pi > delta
           (DeepSeek-V3.2, arXiv 2512.02556, whose pi_old is the engine's)
    kl     of x = log pi/pi_ref: k1 = x, k2 = x^2/2, k3 = e^-x + x - 1, unbiased = pi/pi_rollout k3 with gradient through both
           (V3.2; pi_old where there is no pi_rollout). In the loss k1's expected gradient is 0: it shows, it does not hold.
    share  sequence: 1/(|o| N); token: 1/T; constant: 1/(N max_tokens) (Dr. GRPO, arXiv 2503.20783)
with N responses and T tokens of the whole minibatch. w weighs the policy's term only, not the KL. The sums are over the microbatch
that is passed, the divisors those of the minibatch: the losses of its microbatches, and of context ranks, add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from r1mega.config.errors import UserError
from r1mega.rl.loss.stats import PolicyStats

if TYPE_CHECKING:
    from r1mega.rl.loss.choices import Objective
    from r1mega.rl.loss.inputs import LossInput

LARGEST_LOG_WEIGHT = 20.0
"""Weights w lie in e^-20..e^20: a whole response's product would overflow fp32."""


def policy_loss(given: LossInput, knobs: Objective) -> tuple[torch.Tensor, PolicyStats]:
    """One microbatch's share of the minibatch's loss (0-d fp32), and its statistics.

    Raises UserError where a knob needs log-probabilities that are not given, or ``max_tokens``.
    """
    _check(given, knobs)
    mask = given.mask_BS.bool()
    old = given.rollout_BS if knobs.ratio_to == "rollout" else given.old_BS
    log_ratio = _difference(mask, given.logprobs_BS, old.detach())
    if knobs.ratio == "sequence":
        log_ratio = _of_sequence(given, mask, log_ratio)
    weight = _weights(given, knobs, mask, old)
    kept = mask & (weight > 0)
    ratio = torch.exp(torch.where(kept, log_ratio, 0.0))  # what is dropped may have overflown: 0 x inf would be nan
    advantages = given.advantages_B.detach().float()[:, None].expand_as(ratio)
    if knobs.distill_coef > 0:
        advantages = advantages - knobs.distill_coef * _difference(mask, given.logprobs_BS, given.teacher_BS).detach()

    bound = ratio.clamp(1.0 - knobs.clip_low, 1.0 + knobs.clip_high)
    if knobs.surrogate == "weighted":
        gain = bound.detach() * advantages * torch.where(mask, given.logprobs_BS.float(), 0.0)
        is_low, is_high = ratio < bound, ratio > bound
    else:
        plain, clipped = ratio * advantages, bound * advantages
        gain = torch.minimum(plain, clipped)
        is_low, is_high = (clipped < plain) & (ratio < bound), (clipped < plain) & (ratio > bound)
        if knobs.dual_clip > 0:
            floor = torch.where(advantages < 0, knobs.dual_clip * advantages, float("-inf"))
            is_high = is_high | (gain < floor)
            gain = torch.maximum(gain, floor)
    per_token = -gain * weight

    k3 = torch.zeros_like(ratio)
    if given.ref_BS is not None:
        kl, k3 = _kl(given, knobs, mask)
        if knobs.kl_coef > 0:
            per_token = per_token + knobs.kl_coef * kl
    loss = (per_token * _shares(given, knobs, mask)).sum()

    with torch.no_grad():
        stats = PolicyStats(
            num_tokens=_sum(mask),
            num_clipped_low=_sum(is_low & kept),
            num_clipped_high=_sum(is_high & kept),
            num_dropped=_sum(mask & ~kept),
            kl_sum=_sum(k3.detach()),
            weight_sum=_sum(weight * mask),
            max_ratio=_max(ratio.detach() * kept),
            max_weight=_max(weight * mask),
        )
    return loss, stats


def _check(given: LossInput, knobs: Objective) -> None:
    wanted = (
        ("kl_coef", knobs.kl_coef > 0, knobs.kl_coef, given.ref_BS, "0", "the reference's"),
        ("distill_coef", knobs.distill_coef > 0, knobs.distill_coef, given.teacher_BS, "0", "a teacher's"),
        ("ratio_to", knobs.ratio_to == "rollout", knobs.ratio_to, given.rollout_BS, "trainer", "the engine's"),
        ("correction", knobs.correction != "none", knobs.correction, given.rollout_BS, "none", "the engine's"),
        ("correction_veto", knobs.correction_veto > 0, knobs.correction_veto, given.rollout_BS, "0", "the engine's"),
    )
    for name, is_on, value, held, off, whose in wanted:
        if is_on and held is None:
            raise UserError(
                f"policy_loss.{name}: {value} needs {whose} logprobs; got a batch without them; use policy_loss.{name}={off}"
            )
    if knobs.aggregation == "constant" and not given.max_tokens > 0:
        raise UserError(
            f"policy_loss.aggregation: constant divides by the longest response, above 0 tokens; got {given.max_tokens}; "
            "use policy_loss.aggregation=token"
        )


def _difference(mask: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a - b in fp32, 0 outside the mask: there may be inf or nan, and they end here, gradient included."""
    return torch.where(mask, a.float() - b.float(), 0.0)


def _lengths(given: LossInput, mask: torch.Tensor) -> torch.Tensor:
    return (mask.sum(dim=1) if given.lengths_B is None else given.lengths_B).clamp(min=1)


def _whole(given: LossInput, values_BS: torch.Tensor) -> torch.Tensor:
    """Sums over whole rows in fp64, ``[B]``, whichever rank holds what of them; without gradient."""
    return given.over_sequence(values_BS.detach().double().sum(dim=1))


def _of_sequence(given: LossInput, mask: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """The response's mean log ratio at each of its tokens, with the gradient of the token's own (GSPO-token)."""
    mean_B = (_whole(given, log_ratio) / _lengths(given, mask)).float()
    return torch.where(mask, mean_B[:, None] + (log_ratio - log_ratio.detach()), 0.0)


@torch.no_grad()
def _weights(given: LossInput, knobs: Objective, mask: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """w [B, S], fp32."""
    weight = torch.ones_like(mask, dtype=torch.float32)
    if knobs.correction != "none" or knobs.correction_veto > 0:
        log_w = _difference(mask, old, given.rollout_BS)
        if knobs.correction_veto > 0:
            is_lost = _whole(given, torch.exp(log_w) < knobs.correction_veto) > 0
            weight = weight.masked_fill(is_lost[:, None], 0.0)
        if knobs.correction_level == "sequence" and knobs.correction != "none":
            log_w = _whole(given, log_w).float()[:, None].expand_as(log_w)
        w = torch.exp(log_w.clamp(-LARGEST_LOG_WEIGHT, LARGEST_LOG_WEIGHT))
        if knobs.correction == "truncate":
            weight = weight * w.clamp(max=knobs.correction_high)
        elif knobs.correction == "mask":
            weight = weight * torch.where((w >= knobs.correction_low) & (w <= knobs.correction_high), w, 0.0)
        elif knobs.correction == "decoupled":
            weight = weight * w
    if knobs.offpolicy_mask > 0:
        drift = _whole(given, _difference(mask, _behaviour(given), given.logprobs_BS)) / _lengths(given, mask)
        is_off = (given.advantages_B < 0) & (drift > knobs.offpolicy_mask)
        weight = weight.masked_fill(is_off[:, None], 0.0)
    return weight


def _behaviour(given: LossInput) -> torch.Tensor:
    """The log-probabilities that the responses were drawn with."""
    return (given.old_BS if given.rollout_BS is None else given.rollout_BS).detach()


def _kl(given: LossInput, knobs: Objective, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The KL of the knobs' kind, and k3."""
    x = _difference(mask, given.logprobs_BS, given.ref_BS.detach())
    k3 = torch.exp(-x) + x - 1.0
    if knobs.kl_kind == "k1":
        return x, k3
    if knobs.kl_kind == "k2":
        return x.square() / 2, k3
    if knobs.kl_kind == "unbiased":
        return torch.exp(_difference(mask, given.logprobs_BS, _behaviour(given))) * k3, k3
    return k3, k3


def _shares(given: LossInput, knobs: Objective, mask: torch.Tensor) -> torch.Tensor:
    """What each token's loss weighs, 0 outside the mask."""
    num_sequences = max(float(given.num_sequences), 1.0)  # 0 where nothing of a minibatch counts
    if knobs.aggregation == "sequence":
        return mask / _lengths(given, mask).float()[:, None] / num_sequences
    if knobs.aggregation == "token":
        return mask / max(float(given.num_tokens), 1.0)
    return mask / (num_sequences * given.max_tokens)


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.double().sum()


def _max(values: torch.Tensor) -> torch.Tensor:
    return values.amax().double() if values.numel() else torch.zeros((), dtype=torch.float64, device=values.device)
