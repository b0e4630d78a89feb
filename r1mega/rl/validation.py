"""Held-out problems every few rollouts, by the run's own engine and rewards: pass@1 and length under the weights pushed last.

A sample is an episode as in training, drawn at ``rl.valid.temperature``; the same problems and seeds each time. Generating ranks
share the problems. Nothing of it is trained on or written into the ledger. Runs in the rollouts' thread: with ``rl.lag`` above 0
beside the rollouts that are in the making.
"""

from __future__ import annotations

import asyncio
import copy
import statistics
from dataclasses import dataclass, replace

from r1mega.config.rl import ValidConfig
from r1mega.data.problems import Problem
from r1mega.rl.engine.contract import RoutingRefused
from r1mega.rl.environment.play import Played
from r1mega.rl.place import Place
from r1mega.rl.rollouts import ROUTING_ATTEMPTS, Rollouts, seed_of

EPISODES = 1024
"""Episodes of one rank at once."""


@dataclass(frozen=True)
class Answer:
    """One sample of a held-out problem: ``index`` of the problem, is it correct, its tokens, was it cut off?"""

    index: int
    is_correct: bool
    tokens: int
    is_truncated: bool


class Validation:
    """``problems``: all of them; this rank, at ``place``, answers its share through ``rollouts``."""

    def __init__(self, choice: ValidConfig, problems: list[Problem], rollouts: Rollouts, place: Place, seed: int):
        self._choice, self._rollouts, self._seed = choice, rollouts, seed
        self._mine = list(enumerate(problems))[place.number :: place.count]
        self._player = copy.copy(rollouts.player)
        self._player.sampling = replace(self._player.sampling, temperature=choice.temperature)

    async def answers(self) -> list[Answer]:
        """This rank's, judged. Raises what the first failing request raised."""
        asked = [(*numbered, sample) for numbered in self._mine for sample in range(self._choice.samples)]
        found: list[Answer] = []
        for start in range(0, len(asked), EPISODES):
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._answer(*one)) for one in asked[start : start + EPISODES]]
            found += [task.result() for task in tasks]
        return found

    async def _answer(self, index: int, problem: Problem, sample: int) -> Answer:
        with self._rollouts.busy:
            played = await self._played(index, problem, sample)
        self._rollouts.tokens += played.num_drawn
        records = await self._rollouts.judged(problem, played.said)
        is_correct = not played.failure and records[self._choice.verifier].value >= 1.0
        return Answer(index, is_correct, played.num_drawn, played.completion.finish_reason == "length")

    async def _played(self, index: int, problem: Problem, sample: int) -> Played:
        """An episode; made again where the engine's record of experts, which nobody wants here, is not whole."""
        for _ in range(ROUTING_ATTEMPTS):
            try:
                return await self._player.play(problem, lambda turn: seed_of(f"{self._seed}:valid:{index}:{sample}:{turn}"))
            except RoutingRefused as error:
                refused = error
        raise refused


def valid_line(answers: list[Answer]) -> dict[str, float]:
    """``valid_pass_at_1``: mean over problems of the share of correct samples (R1 3.7), with the standard error of that mean;
    ``valid_response_length``: tokens that the policy drew; ``valid_truncated``: share cut off."""
    by_problem: dict[int, list[bool]] = {}
    for answer in answers:
        by_problem.setdefault(answer.index, []).append(answer.is_correct)
    shares = [statistics.fmean(correct) for correct in by_problem.values()]
    return {
        "valid_pass_at_1": statistics.fmean(shares),
        "valid_standard_error": statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0,
        "valid_response_length": statistics.fmean(answer.tokens for answer in answers),
        "valid_truncated": statistics.fmean(answer.is_truncated for answer in answers),
    }
