"""Servers that somebody else starts and starts again for this run: where they are now, read from a file. The runtime's. No torch.

In: :data:`VARIABLE`, the path of a file on this machine. Out: :class:`Roster`, which the engine uses as it does its own servers.
``PATH.wanted`` tells what the servers are to be; the file then says ``{"servers": [{"url", "start", "alive"}], "failure"}``, and
``PATH.seen`` which starts this rank has taken up: a start that rank 0 has not seen is told to no other rank, since rank 0 alone
pushes. A server may come back at another address.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.config.errors import UserError
from r1mega.rl.engine.sglang.client import EngineError, Server

if TYPE_CHECKING:
    from r1mega.rl.engine.contract import EngineRuntime
    from r1mega.rl.engine.sglang import SglangEngine

VARIABLE = "R1MEGA_SERVERS"
LOOK_SECONDS = 0.2
TELL_SECONDS = 10.0
MARGIN_SECONDS = 60.0
"""Beyond ``engine.start_seconds``, within which whoever starts the servers says that it has failed."""


def given(choice: SglangEngine, runtime: EngineRuntime) -> Roster | None:
    """The run's servers where the variable names their file; else None."""
    path = os.environ.get(VARIABLE)
    return Roster(Path(path), choice, runtime) if path else None


def wanted_of(runtime: EngineRuntime) -> dict[str, Any]:
    """What the servers are to be, for a process without torch."""
    return {"hf_config": runtime.hf_config, "device": runtime.device.partition(":")[0], "dtype": runtime.dtype}


def write(path: Path, value: Any) -> None:
    """JSON into ``path``, whole at once."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(value), encoding="utf-8")
    os.replace(aside, path)


def read(path: Path) -> Any:
    """JSON of ``path``; None while it is not there."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None


@dataclass
class Listed:
    """One server. ``start``: how often it has been started, 0 before the first time; ``alive``: as the file says."""

    server: Server
    start: int = 0
    alive: bool = False


class Roster:
    """As :class:`~r1mega.rl.engine.sglang.launch.Fleet`: ``owned``, ``on_death``, ``on_ready``, ``failure``, ``close``.

    ``is_held`` is not heeded: the runtime starts again what dies, at once."""

    def __init__(self, path: Path, choice: SglangEngine, runtime: EngineRuntime):
        self.path = path
        self.on_death: Callable[[int], None] = lambda index: None
        self.on_ready: Callable[[int], None] = lambda index: None
        self.failure: UserError | None = None
        self.is_held = False
        self._closing = threading.Event()
        self._seconds = choice.start_seconds + MARGIN_SECONDS
        write(path.with_name(f"{path.name}.wanted"), wanted_of(runtime))
        self.owned = [Listed(Server(entry["url"], choice.api_key())) for entry in self._await_all()]
        self._take_up()
        waiting = [index for index, one in enumerate(self.owned) if not one.alive]
        if self.failure or waiting:
            raise self.failure or UserError(f"engine=sglang: servers that answer; got none from {waiting}; see out/logs")
        self._watch = threading.Thread(target=self._keep, name="sglang-roster", daemon=True)
        self._watch.start()

    def _await_all(self) -> list[dict[str, Any]]:
        """The entries, once all servers answer. Raises UserError where one does not start."""
        began = told = time.monotonic()
        while True:
            held = read(self.path) or {"servers": [], "failure": ""}
            if held["failure"]:
                raise UserError(held["failure"])
            if held["servers"] and all(entry["alive"] for entry in held["servers"]):
                return held["servers"]
            now = time.monotonic()
            if now - began > self._seconds:
                raise UserError(
                    f"engine.start_seconds: the runtime starts the servers; got none in {self._seconds:.0f} s; see out/logs, or "
                    "raise it"
                )
            if now - told > TELL_SECONDS:
                told = now
                print(f"engine=sglang: waiting for the runtime's servers, {now - began:.0f} s", file=sys.stderr, flush=True)
            time.sleep(LOOK_SECONDS)

    def _take_up(self) -> None:
        """What the file says now, told to the engine."""
        held = read(self.path)
        if held is None:
            return
        for index, (one, entry) in enumerate(zip(self.owned, held["servers"], strict=True)):
            if one.alive and (not entry["alive"] or entry["start"] != one.start):
                one.alive = False
                self.on_death(index)
                one.server.pool.abandon()
            if entry["alive"] and not one.alive:
                if entry["url"] != one.server.url:
                    one.server.move(entry["url"])
                try:
                    one.server.read_info()
                except EngineError:  # it has just gone again, or cannot be reached from here: the next look
                    continue
                one.alive, one.start = True, entry["start"]
                self.on_ready(index)
        if held["failure"] and self.failure is None:
            self.failure = UserError(held["failure"])
        write(self.path.with_name(f"{self.path.name}.seen"), [one.start if one.alive else 0 for one in self.owned])

    def _keep(self) -> None:
        before = None
        while not self._closing.wait(LOOK_SECONDS):
            with contextlib.suppress(OSError):
                now = self.path.read_bytes()
                if now != before or not all(one.alive for one in self.owned):
                    self._take_up()
                    before = now

    def close(self) -> None:
        """Forget them; whoever has started them ends them."""
        self._closing.set()
        if getattr(self, "_watch", None) is not None and self._watch is not threading.current_thread():
            self._watch.join(30)
