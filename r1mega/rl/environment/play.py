"""One episode: the policy's turns through an engine, the environment's answers between them. RL, evaluation and chat play with it.

In: a problem; out: :class:`Played`, tokens with who put them. The environment's calls run in threads under a time limit; what fails
or hangs there ends the episode and is told in ``failure``. A failure of the engine is raised. Which tokens stand around an
observation is said in :mod:`r1mega.rl.environment.contract`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from r1mega.config.run import SamplingConfig
from r1mega.data.problems import Problem
from r1mega.data.tokenizer import Tokenizer, encode_observation, encode_prompt
from r1mega.rl.engine.contract import Engine, Request, first_of
from r1mega.rl.environment.calls import Calls
from r1mega.rl.environment.contract import Environment, Episode, Step
from r1mega.rl.types import Completion, Span, without_end

WORKERS = 32
"""Calls at once of an environment that does not say."""
LONGEST_TOKEN = 256
"""Characters that one token stands for, at most: a longer observation than so many a token of room is not even encoded."""


class Failed(Exception):
    """An environment did not do what it must; the text names it."""


@dataclass
class Played:
    """An episode that is over.

    ``completion``: everything after the prompt; its spans cover the policy's tokens alone. ``own``: a bool a token, false where the
    environment put it; None: the policy drew every one. ``texts``: the policy's turns and the observations between them, in order,
    without end tokens. ``reward``: the environment's. ``failure``: why the environment ended the episode, "" where it did not fail.
    """

    prompt: list[int]
    completion: Completion
    own: list[bool] | None
    texts: list[str]
    reward: float = 0.0
    failure: str = ""

    @property
    def turns(self) -> int:
        """Of the policy."""
        return len(self.texts[::2])

    @property
    def num_drawn(self) -> int:
        """Tokens that the policy drew."""
        return len(self.completion.token_ids) if self.own is None else sum(self.own)

    @property
    def said(self) -> str:
        """What a reward judges: all that the policy itself wrote, without end tokens at the ends of its turns; other special tokens
        are written out, so that none is missed."""
        return "".join(self.texts[::2])


class Player:
    """``sampling.max_new_tokens``: of an episode, observations included; ``context``: tokens of prompt and episode at most (None:
    the engine's business); ``seconds``: longest call of the environment; ``name``: of the environment, for failures."""

    def __init__(
        self,
        environment: Environment,
        engine: Engine,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        context: int | None = None,
        seconds: float = 60.0,
        name: str = "environment",
    ):
        self.environment, self.engine, self.tokenizer, self.sampling = environment, engine, tokenizer, sampling
        self.context, self.name = context, name
        self._seconds = max(seconds, getattr(environment, "longest_seconds", 0.0))
        self._calls = None if getattr(environment, "inline", False) else Calls(getattr(environment, "workers", WORKERS))

    async def play(self, problem: Problem, seed_of: Callable[[int], int]) -> Played:
        """One episode; ``seed_of``: a turn's number, from 0, to the seed of its draw.

        Where the environment cannot begin, the question is asked as it is and has one turn.
        """
        made, episode = _Made(), None
        try:
            try:
                episode = await self._ask("begin", self.environment.begin, problem, late=_close)
                made.prompt = self._prompt(await self._ask("reset", episode.reset))
                await self._take_turns(made, episode, seed_of)
            except Failed as failed:
                made.failure = str(failed)
            if not made.texts:
                made.prompt = encode_prompt(self.tokenizer, problem.question)
                await self._turn(made, self._limit(made.prompt), seed_of(0))
        finally:
            if episode is not None:
                with contextlib.suppress(Failed):
                    await self._ask("close", episode.close)
        return made.played()

    async def _take_turns(self, made: _Made, episode: Episode, seed_of: Callable[[int], int]) -> None:
        limit = self._limit(made.prompt)
        for turn in range(self.environment.max_turns):
            await self._turn(made, limit, seed_of(turn))
            step = self._checked(await self._ask("step", episode.step, made.texts[-1]))
            made.reward += step.reward
            if step.observation is None or made.reason == "length" or turn + 1 == self.environment.max_turns:
                return
            seen = self._encoded(step.observation, limit - len(made.tokens))
            if seen is None:
                made.reason = "length"
                return
            made.see(seen, step.observation)

    async def _turn(self, made: _Made, limit: int, seed: int) -> None:
        sampling = replace(self.sampling, max_new_tokens=limit - len(made.tokens))
        drawn = await self.engine.complete(Request(made.prompt + made.tokens, sampling, seed))
        ids = without_end(drawn.token_ids, self.tokenizer.eos_id)
        made.add(drawn, self.engine.version, self.tokenizer.decode(ids, skip_special=False))

    async def _ask(self, what: str, function: Callable[..., Any], *arguments: Any, late: Callable[[Any], Any] | None = None) -> Any:
        """A call of the environment. Raises Failed for whatever it raises and for no answer in time; ``late`` gets one after it."""
        try:
            if self._calls is None:
                return function(*arguments)
            return await self._calls(self._seconds, function, *arguments, late=late)
        except Exception as error:
            raise Failed(f"{self.name}: {what}: {type(error).__name__}: {error}") from error

    def _prompt(self, question: Any) -> list[int]:
        if not isinstance(question, str):
            raise Failed(f"{self.name}: reset: a question as text; got {question!r:.80}")
        try:
            prompt = encode_prompt(self.tokenizer, question)
        except Exception as error:
            raise Failed(f"{self.name}: reset: a question that the tokenizer takes; got {error}") from error
        if self._limit(prompt) < 1:
            raise Failed(f"{self.name}: reset: a question of less than {self.context} tokens; got {len(prompt)}")
        return prompt

    def _limit(self, prompt: list[int]) -> int:
        """Tokens that may follow a prompt."""
        limit = self.sampling.max_new_tokens
        return limit if self.context is None else min(limit, self.context - len(prompt))

    def _checked(self, step: Any) -> Step:
        if not isinstance(step, Step) or not isinstance(step.observation, str | None):
            raise Failed(f"{self.name}: step: a Step with a text or None; got {step!r:.80}")
        if not isinstance(step.reward, int | float) or not math.isfinite(step.reward):
            raise Failed(f"{self.name}: step: a reward that is a number; got {step.reward!r:.80}")
        return step

    def _encoded(self, observation: str, room: int) -> list[int] | None:
        """The tokens of an observation, None where they leave no room for an answer."""
        if len(observation) > LONGEST_TOKEN * room:
            return None
        try:
            seen = encode_observation(self.tokenizer, observation)
        except Exception as error:
            raise Failed(f"{self.name}: step: an observation that the tokenizer takes; got {error}") from error
        return seen if len(seen) < room else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """No episode is played any more; safe to call twice."""
        if hasattr(self.environment, "close"):
            with contextlib.suppress(Exception):
                self.environment.close()
        if self._calls is not None:
            self._calls.close()


def play_all(player: Player, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Played]:
    """An episode of each problem, in order, for a caller outside of an event loop; the first turn draws with ``seeds[i]``.

    Raises what the first failing request raised.
    """

    def turns_of(seed: int) -> Callable[[int], int]:
        return lambda turn: seed if turn == 0 else random.Random(f"{seed}:{turn}").getrandbits(62)

    async def everyone() -> list[Played]:
        async with asyncio.TaskGroup() as group:
            pairs = zip(problems, seeds, strict=True)
            tasks = [group.create_task(player.play(problem, turns_of(seed))) for problem, seed in pairs]
        return [task.result() for task in tasks]

    try:
        return asyncio.run(everyone())
    except* Exception as failures:
        raise first_of(failures) from None


def _close(episode: Episode) -> None:
    """Of an episode that has begun too late."""
    with contextlib.suppress(Exception):
        episode.close()


def _joined(before: torch.Tensor | None, whole: torch.Tensor | None) -> torch.Tensor | None:
    """A turn's record of experts behind those of the turns before, whose tokens keep the experts that they were drawn with."""
    if before is None or whole is None:
        return whole
    return torch.cat([before, whole[len(before) :]])


@dataclass
class _Made:
    """An episode as far as it is there."""

    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    support: list[list[int]] | None = None
    routed_experts: Any = None
    reason: str = "stop"
    reward: float = 0.0
    failure: str = ""

    def add(self, drawn: Completion, version: int, text: str) -> None:
        """The policy's turn. An engine's spans count from the turn's start, its routing is of all that it was sent."""
        offset, count = len(self.tokens), len(drawn.token_ids)
        self.spans += [(number, start + offset, end + offset) for number, start, end in drawn.versions or ((version, 0, count),)]
        if drawn.sampling_mask is not None:
            self.support = [*(self.support or [[]] * offset), *drawn.sampling_mask]
        self.tokens += drawn.token_ids
        self.logprobs += drawn.logprobs
        self.own += [True] * count
        self.texts.append(text)
        self.reason, self.routed_experts = drawn.finish_reason, _joined(self.routed_experts, drawn.routed_experts)

    def see(self, ids: list[int], text: str) -> None:
        """An observation."""
        self.tokens += ids
        self.logprobs += [0.0] * len(ids)
        self.own += [False] * len(ids)
        self.texts.append(text)
        if self.support is not None:
            self.support += [[]] * len(ids)

    def played(self) -> Played:
        """The whole of it."""
        whole = Completion(self.tokens, self.logprobs, self.reason, tuple(self.spans), self.routed_experts, self.support)
        return Played(self.prompt, whole, None if all(self.own) else self.own, self.texts, self.reward, self.failure)
