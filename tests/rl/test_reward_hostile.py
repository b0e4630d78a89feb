"""Hostile rewards: every call ends in time, is a recorded failure, leaves no process behind, and the calls around it are scored.

All of it in a PID namespace and, as where the kernel allows none, without.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1mega.rl.reward import keeper
from r1mega.rl.reward.runner import RewardRunner

HOSTILE = '''
    import ctypes, os, signal, subprocess, sys, threading, time
    from dataclasses import dataclass


    def write_to_all_pipes(data):
        for fd in range(3, 4096):
            try:
                os.write(fd, data)
            except OSError:
                pass


    def daemon():
        """A grandchild in a session of its own that heeds no SIGTERM."""
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(1000)
            os._exit(0)


    def deeper(level):
        return deeper(level + 1)


    class Liar(float):
        """A float that says it is in every range."""

        def __float__(self):
            return 3.0

        def __le__(self, other):
            return True

        __ge__ = __le__


    class Unprintable(Exception):
        def __str__(self):
            raise SystemExit(1)


    class Calls:
        def hang(self):
            while True:
                pass

        def hang_in_c(self):
            ctypes.PyDLL(None).pause()  # holds the interpreter's lock

        def stop_itself(self):
            os.kill(os.getpid(), signal.SIGSTOP)

        def raises(self):
            raise KeyError("no such thing")

        def raises_unprintable(self):
            raise Unprintable

        def exits(self):
            sys.exit(0)

        def exits_hard(self):
            os._exit(9)

        def crashes(self):
            ctypes.string_at(1)

        def nan(self):
            return float("nan")

        def text(self):
            return "1.0"

        def too_large(self):
            return 2.0

        def liar(self):
            return Liar(0.5)

        def huge_number(self):
            return 10**100_000

        def huge_text(self):
            return "x" * (1 << 27)

        def many_small(self):
            hoard = []
            while True:
                hoard.append([1] * 1000)

        def one_big(self):
            bytearray(1 << 40)

        def prints(self):
            while True:
                print("x" * 1000)
                sys.stderr.write("y" * 1000)

        def fills_a_file(self):
            with open(self.note, "wb") as file:
                while True:
                    file.write(bytes(1 << 20))

        def recursion(self):
            return deeper(0)

        def endless_recursion(self):
            sys.setrecursionlimit(10**9)
            return deeper(0)

        def fork_comes_back(self):
            os.fork()
            return 1.0

        def fork_bomb(self):
            while True:
                try:
                    os.fork()
                except OSError:
                    pass

        def daemon_stays(self):
            daemon()
            return 1.0

        def daemon_and_hang(self):
            daemon()
            time.sleep(1000)

        def child_without_environment(self):
            subprocess.Popen(["sleep", "1000." + self.mark], env={}, start_new_session=True).wait()

        def thread_stays(self):
            threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
            return 1.0

        def main_thread_ends(self):
            threading.Thread(target=time.sleep, args=(1000,)).start()
            ctypes.CDLL(None).pthread_exit(None)

        def closes_its_pipes(self):
            os.closerange(0, 4096)
            return 1.0

        def closes_its_pipes_and_hangs(self):
            os.closerange(0, 4096)
            time.sleep(1000)

        def writes_garbage(self):
            write_to_all_pipes(b"garbage\\n")
            return 1.0

        def answers_for_others(self):
            for call in range(64):
                write_to_all_pipes(b'{"call": %d, "value": 1.0, "seconds": 0.0, "failure": ""}\\n' % call)
            return 1.0

        def stops_the_clock(self):
            while True:
                write_to_all_pipes(b'{"warming": true}\\n')

        def endless_report(self):
            while True:
                write_to_all_pipes(b"x" * 4096)

        def kills_its_parent(self):
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(0.2)
            return 1.0

        def sets_an_alarm(self):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return 1.0

        def sleeps(self):
            time.sleep(0.2)
            return 1.0

        def kills_everything(self):
            os.kill(-1, signal.SIGKILL)
            return 1.0


    @dataclass(frozen=True)
    class Hostile:
        """Does what the response says."""

        value_range = (0.0, 1.0)

        def build(self):
            def score(problem, response):
                call = Calls()
                call.note, call.mark = problem.metadata["note"], problem.metadata["mark"]
                return getattr(call, response)() if hasattr(call, response) else float(response)
            return score
'''
LIMIT = 0.6
MEMORY = 128 << 20
IN_TIME = f"time limit of {LIMIT:g} s"
FAILS = {
    "hang": IN_TIME,
    "hang_in_c": IN_TIME,
    "stop_itself": IN_TIME,
    "prints": IN_TIME,
    "endless_recursion": (IN_TIME, "memory limit", "SIGSEGV"),
    "main_thread_ends": (IN_TIME, "ended with"),
    "daemon_and_hang": IN_TIME,
    "child_without_environment": IN_TIME,
    "raises": "KeyError: 'no such thing'",
    "raises_unprintable": "Unprintable",
    "exits": "SystemExit: 0",
    "exits_hard": "ended with status 9",
    "crashes": "ended with SIGSEGV",
    "nan": "from 0 to 1; got nan",
    "text": "a number; got str",
    "too_large": "got 2",
    "liar": "got 3",
    "huge_number": "OverflowError",
    "huge_text": f"memory limit of {MEMORY} bytes",
    "many_small": (f"memory limit of {MEMORY} bytes", IN_TIME),
    "one_big": f"memory limit of {MEMORY} bytes",
    "fills_a_file": "OSError",
    "recursion": "RecursionError",
    "fork_comes_back": "left a process behind",
    "fork_bomb": ("limit of 128 processes", IN_TIME),
    "daemon_stays": "left a process behind",
    "thread_stays": "left a thread running",
    "closes_its_pipes": "lost its pipe",
    "closes_its_pipes_and_hangs": "closed its pipe",
    "writes_garbage": "wrote into its process's pipe",
    "answers_for_others": "wrote into its process's pipe",
    "stops_the_clock": "wrote into its process's pipe",
    "endless_report": ("wrote into its process's pipe", "time limit"),  # whichever a busy machine comes to first
}
NAME = "hostile_calls.Hostile"


@pytest.fixture
def mark(tmp_path: Path, monkeypatch) -> str:
    """A text in the environment, or the arguments, of every process that the test starts; the module of the rewards is there."""
    (tmp_path / "hostile_calls.py").write_text(textwrap.dedent(HOSTILE))
    monkeypatch.syspath_prepend(tmp_path)
    text = str(uuid.uuid4().int)
    monkeypatch.setenv("R1MEGA_TEST", text)
    return text


def marked(mark: str) -> set[int]:
    """Pids of the living processes with the mark, this one left out."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found - {os.getpid()}


def kept(runner: RewardRunner) -> set[int]:
    """Pids of the processes that the runner has now."""
    keepers = [worker.keeper.pid for worker in runner._workers]
    return {*keepers, *(pid for each in keepers for pid in keeper.descendants(each))}


def gone(mark: str, runner: RewardRunner) -> bool:
    """Is nothing with the mark there but the runner's own? What was killed may take a moment to be reaped."""
    until = time.monotonic() + 1.0
    while not marked(mark) <= kept(runner):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def problem(tmp_path: Path, mark: str) -> SimpleNamespace:
    metadata = {"note": str(tmp_path / "note"), "mark": mark}
    return SimpleNamespace(id="p", question="?", answer="7", source="numbers", metadata=metadata, solution=None)


STARTS = (
    "hang",
    "daemon_and_hang",
    "child_without_environment",
    "main_thread_ends",
    "fork_comes_back",
    "fork_bomb",
    "daemon_stays",
)
"""What differs where there is no namespace: calls that start something."""


@pytest.mark.parametrize("namespace, kinds", [(True, tuple(FAILS)), (False, STARTS)])
def test_every_hostile_call_fails_in_time_and_alone(namespace: bool, kinds: tuple[str, ...], mark: str, tmp_path: Path) -> None:
    responses = [text for kind in kinds for text in ("0.25", kind)] + ["0.75"]
    with RewardRunner({NAME: 1.0}, LIMIT, MEMORY, workers=3, namespace=namespace) as runner:
        records = [record[NAME] for record in runner.score([problem(tmp_path, mark)] * len(responses), responses)]
        assert gone(mark, runner), "what a call started is gone with it"
    assert not marked(mark), "close() leaves no process"
    for response, record in zip(responses, records, strict=True):
        if response not in FAILS:
            assert (record.value, record.failure) == (float(response), ""), (response, record)
            continue
        wanted = (FAILS[response],) if isinstance(FAILS[response], str) else FAILS[response]
        assert record.value == 0.0 and any(text in record.failure for text in wanted), (response, record)
        assert record.seconds <= LIMIT + 1.0, (response, record)
    assert not (tmp_path / "note").exists() or (tmp_path / "note").stat().st_size <= 16 << 20


@pytest.mark.parametrize("namespace", [True, False])
def test_a_reward_that_kills_its_parent_stops_nothing(namespace: bool, mark: str, tmp_path: Path) -> None:
    with RewardRunner({NAME: 1.0}, LIMIT, namespace=namespace) as runner:
        calls = ["0.25", "kills_its_parent", "0.75"]
        contained = is_contained(runner)
        if contained:
            calls += ["kills_everything", "0.5"]
        records = [record[NAME] for record in runner.score([problem(tmp_path, mark)] * len(calls), calls)]
        assert gone(mark, runner)
    assert not marked(mark)
    for call, record in zip(calls, records, strict=True):
        if not call.startswith("kills"):
            assert (record.value, record.failure) == (float(call), "")
    # In the namespace there is no parent to be killed; outside, it is the keeper, whose end ends the call.
    assert records[1].failure == "" if contained else "ended with SIGKILL" in records[1].failure


def test_an_alarm_does_not_reach_the_next_call(mark: str, tmp_path: Path) -> None:
    with RewardRunner({NAME: 1.0}, LIMIT) as runner:
        records = runner.score([problem(tmp_path, mark)] * 5, ["0.25"] * 3 + ["sets_an_alarm", "sleeps"])
    assert [record[NAME].failure for record in records] == [""] * 5 and records[-1][NAME].value == 1.0


def is_contained(runner: RewardRunner) -> bool:
    """Whether the kernel allowed a namespace."""
    worker = runner._workers[0]
    while worker.phase == "starting":
        runner._collect([], [], None)
    return os.readlink(f"/proc/{worker.keeper.pid}/ns/pid_for_children") != os.readlink("/proc/self/ns/pid")


@pytest.mark.parametrize("namespace", [True, False])
def test_nothing_outlives_a_trainer_that_is_killed(namespace: bool, mark: str, tmp_path: Path) -> None:
    script = f"""
        import sys
        from types import SimpleNamespace
        from r1mega.rl.reward.runner import RewardRunner
        problem = SimpleNamespace(id="p", question="?", answer="7", source="s", metadata={{"note": "", "mark": {mark!r}}})
        with RewardRunner({{{NAME!r}: 1.0}}, 60.0, namespace={namespace}) as runner:
            runner.score([problem], ["0.5"])
            print("ready", flush=True)
            runner.score([problem], ["daemon_and_hang"])
    """
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert trainer.stdout.readline() == b"ready\n"
    wait_until(lambda: len(marked(mark)) >= 4 + namespace * is_root(), "trainer, keeper, reward process and daemon are there")
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    wait_until(lambda: not marked(mark), "all are gone")


def is_root() -> bool:
    return os.geteuid() == 0


def wait_until(true, what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
