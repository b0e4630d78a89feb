"""Into the sandbox: from a fork of the supervisor to the program, through namespaces, a root of its own and the filter.

Three processes, each the parent of the next and each killed with its parent:

- outer: leaves the user's namespaces, waits;
- first: number 1 of the new PID namespace. Builds the root, reaps, and ends with the program: the kernel then kills all others;
- program: a user of a user namespace of its own (of all numbers it holds one, that no file belongs to if we are root), without
  capabilities and privileges to gain, under the filter of system calls; then it is the program.

The root is a read-only tmpfs with the interpreter, the system's libraries and five devices, each read-only, a /tmp of limited size,
and a /proc of the namespace that shows processes only. What fails is told through the status pipe as ``{"refused": REASON}``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import resource
import signal
import time
from typing import NoReturn

from r1mega.rl.sandbox import libc, seccomp
from r1mega.rl.sandbox.limits import Job, Limits

INSIDE_ID = 1000
"""User and group of the program in its own user namespace."""
HOLDERS = ("/sys", "/mnt", "/srv", "/proc")
"""Folders over one of which the new root is built: nothing of it is needed any more."""
DEVICES = ("null", "zero", "full", "random", "urandom")
FOLDER = "/tmp"
"""The program's working folder."""
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": FOLDER,
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""All that the program's environment holds: nothing of ours."""


class Way:
    """What the three processes share: the job, its limits, the paths it sees, its descriptors, the numbers that it becomes."""

    def __init__(self, job: Job, limits: Limits, shows: list[str], fds: tuple[int, int, int], status_fd: int):
        self.job, self.limits, self.shows, self.fds, self.status_fd = job, limits, shows, fds, status_fd
        self.machine, self.may_lack_filter = platform.machine(), False
        self.own = self.ids = (os.getuid(), os.getgid())

    def tell(self, **record: object) -> None:
        """One line to the supervisor."""
        with contextlib.suppress(OSError):
            os.write(self.status_fd, json.dumps(record).encode() + b"\n")

    def refused(self, error: BaseException) -> NoReturn:
        """Say why there is no sandbox, and end."""
        text = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
        self.tell(refused=f"{text} ({error.filename})" if getattr(error, "filename", None) else text)
        os._exit(1)


def outer(way: Way, supervisor: int) -> NoReturn:
    """The first fork: new namespaces, then wait for the first process of them."""
    try:
        tied_to(supervisor)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where memory ends, the kernel takes these first
        enter_namespaces(way)
        own = os.getpid()
        child = os.fork()
        if child == 0:
            first(way, own)
        way.tell(first=child)
    except BaseException as error:
        way.refused(error)
    os.close(way.status_fd)
    for fd in way.fds:
        os.close(fd)
    os.waitpid(child, 0)
    os._exit(0)


def tied_to(parent: int) -> None:
    """Die with the parent. ``parent`` 0: it is outside of this process's PID namespace."""
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL, "PDEATHSIG")
    if os.getppid() != parent:
        os._exit(1)


def enter_namespaces(way: Way) -> None:
    """All but the program's user namespace; through one of our own where we may not make the others without."""
    flags = libc.NEW_NS | libc.NEW_PID | libc.NEW_NET | libc.NEW_IPC | libc.NEW_UTS | libc.NEW_CGROUP
    try:
        libc.unshare(flags, "all but user")
        way.ids = spare_id("uid", way.ids[0]), spare_id("gid", way.ids[1])
    except PermissionError:
        libc.unshare(libc.NEW_USER, "CLONE_NEWUSER")
        write_maps("self", *((number, number) for number in way.ids))
        libc.unshare(flags, "mount, pid, net, ipc, uts")
    with contextlib.suppress(OSError):
        os.setgroups([])


def spare_id(kind: str, own: int) -> int:
    """A user or group that nobody is, from the end of the numbers that this user namespace holds; our own if there is none."""
    if os.geteuid() != 0:
        return own
    with open(f"/proc/self/{kind}_map") as file:
        start, _, count = max((tuple(map(int, line.split())) for line in file), key=lambda line: line[2])
    return start + count - 2 - os.getpid() % 30_000 if count >= 1 << 16 else own


def write_maps(process: str, user: tuple[int, int], group: tuple[int, int]) -> None:
    """(inside, outside) of the one user and the one group that a process's new user namespace holds."""
    lines = ("setgroups", "deny"), ("uid_map", f"{user[0]} {user[1]} 1"), ("gid_map", f"{group[0]} {group[1]} 1")
    for name, line in lines:
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(line)


def first(way: Way, parent: int) -> NoReturn:
    """Number 1: the root, the program, its end."""
    try:
        tied_to(0)
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # which for number 1 means that no signal of its namespace reaches it
        libc.call("sethostname", b"sandbox", 7)
        holder = next(folder for folder in HOLDERS if os.path.isdir(folder))
        build_root(way, holder)
        for fd in way.fds:  # so that the program may open them again by name
            with contextlib.suppress(OSError):
                os.fchown(fd, *way.ids)
        named, named_by = os.pipe()
        mapped, mapped_by = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(mapped_by)
            program(way, named_by, mapped)
        os.close(named_by)
        number = os.read(named, 32).decode()
        if number:
            write_maps(number, (INSIDE_ID, way.ids[0]), (INSIDE_ID, way.ids[1]))
            os.chdir(holder)
            libc.pivot_to_here(way.machine)
            libc.mount("", "/", None, libc.REMOUNT | libc.RDONLY | libc.NOSUID | libc.NODEV)
            libc.prctl(libc.PR_SET_DUMPABLE, 0, "DUMPABLE")
            os.write(mapped_by, b"go")
        os.close(mapped_by)
        for fd in way.fds:
            os.close(fd)
        while True:
            pid, status = os.wait()
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                way.tell(code=code)
                os._exit(0)
    except BaseException as error:
        way.refused(error)


def build_root(way: Way, holder: str) -> None:
    """The new root, mounted on ``holder``."""
    libc.mount("", "/", None, libc.REC | libc.PRIVATE)
    libc.mount("sandbox", holder, "tmpfs", libc.NOSUID | libc.NODEV, "size=1m,nr_inodes=4096,mode=755")
    for folder in ("tmp", "proc", "dev"):
        os.mkdir(f"{holder}/{folder}", 0o755)
    size = f"size={way.limits.disk_bytes},nr_inodes={max(64, way.limits.disk_bytes >> 12)},mode=1777"
    libc.mount("tmp", f"{holder}{FOLDER}", "tmpfs", libc.NOSUID | libc.NODEV, size)
    for path in way.shows:
        show(path, holder)
    for name in DEVICES:
        target = f"{holder}/dev/{name}"
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        libc.mount(f"/dev/{name}", target, None, libc.BIND)
        flags = libc.remount_flags(target) & ~libc.NODEV
        libc.mount("", target, None, libc.BIND | libc.REMOUNT | flags | libc.RDONLY | libc.NOSUID | libc.NOEXEC)
    links = {"shm": FOLDER, "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
    for name, goal in links.items():
        os.symlink(goal, f"{holder}/dev/{name}")
    for name, body in way.job.files.items():
        with open(f"{holder}{FOLDER}/{name}", "xb") as file:
            file.write(body)
        os.chmod(f"{holder}{FOLDER}/{name}", 0o755)
    mount_proc(f"{holder}/proc")


def mount_proc(target: str) -> None:
    """A read-only /proc of the namespace with as little in it as the kernel can; none where a container covers parts of its own."""
    flags = libc.NOSUID | libc.NODEV | libc.NOEXEC | libc.RDONLY
    for options in ("subset=pid,hidepid=2", "hidepid=2", ""):
        with contextlib.suppress(OSError):
            libc.mount("proc", target, "proc", flags, options)
            return


def show(path: str, holder: str) -> None:
    """The same file, folder or link in the new root, read-only with all that is mounted below it."""
    target = holder + path
    os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, 0o755, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    libc.mount(path, target, None, libc.BIND | libc.REC)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [unescaped(line.split()[4]) for line in file]
    for point in points:
        if point == target or point.startswith(f"{target}/"):
            flags = libc.remount_flags(point) | libc.RDONLY | libc.NOSUID | libc.NODEV
            libc.mount("", point, None, libc.BIND | libc.REMOUNT | flags)


def unescaped(text: str) -> str:
    """A path as mountinfo writes it: blanks, tabs, line ends and backslashes as octal numbers."""
    for code in ("040", "011", "012", "134"):
        text = text.replace(f"\\{code}", chr(int(code, 8)))
    return text


def program(way: Way, named_by: int, mapped: int) -> NoReturn:
    """The last fork: nobody, with nothing; then the program."""
    try:
        os.setsid()
        libc.unshare(libc.NEW_USER, "CLONE_NEWUSER of the program")
        os.write(named_by, os.readlink("/proc/self").encode())  # number 1 still sees the old /proc, and its numbers
        os.close(named_by)
        if os.read(mapped, 2) != b"go":
            os._exit(1)
        os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
        os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
        os.chdir(FOLDER)
        libc.drop_capabilities(way.machine)
        become(way, way.ids != way.own or kernel() >= (5, 14))  # else the limit would count all processes of our user
    except BaseException as error:
        way.refused(error)


def kernel() -> tuple[int, int]:
    """Version of the kernel; since 5.14 a user namespace has a count of processes of its own."""
    major, minor = os.uname().release.split("-")[0].split(".")[:2]
    return int(major), int("".join(char for char in minor if char.isdigit()) or 0)


def unconfined(way: Way, supervisor: int, folder: str) -> NoReturn:
    """Where there is no sandbox by the user's choice: the program in a folder, with limits, without capabilities, under the filter
    if the kernel has one. It sees the user's files and processes."""
    try:
        os.setsid()
        way.may_lack_filter = True
        tied_to(supervisor)
        for name, body in way.job.files.items():
            with open(f"{folder}/{name}", "xb") as file:
                file.write(body)
        os.chdir(folder)
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1, "NO_NEW_PRIVS")
        libc.drop_capabilities(way.machine)
        way.tell(first=os.getpid())
        become(way, number_of_processes=False)
    except BaseException as error:
        way.refused(error)


def become(way: Way, number_of_processes: bool) -> NoReturn:
    """Limits, descriptors, the filter, exec."""
    limits = way.limits
    os.umask(0o022)
    seconds = math.ceil(limits.cpu_seconds)
    wanted = {
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 1024,
    }
    if number_of_processes:
        wanted[resource.RLIMIT_NPROC] = limits.processes
    for kind, value in wanted.items():
        most = resource.getrlimit(kind)[1]
        hard = value + 1 if kind == resource.RLIMIT_CPU else value  # first SIGXCPU, which tells why
        value, hard = (each if most == resource.RLIM_INFINITY else min(each, most) for each in (value, hard))
        resource.setrlimit(kind, (value, hard))
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    high = [os.dup(fd) for fd in way.fds]  # above 0, 1 and 2, whatever the pipes are numbered
    for target, fd in enumerate(high):
        os.dup2(fd, target, inheritable=True)
    os.closerange(3, way.status_fd)
    os.closerange(way.status_fd + 1, 1 << 16)  # what is above was never opened here: the supervisor has few
    os.set_inheritable(way.status_fd, False)
    way.tell(started=time.monotonic())
    try:
        seccomp.install()
    except OSError:
        if not way.may_lack_filter:
            raise
    os.execve(way.job.argv[0], list(way.job.argv), ENVIRONMENT)
