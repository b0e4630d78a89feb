"""What a policy loss is given: one microbatch's log-probabilities, advantages, masks, and the whole minibatch's sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def alone(values: torch.Tensor) -> torch.Tensor:
    """Sums over a sequence where this rank holds all of it: what it has already."""
    return values


@dataclass(frozen=True)
class LossInput:
    """Log-probabilities are natural, at the sampling temperature, ``[B, S]``, any float; without gradient but ``logprobs_BS``.

    ``logprobs_BS``: the policy's, with gradient. ``old_BS``: the trainer's own of the weights before the rollout's first update
    (pi_old; the proximal policy of decoupled PPO). ``rollout_BS``: those that the engine drew with (the behaviour policy).
    ``ref_BS``, ``teacher_BS``: the reference's and a teacher's. None where nobody made them.
    ``advantages_B``: [B]. ``mask_BS``: true at the response tokens that count; elsewhere all of the above may hold anything.
    ``num_sequences`` and ``num_tokens``: responses and response tokens that count, of the whole minibatch over all microbatches and
    data ranks; ``max_tokens``: the longest response that could be drawn. They are divisors: microbatches' losses add up.
    ``lengths_B``: counted response tokens of each row where this rank holds only a part of it (context parallel); default: the
    mask's own sums. ``over_sequence``: takes ``[B]`` sums over this rank's parts of the rows to sums over the whole rows, without
    gradient; every context rank calls it equally often (:meth:`r1mega.model.context.ContextPart.sum`).
    """

    logprobs_BS: torch.Tensor
    old_BS: torch.Tensor
    advantages_B: torch.Tensor
    mask_BS: torch.Tensor
    num_sequences: float
    num_tokens: float
    ref_BS: torch.Tensor | None = None
    rollout_BS: torch.Tensor | None = None
    teacher_BS: torch.Tensor | None = None
    lengths_B: torch.Tensor | None = None
    max_tokens: int = 0
    over_sequence: Callable[[torch.Tensor], torch.Tensor] = alone
