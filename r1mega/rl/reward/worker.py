"""The reward process: reads chunks of calls from a pipe, runs them one by one, reports each as it ends. Imports no torch.

Forked by :mod:`r1mega.rl.reward.keeper`. A request is a pickle with an 8-byte length before it; a report is one JSON line. Standard
input is empty and output goes nowhere, so that a reward can neither read requests nor fill a disk with prints.

A reward whose ``many`` scores several calls at once gets all calls of a chunk, which are then its own; they are one call in time.

A call ends what it starts: a child process that it did not wait for, or a thread that runs on, makes it a failure and ends this
process, so that nothing of one call reaches into the next.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import importlib
import json
import math
import numbers
import os
import pickle
import resource
import signal
import struct
import sys
import time
from typing import Any

from r1mega.rl.types import Noted

OUT_OF_MEMORY, LEFT_A_PROCESS, LEFT_A_THREAD, LOST_ITS_PIPE = 77, 78, 80, 81
"""Exit statuses: what the last call did."""
LARGEST_FILE = 16 << 20
LONGEST_FAILURE = 200
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main(request_fd: int, report_fd: int) -> None:
    """Serve until the request pipe closes."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of a call become children of this process, which then knows of them
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory ends, the kernel takes a reward's process first, not the trainer
    requests = os.fdopen(request_fd, "rb")
    start = read(requests)

    def report(**record: object) -> None:
        try:
            os.write(report_fd, json.dumps({**record, "secret": start["secret"]}).encode() + b"\n")
        except OSError:
            os._exit(LOST_ITS_PIPE)

    try:
        sys.path[:] = start["path"]
        rewards = [build(module, name, fields) for module, name, fields in start["rewards"]]
    except BaseException as error:
        report(broken=describe(error))
        return
    limit(start["memory_bytes"])
    try:
        bytearray(4 << 20)
        report(ready=True)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    warmed: set[tuple[int, str]] = set()
    while True:
        try:
            calls = read(requests)
        except EOFError:
            return
        serve(calls, rewards, warmed, report)


def serve(calls: list, rewards: list, warmed: set[tuple[int, str]], report) -> None:
    """Run (reward index, problem, response) after (reward index, problem, response), a report each."""
    for reward_idx, problem, _ in calls:
        if (reward_idx, problem.source) not in warmed:
            warmed.add((reward_idx, problem.source))
            function, _ = rewards[reward_idx]
            if hasattr(function, "warm"):
                report(warming=True)
                guarded(function.warm, problem.source)  # what fails here fails again in the call, where it is recorded
    report(begin=True)
    own = os.getpid()
    together = bool(calls) and hasattr(rewards[calls[0][0]][0], "many")
    for number in range(1) if together else range(len(calls)):
        reward_idx, problem, response = calls[number]
        function, value_range = rewards[reward_idx]
        threads = _thread._count()
        start = time.perf_counter()
        if together:
            found = all_judged(function, value_range, [call[1:] for call in calls])
        else:
            found = [guarded(judged, function, value_range, problem, response)]
        seconds = time.perf_counter() - start
        if os.getpid() != own:
            os._exit(0)  # a fork that came back
        if left_a_process():
            os._exit(LEFT_A_PROCESS)
        if _thread._count() > threads:
            os._exit(LEFT_A_THREAD)
        signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that a call set is not for the next one
        for offset, (value, failure, note) in enumerate(found):
            report(call=number + offset, value=value, seconds=seconds, failure=failure, note=note)


def guarded(function, *args) -> Any:
    """What the function returns, or (0.0, what it raised, ""); ends the process at the memory limit: little can be trusted then."""
    try:
        return function(*args)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BaseException as error:  # SystemExit too: a reward must not end the run
        return 0.0, describe(error), ""


def judged(function, value_range: tuple[float, float], problem: object, response: str) -> tuple[float, str, str]:
    """One call and the check of its value, which may run a reward's code too: (value, failure, note)."""
    value = function(problem, response)
    note = value.note if type(value) is Noted else ""
    return *checked(value, value_range), str(note)[:LONGEST_FAILURE]


def all_judged(function, value_range: tuple[float, float], calls: list[tuple[object, str]]) -> list[tuple[float, str, str]]:
    """:func:`judged` of several calls by one call of ``many``, which answers each with a value or the exception that it met."""
    answers = guarded(lambda: (function.many(calls),))
    if len(answers) != 1:
        return [answers] * len(calls)
    if len(answers[0]) != len(calls):
        return [(0.0, f"many answers {len(calls)} calls; got {len(answers[0])} answers", "")] * len(calls)

    def one(answer: object, response: str) -> object:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return [guarded(judged, one, value_range, *pair) for pair in zip(answers[0], (call[1] for call in calls), strict=True)]


def checked(value: object, value_range: tuple[float, float]) -> tuple[float, str]:
    """The value as a float, or 0 and which rule it broke: a finite number in the declared range."""
    low, high = value_range
    if not isinstance(value, numbers.Real):
        return 0.0, f"a reward is a number; got {type(value).__name__}"[:LONGEST_FAILURE]
    value = float(value)
    if math.isfinite(value) and low <= value <= high:
        return value, ""
    return 0.0, f"a reward is from {low:g} to {high:g}; got {value:g}"


def left_a_process() -> bool:
    """Whether there is a child, running or ended and not waited for. A call that starts one waits for it."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def describe(error: BaseException) -> str:
    """``Type: message`` on one line, cut; an exception may refuse to be printed."""
    try:
        return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_FAILURE]
    except BaseException:
        return type(error).__name__[:LONGEST_FAILURE]


def build(module: str, name: str, fields: dict | None) -> tuple[object, tuple[float, float]]:
    """The built reward of a class path and its field values, with its declared range; fields None: the path is a function's."""
    target = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    if fields is None:
        return target, getattr(target, "value_range", (-math.inf, math.inf))
    return target(**fields).build(), getattr(target, "value_range", (-math.inf, math.inf))


def limit(memory_bytes: int) -> None:
    """Address space, file size and core files of this process and what it starts."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a too large file is an OSError in the reward, not the end of the process


def prctl(option: int, value: int) -> None:
    """Set one of the kernel's per-process options; elsewhere than on Linux, nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def read(requests) -> object:
    """The next pickle; EOFError when the parent closed the pipe."""
    header = requests.read(8)
    if len(header) < 8:
        raise EOFError
    return pickle.loads(requests.read(struct.unpack("<Q", header)[0]))
