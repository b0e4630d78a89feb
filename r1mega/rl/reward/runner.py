"""Rewards under limits: runs calls in processes that are killed at their time or memory limit, and records what each one said.

In: problems and responses; out: one :class:`~r1mega.rl.types.RewardRecord` a reward and response, in order. Computes no reward
itself and imports no torch. A call that hangs, crashes, raises, answers nonsense, or leaves a process or a thread behind is a
failure with value 0, and the rest goes on. What a call must keep to is in :mod:`r1mega.rl.reward.worker`, what holds it in
:mod:`r1mega.rl.reward.keeper`.
"""

from __future__ import annotations

import dataclasses
import select
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Self

from r1mega.config.errors import UserError
from r1mega.registry import lookup
from r1mega.rl.reward.mix import names_of, weights_of
from r1mega.rl.reward.process import START_SECONDS, RewardProcess
from r1mega.rl.types import RewardRecord

LARGEST_CHUNK = 256


class RewardRunner:
    """Scores responses with several rewards in ``workers`` processes; a context manager.

    ``weights``: reward name (registered, or the dotted path of a class or function) to weight; ``by_source``: other weights for
    some sources, see :mod:`r1mega.rl.reward.mix`. ``timeout_seconds``: wall-clock limit of one call, but for rewards whose
    ``longest_seconds`` is more. ``memory_bytes``: address space of one process. ``rewards``: choices by name where the knobs are
    not the defaults; their classes must be importable. ``namespace``: whether the processes may be kept in a PID namespace. They
    end with this process and with :meth:`close`. A choice may have ``check()``, which raises UserError here for what it needs of
    this machine, and ``batched = True`` where what it builds has ``many(calls)``. Raises UserError for an unknown or unbuildable
    reward, or a memory limit too small to start.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        timeout_seconds: float = 5.0,
        memory_bytes: int = 2 << 30,
        workers: int = 1,
        rewards: Mapping[str, object] | None = None,
        by_source: Mapping[str, Mapping[str, float]] | None = None,
        namespace: bool = True,
    ):
        self.weights, self.by_source = weights, by_source or {}
        self.names = names_of(weights, self.by_source)
        if not self.names:
            raise UserError("reward.weights: at least one reward; got none; use accuracy and format")
        self.timeout_seconds, self.memory_bytes, self.namespace = timeout_seconds, memory_bytes, namespace
        choices = [_choice(name, (rewards or {}).get(name)) for name in self.names]
        for choice in choices:
            if hasattr(choice, "check"):  # what a reward needs of this machine is missed here, not in the first rollout
                choice.check()
        self._specs = [_spec(name, choice) for name, choice in zip(self.names, choices, strict=True)]
        self._limits = [max(timeout_seconds, getattr(choice, "longest_seconds", 0.0)) for choice in choices]
        self._batched = [bool(getattr(choice, "batched", False)) for choice in choices]
        self._workers = [self._start() for _ in range(workers)]
        self._ending: list[RewardProcess] = []

    def score(self, problems: Sequence[Any], responses: Sequence[str]) -> list[dict[str, RewardRecord]]:
        """The records of each response by reward name: the rewards that have a weight for the source of ``problems[i]``.

        ``problems[i]`` is the problem of ``responses[i]``. Raises UserError where no call can succeed: a process that does not
        start, or that dies while it loads what a source needs.
        """
        if len(problems) != len(responses):
            raise UserError(
                f"reward: one problem a response; got {len(problems)} and {len(responses)}; repeat the problem of a group"
            )
        if not self._workers:
            raise UserError("reward: the runner is closed; got a call of score; make a new one")
        index = {name: idx for idx, name in enumerate(self.names)}
        names = [list(weights_of(problem.source, self.weights, self.by_source)) for problem in problems]
        calls = [
            (index[name], problem, response)
            for problem, response, mine in zip(problems, responses, names, strict=True)
            for name in mine
        ]
        # Calls that are scored together stand together, behind all others.
        order = sorted(
            range(len(calls)), key=lambda idx: (self._batched[calls[idx][0]], calls[idx][0] * self._batched[calls[idx][0]])
        )
        found: list[RewardRecord | None] = [None] * len(calls)
        for idx, record in zip(order, self._run([calls[idx] for idx in order]), strict=True):
            found[idx] = record
        records = iter(found)
        return [{name: next(records) for name in mine} for mine in names]

    def _chunks(self, calls: list) -> list[tuple[int, int]]:
        """(start, stop) of what one process gets at once: several chunks a process, but of calls that are scored together one."""
        chunks = []
        for reward_idx, group in groupby(range(len(calls)), lambda idx: calls[idx][0] if self._batched[calls[idx][0]] else -1):
            places = list(group)
            parts = len(self._workers) * (1 if reward_idx >= 0 else 4)
            size = max(1, min(LARGEST_CHUNK, -(-len(places) // parts)))
            stop = places[-1] + 1
            chunks += [(start, min(start + size, stop)) for start in range(places[0], stop, size)]
        return chunks

    def _run(self, calls: list) -> list[RewardRecord]:
        """The record of each call, in order."""
        records: list[RewardRecord | None] = [None] * len(calls)
        self._killed: set[int] = set()
        todo = deque(self._chunks(calls))
        try:
            while todo or any(worker.calls for worker in self._workers):
                for slot, worker in enumerate(self._workers):
                    if worker.phase == "idle" and worker.is_gone:  # ended between calls, by what a reward left behind
                        self._end(worker)
                        self._workers[slot] = worker = self._start()
                    if todo and worker.phase == "idle":
                        start, stop = todo.popleft()
                        worker.give(start, calls[start:stop])
                self._collect(calls, records, todo)
        except BaseException:
            self._renew()  # a half-served process would answer the next caller
            raise
        finally:
            self._bury()
        return records

    def close(self) -> None:
        """Kill all processes; safe to call twice."""
        for worker in self._workers:
            self._end(worker)
        self._workers = []
        self._bury()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> RewardProcess:
        return RewardProcess({"rewards": self._specs, "memory_bytes": self.memory_bytes, "path": sys.path}, self.namespace)

    def _end(self, worker: RewardProcess) -> None:
        """Have a process killed while the others go on."""
        worker.end()
        self._ending.append(worker)

    def _bury(self) -> None:
        """Wait until the processes that were told to end are gone."""
        for worker in self._ending:
            worker.kill()
        self._ending = []

    def _renew(self) -> None:
        for slot, worker in enumerate(self._workers):
            if worker.phase != "idle" or worker.calls:
                self._end(worker)
                self._workers[slot] = self._start()

    def _collect(self, calls: list, records: list, todo: deque) -> None:
        """Wait for reports or a limit, take what there is, replace processes that ended or must end."""
        busy = [slot for slot, worker in enumerate(self._workers) if worker.phase != "idle"]
        wait = min(self._workers[slot].deadline for slot in busy) - time.monotonic()
        poll = select.poll()
        for slot in busy:
            poll.register(self._workers[slot].report_fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(max(0.0, wait) * 1000 + 1)}
        for slot in busy:
            worker = self._workers[slot]
            failure = self._take(worker, calls, records) if worker.report_fd in ready else ""
            if not failure and worker.phase != "idle" and time.monotonic() >= worker.deadline and not worker.has_more():
                limit = self._limit(worker, calls) if worker.phase == "running" else START_SECONDS
                failure = f"time limit of {limit:g} s"
            if failure:
                self._replace(slot, failure, calls, records, todo)

    def _limit(self, worker: RewardProcess, calls: list) -> float:
        """Seconds that the call may take which the process is at, or comes to next."""
        return self._limits[calls[worker.calls[0]][0]] if worker.calls else 0.0

    def _take(self, worker: RewardProcess, calls: list, records: list) -> str:
        """Read reports; returns why the process must go, or an empty string."""
        reports = worker.read()
        if reports is None:
            return worker.last_words(self.memory_bytes)
        for report in reports:
            if not worker.allows(report):
                return "it wrote into its process's pipe"
            if "value" in report:
                records[worker.calls.popleft()] = RewardRecord(
                    report["value"], report["seconds"], report["failure"], report["note"]
                )
                worker.enter("running" if worker.calls else "idle", self._limit(worker, calls))
            elif "begin" in report:
                worker.enter("running", self._limit(worker, calls))
            elif "warming" in report:
                worker.enter("warming", START_SECONDS)
            elif "ready" in report:
                worker.enter("idle", 0.0)
            else:
                raise UserError(
                    f"reward: a reward builds in a process of its own; got {report['broken']}; make its class importable"
                )
        return ""

    def _replace(self, slot: int, failure: str, calls: list, records: list, todo: deque) -> None:
        worker = self._workers[slot]
        self._end(worker)
        first = worker.calls[0] if worker.calls else -1
        early = time.monotonic() - worker.entered < min(0.5, self.timeout_seconds / 2)  # a second try still ends in time
        if worker.was_killed and early and first not in self._killed:
            # By somebody else, most likely; a reward that kills itself does so again.
            self._killed.add(first)
            if worker.calls:
                todo.appendleft((first, worker.calls[-1] + 1))
            self._workers[slot] = self._start()
            return
        if worker.phase in ("starting", "warming"):
            what = "starts" if worker.phase == "starting" else f"loads what {_sources(worker, calls)} needs"
            if failure.startswith("memory limit"):
                raise UserError(f"reward.memory_bytes: enough that a process {what}; got {self.memory_bytes} ({failure}); raise it")
            way_out = f"see what its rewards ({', '.join(self.names)}) do when they are built, or leave one out of reward.weights"
            raise UserError(f"reward.weights: rewards whose process {what}; got {failure}; {way_out}")
        seconds = time.monotonic() - worker.entered
        together = self._batched[calls[first][0]]
        for _ in range(len(worker.calls) if together else 1):
            records[worker.calls.popleft()] = RewardRecord(0.0, seconds, failure)
        if worker.calls:
            todo.appendleft((worker.calls[0], worker.calls[-1] + 1))
        self._workers[slot] = self._start()


def total(records: Sequence[Mapping[str, RewardRecord]], weights: Sequence[Mapping[str, float]]) -> list[float]:
    """The reward of each response: the sum of weight times value over its own weights, ``weights[i]``."""
    return [
        sum(weight * record[name].value for name, weight in mine.items()) for record, mine in zip(records, weights, strict=True)
    ]


def _sources(worker: RewardProcess, calls: list) -> str:
    return ", ".join(sorted({calls[idx][1].source for idx in worker.calls}))


def _choice(name: str, choice: object | None) -> object:
    """The choice that a reward's name means, with its default knobs if none is given; a function is itself."""
    if choice is None:
        choice = lookup("reward", name)
        if isinstance(choice, type):
            return choice()
    return choice


def _spec(name: str, choice: Any) -> tuple[str, str, dict[str, Any] | None]:
    """(module, class, field values) of a reward, with which the process builds it; (module, name, None) of a function."""
    if not dataclasses.is_dataclass(choice):
        module, _, attribute = name.rpartition(".")
        return module, attribute, None
    cls = type(choice)
    if cls.__module__ == "__main__":
        raise UserError(
            f"reward.weights: a reward's class is in a module that can be imported; got {name} in __main__; move it to a file"
        )
    return cls.__module__, cls.__qualname__, {field.name: getattr(choice, field.name) for field in dataclasses.fields(choice)}
