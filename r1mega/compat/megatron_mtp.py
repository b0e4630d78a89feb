"""Megatron-Core 0.16.1's logged MTP loss, on any device. Owns what its tracker adds up.

| bend | symptom without it | remove when |
|---|---|---|
| the tracker keeps the sum of the losses and the number of tokens | it adds up means of microbatches: the logged loss depends on the split wherever rows have tokens that are not learnt, and is NaN after a microbatch without any | it keeps both |

Versions: megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_tokens: torch.Tensor | None = None
_sums: list[torch.Tensor] = []


def apply() -> None:
    """Bend the model's two calls; safe to call again."""
    from megatron.core.models.gpt import gpt_model

    if getattr(gpt_model.roll_tensor, "_r1mega_bent", False):
        return
    roll, helper = gpt_model.roll_tensor, gpt_model.MTPLossLoggingHelper

    def roll_and_count(*args, **kwargs):
        global _tokens
        rolled, tokens = roll(*args, **kwargs)
        _tokens = tokens  # of the mask, which is rolled last before its loss is saved
        return rolled, tokens

    class Helper(helper):
        """Adds up sums and counts."""

        @staticmethod
        def save_loss_to_tracker(loss, *args, **kwargs):
            """Keep what ``loss``, a mean, is the mean of."""
            count = _tokens.detach().double()
            total = torch.where(count > 0, loss.detach().double() * count, 0.0)
            _sums.append(torch.stack([total, count]))

    roll_and_count._r1mega_bent = True
    gpt_model.roll_tensor, gpt_model.MTPLossLoggingHelper = roll_and_count, Helper


def take(device: torch.device) -> torch.Tensor:
    """Sum of this rank's MTP losses and number of tokens since the last call, all depths together: float64 ``[2]``."""
    total = torch.stack(_sums).sum(0) if _sums else torch.zeros(2, dtype=torch.float64, device=device)
    _sums.clear()
    return total


@contextlib.contextmanager
def scaled(share: float) -> Iterator[None]:
    """Inside, what goes back from MTP's losses is multiplied by ``share``, as the caller multiplies the main loss (Megatron's knob)."""
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    before = MTPLossAutoScaler.main_loss_backward_scale
    MTPLossAutoScaler.set_loss_scale(share)
    try:
        yield
    finally:
        MTPLossAutoScaler.set_loss_scale(before)
