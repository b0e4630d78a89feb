"""What answers the policy's turns: nothing (one response is the episode), or an environment with tools. Registers
``environment=single``.

An environment speaks text; tokens are the loop's: what the policy has written stays as the ids that it drew, and an observation is
encoded once and appended, so that no turn is ever encoded again. Its tokens are read and not trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from r1mega.registry import register

if TYPE_CHECKING:
    from r1mega.data.problems import Problem


@dataclass(frozen=True)
class Step:
    """What a turn brought. ``observation``: text that the policy reads next, None where the episode is over; ``reward``: of this
    turn, added to the judges' with weight 1."""

    observation: str | None = None
    reward: float = 0.0


class Episode(Protocol):
    """One response's way through an environment; used by one thread at a time."""

    def reset(self) -> str:
        """The question, as the policy is asked it (inside the tokenizer's prompt)."""

    def step(self, response: str) -> Step:
        """Take the policy's turn: the text that it wrote, without its end token. May take its time, others go on meanwhile."""

    def close(self) -> None:
        """The episode is over, however it ended; safe to call twice."""


class Environment(Protocol):
    """What a choice of kind ``environment`` builds: ``build() -> Environment``. A turn ends with the end token. ``max_turns``: most
    turns of an episode."""

    max_turns: int

    def begin(self, problem: Problem) -> Episode:
        """A fresh episode."""


@register("environment", "single")
@dataclass(frozen=True)
class Single:
    """One response is the whole episode."""

    def build(self) -> Environment:
        """The environment."""
        return _Single()


class _Single:
    max_turns = 1

    def begin(self, problem: Problem) -> Episode:
        return _Question(problem.question)


class _Question:
    def __init__(self, question: str):
        self._question = question

    def reset(self) -> str:
        return self._question

    def step(self, response: str) -> Step:
        return Step()

    def close(self) -> None:
        pass
