"""The stream of problems that reinforcement learning asks: shuffled epochs with a cursor that is saved and restored exactly.

In: a list of problems; out: lists of ``prompts_per_rollout`` problems. The stream is global: ranks share it and take their part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from r1mega.config.errors import UserError
from r1mega.data.order import epoch_items
from r1mega.data.problems import Problem


class PromptStream:
    """Endless: every problem once in each epoch, in an order that ``seed`` and the epoch decide; a rollout may
    reach over the end of an epoch."""

    def __init__(self, problems: Sequence[Problem], prompts_per_rollout: int, seed: int):
        """Raises UserError without problems."""
        if not problems:
            raise UserError("data.problems: at least one problem to ask; got none; check the problem file and data.limit")
        self.problems = list(problems)
        self.prompts_per_rollout = prompts_per_rollout
        self.seed = seed
        self.consumed = 0
        digest = hashlib.sha256()
        for problem in self.problems:
            digest.update(f"{problem.question}\0{problem.answer}\0".encode())
        self._sha256 = digest.hexdigest()

    @property
    def epoch(self) -> float:
        """Passes over the problems so far."""
        return self.consumed / len(self.problems)

    def next(self) -> list[Problem]:
        """The next ``prompts_per_rollout`` problems."""
        items = epoch_items(self.consumed, self.prompts_per_rollout, len(self.problems), [self.seed, _STREAM])
        self.consumed += self.prompts_per_rollout
        return [self.problems[i] for i in items]

    def state_dict(self) -> dict[str, Any]:
        """The cursor, as JSON values."""
        return {"consumed": self.consumed, "seed": self.seed, "sha256": self._sha256}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved cursor. Raises UserError when the problems or the seed are others."""
        for key, now in (("sha256", self._sha256), ("seed", self.seed)):
            if state[key] != now:
                raise UserError(
                    f"data.problems: a run goes on with the problems and seed it began with; got {key} {str(now)[:12]} for "
                    f"{str(state[key])[:12]}; restore them, or start a new run"
                )
        self.consumed = state["consumed"]


_STREAM = 3  # keeps this order apart from the loaders' under the same seed
