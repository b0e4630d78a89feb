"""Where samples come from: questions become groups of judged responses, in a thread of their own beside the training.

One rank's part: its share of the questions, through episodes (:mod:`r1mega.rl.environment.play`) and the judges, into the ledger.
How far it may run ahead is bounded: while the trainer makes rollout n, at most the groups of rollouts n to n + ``lag`` are in the
making, so that a response is begun from weights at most ``lag`` pushes old. Pushes interrupt: what runs keeps its tokens and goes
on under the new weights. A sample that the ledger has from before a crash is not made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from r1mega.config.errors import UserError
from r1mega.config.run import SamplingConfig
from r1mega.data.prompts import PromptStream
from r1mega.data.tokenizer import Tokenizer
from r1mega.rl.engine.batcher import Batcher
from r1mega.rl.engine.contract import RoutingRefused, first_of
from r1mega.rl.environment.play import Player
from r1mega.rl.ledger import Frame, Ledger
from r1mega.rl.reward.runner import RewardRunner
from r1mega.rl.routing import RoutingShape
from r1mega.rl.types import Completion, RewardRecord, Sample, without_end

ROUTING_ATTEMPTS = 4
"""Times that a response is made before the run ends because its experts are not told."""


@dataclass(frozen=True)
class Plan:
    """How many: ``share`` groups of ``group_size`` responses a rollout on this rank; ``lag`` rollouts ahead; ``oversample`` times
    as many groups begun as are wanted, of which the first to end are taken and the others go on into the next rollout (1: none, and
    groups are taken in the order of the questions). ``keeps``: is there something to learn from a judged group (dynamic sampling)?
    ``patience``: groups begun for one that is wanted, at most; then dropped ones fill the rollout up. ``routing``: what the
    engine's records of experts must be; None: they are not asked for. ``replays``: they are trained with, so that a sample without
    one, as the ledger gives it back, is of no use."""

    share: int
    group_size: int
    sampling: SamplingConfig
    seed: int
    lag: int = 0
    oversample: float = 1.0
    keeps: Callable[[list[Sample]], bool] = lambda group: True
    patience: int = 10
    routing: RoutingShape | None = None
    replays: bool = False


@dataclass
class Taken:
    """What a rollout gets: groups to train on, groups that were judged and dropped, seconds that the trainer waited, responses that
    were refused since the last one because their experts were not told, and made again."""

    groups: list[list[Sample]] = field(default_factory=list)
    dropped: list[list[Sample]] = field(default_factory=list)
    waited_seconds: float = 0.0
    refused: int = 0

    @property
    def samples(self) -> list[Sample]:
        """The samples to train on, group by group."""
        return [sample for group in self.groups for sample in group]


class Rollouts:
    """``known``: (item, member) to the ledger's sample, for what an earlier start of the run has made; ``score``: weights and
    records to a reward, see :class:`Judge`. Its thread ends with :meth:`close`."""

    def __init__(
        self,
        plan: Plan,
        player: Player,
        judge: Judge,
        stream: PromptStream,
        ledger: Ledger,
        known: Mapping[tuple[int, int], Frame] | None = None,
    ):
        self.plan, self.player, self.engine, self.tokenizer = plan, player, player.engine, player.tokenizer
        self.stream, self.ledger, self.judge = stream, ledger, judge
        self.known, self.reused = dict(known or {}), 0
        self.busy, self.tokens, self._refused = Busy(), 0, 0
        self._pool: dict[int, asyncio.Task[list[Sample]]] = {}
        self._taking: asyncio.Task[Taken] | None = None
        self._beside: set[asyncio.Task] = set()
        self._judging = Batcher(lambda asked: judge.records([problem for problem, _ in asked], [text for _, text in asked]))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine) -> Any:
        """The result of a coroutine in the thread's event loop."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except BaseExceptionGroup as failures:
            raise first_of(failures) from failures

    def begin(self, work: Coroutine) -> asyncio.Task:
        """Let something run beside the rollouts; :meth:`look` at it."""

        async def start() -> asyncio.Task:
            self._beside.add(task := asyncio.create_task(work))
            task.add_done_callback(self._beside.discard)
            return task

        return self.call(start())

    def look(self, seconds: float | None = None, work: asyncio.Task | None = None) -> str:
        """Work on the next rollout (or ``work``) until it is "done", a server is "stale" (wants a push), or ``seconds`` are over
        ("waiting")."""
        return self.call(self._look(seconds, work))

    def take(self) -> Taken:
        """The groups of the next rollout; waits for them. Raises what failed in any of the groups."""
        self.call(self._look(None, heed_stale=False))
        taking, self._taking = self._taking, None
        taken = result_of(taking)
        taken.refused, self._refused = self._refused, 0
        return taken

    def abandon(self) -> None:
        """Forget what is in the making: the run goes back, and asks these questions again."""
        self.call(self._abandon())
        self.stream.release()
        self.known = {}

    def close(self) -> None:
        """End the thread; safe to call twice."""
        if self._thread.is_alive():
            with contextlib.suppress(Exception):
                self.call(self._abandon())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=30)
            if not self._thread.is_alive():
                self._loop.close()  # who answers later is told that nobody waits
        self.player.close()

    async def judged(self, problem: Any, text: str) -> dict[str, RewardRecord]:
        """What every reward says of a response; many that come together are one call."""
        return await self._judging.ask((problem, text))

    async def _look(self, seconds: float | None, work: asyncio.Task | None = None, *, heed_stale: bool = True) -> str:
        if work is None:
            self._taking = work = self._taking or asyncio.create_task(self._take())
        watched = {work}
        if heed_stale and hasattr(self.engine, "wait_for_stale"):
            watched.add(asyncio.create_task(self.engine.wait_for_stale()))
        await asyncio.wait(watched, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        is_stale = any(task.done() for task in watched - {work})
        for task in watched - {work}:
            task.cancel()
        return "done" if work.done() else "stale" if is_stale else "waiting"

    async def _take(self) -> Taken:
        plan, taken, began = self.plan, Taken(), time.perf_counter()
        while len(taken.groups) < plan.share:
            wanted = plan.share - len(taken.groups)
            left = plan.patience * plan.share - len(taken.groups) - len(taken.dropped)
            self._fill(min(math.ceil(wanted * plan.oversample), left) + plan.share * plan.lag)
            item = await self._first()
            group = await self._pool.pop(item)
            (taken.groups if plan.keeps(group) else taken.dropped).append(group)
            if len(taken.groups) + len(taken.dropped) >= plan.patience * plan.share:
                missing = plan.share - len(taken.groups)
                taken.groups, taken.dropped = taken.groups + taken.dropped[:missing], taken.dropped[missing:]
        taken.waited_seconds = time.perf_counter() - began
        return taken

    def _fill(self, count: int) -> None:
        """Begin groups until ``count`` are in the making."""
        for item in self.stream.take(max(0, count - len(self._pool))):
            self._pool[item] = asyncio.create_task(self._group(item))

    async def _first(self) -> int:
        """The item that is taken next: the first in order, or, with oversampling, the first that has ended."""
        if self.plan.oversample == 1.0:
            return next(iter(self._pool))
        await asyncio.wait(self._pool.values(), return_when=asyncio.FIRST_COMPLETED)
        return next(item for item, task in self._pool.items() if task.done())

    async def _abandon(self) -> None:
        tasks, self._pool = [*self._pool.values(), *self._beside], {}
        if self._taking is not None:
            tasks, self._taking = [self._taking, *tasks], None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _group(self, item: int) -> list[Sample]:
        async with asyncio.TaskGroup() as group:
            members = [group.create_task(self._sample(item, member)) for member in range(self.plan.group_size)]
        return [member.result() for member in members]

    async def _sample(self, item: int, member: int) -> Sample:
        held = self.known.pop((item, member), None)
        if held is not None and not self.plan.replays:
            with contextlib.suppress(UserError):  # a damaged frame: made again
                self.reused += 1
                return restored(held, self.stream.problem(item))
        with self.busy:
            sample = await self._told_episode(item, member)
        text = sample_text(self.tokenizer, sample)
        sample.records = await self.judged(sample.problem, text)
        sample.reward = self.judge.total(sample.problem, sample.records) + sample.environment_reward
        sample.judged = time.time()
        sample.id = self.ledger.write("sample", *recorded(sample))
        return sample

    async def _told_episode(self, item: int, member: int) -> Sample:
        """An episode with its experts, where they are asked for; one whose experts are not whole is made again, for a few times."""
        for attempt in range(ROUTING_ATTEMPTS):
            try:
                sample = await self._episode(item, member)
                if self.plan.routing is not None:
                    made = sample.completion
                    own = sample.own or [True] * len(made.token_ids)
                    record = await asyncio.to_thread(self.plan.routing.checked, made.routed_experts, len(sample.prompt), own)
                    sample.completion = replace(made, routed_experts=record)
                return sample
            except RoutingRefused:
                self._refused += 1
                if attempt + 1 == ROUTING_ATTEMPTS:
                    raise

    async def _episode(self, item: int, member: int) -> Sample:
        problem, began = self.stream.problem(item), time.time()
        played = await self.player.play(problem, lambda turn: seed_of(f"{self.plan.seed}:{item}:{member}:{turn}"))
        self.tokens += played.num_drawn
        return Sample(
            item=item,
            member=member,
            problem=problem,
            prompt=played.prompt,
            completion=played.completion,
            own=played.own,
            turns=played.turns,
            environment_reward=played.reward,
            environment_failure=played.failure,
            began=began,
            generated=time.time(),
        )


def seed_of(text: str) -> int:
    """A draw's seed, 62 bits, by what it is for."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


def result_of(task: asyncio.Task) -> Any:
    """Of a task that is done. Raises what failed first in it."""
    try:
        return task.result()
    except BaseException as failures:
        raise first_of(failures) from failures


class Busy:
    """A stopwatch that runs while at least one ``with`` of it is open and it is not paused. For any thread."""

    def __init__(self) -> None:
        self._lock, self._count, self._paused = threading.Lock(), 0, False
        self._total, self._since = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Run so far."""
        self._move(0)
        return self._total

    def pause(self, paused: bool) -> None:
        """Stand still, or go on."""
        self._move(0, paused)

    def __enter__(self) -> Busy:
        self._move(1)
        return self

    def __exit__(self, *failure: object) -> None:
        self._move(-1)

    def _move(self, change: int, paused: bool | None = None) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._count and not self._paused:
                self._total += now - self._since
            self._since, self._count = now, self._count + change
            self._paused = self._paused if paused is None else paused


class Judge:
    """The rewards of a run. ``runner``: scores; ``weights_of(source)``: which reward counts how much; ``seconds``: spent so far."""

    def __init__(self, runner: RewardRunner, weights_of: Callable[[str], Mapping[str, float]]):
        self._runner, self._weights_of, self.seconds = runner, weights_of, 0.0

    def records(self, problems: list[Any], texts: list[str]) -> list[dict[str, RewardRecord]]:
        """What every reward says of each response."""
        began = time.perf_counter()
        found = self._runner.score(problems, texts)
        self.seconds += time.perf_counter() - began
        return found

    def total(self, problem: Any, records: Mapping[str, RewardRecord]) -> float:
        """The weighted sum."""
        return sum(weight * records[name].value for name, weight in self._weights_of(problem.source).items())


def sample_text(tokenizer: Tokenizer, sample: Sample) -> str:
    """What a reward judges: what the policy wrote, without the end tokens of its turns; special tokens are written out, so that
    none is missed."""
    own = sample.own or [True] * len(sample.completion.token_ids)
    text, turn = "", []
    for token, mine in zip([*sample.completion.token_ids, -1], [*own, False], strict=True):
        if mine:
            turn.append(token)
        elif turn:
            text += tokenizer.decode(without_end(turn, tokenizer.eos_id), skip_special=False)
            turn = []
    return text


def recorded(sample: Sample) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A sample as the ledger keeps it. Routing is kept as its hash: it is as large as the rest many times over."""
    made = sample.completion
    routing = made.routed_experts
    values = {
        "item": sample.item,
        "member": sample.member,
        "problem": sample.problem.id,
        "source": sample.problem.source,
        "prompt_sha256": hashlib.sha256(np.asarray(sample.prompt, np.int32).tobytes()).hexdigest()[:16],
        "finish_reason": made.finish_reason,
        "versions": [list(span) for span in made.versions],
        "turns": sample.turns,
        "routing_sha256": hashlib.sha256(routing.numpy().tobytes()).hexdigest()[:16] if routing is not None else None,
        "rewards": {name: [record.value, record.seconds, record.failure, record.note] for name, record in sample.records.items()},
        "environment_reward": sample.environment_reward,
        "environment_failure": sample.environment_failure,
        "reward": sample.reward,
        "began": sample.began,
        "generated": sample.generated,
        "judged": sample.judged,
    }
    arrays = {
        "prompt": np.asarray(sample.prompt, np.int32),
        "tokens": np.asarray(made.token_ids, np.int32),
        "logprobs": np.asarray(made.logprobs, np.float32),
    }
    if sample.own is not None:
        arrays["own"] = np.asarray(sample.own, np.bool_)
    return values, arrays


def restored(frame: Frame, problem: Any) -> Sample:
    """The sample of a ledger's frame."""
    values, arrays = frame.values, frame.arrays()
    made = Completion(
        arrays["tokens"].tolist(),
        arrays["logprobs"].tolist(),
        values["finish_reason"],
        tuple(tuple(span) for span in values["versions"]),
    )
    return Sample(
        item=values["item"],
        member=values["member"],
        problem=problem,
        prompt=arrays["prompt"].tolist(),
        completion=made,
        own=arrays["own"].tolist() if "own" in arrays else None,
        turns=values["turns"],
        records={name: RewardRecord(*record) for name, record in values["rewards"].items()},
        environment_reward=values["environment_reward"],
        environment_failure=values.get("environment_failure", ""),
        reward=values["reward"],
        began=values["began"],
        generated=values["generated"],
        judged=values["judged"],
        id=frame.id,
    )
