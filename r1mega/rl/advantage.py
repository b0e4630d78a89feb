"""How a group's rewards become advantages; in: ``rewards_PG`` of P prompts with G responses each, out: ``advantages_PG`` fp32.

Knows no tokens and no ranks: a group is whole where this is called. GRPO: A = (r - mean(r)) / std(r) over the group (DeepSeekMath
arXiv 2402.03300 4.1.2, DeepSeek-R1 arXiv 2501.12948v1 Eq. 3).
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


def group_advantages(rewards_PG, mask_PG=None, *, scale_by_std: bool = True, eps: float = 1e-6) -> torch.Tensor:
    """A = (r - mean) / (std + eps) in each row.

    ``rewards_PG``: [P, G], any real dtype; ``mask_PG``: [P, G], true where the response counts (default: all). Returns fp32
    [P, G]. Mean and std are over the counted responses in fp64; std is the population's (divisor: counted responses, not one
    less), so \\|A\\| is at most sqrt(G - 1). Equal rewards, and a group with one counted response, give exactly 0; a response that
    does not count gets exactly 0 whatever its reward. Raises UserError for another shape or a counted reward that is not finite.
    """
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
    rewards = rewards.masked_fill(~mask, 0.0)
    count_P1 = mask.sum(dim=1, keepdim=True).clamp(min=1)
    centred = (rewards - rewards.sum(dim=1, keepdim=True) / count_P1).masked_fill(~mask, 0.0)
    # The mean of equal numbers may differ from them in the last bit, and the division would blow that up: say 0 outright.
    low = rewards.masked_fill(~mask, float("inf")).amin(dim=1, keepdim=True)
    high = rewards.masked_fill(~mask, float("-inf")).amax(dim=1, keepdim=True)
    centred = centred.masked_fill(low >= high, 0.0)
    if scale_by_std:
        centred = centred / ((centred.square().sum(dim=1, keepdim=True) / count_P1).sqrt() + eps)
    return centred.to(torch.float32)
