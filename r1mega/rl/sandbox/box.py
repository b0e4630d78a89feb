"""Run untrusted programs in sandboxes: in: a :class:`Job` and :class:`Limits`; out: a :class:`Result`. Judges no output.

    with Sandbox() as sandbox:
        result = sandbox.run(Job((PYTHON, "main.py"), stdin=b"1 2", files={"main.py": code}), Limits(wall_seconds=2.0))

Each program has a sandbox of its own (:mod:`r1mega.rl.sandbox.inside`): it sees no process, no network and no file of the machine
but the interpreter and the system's libraries, and nothing of it is left when ``run`` returns, at most a second after its limit.
Linux on x86_64 or aarch64. Needs user, pid, mount and network namespaces and seccomp; :func:`why_not` says what is refused.
``confined=False`` is weaker: limits, and the end of all processes, but the program sees the user's files and processes, all that it
writes into its folder counts on the disk until it is removed, and it may write elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from r1mega.config.errors import UserError
from r1mega.rl.sandbox import supervisor
from r1mega.rl.sandbox.limits import Job, Limits, Result

PYTHON = os.path.realpath(sys.executable)
"""The interpreter of a program, without the packages of a virtual environment."""
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
START_SECONDS = 60.0
"""Longest start of the supervisor."""
GRACE_SECONDS = 0.9
"""How long after a program's limit its result is waited for, beside the time that its sandbox takes to be made."""
END_SECONDS = 5.0
"""Longest wait for a supervisor that was told to end, before it is killed, with which all below it die."""
WAYS_OUT = (
    "allow user namespaces (a container: run it with --security-opt seccomp=unconfined --security-opt apparmor=unconfined; a host: "
    "sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0)"
)


class Sandbox:
    """Runs programs one after the other, for one thread at a time; a context manager.

    ``shows``: paths that programs may read beside the interpreter and the system's libraries. ``confined``: False for limits only,
    see the module. Raises UserError for a path that is not there.
    """

    def __init__(self, shows: Sequence[str] = (), confined: bool = True):
        missing = [path for path in shows if not os.path.isabs(path) or not os.path.exists(path)]
        if missing:
            raise UserError(f"sandbox: a path that programs may read is absolute and exists; got {missing[0]}; correct it")
        self.shows, self.confined = [*interpreter(), *shows], confined
        self.process: subprocess.Popen | None = None

    def run(self, job: Job, limits: Limits = Limits()) -> Result:  # noqa: B008  (frozen)
        """How the program ended. Raises UserError for file names that are none."""
        bad = [name for name in job.files if not name or "/" in name or "\x00" in name or name in (".", "..")]
        if bad:
            raise UserError(f"sandbox: a file's name has no folder; got {bad[0]!r}; put all files side by side")
        given = {"argv": job.argv, "stdin": job.stdin.decode("latin-1")}
        given["files"] = {name: body.decode("latin-1") for name, body in job.files.items()}
        request = {"job": given, "limits": dataclasses.asdict(limits), "shows": self.shows, "confined": self.confined}
        if self.process is not None and self.process.poll() is not None:
            self.close()  # it ended with the thread that had started it
        if self.process is None:
            self.process = self._start()
            if not self._exchange(b"", time.monotonic() + START_SECONDS):
                self.close()
                return Result("refused", 0, b"", b"", 0.0, "the sandbox's supervisor did not start")
        start = time.monotonic()
        line = self._exchange(
            json.dumps(request).encode() + b"\n", start + supervisor.MAKING_SECONDS + limits.wall_seconds + GRACE_SECONDS
        )
        seconds = time.monotonic() - start
        if line is None:
            self.close()
            return Result("time", 0, b"", b"", seconds, f"wall time of {limits.wall_seconds:g} s")
        if not line:
            self.close()
            return Result("refused", 0, b"", b"", seconds, "the sandbox's supervisor ended")
        answer = json.loads(line)
        out, err = (answer.pop(name).encode("latin-1") for name in ("stdout", "stderr"))
        return Result(stdout=out, stderr=err, **answer)

    def _exchange(self, data: bytes, deadline: float) -> bytes | None:
        """Send a request, wait for its line; None at the deadline, b"" when the supervisor is gone."""
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        to, back = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(to, False)
        poll, answer, view = select.poll(), bytearray(), memoryview(data)
        poll.register(back, select.POLLIN)
        if data:
            poll.register(to, select.POLLOUT)
        while not answer.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            for fd, _ in poll.poll(left * 1000 + 1):
                if fd == to:
                    try:
                        view = view[os.write(to, view) :]
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        return b""
                    if not view:
                        poll.unregister(to)
                else:
                    part = os.read(back, 1 << 16)
                    if not part:
                        return b""
                    answer += part
        return bytes(answer)

    def _start(self) -> subprocess.Popen:
        """The supervisor, with nothing of our environment and no packages."""
        root = str(Path(__file__).resolve().parents[3])
        code = "import sys; sys.path.insert(0, sys.argv[1]); from r1mega.rl.sandbox.supervisor import main; main(int(sys.argv[2]))"
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code, root, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            cwd="/",
        )

    def close(self) -> None:
        """End the supervisor and all that it started, and wait for it; safe to call twice."""
        if self.process is None:
            return
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=END_SECONDS)  # it ends what it runs, then itself
        self.process.kill()
        self.process.wait()
        self.process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def interpreter() -> list[str]:
    """What the interpreter needs of the machine's files, outer folders first."""
    library = os.path.join(sys.base_prefix, "lib")
    found = [*SYSTEM, library, PYTHON]
    kept: list[str] = []
    for path in found:
        inner = any(path.startswith(f"{other}/") and not os.path.islink(other) for other in kept)
        if os.path.exists(path) and path not in kept and not inner:
            kept.append(path)
    return kept


def why_not() -> str:
    """Why programs cannot be confined on this machine; "" where they can. Some tens of milliseconds."""
    if sys.platform != "linux":
        return f"this is {platform.system()}, not Linux"
    with Sandbox() as sandbox:
        result = sandbox.run(Job((PYTHON, "-I", "-S", "-c", "print(6 * 7)")), Limits(wall_seconds=20.0))
    if result.end == "ok" and result.stdout == b"42\n":
        return ""
    return (
        result.detail or f"a trial program ended with {result.end} {result.status}: {result.stderr[-200:].decode(errors='replace')}"
    )


def require(where: str = "sandbox", instead: str = "") -> None:
    """Raises UserError where programs cannot be confined. ``instead``: what the user can do without."""
    reason = why_not()
    if reason:
        way_out = f"{WAYS_OUT}{f', or {instead}' if instead else ''}"
        raise UserError(f"{where}: namespaces and a filter of system calls on this machine; got {reason}; {way_out}")
