"""Rewards under limits: runs calls in processes that are killed at their time or memory limit, and records what each one said.

In: problems and responses; out: one :class:`~r1mega.rl.types.RewardRecord` a reward and response, in order. Computes no reward
itself and imports no torch. A call that hangs, crashes, raises or answers nonsense is a failure with value 0, and the rest goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Self

from r1mega.config.errors import UserError
from r1mega.registry import lookup
from r1mega.rl.reward import worker as worker_module
from r1mega.rl.types import RewardRecord

START_SECONDS = 120.0
"""Longest start of a process, and longest loading of what one source needs."""
LONGEST_REPORT = 1 << 16
LARGEST_CHUNK = 256


class RewardRunner:
    """Scores responses with several rewards in ``workers`` processes; a context manager.

    ``weights``: reward name (registered, or a dotted class path) to weight, see :func:`total`. ``timeout_seconds``: wall-clock
    limit of one call. ``memory_bytes``: address space of one process. ``rewards``: choices by name where the knobs are not the
    defaults; their classes must be importable. The processes live in sessions of their own, end with the thread that made them
    (Linux) and with :meth:`close`. Raises UserError for an unknown or unbuildable reward, or a memory limit too small to start.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        timeout_seconds: float = 5.0,
        memory_bytes: int = 2 << 30,
        workers: int = 1,
        rewards: Mapping[str, object] | None = None,
    ):
        if not weights:
            raise UserError("reward.weights: at least one reward; got none; use accuracy and format")
        self.names = list(weights)
        self.timeout_seconds, self.memory_bytes = timeout_seconds, memory_bytes
        self._specs = [_spec(name, (rewards or {}).get(name)) for name in self.names]
        self._workers = [self._start() for _ in range(workers)]

    def score(self, problems: Sequence[Any], responses: Sequence[str]) -> list[dict[str, RewardRecord]]:
        """The records of each response by reward name; ``problems[i]`` is the problem of ``responses[i]``.

        Raises UserError where no call can succeed: a process that does not start, or that dies while it loads what a source needs.
        """
        if len(problems) != len(responses):
            raise UserError(
                f"reward: one problem a response; got {len(problems)} and {len(responses)}; repeat the problem of a group"
            )
        if not self._workers:
            raise UserError("reward: the runner is closed; got a call of score; make a new one")
        calls = [
            (idx, problem, response)
            for problem, response in zip(problems, responses, strict=True)
            for idx in range(len(self.names))
        ]
        records: list[RewardRecord | None] = [None] * len(calls)
        size = max(1, min(LARGEST_CHUNK, -(-len(calls) // (4 * len(self._workers)))))
        todo = deque((start, min(start + size, len(calls))) for start in range(0, len(calls), size))
        try:
            while todo or any(worker.calls for worker in self._workers):
                for slot, worker in enumerate(self._workers):
                    if (
                        worker.phase == "idle" and worker.process.poll() is not None
                    ):  # ended between calls, by what a reward left behind
                        worker.kill()
                        self._workers[slot] = worker = self._start()
                    if todo and worker.phase == "idle":
                        self._give(worker, calls, *todo.popleft())
                self._collect(calls, records, todo)
        except BaseException:
            self._renew()  # a half-served process would answer the next caller
            raise
        width = len(self.names)
        return [dict(zip(self.names, records[start : start + width], strict=True)) for start in range(0, len(records), width)]

    def close(self) -> None:
        """Kill all processes; safe to call twice."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> _Worker:
        return _Worker({"rewards": self._specs, "memory_bytes": self.memory_bytes, "path": sys.path})

    def _renew(self) -> None:
        for slot, worker in enumerate(self._workers):
            if worker.phase != "idle" or worker.calls:
                worker.kill()
                self._workers[slot] = self._start()

    def _give(self, worker: _Worker, calls: list, start: int, stop: int) -> None:
        worker.calls = deque(range(start, stop))
        worker.enter("queued", START_SECONDS)
        worker.send(calls[start:stop])

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
            failure = ""
            if worker.report_fd in ready:
                failure = self._take(worker, records)
            elif time.monotonic() >= worker.deadline:
                failure = f"time limit of {self.timeout_seconds:g} s"
            if failure:
                self._replace(slot, failure, calls, records, todo)

    def _take(self, worker: _Worker, records: list) -> str:
        """Read reports; returns why the process must go, or an empty string."""
        data = os.read(worker.report_fd, LONGEST_REPORT)
        if not data:
            return self._ended(worker)
        *lines, worker.rest = (worker.rest + data).split(b"\n")
        for line in lines:
            report = json.loads(line)
            if "value" in report:
                records[worker.calls.popleft()] = RewardRecord(report["value"], report["seconds"], report["failure"])
                worker.enter("running" if worker.calls else "idle", self.timeout_seconds)
            elif "begin" in report:
                worker.enter("running", self.timeout_seconds)
            elif "warming" in report:
                worker.enter("warming", START_SECONDS)
            elif "ready" in report:
                worker.enter("idle", 0.0)
            else:
                raise UserError(
                    f"reward: a reward builds in a process of its own; got {report['broken']}; make its class importable"
                )
        return ""

    def _ended(self, worker: _Worker) -> str:
        try:
            status = worker.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:  # it closed its pipe and lives on
            worker.kill()
            return "its process closed its pipe"
        if status == worker_module.OUT_OF_MEMORY:
            return f"memory limit of {self.memory_bytes} bytes"
        return f"its process ended with status {status}"

    def _replace(self, slot: int, failure: str, calls: list, records: list, todo: deque) -> None:
        worker = self._workers[slot]
        worker.kill()
        if worker.phase == "starting":
            raise UserError(f"reward.memory_bytes: enough for a process to start; got {self.memory_bytes} ({failure}); raise it")
        if worker.phase == "warming":
            source = calls[worker.calls[0]][1].source
            raise UserError(
                f"reward.memory_bytes: enough to load what {source} needs; got {self.memory_bytes} ({failure}); raise it"
            )
        seconds = time.monotonic() - worker.entered
        records[worker.calls.popleft()] = RewardRecord(0.0, seconds, failure)
        if worker.calls:
            todo.appendleft((worker.calls[0], worker.calls[-1] + 1))
        self._workers[slot] = self._start()


def total(records: Sequence[Mapping[str, RewardRecord]], weights: Mapping[str, float]) -> list[float]:
    """The reward of each response: the sum over its records of weight times value."""
    return [sum(weight * record[name].value for name, weight in weights.items()) for record in records]


class _Worker:
    """One reward process as its parent sees it: ``phase`` is starting, idle, queued, warming or running; ``calls`` it owes."""

    def __init__(self, start: dict[str, Any]):
        requests, request_fd = os.pipe()
        self.report_fd, reports = os.pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", worker_module.__name__, str(requests), str(reports), str(os.getpid())]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(requests, reports),
            env=environment,
            start_new_session=True,
        )
        os.close(requests)
        os.close(reports)
        os.set_blocking(request_fd, False)
        self.request_fd = request_fd
        self.calls: deque[int] = deque()
        self.rest = b""
        self.enter("starting", START_SECONDS)
        self.send(start)

    def enter(self, phase: str, seconds: float) -> None:
        self.phase, self.entered = phase, time.monotonic()
        self.deadline = self.entered + seconds

    def send(self, request: object) -> None:
        """Write one request; gives up at the deadline or when the process is gone, which the next collection then finds."""
        body = pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL)
        data = memoryview(struct.pack("<Q", len(body)) + body)
        poll = select.poll()
        poll.register(self.request_fd, select.POLLOUT)
        while data and time.monotonic() < self.deadline:
            poll.poll(max(1.0, (self.deadline - time.monotonic()) * 1000))
            try:
                data = data[os.write(self.request_fd, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                return

    def kill(self) -> None:
        """End the process and all that it started in its session, at once."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        for fd in (self.request_fd, self.report_fd):
            if fd >= 0:
                os.close(fd)
        self.request_fd = self.report_fd = -1


def _spec(name: str, choice: object | None) -> tuple[str, str, dict[str, Any]]:
    """(module, class, field values) of a reward, with which the process builds it."""
    cls = lookup("reward", name) if choice is None else type(choice)
    if choice is None:
        choice = cls()
    if cls.__module__ == "__main__":
        raise UserError(
            f"reward.weights: a reward's class is in a module that can be imported; got {name} in __main__; move it to a file"
        )
    return cls.__module__, cls.__qualname__, {field.name: getattr(choice, field.name) for field in dataclasses.fields(choice)}
