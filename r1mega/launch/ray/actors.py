"""What runs on the cluster's nodes: one :class:`RankActor` a trainer rank, one :class:`ServerActor` a server. No torch, late Ray.

Each holds one process of its own and answers the driver's questions within milliseconds: what the process has written since the
last one, how it has ended. A rank's process is killed when its actor is gone, a server's keeper ends it then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1mega import __version__
from r1mega.config.errors import UserError
from r1mega.launch.local import RESULT_VARIABLE
from r1mega.launch.ray import tied
from r1mega.rl.engine.sglang import roster

MOST_BYTES = 1 << 20
"""Of a log, in one answer."""


def place() -> dict[str, Any]:
    """This node and what Ray has given this actor of it. ``gpus``: their numbers or names, as processes name them."""
    import ray

    return {
        "node": ray.get_runtime_context().get_node_id(),
        "address": ray.util.get_node_ip_address(),
        "host": socket.gethostname(),
        "gpus": [str(gpu) for gpu in ray.get_gpu_ids()],
        "cores": len(os.sched_getaffinity(0)),
        "version": __version__,
    }


class Tail:
    """What a file has got since the last look."""

    def __init__(self, path: Path):
        self.path, self.mark = path, 0

    def read(self) -> bytes:
        """At most :data:`MOST_BYTES`; nothing while it is not there."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(self.mark)
            data = file.read(MOST_BYTES)
            self.mark += len(data)
            return data
        return b""


class RankActor:
    """One trainer rank: ``python -m r1mega ...`` in a process of its own."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="r1mega-rank-")
        self.folder = Path(self._folder.name)
        self.process: subprocess.Popen | None = None

    def place(self) -> dict[str, Any]:
        """See :func:`place`."""
        return place()

    def free_port(self) -> int:
        """A port of this node that nobody listens on."""
        with socket.socket() as server:
            server.bind(("", 0))
            return server.getsockname()[1]

    def start(self, arguments: Sequence[str], env: Mapping[str, str], cwd: str, has_servers: bool) -> int:
        """Start the rank; ``env``: beside this actor's environment. Returns the process's number."""
        for old in self.folder.iterdir():
            old.unlink()
        self.result = self.folder / "result"
        self.roster = self.folder / "servers"
        self.tails = [Tail(self.folder / name) for name in ("out", "err")]
        made = {**os.environ, **env, RESULT_VARIABLE: str(self.result)}
        if has_servers:
            made[roster.VARIABLE] = str(self.roster)
        with open(self.tails[0].path, "wb") as out, open(self.tails[1].path, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, tied.__file__, str(os.getpid()), sys.executable, *arguments],
                env=made,
                cwd=cwd if os.path.isdir(cwd) else None,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        return self.process.pid

    def poll(self) -> dict[str, Any]:
        """``status``: None while it runs; ``out`` and ``err``: new bytes; ``wanted`` and ``seen``: of the engine's roster."""
        code = self.process.poll()
        out, err = (tail.read() for tail in self.tails)
        status = None if code is None or out or err else code if code >= 0 else 128 - code  # the last words come first
        wanted, seen = (roster.read(self.roster.with_name(f"servers.{name}")) for name in ("wanted", "seen"))
        return {"status": status, "out": out, "err": err, "wanted": wanted, "seen": seen}

    def tell(self, servers: Mapping[str, Any]) -> None:
        """Where the servers are now."""
        roster.write(self.roster, servers)

    def send(self, number: int) -> None:
        """A signal for the rank."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def take_result(self) -> bytes | None:
        """What the command has returned, pickled."""
        return self.result.read_bytes() if self.result.exists() else None

    def end(self, seconds: float) -> None:
        """SIGTERM, after ``seconds`` SIGKILL; then what it has left of its session."""
        if self.process is None:
            return
        self.send(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class ServerActor:
    """One server, started by :class:`~r1mega.rl.engine.sglang.launch.Fleet` in a thread: it takes minutes."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="r1mega-server-")
        self.fleet: Any = None
        self.failure = ""
        self.starting: threading.Thread | None = None

    def place(self) -> dict[str, Any]:
        """See :func:`place`."""
        return place()

    def begin(self, choice: Any, wanted: Mapping[str, Any], index: int, env: Mapping[str, str], cwd: str, log: str) -> None:
        """Start server ``index`` of ``choice``; ``wanted``: what the trainer has said of the model; ``env``: as of a rank; ``log``:
        where the driver keeps its log."""
        self._close()
        os.environ.update(env)
        if os.path.isdir(cwd):
            os.chdir(cwd)  # where make sglang's interpreter may lie
        self.failure, folder = "", Path(self._folder.name)
        self.tail = getattr(self, "tail", None) or Tail(folder / f"engine/server{index}.log")
        address = place()["address"]

        def start() -> None:
            from r1mega.rl.engine.contract import EngineRuntime
            from r1mega.rl.engine.sglang.launch import Fleet

            try:
                runtime = EngineRuntime(**wanted, folder=str(folder))
                self.fleet = Fleet(replace(choice, servers=1, restarts=0), runtime, address, index)
            except UserError as error:
                self.failure = str(error).replace(str(self.tail.path.resolve()), log)

        self.starting = threading.Thread(target=start, daemon=True)
        self.starting.start()

    def poll(self) -> dict[str, Any]:
        """``state``: starting, ready or dead; ``url``; ``said``: why it is dead; ``log``: new bytes."""
        fleet, said = self.fleet, self.failure
        if fleet is not None and not fleet.owned[0].is_running():
            said = fleet.owned[0].complaint()
        state = "dead" if said else "ready" if fleet is not None else "starting"
        return {"state": state, "said": said, "url": fleet.owned[0].server.url if fleet else "", "log": self.tail.read()}

    def end(self) -> None:
        """End it with all its processes."""
        self._close()

    def _close(self) -> None:
        if self.starting is not None and self.starting.is_alive() and self.fleet is None:
            return  # the end of this actor ends it: its keeper looks
        if self.fleet is not None:
            self.fleet.close()
            self.fleet = None
