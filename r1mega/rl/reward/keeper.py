"""The keeper: the process between the trainer and a reward process; nothing that a reward starts outlives it. Imports no torch.

Started by :mod:`r1mega.rl.reward.process` as ``python -m r1mega.rl.reward.keeper REQUEST_FD REPORT_FD PARENT_PID NAMESPACE``. It
forks the reward process (:mod:`r1mega.rl.reward.worker`), waits, and ends everything when the reward process ends, when the trainer
says so (SIGTERM) or is gone, and when there are more than ``MOST_PROCESSES``. Its exit status is the reward process's.

Two ways to hold what a reward starts. In a PID namespace (as root, or in a user namespace of its own) the kernel kills all members
with the first of them, new sessions, double forks and fork bombs included, and a reward sees no process outside, so it can signal
none. Where namespaces are refused (NAMESPACE 0, or the kernel says no) the keeper is a subreaper: orphans become its children, and
it kills its descendants until none is left. There a reward can signal all processes of its user, the trainer too: nothing prevents
that.

RLIMIT_NPROC is not used: it counts all of a user's processes, and root is exempt.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

from r1mega.rl.reward import worker

MOST_PROCESSES = 128
"""Processes that a reward may have at once."""
TOO_MANY_PROCESSES = 79
"""Exit status after more than that."""
TICK_SECONDS = 0.05
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_SLAVE = 0x2, 0x4, 0x8, 0x4000, 0x80000
WATCHED = (signal.SIGTERM, signal.SIGCHLD)


def main(request_fd: int, report_fd: int, parent: int, namespace: bool) -> None:
    """Keep one reward process until it ends or must end; never returns."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)  # taken by sigtimedwait only, so none comes between two steps
    contained = namespace and enter_namespace()
    worker.prctl(worker.PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        if contained:
            first_of_namespace(request_fd, report_fd)
        start(request_fd, report_fd)
    os.close(request_fd)
    os.close(report_fd)
    status = watch(child, parent)
    end(child, contained)
    os._exit(status)


def start(request_fd: int, report_fd: int) -> None:
    """Become the reward process; never returns."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        os.setsid()  # so that a signal to its own group does not reach the keeper
        worker.main(request_fd, report_fd)
    finally:
        os._exit(1)


def enter_namespace() -> bool:
    """A PID namespace for the children of this process; False where the kernel refuses."""
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWPID) == 0:
        return True
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWPID) != 0:
        return False
    for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:  # without a map it is nobody, but contained
            file.write(line)
    return True


def first_of_namespace(*fds: int) -> None:
    """Be the namespace's first process: fork the reward process, reap, end with its status. Returns in the reward process.

    The reward process is not the first itself: that one ignores most signals, and its children look as if they had lost a parent.
    """
    worker.prctl(worker.PR_SET_PDEATHSIG, signal.SIGKILL)
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWNS) == 0:  # a /proc of its own, where a process finds itself by its own number; else the trainer's
        libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None)
        libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    child = os.fork()
    if child == 0:
        return
    for fd in fds:
        os.close(fd)
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(exit_status(os.waitstatus_to_exitcode(status)))


def watch(child: int, parent: int) -> int:
    """Wait until the child ends or must end; the status to leave with. Does not reap it, so that its number stays its own."""
    base = num_tasks()
    while True:
        got = signal.sigtimedwait(WATCHED, TICK_SECONDS)
        if (got and got.si_signo == signal.SIGTERM) or os.getppid() != parent:
            return 128 + signal.SIGTERM  # whoever sent it: a cluster signals every process of a job
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended:
            return exit_status(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
        tasks = num_tasks()
        if tasks > base + MOST_PROCESSES:  # cheap to ask; only then are the processes counted
            if len(descendants(os.getpid())) > MOST_PROCESSES:
                return TOO_MANY_PROCESSES
            base = tasks
        base = min(base, tasks)


def end(child: int, contained: bool) -> None:
    """Kill and reap all that is below this process. The first of a namespace is reaped when all the others are gone."""
    while True:
        for pid in [child] if contained else descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, 0 if contained else os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        signal.sigtimedwait([signal.SIGCHLD], 0.002)


def descendants(root: int) -> list[int]:
    """Pids below ``root`` that /proc shows, ended ones that nobody reaped included (another of their threads may run on)."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def num_tasks() -> int:
    """Tasks of the whole machine; 0 where that is not told."""
    try:
        with open("/proc/loadavg") as file:
            return int(file.read().split()[3].partition("/")[2])
    except (OSError, ValueError, IndexError):
        return 0


def exit_status(code: int) -> int:
    """An exit code as the shell tells it: 128 and the signal's number where one ended the process."""
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), namespace=sys.argv[4] == "1")
