"""Starts the ranks of one run on this machine, as torchrun would: RANK, LOCAL_RANK, WORLD_SIZE and a free port in the environment.

In: the arguments of ``python`` and a number of ranks. Out: nothing, or :class:`LaunchError` with the status of the rank that failed
first; the others are ended. Rank 0's output passes through; of the others only the stderr of a rank that fails is shown. No rank
outlives this process: not after Ctrl-C, not after kill -9.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from r1mega.config.errors import STOPPED

HOST = "127.0.0.1"
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # linux/prctl.h
NOTES_VARIABLE = "R1MEGA_NOTES"
"""Names the folder in which a launcher that is not ours alone, and its ranks, leave what we are to know."""

RESULT_VARIABLE = "R1MEGA_RESULT"
"""Names the file in which rank 0 of started ranks leaves its result."""

SHOWN_BYTES = 16 << 10
"""Of a failing rank's stderr, the end that is shown."""


class LaunchError(RuntimeError):
    """A rank failed. ``rank``: which; ``status``: its exit status, 128 + signal where a signal ended it."""

    def __init__(self, rank: int, processes: int, status: int):
        super().__init__(f"launch: every rank ends with status 0; got {status} from rank {rank} of {processes}; its error is above")
        self.rank, self.status = rank, status


def start_ranks(
    arguments: Sequence[str],
    processes: int,
    *,
    env: Mapping[str, str] | None = None,
    grace_seconds: float = 2.0,
    end_seconds: float = 5.0,
) -> None:
    """Run ``python ARGUMENTS`` as ``processes`` ranks and wait for all of them.

    ``env``: added to this process's environment; ``grace_seconds``: how long the other ranks may go on after the first failure, so
    that the one that knows the cause can say it; ``end_seconds``: from SIGTERM to SIGKILL. SIGTERM is handed on to the ranks, whose
    status then counts; a second one ends them. Raises LaunchError; KeyboardInterrupt, and SystemExit 143 where SIGTERM ended the
    ranks, after they are gone.
    """
    port = free_port()
    ranks: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        errors: list[BinaryIO | None] = [None] + [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes - 1)]
        stack.callback(_end, ranks, end_seconds)
        came = stack.enter_context(_sigterm_forwarded(ranks))
        for rank in range(processes):
            variables = {**os.environ, **(env or {}), **rank_env(rank, processes, port)}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=variables,
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    stderr=errors[rank],
                    stdin=None if rank == 0 else subprocess.DEVNULL,
                    preexec_fn=_dies_with(os.getpid()),  # noqa: PLW1509 - runs two system calls, takes no lock
                )
            )
        if came:  # while they were started: those that had not been there yet have not heard
            for process in ranks:
                process.send_signal(came[0])
        failed = _wait(ranks, grace_seconds)
        if came and failed and failed[0][1] == 128 + signal.SIGTERM:  # ranks that had nothing to save
            raise SystemExit(failed[0][1])
        if failed:
            show_errors(failed, errors)
            raise LaunchError(failed[0][0], processes, failed[0][1])


def rank_env(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torch.distributed reads, and a share of the cores for each rank unless the user has said how many threads."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def free_port() -> int:
    """A TCP port that nobody on this machine listens on."""
    with socket.socket() as server:
        server.bind((HOST, 0))
        return server.getsockname()[1]


def tie_to_launcher() -> None:
    """For a rank of a launcher that does not do it: be killed when the launcher is gone, so that no rank goes on alone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def rank_ended(status: int, notes: str | None) -> int:
    """Tell the other ranks and the launcher that this one ends with ``status``; the status that the process takes.

    A rank that has saved and stopped is no failure, after which torch's launcher would start all of them again.
    """
    watch = sys.modules.get("r1mega.mesh.watch")  # there where this rank has met others
    if watch is not None:
        watch.leave(status)
    if notes is None or status != STOPPED:
        return status
    Path(notes, "stopped").touch()
    return 0


def _dies_with(parent: int) -> Callable[[], None]:
    """For a child between fork and exec: be killed when the parent is gone, however it went."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it went before the call above
            os._exit(1)

    return prepare


@contextlib.contextmanager
def _sigterm_forwarded(ranks: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """While ranks run, SIGTERM goes on to them, so that they can save; a second one unwinds the stack, which ends them.

    Gives the list of signals that came. Outside the main thread signals stay as they are.
    """
    came: list[int] = []

    def forward(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise SystemExit(128 + number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    try:
        before = signal.signal(signal.SIGTERM, forward)
    except ValueError:
        yield came
        return
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(ranks: Sequence[subprocess.Popen], grace_seconds: float) -> list[tuple[int, int]]:
    """(rank, status) of the ranks that failed by themselves, the first to fail first; empty when all ended with 0."""
    failed: list[tuple[int, int]] = []
    deadline = None
    while True:
        known = {rank for rank, _ in failed}
        for rank, process in enumerate(ranks):
            code = process.poll()
            if code and rank not in known:
                failed.append((rank, code if code > 0 else 128 - code))
        running = any(process.poll() is None for process in ranks)
        if deadline is None and any(status != STOPPED for _, status in failed):  # ranks that stop may take their time
            deadline = time.monotonic() + grace_seconds
        if not running or (deadline is not None and time.monotonic() > deadline):
            return failed
        time.sleep(POLL_SECONDS)


def show_errors(failed: Sequence[tuple[int, int]], errors: Sequence[BinaryIO | None]) -> None:
    """The end of the stderr of every failed rank but 0, whose stderr has passed through."""
    for rank, status in failed:
        stream = errors[rank]
        if stream is None or status == STOPPED:
            continue
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - SHOWN_BYTES))
        print(f"--- rank {rank}, status {status} ---", file=sys.stderr)
        print(stream.read().decode("utf-8", "replace"), end="", file=sys.stderr, flush=True)


def _end(ranks: Sequence[subprocess.Popen], end_seconds: float) -> None:
    """End what still runs: SIGTERM, then SIGKILL, then wait, so that nothing is left behind."""
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + end_seconds
    for process in ranks:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
