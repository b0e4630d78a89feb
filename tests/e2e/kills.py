"""Runs a command, kills one of its processes at some moment, and runs it again until it is done. For the tests of kills alone."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
LONGEST_SECONDS = 120.0
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "SIGKILL", "DistNetworkError", "Broken pipe")
"""What a rank may tell of the one that was killed."""


@dataclass
class Killer:
    """``moments``: how many kills are left; ``log``: what was killed and when."""

    moments: int
    rng: random.Random
    log: list[str] = field(default_factory=list)

    def finish(self, arguments: list[str], out: Path) -> None:
        """Run the command to its end, with kills on the way while there are any left."""
        for _ in range(100):
            run = start(arguments)
            try:
                is_hit = self.moments > 0 and self._kill(run, out)
                self.moments -= is_hit
                told = run.communicate(timeout=LONGEST_SECONDS)[1]
                if run.returncode == 0:
                    return
                assert is_hit, f"it ended by itself: {told[-3000:]}"
                assert run.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL, 2), told[-3000:]
                crashed = [part for part in told.split("Traceback")[1:] if not any(word in part for word in PEER_GONE)]
                assert not crashed, told[-3000:]
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)
        raise AssertionError("a hundred starts, and not done")

    def _kill(self, run: subprocess.Popen, out: Path) -> bool:
        """Kill one process of the run: while it starts, inside a save, or anywhere; False where the run was over before."""
        kind, metrics, began = self.rng.choice(["start", "save", "save", "any", "any"]), out / "metrics.jsonl", time.time()
        if kind == "start":
            time.sleep(self.rng.random() * 5.0)
        else:
            wait(lambda: (metrics.is_file() and metrics.stat().st_mtime > began) or run.poll() is not None)
        if kind == "save":
            wait(lambda: any((out / "checkpoints").glob(".step-*")) or run.poll() is not None, pause=0.0002)
            time.sleep(self.rng.random() * 0.08)
        elif kind == "any":
            time.sleep(self.rng.random() * 2.0)
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
            victim = self.rng.choice(family)
            name = " ".join(victim.cmdline()[1:4])
            victim.kill()
            saving = [path.name for path in (out / "checkpoints").glob(".step-*")]
            self.log.append(f"{kind}: {name or 'a child'}, one of {len(family)}; {', '.join(saving) or 'no save under way'}")
            return True
        return False


def start(arguments: list[str]) -> subprocess.Popen:
    """``r1mega ARGUMENTS`` in a session of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "r1mega", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait(condition, pause: float = 0.005) -> bool:
    """Until ``condition``; False after too long."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True
