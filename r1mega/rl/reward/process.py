"""One reward process as the trainer sees it: starts it, writes requests, reads and checks reports, ends it and all that it started.

In: pickled requests; out: reports, each checked, since a reward can write into its process's pipe. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import time
import uuid
from collections import deque
from typing import Any

from r1mega.rl.reward import keeper, worker

START_SECONDS = 120.0
"""Longest start of a process, and longest loading of what one source needs."""
END_SECONDS = 0.5
"""Longest wait for a process that was told to end, or whose pipe is closed."""
LONGEST_REPORT = 1 << 16
MARK = "R1MEGA_REWARD"
"""Environment variable that names the reward process whose descendant a process is."""
PHASES = {
    "broken": ("starting",),
    "ready": ("starting",),
    "warming": ("queued", "warming"),
    "begin": ("queued", "warming"),
    "value": ("running",),
}
"""Reports, and the phases in which each may come."""
SAYS = {
    worker.LEFT_A_PROCESS: "it left a process behind: a call waits for the processes that it starts",
    worker.LEFT_A_THREAD: "it left a thread running: a call ends the threads that it starts",
    worker.LOST_ITS_PIPE: "its process lost its pipe",
    keeper.TOO_MANY_PROCESSES: f"limit of {keeper.MOST_PROCESSES} processes",
}


class RewardProcess:
    """A keeper with its reward process. ``phase``: starting, idle, queued, warming or running; ``calls``: indices that it owes.

    ``start``: what the process builds, see :func:`r1mega.rl.reward.worker.main`. ``namespace``: whether to try a PID namespace.
    """

    def __init__(self, start: dict[str, Any], namespace: bool = True):
        requests, self.request_fd = os.pipe()
        self.report_fd, reports = os.pipe()
        self.mark = uuid.uuid4().hex
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            MARK: self.mark,
        }
        # A report without it is a reward's: one that writes blindly into the pipe fails its own call, not the next.
        self.secret = uuid.uuid4().hex
        arguments = [str(requests), str(reports), str(os.getpid()), str(int(namespace))]
        self.keeper = subprocess.Popen(
            [sys.executable, "-m", keeper.__name__, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(requests, reports),
            env=environment,
            start_new_session=True,
        )
        os.close(requests)
        os.close(reports)
        os.set_blocking(self.request_fd, False)
        self.calls: deque[int] = deque()
        self.size, self.rest = 0, b""
        self.enter("starting", START_SECONDS)
        self.send({**start, "secret": self.secret})
        self.told_to_end: float | None = None
        self.status: int | None = None  # of a process that ended by itself

    @property
    def is_gone(self) -> bool:
        """True once the process has ended."""
        return self.keeper.poll() is not None

    def enter(self, phase: str, seconds: float) -> None:
        """Be in ``phase`` for at most ``seconds``."""
        self.phase, self.entered = phase, time.monotonic()
        self.deadline = self.entered + seconds

    def give(self, start: int, calls: list) -> None:
        """Hand over calls ``start``, ``start + 1``, ..."""
        self.calls = deque(range(start, start + len(calls)))
        self.size = len(calls)
        self.enter("queued", START_SECONDS)
        self.send(calls)

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

    def read(self) -> list[dict[str, Any]] | None:
        """The reports that are there, an empty one for what a reward wrote; None when the pipe is closed."""
        data = os.read(self.report_fd, LONGEST_REPORT)
        if not data:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        reports = [_report(line, self.secret) for line in lines]
        return [*reports, {}] if len(self.rest) > LONGEST_REPORT else reports

    def has_more(self) -> bool:
        """Whether reports wait to be read."""
        poll = select.poll()
        poll.register(self.report_fd, select.POLLIN)
        return bool(poll.poll(0))

    def allows(self, report: dict[str, Any]) -> bool:
        """Whether this report may come now: a reward must not answer another's call, nor stop the clock."""
        if "value" in report and report["call"] != self.size - len(self.calls):
            return False
        return any(self.phase in phases for name, phases in PHASES.items() if name in report)

    @property
    def was_killed(self) -> bool:
        """True where a signal that is sent from outside ended the process."""
        return self.status in {sign for number in (signal.SIGKILL, signal.SIGTERM) for sign in (-number, 128 + number)}

    def last_words(self, memory_bytes: int) -> str:
        """Why its pipe is closed; waits a moment for the process to end."""
        try:
            status = self.status = self.keeper.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            return "its process closed its pipe"
        if status == worker.OUT_OF_MEMORY:
            return f"memory limit of {memory_bytes} bytes"
        if status > 128 or status < 0:
            with contextlib.suppress(ValueError):
                return f"its process ended with {signal.Signals(-status if status < 0 else status - 128).name}"
        return SAYS.get(status, f"its process ended with status {status}")

    def kill(self) -> None:
        """End the process and all that it started, and wait until they are gone; safe to call twice."""
        self.end()
        while not self.ended():
            time.sleep(0.001)

    def end(self) -> None:
        """Tell the keeper to kill all; returns at once."""
        if self.told_to_end is None:
            self.told_to_end = time.monotonic()
            self.keeper.terminate()

    def ended(self) -> bool:
        """Whether all are gone after :meth:`end`. Takes over from a keeper that does not manage."""
        if self.request_fd < 0:
            return True
        status = self.keeper.poll()
        if status is None and time.monotonic() < self.told_to_end + END_SECONDS:
            return False
        if status is None or status < 0:  # a reward outside a namespace can stop or kill its keeper
            self._sweep()
        for fd in (self.request_fd, self.report_fd):
            os.close(fd)
        self.request_fd = self.report_fd = -1
        return True

    def _sweep(self) -> None:
        """Kill what is left, by descent and by its mark, until nothing is."""
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            below = keeper.descendants(self.keeper.pid) if self.keeper.poll() is None else []
            found = [*below, *marked(self.mark)]
            if self.keeper.returncode is None:
                self.keeper.kill()
            elif not found:
                return
            for pid in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)


def marked(mark: str) -> list[int]:
    """Pids of the living processes that were started with this mark in their environment."""
    found, want = [], f"{MARK}={mark}".encode()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if want in file.read():
                    found.append(int(name))
    return found


def _report(line: bytes, secret: str) -> dict[str, Any]:
    """A report that the process itself wrote; anything else is empty."""
    try:
        report = json.loads(line)
        fits = report["secret"] == secret
        if "value" in report:
            call, value, seconds, failure, note = (report[name] for name in ("call", "value", "seconds", "failure", "note"))
            fits = fits and type(call) is int and isinstance(failure, str) and isinstance(note, str)
            fits = fits and all(type(number) is float and math.isfinite(number) for number in (value, seconds))
        return report if fits else {}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
