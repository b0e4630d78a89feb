"""The process that runs programs in sandboxes one after the other, watches their limits and ends them; started by ``box``.

In: a JSON line a job on standard input; out: a JSON line a result on standard output (bytes as latin-1 text). It has a clean
environment, and a fork of it is what becomes the sandbox, so that a program finds no secret in memory or descriptors. It ends with
its parent and ends all that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import time

from r1mega.rl.sandbox import inside, libc
from r1mega.rl.sandbox.limits import Job, Limits

TICK_SECONDS = 0.01
MAKING_SECONDS = 10.0
"""Longest making of a sandbox; some ten milliseconds on a machine that is not overloaded."""
GRACE_SECONDS = 0.3
"""Longest wait for the end of a namespace's first process before its parent is killed too."""
FULL_PIPE = 32
"""Reads that empty any pipe: 64 KiB each, of at most a MiB. Whoever still writes is not waited for."""
HZ = os.sysconf("SC_CLK_TCK")


def main(parent: int) -> None:
    """Serve until standard input ends."""
    inside.tied_to(parent)
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1, "CHILD_SUBREAPER")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(1, b"\n")  # ready
    for line in sys.stdin.buffer:
        request = json.loads(line)
        given = request["job"]
        files = {name: body.encode("latin-1") for name, body in given["files"].items()}
        job = Job(tuple(given["argv"]), given["stdin"].encode("latin-1"), files)
        folder = None if request["confined"] else tempfile.mkdtemp(prefix="r1mega_program_")
        try:
            answer = run(job, Limits(**request["limits"]), request["shows"], folder)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        finally:
            if folder:
                with contextlib.suppress(OSError):
                    remove(folder)


def run(job: Job, limits: Limits, shows: list[str], folder: str | None) -> dict:
    """One program from its start to the end of all that it started; the fields of a Result, bytes as latin-1 text.

    ``folder``: where it runs if not in a sandbox.
    """
    start = time.monotonic()
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return Watched.no_result("a /proc of another PID namespace; mount one", 0.0)
        watched = Watched(job, limits, shows, folder)
        try:
            watched.watch()
        finally:
            watched.end()
        return watched.result(time.monotonic() - (watched.started or start))
    except Exception as error:
        return Watched.no_result(f"{type(error).__name__}: {error}", time.monotonic() - start)


def remove(folder: str) -> None:
    """Remove a folder, however deep it is: by going down and up, since a path may be longer than the kernel takes."""
    os.chdir(folder)
    above: list[tuple[str, list[str]]] = []  # the folders that this one is in, each with those beside it that are still to do
    name, beside = "", emptied()
    while above or beside:
        if beside:
            above.append((name, beside))
            name = beside.pop()
            os.chmod(name, 0o700)
            os.chdir(name)
            beside = emptied()
        else:
            done, (name, beside) = name, above.pop()
            os.chdir("..")
            os.rmdir(done)
    os.chdir("/")
    os.rmdir(folder)


def emptied() -> list[str]:
    """The folders in the working folder, all else in which is removed."""
    kept = []
    with os.scandir(".") as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                kept.append(entry.name)
            else:
                os.unlink(entry.name)
    return kept


class Watched:
    """One running program with its pipes."""

    def __init__(self, job: Job, limits: Limits, shows: list[str], folder: str | None):
        self.limits, self.folder = limits, folder
        self.detail, self.kind, self.refused = "", "", ""
        self.first, self.code, self.status = 0, None, b""
        self.started = 0.0
        self.out, self.err = bytearray(), bytearray()
        stdin = sealed(job.stdin)
        self.out_fd, out = os.pipe()
        self.err_fd, err = os.pipe()
        self.status_fd, status = os.pipe()
        own = os.getpid()
        self.outer = os.fork()
        if self.outer == 0:
            way = inside.Way(job, limits, shows, (stdin, out, err), status)
            inside.unconfined(way, own, folder) if folder else inside.outer(way, own)
        for fd in (stdin, out, err, status):
            os.close(fd)
        self.open = {self.out_fd, self.err_fd, self.status_fd}

    def watch(self) -> None:
        """Until the program ends, or must."""
        deadline = time.monotonic() + MAKING_SECONDS
        poll = select.poll()
        for fd in self.open:
            os.set_blocking(fd, False)
            poll.register(fd, select.POLLIN)
        poll.register(0, 0)  # the parent has closed its end: nobody waits for this
        look = time.monotonic()
        while not self.kind:
            now = time.monotonic()
            if self.started:
                deadline = self.started + self.limits.wall_seconds
            if now >= deadline and not self.started:
                self.refused = f"the sandbox was not made in {MAKING_SECONDS:g} s"
            elif now >= deadline:
                self.stop("time", f"wall time of {self.limits.wall_seconds:g} s")
            if now >= deadline:
                return
            for fd, _ in poll.poll(max(0.0, min(deadline, look) - now) * 1000 + 0.5):
                if fd == 0:
                    self.stop("refused", "nobody waits for it")
                elif not self.read(fd):
                    poll.unregister(fd)
                    self.open.discard(fd)
            if self.refused or self.code is not None or self.status_fd not in self.open and not self.folder:
                break  # output that is there is read below; what comes later is of processes that the end kills
            if self.folder and os.waitid(os.P_PID, self.outer, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            if time.monotonic() >= look:
                self.look()
                look = time.monotonic() + TICK_SECONDS
        for fd in self.open & {self.out_fd, self.err_fd}:
            for _ in range(FULL_PIPE):
                if not self.read(fd, once=True):
                    break

    def read(self, fd: int, once: bool = False) -> bool:
        """Take what a pipe holds; False when it has ended (``once``: or holds nothing)."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return not once
        if fd == self.out_fd:
            self.out += data
            if len(self.out) > self.limits.output_bytes:
                self.stop("output", f"output of {self.limits.output_bytes} bytes")
                return False
        elif fd == self.err_fd:
            self.err += data
            del self.err[: -self.limits.output_bytes]  # the end says why a program failed
        else:
            self.status += data
            *lines, self.status = self.status.split(b"\n")
            for record in map(json.loads, lines):
                self.first = record.get("first", self.first)
                self.code = record.get("code", self.code)
                self.started = record.get("started", self.started)
                self.refused = record.get("refused", self.refused)
        return bool(data)

    def stop(self, kind: str, detail: str) -> None:
        """The first limit that was met is the one that counts."""
        if not self.kind:
            self.kind, self.detail = kind, detail

    def look(self) -> None:
        """What all processes of the program use now."""
        if not self.first:
            return
        # Without a namespace, orphans are this process's children.
        pids = descendants(os.getpid() if self.folder else self.first)
        if len(pids) > self.limits.processes:
            self.stop("processes", f"{self.limits.processes} processes")
            return
        ticks = 0 if self.folder else spent(self.first)  # with those of its orphans
        memory = tasks = 0
        for pid in pids:
            memory, tasks = (old + new for old, new in zip((memory, tasks), resident(pid), strict=True))
            ticks += spent(pid)
        if tasks > self.limits.processes:
            self.stop("processes", f"{self.limits.processes} processes")
        elif memory > self.limits.memory_bytes:
            self.stop("memory", f"memory of {self.limits.memory_bytes} bytes")
        elif ticks / HZ > self.limits.cpu_seconds:
            self.stop("time", f"processor time of {self.limits.cpu_seconds:g} s")

    def end(self) -> None:
        """Kill all and wait until they are gone."""
        deadline = time.monotonic() + GRACE_SECONDS
        while True:
            late = time.monotonic() > deadline
            targets = [self.first] if self.first else [self.outer]
            if self.folder or late:
                targets = [self.outer, *descendants(os.getpid())]
            for pid in targets:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while True:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if pid == 0:
                        break
                    if pid == self.outer and self.folder and self.code is None:
                        self.code = os.waitstatus_to_exitcode(status)
                    if pid == self.first:
                        self.first = 0
                if time.monotonic() > deadline + GRACE_SECONDS:
                    break
                time.sleep(0.0005)
                continue
            break
        for fd in (self.out_fd, self.err_fd, self.status_fd):
            os.close(fd)

    def result(self, seconds: float) -> dict:
        """How it ended."""
        if self.refused:
            return self.no_result(self.refused, seconds)
        code = self.code
        if self.kind:
            kind, status = self.kind, 0
        elif code is None:
            return self.no_result("the sandbox's first process ended before the program", seconds)
        elif code == -signal.SIGXCPU:
            kind, status, self.detail = "time", signal.SIGXCPU, f"processor time of {self.limits.cpu_seconds:g} s"
        else:
            kind, status = ("signal", -code) if code < 0 else ("exit" if code else "ok", code)
        out, err = (bytes(part[: self.limits.output_bytes]).decode("latin-1") for part in (self.out, self.err))
        return {"end": kind, "status": int(status), "stdout": out, "stderr": err, "seconds": seconds, "detail": self.detail}

    @staticmethod
    def no_result(why: str, seconds: float) -> dict:
        """There was no sandbox, or none any more."""
        return {"end": "refused", "status": 0, "stdout": "", "stderr": "", "seconds": seconds, "detail": why}


def sealed(body: bytes) -> int:
    """A descriptor that reads these bytes and can neither be written nor grow."""
    import fcntl

    fd = os.memfd_create("stdin", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    view = memoryview(body)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def descendants(root: int) -> list[int]:
    """Pids below a process, by the kernel's lists of children."""
    found = [root]
    for pid in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                    found += map(int, file.read().split())
    return found[1:]


def resident(pid: int) -> tuple[int, int]:
    """(bytes of memory that is a process's own or shared by fork, threads) of a process; zeros once it is gone."""
    memory = tasks = 0
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith((b"RssAnon:", b"RssShmem:", b"VmPTE:")):
                memory += int(line.split()[1]) << 10
            elif line.startswith(b"Threads:"):
                tasks = int(line.split()[1])
    return memory, tasks


def spent(pid: int) -> int:
    """Clock ticks of a process and of its children that ended."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return sum(map(int, file.read().rpartition(b")")[2].split()[11:15]))
    return 0


if __name__ == "__main__":
    main(int(sys.argv[1]))
