"""What the tests of runtime=ray share: a cluster of this machine, configs, rank programs in r1mega's place, a reward that differs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1mega.config.compose import compose

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("RAY_AUTH_MODE", "token")  # read once, when Ray is imported; nothing is written below the home folder
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(
    not HAS_RAY and "R1MEGA_CI" not in os.environ, reason="Ray is not installed (pip install 'r1mega[ray]'); CI must have it"
)


def by_length(problem, response: str) -> float:
    """A reward: half of the last digit of the response's length, so that groups differ."""
    return len(response) % 10 / 2


def start_node(*options: str, line: tuple[str, ...] = (), env: dict[str, str] | None = None, cpus: int = 8) -> str:
    """``ray start`` with ``options``, in a session of its own; what it has said. ``line``: what stands before the command."""
    program = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
    flags = [f"--num-cpus={cpus}", "--num-gpus=0", "--disable-usage-stats", *options]
    lean = {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}  # no workers before they are asked for
    done = subprocess.run(
        [*line, sys.executable, "-c", program, "start", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), **lean, **(env or {})},
        capture_output=True,
        text=True,
        timeout=180,
        start_new_session=True,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def processes_of(folder: Path) -> list[int]:
    """Processes of the cluster whose files lie in ``folder``: all name it, or have it in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            text = (entry / "cmdline").read_bytes() if entry.name.isdecimal() else b""
            if str(folder).encode() in text:
                found.append(int(entry.name))
    return found


def end_cluster(folder: Path) -> None:
    """Kill all of it."""
    for number in (signal.SIGKILL,) * 2:  # what was being started is there the second time
        for pid in processes_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 5
        while processes_of(folder) and time.monotonic() < deadline:
            time.sleep(0.1)


@contextlib.contextmanager
def cluster(folder: Path, **options) -> Iterator[str]:
    """A head alone, with its files in ``folder`` (short: sockets lie there); its address."""
    folder.mkdir(exist_ok=True)
    flags = ("--head", "--port=0", "--include-dashboard=false", f"--temp-dir={folder}")
    try:
        try:
            said = start_node(*flags, **options)
        except AssertionError as error:
            if "Deadline Exceeded" not in str(error):
                raise
            end_cluster(folder)  # Ray waits 30 s for itself: too short on a machine that is busy with other tests
            said = start_node(*flags, **options)
        yield re.search(r"--address='([^']+)'", said)[1]
    finally:
        end_cluster(folder)


def config(out: Path, *overrides: str):
    """Of ``r1mega rl`` on Ray, with two ranks."""
    usual = [
        "init=x",
        "data.problems=x",
        "rl.rollouts=2",
        f"out={out}",
        "runtime=ray",
        "launch.processes=2",
        "rl.prompts_per_rollout=8",
    ]
    return compose("rl", [*usual, "optim.warmup_steps=0", *overrides])


def wait_until(what, seconds: float = 60.0, said=lambda: "in time") -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, said()
        time.sleep(0.05)


def is_there(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
