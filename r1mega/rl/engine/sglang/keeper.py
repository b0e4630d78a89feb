"""The process between the trainer and one server: nothing of the server outlives the trainer, however that ends. Standard library.

Started by :mod:`launch` as ``python keeper.py PARENT_PID LOG COMMAND...``. The other end of its stdin is the trainer's alone: when
that closes, when the parent is another one, or at SIGTERM, the server's processes are killed. It is a subreaper, so that whatever
the server has started becomes its child and is killed with it. Exit status: the server's, 128 + signal where one ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TICK_SECONDS = 0.2
LOOK_SECONDS = 5.0
"""Between two looks at shared memory: a server that dies by itself cannot be asked any more."""


def main(parent: int, log: str, command: list[str]) -> int:
    """Keep one server until it ends or must."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(log, "ab") as out:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
        )
    left, looked = set(), time.monotonic()
    while server.poll() is None and not asked and os.getppid() == parent:
        if time.monotonic() - looked > LOOK_SECONDS:
            left, looked = left | shared_files(), time.monotonic()
        with contextlib.suppress(InterruptedError):
            if select.select([sys.stdin], [], [], TICK_SECONDS)[0] and not os.read(sys.stdin.fileno(), 1):
                break
    end(server, left)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def end(server: subprocess.Popen, left: set[str]) -> None:
    """Kill the server and all that it has started, and remove ``left`` and what else it leaves in shared memory.

    Without a request to end: SGLang would then wait for its requests and take the end of its own scheduler for a crash.
    """
    left = left | shared_files()
    while pids := children():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if server.poll() is None:
            server.wait()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)
    for file in left:
        with contextlib.suppress(OSError):
            os.unlink(file)


def shared_files() -> set[str]:
    """Files of SGLang's in shared memory that its processes hold now: others' are other servers'."""
    found: set[str] = set()
    waiting = children()
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):
            waiting += children(pid)
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {line.split()[-1] for line in lines if "/dev/shm/sglang_" in line and not line.endswith("(deleted)")}
    return found


def children(pid: int | str = "self") -> list[int]:
    """Processes whose parent that one is; of this one: orphans of the server too."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
