"""A process that has imported what every rank imports, and forks ranks that begin at once. For :mod:`r1mega.testing.ranks` alone.

In, over a socket: a folder with a call, and each rank's environment. Out: which ranks failed, with what status. It forks only
with a single thread and without an accelerator; else it says so, and ends. Forks differ from fresh processes in two things: strings
hash alike on all ranks, and variables that a module reads at its import are those of the first call.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1mega.compat import megatron_jit

IMPORTED = ("r1mega.train.pretrain", "r1mega.rl.loop")
"""What ranks begin with; what else a call needs, its process imports."""
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.01
GRACE_SECONDS = 2.0
"""How long the other ranks may go on after the first failure, so that the one that knows the cause can say it."""


class Nest:
    """The side that asks. ``is_fit``: it can fork; else ranks are started anew."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=dict(environment))
        self.socket = ours
        self.is_fit = _line(ours) == "fit"

    @property
    def is_alive(self) -> bool:
        """Is its process there?"""
        return self.process.poll() is None

    def run(self, folder: Path, arguments: Sequence[str], environments: Sequence[Mapping[str, str]]) -> list[tuple[int, int]]:
        """:func:`r1mega.testing.ranks.main` as so many ranks; (rank, status) of those that failed, the first to fail first."""
        job = {"folder": str(folder), "arguments": list(arguments), "environments": list(map(dict, environments))}
        data = json.dumps(job | {"path": sys.path, "cwd": os.getcwd()}).encode()
        try:
            streams = array.array("i", [1, 2])  # as they are now: a test may have put others in their place
            self.socket.sendmsg([f"{len(data)}\n".encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
            self.socket.sendall(data)
            return [tuple(pair) for pair in json.loads(_line(self.socket))]
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Kill it, and with it the ranks."""
        self.process.kill()
        self.process.wait()
        self.socket.close()


def _line(stream: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\n"):
        part = stream.recv(1 << 16)
        if not part:
            raise EOFError("the process that forks ranks has ended; its error is above")
        data += part
    return data.decode().strip()


def main(number: int, parent: int) -> None:
    """The process: until the side that asks is gone."""
    _die_with(parent)
    megatron_jit.apply()
    for name in IMPORTED:
        importlib.import_module(name)
    import torch

    threads = len(os.listdir("/proc/self/task"))
    stream = socket.socket(fileno=number)
    if threads > 1 or torch.accelerator.is_available():
        stream.sendall(b"unfit\n")
        return
    stream.sendall(b"fit\n")
    while True:
        head, streams, *_ = socket.recv_fds(stream, 32, 2)
        if not head:
            return
        size, _, data = head.partition(b"\n")
        while len(data) < int(size):
            data += stream.recv(int(size) - len(data))
        failed = _ranks(json.loads(data), streams)
        for each in streams:
            os.close(each)
        stream.sendall(json.dumps(failed).encode() + b"\n")


def _ranks(job: dict[str, Any], streams: Sequence[int]) -> list[tuple[int, int]]:
    """Fork, wait, and end those that are left after a failure."""
    pids: dict[int, int] = {}
    nest = os.getpid()
    for rank, environment in enumerate(job["environments"]):
        pid = os.fork()
        if pid == 0:
            _become(nest, rank, job, environment, streams)
        pids[pid] = rank
    failed: list[tuple[int, int]] = []
    deadline = None
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            rank, code = pids.pop(pid), os.waitstatus_to_exitcode(status)
            if code:
                failed.append((rank, code if code > 0 else 128 - code))
                deadline = deadline or time.monotonic() + GRACE_SECONDS
        elif deadline is not None and time.monotonic() > deadline:
            for left in pids:
                os.kill(left, signal.SIGKILL)
            for left in pids:
                os.waitpid(left, 0)
            return failed
        else:
            time.sleep(POLL_SECONDS)
    return failed


def _become(nest: int, rank: int, job: dict[str, Any], environment: dict[str, str], streams: Sequence[int]) -> None:
    """The rank: does not return."""
    status = 1
    try:
        _die_with(nest)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(job["cwd"])
        sys.path[:] = job["path"]
        errors = os.open(f"{job['folder']}/{rank}.stderr", os.O_CREAT | os.O_WRONLY)
        os.dup2(streams[0] if rank == 0 else os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(streams[1] if rank == 0 else errors, 2)
        import torch

        from r1mega.testing import ranks

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        status = ranks.main(*job["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # before the call: it tells of its own failures
        Path(job["folder"], f"{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def _die_with(parent: int) -> None:
    """Be killed when the parent is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(int(sys.argv[1]), int(sys.argv[2]))
