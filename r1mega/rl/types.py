"""What flows through the RL loop, as dataclasses. No ranks, no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Span = tuple[int, int, int]
"""(version, start, end): tokens ``start`` to ``end - 1`` of a response were drawn from the weights of ``version``."""


@dataclass(frozen=True)
class Completion:
    """One generated response.

    ``token_ids``: the response's tokens, the end-of-sequence token included when it was drawn; ``logprobs``: float a token, natural
    log of its probability under the distribution that it was drawn from (softmax of logits / temperature); ``finish_reason``:
    "stop" (end of sequence drawn) or "length" (max_new_tokens reached). ``versions``: spans over all tokens, in order; () where
    one version drew them all. ``routed_experts``: [prompt + response - 1, layers, top_k] experts of each token in each layer, where
    the engine tells them; in a :class:`Sample` as ``r1mega.rl.routing.RoutingShape.checked`` gives them. ``sampling_mask``: per
    token the ids that it could have been, where top-k or top-p cut the rest off.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    versions: tuple[Span, ...] = ()
    routed_experts: torch.Tensor | None = None
    sampling_mask: list[list[int]] | None = None


@dataclass(frozen=True)
class RewardRecord:
    """What one reward said of one response: its value, why it failed ("" when it did not), and what it noted (:class:`Noted`)."""

    value: float
    seconds: float
    failure: str = ""
    note: str = ""


@dataclass
class Sample:
    """One response with all that is known of it when its group is judged.

    ``item``: the number of its question in the run's endless stream; ``member``: its place in the group. ``prompt``: token ids.
    ``completion``: the whole episode after the prompt. ``own``: a bool a token, false where an environment put it (such a token has
    log-probability 0 and is not trained); None: the policy drew every one. ``records``: what the rewards said; ``reward``: their
    weighted sum and the environment's. ``began``, ``generated``, ``judged``: seconds since the epoch. ``id``: the ledger's.
    """

    item: int
    member: int
    problem: Any
    prompt: list[int]
    completion: Completion
    own: list[bool] | None = None
    turns: int = 1
    records: dict[str, RewardRecord] = field(default_factory=dict)
    environment_reward: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0
    began: float = 0.0
    generated: float = 0.0
    judged: float = 0.0
    id: str = ""

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions that drew its tokens, in order."""
        return tuple(span[0] for span in self.completion.versions)


def without_end(ids: list[int], eos_id: int) -> list[int]:
    """A turn's tokens without the one that ended it, if one did."""
    return ids[:-1] if ids and ids[-1] == eos_id else ids


class Noted(float):
    """A reward's value with a word on how it came about ("test 3: wrong"): no failure of the reward, but kept with its record."""

    def __new__(cls, value: float, note: str = "") -> Noted:
        made = super().__new__(cls, value)
        made.note = note
        return made
