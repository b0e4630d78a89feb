"""What flows through the RL loop, as dataclasses. No ranks, no model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """One generated response.

    ``token_ids``: the response's tokens, the end-of-sequence token included when it was drawn; ``logprobs``: float a token, natural
    log of its probability under the distribution that it was drawn from (softmax of logits / temperature); ``finish_reason``:
    "stop" (end of sequence drawn) or "length" (max_new_tokens reached).
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class RewardRecord:
    """What one reward said of one response: its value, why it failed ("" when it did not), and what it noted (:class:`Noted`)."""

    value: float
    seconds: float
    failure: str = ""
    note: str = ""


class Noted(float):
    """A reward's value with a word on how it came about ("test 3: wrong"): no failure of the reward, but kept with its record."""

    def __new__(cls, value: float, note: str = "") -> Noted:
        made = super().__new__(cls, value)
        made.note = note
        return made
