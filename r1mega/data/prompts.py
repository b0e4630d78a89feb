"""The stream of problems that reinforcement learning asks: shuffled epochs in which every place has a number, and what is done of
it.

In: a list of problems; out: numbers and problems. Number n is the same problem in every run with the same file and seed. Ranks
share the stream: of R ranks, rank r takes the numbers that leave r when divided by R. What has been taken is not done yet: a run
that ends takes again what it had taken and not finished, so that no question is lost and none is asked twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from r1mega.config.errors import UserError
from r1mega.data.order import epoch_items
from r1mega.data.problems import Problem


class PromptStream:
    """Endless: every problem once in each epoch, in an order that ``seed`` and the epoch decide."""

    def __init__(self, problems: Sequence[Problem], seed: int, rank: int = 0, ranks: int = 1):
        """Raises UserError without problems."""
        if not problems:
            raise UserError("data.problems: at least one problem to ask; got none; check the problem file and data.limit")
        self.problems = list(problems)
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.consumed = 0  # every number below is done
        self._done: set[int] = set()  # at or above it
        self._taken: set[int] = set()
        digest = hashlib.sha256()
        for problem in self.problems:
            digest.update(f"{problem.question}\0{problem.answer}\0".encode())
        self._sha256 = digest.hexdigest()

    def problem(self, item: int) -> Problem:
        """The problem of a number."""
        return self.problems[epoch_items(item, 1, len(self.problems), [self.seed, _STREAM])[0]]

    def take(self, count: int) -> list[int]:
        """This rank's next ``count`` numbers that are neither done nor taken."""
        found: list[int] = []
        item = self.consumed + (self.rank - self.consumed) % self.ranks
        while len(found) < count:
            if item not in self._done and item not in self._taken:
                found.append(item)
            item += self.ranks
        self._taken.update(found)
        return found

    def release(self) -> None:
        """What is taken and not done can be taken again."""
        self._taken.clear()

    def finish(self, items: Iterable[int]) -> None:
        """Numbers, those of other ranks among them, are done: never taken again."""
        for item in items:
            self._taken.discard(item)
            if item >= self.consumed:
                self._done.add(item)
        while self.consumed in self._done:
            self._done.remove(self.consumed)
            self.consumed += 1

    def done_until(self, state: dict[str, Any]) -> list[int]:
        """Numbers that are done in a later cursor and not in this one."""
        later = set(range(self.consumed, state["consumed"])) | set(state["done"])
        return sorted(item for item in later if item >= self.consumed and item not in self._done)

    def state_dict(self) -> dict[str, Any]:
        """The cursor, as JSON values: what is done, over all ranks where :meth:`finish` was told of all."""
        return {"consumed": self.consumed, "done": sorted(self._done), "seed": self.seed, "sha256": self._sha256}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved cursor, with any number of ranks. Raises UserError when the problems or the seed are others."""
        for key, now in (("sha256", self._sha256), ("seed", self.seed)):
            if state[key] != now:
                raise UserError(
                    f"data.problems: a run goes on with the problems and seed it began with; got {key} {str(now)[:12]} for "
                    f"{str(state[key])[:12]}; restore them, or start a new run"
                )
        self.consumed, self._done = state["consumed"], set(state.get("done", ()))
        self.release()


_STREAM = 3  # keeps this order apart from the loaders' under the same seed
