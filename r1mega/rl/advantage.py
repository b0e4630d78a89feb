"""How rewards become advantages; in: ``rewards_PG`` of P prompts with G responses each, out: ``advantages_PG`` fp32.

P is all prompts of the rollout, over all data ranks: a baseline or a scale may be the whole batch's. Knows no tokens and no ranks.
All four subtract a baseline b and divide by a scale s, A = (r - b) / s:

| choice | b | s | paper |
|---|---|---|---|
| ``grpo`` | the group's mean | the group's std, divisor G | DeepSeekMath arXiv 2402.03300 4.1.2; R1 arXiv 2501.12948v1 Eq. 3 |
| ``dr_grpo`` | the group's mean | 1 | arXiv 2503.20783 |
| ``rloo`` | mean of the G - 1 other responses | 1 | arXiv 2402.14740 |
| ``reinforce++`` | the batch's mean (or the group's, by knob) | the batch's std, divisor P x G | arXiv 2501.03262 |

In every choice a masked response gets exactly 0 and counts nowhere: not in a mean, not in a std, not in a divisor. Where all that b
is the mean of is equal, A is exactly 0. In fp64. Wrong shapes, and counted rewards that are not finite, raise UserError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1mega.config.errors import UserError
from r1mega.config.knob import above, knob
from r1mega.registry import register

if TYPE_CHECKING:
    import torch


@register("advantage", "grpo")
@dataclass(frozen=True)
class GroupAdvantage:
    """Group-normalised advantage (GRPO); ``scale_by_std=false`` is Dr. GRPO's (arXiv 2503.20783)."""

    scale_by_std: bool = knob(True, "divide by the group's standard deviation (population: divisor G)", "bool")
    eps: float = knob(1e-6, "added to the standard deviation", "1", **above(0))

    def build(self) -> Callable[..., torch.Tensor]:
        """The function ``(rewards_PG, mask_PG=None) -> advantages_PG``; see :func:`group_advantages`."""

        def advantages(rewards_PG: torch.Tensor, mask_PG: torch.Tensor | None = None) -> torch.Tensor:
            return group_advantages(rewards_PG, mask_PG, scale_by_std=self.scale_by_std, eps=self.eps)

        return advantages


@register("advantage", "dr_grpo")
@dataclass(frozen=True)
class CentredAdvantage:
    """A = r - mean of the group, not divided (Dr. GRPO, arXiv 2503.20783): a division favours questions of little spread."""

    def build(self) -> Callable[..., torch.Tensor]:
        """The function ``(rewards_PG, mask_PG=None) -> advantages_PG``; see :func:`group_advantages`."""

        def advantages(rewards_PG: torch.Tensor, mask_PG: torch.Tensor | None = None) -> torch.Tensor:
            return group_advantages(rewards_PG, mask_PG, scale_by_std=False)

        return advantages


@register("advantage", "rloo")
@dataclass(frozen=True)
class LeaveOneOutAdvantage:
    """A_i = r_i - mean of the group's other responses (RLOO, arXiv 2402.14740), not divided."""

    def build(self) -> Callable[..., torch.Tensor]:
        """The function ``(rewards_PG, mask_PG=None) -> advantages_PG``; see :func:`leave_one_out_advantages`."""
        return leave_one_out_advantages


@register("advantage", "reinforce++")
@dataclass(frozen=True)
class BatchAdvantage:
    """Advantage normalised over the whole batch (REINFORCE++, arXiv 2501.03262).

    Its KL to the reference, in the paper a part of each token's reward, is the loss's here (``policy_loss.kl_coef``).
    """

    group_baseline: bool = knob(
        False, "subtract the group's mean before the batch's normalisation (REINFORCE++ with baseline: for reasoning)", "bool"
    )
    eps: float = knob(1e-8, "added to the batch's standard deviation", "1", **above(0))

    @property
    def baseline(self) -> str:
        """Over what rewards must be equal for the advantage to be exactly 0: "group" or "batch"."""
        return "group" if self.group_baseline else "batch"

    def build(self) -> Callable[..., torch.Tensor]:
        """The function ``(rewards_PG, mask_PG=None) -> advantages_PG``; see :func:`batch_advantages`."""

        def advantages(rewards_PG: torch.Tensor, mask_PG: torch.Tensor | None = None) -> torch.Tensor:
            return batch_advantages(rewards_PG, mask_PG, group_baseline=self.group_baseline, eps=self.eps)

        return advantages


def group_advantages(rewards_PG, mask_PG=None, *, scale_by_std: bool = True, eps: float = 1e-6) -> torch.Tensor:
    """A = (r - mean) / (std + eps) in each row.

    ``rewards_PG``: [P, G], any real dtype; ``mask_PG``: [P, G], true where the response counts (default: all). Returns fp32
    [P, G]. Mean and std are over the counted responses in fp64; std is the population's (divisor: counted responses, not one
    less), so \\|A\\| is at most sqrt(G - 1). Equal rewards, and a group with one counted response, give exactly 0; a response that
    does not count gets exactly 0 whatever its reward. Raises UserError for another shape or a counted reward that is not finite.
    """
    rewards, mask = _checked(rewards_PG, mask_PG)
    centred, count_P1 = _centred(rewards, mask)
    return (_over_std(centred, count_P1, eps) if scale_by_std else centred).float()


def leave_one_out_advantages(rewards_PG, mask_PG=None) -> torch.Tensor:
    """A_i = r_i - sum of the others / (n - 1) = (r_i - mean) n / (n - 1) for the n counted responses of a row; fp32 [P, G].

    No standard deviation. A group with one counted response has no baseline: it gets 0. Errors as :func:`group_advantages`.
    """
    rewards, mask = _checked(rewards_PG, mask_PG)
    centred, count_P1 = _centred(rewards, mask)
    return (centred * count_P1 / (count_P1 - 1).clamp(min=1)).float()


def batch_advantages(rewards_PG, mask_PG=None, *, group_baseline: bool = False, eps: float = 1e-8) -> torch.Tensor:
    """A = (r - mean) / (std + eps) over all counted responses of all P prompts; fp32 [P, G].

    ``group_baseline``: r is first replaced by r minus its group's mean, whose mean over the batch is 0. std is the population's
    (divisor: counted responses of the batch). Equal rewards in the batch (with ``group_baseline``: in the group) give exactly 0.
    Normalised over responses, not tokens: a long response does not weigh more. Errors as :func:`group_advantages`.
    """
    rewards, mask = _checked(rewards_PG, mask_PG)
    centred = _centred(rewards, mask)[0] if group_baseline else rewards
    row, count_11 = _centred(centred.reshape(1, -1), mask.reshape(1, -1))
    if group_baseline:
        row = centred.reshape(1, -1)  # its mean is 0 but for rounding, and flat groups stay exactly 0
    return _over_std(row, count_11, eps).reshape(rewards.shape).float()


def _checked(rewards_PG, mask_PG) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards in fp64, 0 where they do not count, and the mask as bool."""
    import torch

    rewards = torch.as_tensor(rewards_PG).to(torch.float64)
    if rewards.dim() != 2:
        raise UserError(f"advantage: rewards are [P, G]; got shape {tuple(rewards.shape)}; give one row a prompt")
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask_PG is None else torch.as_tensor(mask_PG, device=rewards.device).bool()
    if mask.shape != rewards.shape:
        raise UserError(
            f"advantage: the mask has the rewards' shape {tuple(rewards.shape)}; got {tuple(mask.shape)}; give one value a reward"
        )
    if not torch.isfinite(rewards[mask]).all():
        raise UserError("advantage: rewards are finite; got nan or inf; mask failed responses or give them 0")
    return rewards.masked_fill(~mask, 0.0), mask


def _centred(rewards: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row minus the mean of what counts in it, 0 elsewhere; and the number that counts, at least 1, ``[rows, 1]``."""
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    centred = (rewards - rewards.sum(dim=1, keepdim=True) / count).masked_fill(~mask, 0.0)
    if not rewards.shape[1]:
        return centred, count
    # The mean of equal numbers may differ from them in the last bit, and a division would blow that up: say 0 outright.
    low = rewards.masked_fill(~mask, float("inf")).amin(dim=1, keepdim=True)
    high = rewards.masked_fill(~mask, float("-inf")).amax(dim=1, keepdim=True)
    return centred.masked_fill(low >= high, 0.0), count


def _over_std(centred: torch.Tensor, count: torch.Tensor, eps: float) -> torch.Tensor:
    return centred / ((centred.square().sum(dim=1, keepdim=True) / count).sqrt() + eps)
