"""One response is the whole episode. Registers ``environment=single``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1mega.registry import register
from r1mega.rl.environment.contract import Environment, Step

if TYPE_CHECKING:
    from r1mega.data.problems import Problem


@register("environment", "single")
@dataclass(frozen=True)
class Single:
    """One response is the whole episode."""

    def build(self) -> Environment:
        """The environment."""
        return _Single()


class _Single:
    max_turns = 1
    inline = True

    def begin(self, problem: Problem) -> _Question:
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
