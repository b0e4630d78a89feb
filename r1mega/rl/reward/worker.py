"""The reward process: reads chunks of calls from a pipe, runs them one by one, reports each as it ends. Imports no torch.

Started by :mod:`r1mega.rl.reward.runner` as ``python -m r1mega.rl.reward.worker REQUEST_FD REPORT_FD PARENT_PID``. A request is a
pickle with an 8-byte length before it; a report is one JSON line. Standard input is empty and output goes nowhere, so that a
reward can neither read requests nor fill a disk with prints.
"""

from __future__ import annotations

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

OUT_OF_MEMORY = 77
"""Exit status after a call that hit the memory limit."""
LARGEST_FILE = 16 << 20
LONGEST_FAILURE = 200
PR_SET_PDEATHSIG = 1


def main(request_fd: int, report_fd: int, parent: int) -> None:
    """Serve until the request pipe closes."""
    # The parent may be killed while a call hangs here, when nobody reads the pipe: ask the kernel to end this process then.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    requests = os.fdopen(request_fd, "rb")

    def report(**record: object) -> None:
        os.write(report_fd, json.dumps(record).encode() + b"\n")

    try:
        start = read(requests)
        sys.path[:] = start["path"]
        rewards = [build(module, name, fields) for module, name, fields in start["rewards"]]
    except Exception as error:
        report(broken=describe(error))
        return
    limit(start["memory_bytes"])
    try:
        bytearray(4 << 20)
        report(ready=True)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    warmed: set[str] = set()
    while True:
        try:
            calls = read(requests)
        except EOFError:
            return
        serve(calls, rewards, warmed, report)


def serve(calls: list, rewards: list, warmed: set[str], report) -> None:
    """Run (reward index, problem, response) after (reward index, problem, response), a report each."""
    for idx, (_, problem, _) in enumerate(calls):
        if problem.source not in warmed:
            warmed.add(problem.source)
            report(warming=idx)
            for function, _ in rewards:
                if hasattr(function, "warm"):
                    guarded(function.warm, problem.source)  # what fails here fails again in the call, where it is recorded
    report(begin=True)
    for reward_idx, problem, response in calls:
        function, value_range = rewards[reward_idx]
        start = time.perf_counter()
        value, failure = guarded(function, problem, response)
        if not failure:
            value, failure = checked(value, value_range)
        report(value=value, seconds=time.perf_counter() - start, failure=failure)


def guarded(function, *args) -> tuple[object, str]:
    """(result, "") or (0.0, what was raised); ends the process at the memory limit, since little can be trusted after that."""
    try:
        return function(*args), ""
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BaseException as error:  # SystemExit too: a reward must not end the run
        return 0.0, describe(error)


def checked(value: object, value_range: tuple[float, float]) -> tuple[float, str]:
    """The value as a float, or 0 and which rule it broke: a finite number in the declared range."""
    low, high = value_range
    if not isinstance(value, numbers.Real):
        return 0.0, f"a reward is a number; got {type(value).__name__}"
    value = float(value)
    if math.isfinite(value) and low <= value <= high:
        return value, ""
    return 0.0, f"a reward is from {low:g} to {high:g}; got {value:g}"


def describe(error: BaseException) -> str:
    """``Type: message`` on one line, cut; an exception may refuse to be printed."""
    try:
        return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_FAILURE]
    except Exception:
        return type(error).__name__


def build(module: str, name: str, fields: dict) -> tuple[object, tuple[float, float]]:
    """The built reward of a class path and its field values, with its declared range."""
    target = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return target(**fields).build(), getattr(target, "value_range", (-math.inf, math.inf))


def limit(memory_bytes: int) -> None:
    """Address space, file size and core files of this process and what it starts."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a too large file is an OSError in the reward, not the end of the process


def read(requests) -> object:
    """The next pickle; EOFError when the parent closed the pipe."""
    header = requests.read(8)
    if len(header) < 8:
        raise EOFError
    return pickle.loads(requests.read(struct.unpack("<Q", header)[0]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
