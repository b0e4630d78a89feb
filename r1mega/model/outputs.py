"""What a model gives in the place of logits. No Megatron in here: RL reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Hidden(NamedTuple):
    """What logits are made of: ``hidden_BSD``, ``weight_VD``, and how many of V are tokens."""

    hidden_BSD: torch.Tensor
    weight_VD: torch.Tensor
    num_tokens: int
