"""What flows through the RL loop, as dataclasses. No ranks, no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Completion:
    """One generated response.

    ``token_ids``: the response's tokens, the end-of-sequence token included when it was drawn; ``logprobs``: float a token, natural
    log of its probability under the distribution that it was drawn from (softmax of logits / temperature); ``finish_reason``:
    "stop" (end of sequence drawn) or "length" (max_new_tokens reached).
    ``versions``: (version of the weights, start, end) in order, half-open spans that cover ``token_ids``; () from engines that hold
    one version. ``routed_experts``: int16 [prompt + response - 1, layers, top_k], what each position went through when it was read
    (dense layers hold what the engine gives there); None where it was not asked for. ``sampling_mask``: for each token the ids that
    it was drawn from, after top-p, top-k and min-p; ``logprobs`` are then renormalised over them.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    versions: tuple[tuple[int, int, int], ...] = ()
    routed_experts: torch.Tensor | None = None
    sampling_mask: list[list[int]] | None = None


@dataclass(frozen=True)
class RewardRecord:
    """What one reward said of one response: its value, and why it failed ("" when it did not)."""

    value: float
    seconds: float
    failure: str = ""
