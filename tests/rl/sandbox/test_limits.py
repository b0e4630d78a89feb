"""Programs that want everything: each ends at its limit plus a second, says which limit it was, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from r1mega.config.errors import UserError
from r1mega.rl.sandbox import PYTHON, Job, Limits, Result, Sandbox

LIMITS = Limits(wall_seconds=1.0, cpu_seconds=1.0, memory_bytes=128 << 20, processes=16, disk_bytes=16 << 20, output_bytes=1 << 20)
SLACK_SECONDS = 1.0
HELD = ("time", "memory", "processes")
GREEDY = {
    "endless loop": ("while True: pass", ("time",)),
    "sleep": ("import time; time.sleep(100)", ("time",)),
    "sleep that ignores signals": (
        "import signal, time\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: pass\ntime.sleep(100)",
        ("time",),
    ),
    "stops itself": ("import os, signal; os.kill(0, signal.SIGSTOP)", ("time",)),
    "fork bomb": ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", HELD),
    "fork bomb of sessions": (
        "import os\nwhile True:\n  try:\n    if os.fork(): os._exit(0)\n    os.setsid()\n  except OSError: pass",
        ("time", "processes", "ok"),
    ),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(100,)).start()",
        (*HELD, "exit"),
    ),
    "double fork that stays": (
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(1000)\n  os._exit(0)",
        ("ok",),
    ),
    "a child that writes on": (
        "import os\nif os.fork() == 0:\n  os.setsid()\n  while True: os.write(2, b'x' * 4096)\nimport time; time.sleep(0.1)",
        ("ok",),
    ),
    "double fork that holds the output": (
        "import os, time\nif os.fork() == 0:\n  os.setsid(); time.sleep(1000)\nprint('here')",
        ("ok",),
    ),
    "one large array": ("bytearray(1 << 40)", ("exit",)),
    "many small lists": ("hoard = []\nwhile True: hoard.append([1] * 1000)", ("exit", "memory")),
    "memory of many processes": (
        "import os, time\nfor _ in range(7): os.fork()\nhoard = bytearray(os.urandom(1)) * (60 << 20)\ntime.sleep(100)",
        ("memory", "exit", "processes", "time"),
    ),
    "shared memory": (
        "import mmap\nkeep = [mmap.mmap(-1, 16 << 20) for _ in range(64)]\nfor m in keep: m.write(bytes(16 << 20))",
        ("exit", "memory"),
    ),
    "memory held by forks": (
        "import os, time\nhoard = b'x' * (50 << 20)\nfor _ in range(9):\n  if os.fork() == 0: time.sleep(100)\ntime.sleep(100)",
        ("memory",),
    ),
    "gigabytes of output": ("import sys\nwhile True: sys.stdout.write('x' * (1 << 20))", ("output",)),
    "gigabytes of errors": ("import sys\nwhile True: sys.stderr.write('x' * (1 << 20))", ("time",)),
    "output of a child": (
        "import os\nif os.fork() == 0:\n  while True: os.write(1, b'x' * 4096)\nos.wait()",
        ("output",),
    ),
    "output by name": (
        "import os\nfd = os.open('/dev/stdout', os.O_WRONLY)\nwhile True: os.write(fd, b'x' * 65536)",
        ("output",),
    ),
    "one large file": ("f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 20))", ("exit", "signal")),
    "many large files": ("n = 0\nwhile True:\n  n += 1\n  open(str(n), 'wb').write(bytes(1 << 20))", ("exit",)),
    "many small files": ("n = 0\nwhile True:\n  n += 1\n  open(str(n), 'w')", ("exit",)),
    "many folders": ("import os\nwhile True:\n  os.mkdir('d'); os.chdir('d')", ("exit", "time")),
    "sparse file": ("import os\nos.truncate(os.open('f', os.O_CREAT | os.O_RDWR), 1 << 50)", ("exit", "signal")),
    "many descriptors": ("import os\nwhile True: os.open('/dev/null', os.O_RDONLY)", ("exit",)),
    "many pipes": ("import os\nwhile True: os.pipe()", ("exit",)),
    "a large number": ("9 ** 9 ** 9", ("time", "exit", "memory")),
    "a factorial tower": ("import math; math.factorial(10 ** 8)", ("time", "exit", "memory")),
    "a formula that grows": (
        "terms = {(): 1}\nwhile True: terms = {a + (n,): v for a, v in terms.items() for n in range(9)}",
        ("time", "exit", "memory"),
    ),
    "regex backtracking": ("import re; re.match('(a+)+$', 'a' * 60 + 'b')", ("time",)),
    "recursion": ("import sys; sys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()", ("signal", "exit", "memory", "time")),
    "crash": ("import ctypes; ctypes.string_at(1)", ("signal",)),
    "processor time of children": (
        "import os\nwhile True:\n  if os.fork() == 0:\n    for _ in range(10 ** 6): pass\n    os._exit(0)\n  os.wait()",
        ("time",),
    ),
    "zombies": ("import os\nwhile True:\n  try:\n    if os.fork() == 0: os._exit(0)\n  except OSError: pass", HELD),
    "closed output": ("import os, time; os.closerange(0, 9); time.sleep(100)", ("time",)),
    "exits badly": ("import sys; sys.exit(3)", ("exit",)),
    "kills itself": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ("signal",)),
    "kills all it sees": (
        "import os, signal\ntry: os.kill(-1, signal.SIGKILL)\nexcept ProcessLookupError: print('nobody else')",
        ("ok",),
    ),
}
UNFIT = ("kills all it sees", "many folders", "many small files")
"""Not without a sandbox: what would reach other processes, and what takes a disk longer to remove than a program to make."""
QUICK = (
    *("sleep that ignores signals", "stops itself", "fork bomb", "double fork that stays", "double fork that holds the output"),
    *(
        "memory held by forks",
        "many small lists",
        "gigabytes of output",
        "output of a child",
        "many large files",
        "many small files",
    ),
    *("a large number", "regex backtracking", "crash", "closed output", "kills all it sees"),
)


def marked(mark: str) -> list[str]:
    """Command lines of living processes of this machine that hold the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "cmdline").read_bytes():
                found.append((folder / "cmdline").read_text())
    return found


def run(code: str, limits: Limits = LIMITS, **more) -> Result:
    """One program; checks that it ended in time and left no process."""
    mark = uuid.uuid4().hex
    with Sandbox(**more) as sandbox:
        sandbox.run(Job((PYTHON, "-c", "")), Limits(wall_seconds=20.0))  # so that no start is timed
        start = time.monotonic()
        result = sandbox.run(Job((PYTHON, "-s", "main.py", mark), b"", {"main.py": code.encode()}), limits)
        seconds = time.monotonic() - start
        assert not marked(mark), "nothing is left when run returns"
    assert seconds <= limits.wall_seconds + SLACK_SECONDS, (seconds, result)
    return result


def limits_for(ends: tuple[str, ...]) -> Limits:
    """A program that ends at another limit than time has enough of it on a loaded machine too."""
    return LIMITS if "time" in ends else dataclasses.replace(LIMITS, wall_seconds=6.0, cpu_seconds=6.0)


@pytest.mark.parametrize("name", QUICK)
def test_a_greedy_program_ends_in_time(name: str) -> None:
    code, ends = GREEDY[name]
    result = run(code, limits_for(ends))
    assert result.end in ends, result
    assert len(result.stdout) <= LIMITS.output_bytes and len(result.stderr) <= LIMITS.output_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GREEDY if name not in QUICK])
def test_every_greedy_program_ends_in_time(name: str) -> None:
    test_a_greedy_program_ends_in_time(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GREEDY if name not in UNFIT])
def test_limits_without_a_sandbox(name: str) -> None:
    """The weaker kind ends and cleans up all the same."""
    code, ends = GREEDY[name]
    before = set(Path("/tmp").glob("r1mega_program_*"))
    result = run(code, limits_for(ends), confined=False)
    wide = {"many large files": ("time", "exit"), "many small files": ("time", "exit"), "many folders": ("time", "exit")}
    assert result.end in (*ends, *wide.get(name, ()), "processes"), result
    assert set(Path("/tmp").glob("r1mega_program_*")) <= before


def test_nothing_is_left_for_the_next_program() -> None:
    with Sandbox() as sandbox:
        write = "open('left', 'w').write('x'); import os; os.mkdir('dir'); os.mkfifo('/tmp/fifo'); print(sorted(os.listdir()))"
        first = sandbox.run(Job((PYTHON, "-c", write)))
        second = sandbox.run(Job((PYTHON, "-c", "import os; print(os.listdir('/tmp'), os.listdir('/dev/shm'))")))
    assert first.stdout == b"['dir', 'fifo', 'left']\n" and second.stdout == b"[] []\n"


def test_input_output_and_status() -> None:
    code = b"import sys; data = sys.stdin.buffer.read(); print(len(data), sum(data)); print('oh', file=sys.stderr); sys.exit(7)"
    with Sandbox() as sandbox:
        result = sandbox.run(Job((PYTHON, "main.py"), bytes(range(256)) * 4096, {"main.py": code}))
        assert (result.end, result.status) == ("exit", 7)
        assert result.stdout == f"{1 << 20} {4096 * 255 * 128}\n".encode() and result.stderr == b"oh\n"
        missing = sandbox.run(Job(("/bin/no such program",)))
        assert missing.end == "refused" and "No such file" in missing.detail
        for name in ("a/b", "..", "", "a\0b"):
            with pytest.raises(UserError, match="a file's name has no folder"):
                sandbox.run(Job((PYTHON,), files={name: b""}))
    with pytest.raises(UserError, match="absolute and exists; got nowhere"):
        Sandbox(["nowhere"])


def test_threads_take_turns() -> None:
    """The supervisor dies with the thread that started it; the next run starts another."""
    found = []
    with Sandbox() as sandbox:
        for number in range(2):
            thread = threading.Thread(target=lambda: found.append(sandbox.run(Job((PYTHON, "-c", "print(1)"))).stdout))
            thread.start()
            thread.join()
            if number == 0:
                sandbox.process.wait(10.0)
    assert found == [b"1\n"] * 2


def test_a_path_that_is_shown_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("apple")
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    (tmp_path / "words.txt").chmod(0o666)
    code = f"print(open('{tmp_path}/words.txt').read()); open('{tmp_path}/words.txt', 'a')"
    with Sandbox([str(tmp_path)]) as sandbox:
        result = sandbox.run(Job((PYTHON, "-c", code)))
    assert result.stdout == b"apple\n" and b"Read-only file system" in result.stderr


def test_a_killed_parent_takes_all_with_it() -> None:
    mark = uuid.uuid4().hex
    script = (
        "import sys; from r1mega.rl.sandbox import *\n"
        "with Sandbox() as s:\n"
        "    s.run(Job((PYTHON, '-c', ''))); print('ready', flush=True)\n"
        "    s.run(Job((PYTHON, '-c', 'import time; time.sleep(100)', sys.argv[1])), Limits(wall_seconds=100))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, mark], stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 20.0
    while len(marked(mark)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(marked(mark)) == 2, "the parent and its program run"
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not marked(mark)
