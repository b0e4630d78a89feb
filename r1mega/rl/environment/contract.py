"""What an environment is asked and what it must answer. No tokens, no threads, no torch.

An environment speaks text; tokens are the loop's (:mod:`r1mega.rl.environment.play`): what the policy has written stays as the ids
that it drew, and an observation is encoded once and appended, so that no turn is ever encoded again. Its tokens are read and not
trained.

What the policy reads, for a question with one observation (``|`` between tokens that no text of an environment can make)::

    bos |User| question |Assistant| <think>  turn 1  |eos| |User| observation |Assistant|  turn 2  |eos|

So an observation is a turn of the user, and the reasoning that ``<think>`` of the prompt opened goes on after it: the policy closes
it once, in the turn that answers, and what a reward judges, the policy's turns in a row, has the form of one response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from r1mega.data.problems import Problem


@dataclass(frozen=True)
class Step:
    """What a turn brought. ``observation``: text that the policy reads next, None where the episode is over; ``reward``: of this
    turn, added to the judges' with weight 1."""

    observation: str | None = None
    reward: float = 0.0


class Episode(Protocol):
    """One response's way through an environment. Its calls come one after the other, from threads that may differ.

    What it raises, or does not answer in time, ends this episode alone, which is then judged as far as it came and counted in
    ``environment_failed``.
    """

    def reset(self) -> str:
        """The question, as the policy is asked it (inside the tokenizer's prompt)."""

    def step(self, response: str) -> Step:
        """Take the policy's turn: the text that it wrote, without its end token. May take its time, others go on meanwhile. Called
        for every turn, also the last one and one that was cut off at the longest length; then nobody reads the observation."""

    def close(self) -> None:
        """The episode is over, however it ended; safe to call twice, and while a step that took too long still runs."""


class Environment(Protocol):
    """What a choice of kind ``environment`` builds: ``build() -> Environment``. A turn ends with the end token.

    ``max_turns``: most turns of an episode. It may also have: ``workers``, calls at once (default 32); ``longest_seconds``, where a
    call may take longer than ``step_seconds`` of the command; ``inline = True``, where no call ever waits: then no thread is used;
    ``close()``, when the command ends. The choice may have ``check()``, which raises UserError for what it needs of the machine.
    """

    max_turns: int

    def begin(self, problem: Problem) -> Episode:
        """A fresh episode."""
