"""Ranks of a small script, each with its own output, for the tests of meeting and watching: no model, Gloo alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1mega.launch.local import free_port

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
HEAD = """\
import os, signal, sys, time
import torch, torch.distributed as dist
from r1mega.config.errors import UserError
from r1mega.config.run import LaunchConfig
from r1mega.mesh import rendezvous, watch
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
launch = LaunchConfig(timeout_seconds=60, rendezvous_timeout_seconds={meet}, stall_timeout_seconds={stall})
def join():
    meeting = rendezvous.meet(launch)
    dist.init_process_group("gloo", store=rendezvous.fresh_store(meeting, "mesh"), rank=rank, world_size=world)
    watch.start(meeting, launch.stall_timeout_seconds)
def body():
{body}
status = 0
try:
    body()
except UserError as error:
    print(error, file=sys.stderr)
    status = 2
except RuntimeError as error:
    told = watch.explain(error)
    print(told or repr(error), file=sys.stderr)
    status = 1
watch.leave(status)
sys.stderr.flush()
os._exit(status)
"""


@dataclass
class Ended:
    """How a rank went: its exit status (negative: a signal), what it wrote to stderr without the warnings of torch, when it ended."""

    status: int
    told: str
    seconds: float


class Group:
    """Ranks that run ``body`` (a function's lines, where ``join()`` meets the others)."""

    def __init__(
        self, folder: Path, body: str, world: int, *, stall: float = 4, meet: float = 30, env: Sequence[Mapping[str, str]] = ()
    ):
        script = folder / "rank.py"
        script.write_text(HEAD.format(body="\n".join(f"    {line}" for line in body.splitlines()), stall=stall, meet=meet))
        port, self.began = free_port(), time.monotonic()
        self.errors = [folder / f"stderr-{rank}" for rank in range(world)]
        self.ranks = []
        for rank in range(world):
            places = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            own = dict(env[rank]) if env else {}
            variables = {**os.environ, **places, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **own}
            with self.errors[rank].open("w") as stream:
                self.ranks.append(subprocess.Popen([PYTHON, str(script)], env=variables, stderr=stream, cwd=folder))

    def wait_for(self, path: Path, seconds: float = 40.0) -> None:
        """Until ``path`` is there."""
        deadline = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.02)

    def send(self, rank: int, number: int) -> None:
        self.ranks[rank].send_signal(number)

    def end(self, *ranks: int, seconds: float = 40.0) -> dict[int, Ended]:
        """Wait for ``ranks`` (all without any) and kill the rest."""
        wanted, ended, deadline = ranks or range(len(self.ranks)), {}, time.monotonic() + seconds
        try:
            while len(ended) < len(wanted):
                assert time.monotonic() < deadline, self.told()
                for rank in wanted:
                    if rank not in ended and self.ranks[rank].poll() is not None:
                        ended[rank] = Ended(self.ranks[rank].returncode, self._told(rank), time.monotonic() - self.began)
                time.sleep(0.02)
        finally:
            for process in self.ranks:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()
        return ended

    def _told(self, rank: int) -> str:
        return "\n".join(
            line
            for line in self.errors[rank].read_text().splitlines()
            if not line.startswith(("[W", "[rank", "frame ", "Exception raised", "\t"))
        )

    def told(self) -> str:
        return "\n".join(f"--- rank {rank}\n{path.read_text()[-2000:]}" for rank, path in enumerate(self.errors))
