"""SGLang servers that are ours: started, waited for, watched, started again when they die, ended with this process. No torch.

In: the choice and the runtime. Out: :class:`Fleet`, with one :class:`~r1mega.rl.engine.sglang.client.Server` each. A server is a
process group of another interpreter below a keeper (:mod:`keeper`), with its log in the run's folder. It begins with the model's
shape and random weights, and serves after a push.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.compat import sglang_server
from r1mega.config.errors import UserError, nearest
from r1mega.rl.engine.sglang import keeper
from r1mega.rl.engine.sglang.client import EngineError, Server

if TYPE_CHECKING:
    from r1mega.rl.engine.contract import EngineRuntime
    from r1mega.rl.engine.sglang import SglangEngine

BESIDE = ".venv-sglang/bin/python"
LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.5
TELL_SECONDS = 10.0
ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception|Interrupt)\b.*|.*\berror: .*)$")
OURS = ("model_path", "port", "load_format")
"""Arguments that the engine sets; the others are the user's to change."""


def interpreter(python: str | None) -> str:
    """``engine.python``, or this interpreter where it has sglang, or the one of ``make sglang``. Raises UserError for none."""
    if python:
        return python
    if importlib.util.find_spec("sglang") is not None:
        return sys.executable
    places = (Path(sys.prefix).parent, Path(__file__).resolve().parents[4], Path.cwd())
    for place in places:
        if (place / BESIDE).is_file():
            return str(place / BESIDE)
    raise UserError(
        "engine.python: an interpreter that has sglang; got none here and no .venv-sglang; make sglang makes one for a CPU, or use "
        "engine.python=/path/to/python or engine.url=http://HOST:PORT"
    )


def check_arguments(given: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise UserError for a server argument that this SGLang does not have, or that the engine sets itself."""
    for name in given:
        if name in OURS:
            raise UserError(f"engine.args.{name}: the engine's own; got {given[name]!r}; leave it out")
        known = found["arguments"]
        if known is not None and name not in known:
            raise UserError(
                f"engine.args.{name}: an argument of SGLang {found['sglang']}'s server, with underscores; got an unknown one; "
                f"{nearest(name, known)}sglang.launch_server --help lists them"
            )


def first_error(log: Path) -> str:
    """The first line of a log that says what went wrong; else its last one."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()] if log.is_file() else []
    return next((line for line in lines if ERROR.match(line)), lines[-1] if lines else "an empty log")[:300]


class Owned:
    """One server of ours. ``server`` keeps its address over restarts; ``process``: its keeper; ``is_missed``: known to be dead."""

    def __init__(self, index: int, command: list[str], environment: dict[str, str], log: Path, place: str, api_key: str):
        self.index, self.command, self.environment, self.log = index, command, environment, log
        self.server = Server(f"http://{place}", api_key)
        self.process: subprocess.Popen | None = None
        self.began = 0.0
        self.mark = 0
        self.is_missed = False

    def start(self) -> None:
        """Start the process; the log grows."""
        self.mark = self.log.stat().st_size if self.log.is_file() else 0
        self.began = time.monotonic()
        self.is_missed = False
        self.process = subprocess.Popen(
            [sys.executable, keeper.__file__, str(os.getpid()), str(self.log), *self.command],
            stdin=subprocess.PIPE,
            env=self.environment,
            start_new_session=True,
        )

    def is_running(self) -> bool:
        """Whether its process is there."""
        return self.process is not None and self.process.poll() is None

    def is_ready(self) -> bool:
        """Whether it answers; its facts are read then."""
        try:
            self.server.read_info(5.0)
        except EngineError:
            return False
        return True

    def complaint(self) -> str:
        """What its log says since its last start."""
        with tempfile.NamedTemporaryFile("wb") as part, open(self.log, "rb") as log:
            log.seek(self.mark)
            part.write(log.read())
            part.flush()
            return first_error(Path(part.name))

    def end(self, timeout_seconds: float = 20) -> None:
        """End it with all its processes."""
        if self.process is None:
            return
        self.process.stdin.close()
        try:
            self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Fleet:
    """The servers of one engine. ``on_death`` and ``on_ready`` are called with an index, from a thread, when one dies and when it
    answers again; ``failure``: why one will not be started again. ``host``: this machine's address where others ask them too;
    ``first``: number of the first; ``is_held``: what dies is not started again for now, since its memory is lent to the trainer."""

    def __init__(self, choice: SglangEngine, runtime: EngineRuntime, host: str = LOOPBACK, first: int = 0):
        self.choice, self.host, self.first = choice, host, first
        self.on_death: Callable[[int], None] = lambda index: None
        self.on_ready: Callable[[int], None] = lambda index: None
        self.failure: UserError | None = None
        self.restarts = 0
        self.is_held = False
        self.folder = Path(runtime.folder or tempfile.mkdtemp(prefix="r1mega-sglang-")).resolve() / "engine"
        self.owned = list(self._prepare(runtime))
        self._closing = threading.Event()
        try:
            for one in self.owned:
                one.start()
            self._await_ready(self.owned)
        except BaseException:
            self.close()
            raise
        self._watch = threading.Thread(target=self._keep, name="sglang-watch", daemon=True)
        self._watch.start()

    def _prepare(self, runtime: EngineRuntime) -> Iterator[Owned]:
        choice = self.choice
        python = interpreter(choice.python)
        found = sglang_server.installed(python)
        if not found["sglang"]:
            raise UserError(f"engine.python: an interpreter that has sglang; got {python} without; make sglang makes one for a CPU")
        check_arguments(choice.args, found)
        sglang_server.check_widths(
            runtime.device, runtime.hf_config, int(choice.args.get("tp_size", 1)), "a server of engine=sglang"
        )
        model = self.folder / "model"
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(runtime.hf_config, indent=1), encoding="utf-8")
        values = sglang_server.arguments(runtime.device, found) | {"dtype": runtime.dtype, "random_seed": choice.seed}
        values |= {name: True for name in choice.wanted_arguments()} | dict(choice.args)
        environment = sglang_server.environment(runtime.device, found) | {name: str(v) for name, v in choice.environment.items()}
        if choice.api_key_variable:
            values["api_key"] = choice.api_key()
        if self.host != LOOPBACK and "host" not in choice.args:
            values["host"] = self.host
        for index in range(choice.servers):
            port = _free_port(self.host)
            own = {"model_path": str(model), "load_format": "dummy", "port": port}
            if sglang_server.is_accelerated(runtime.device) and "base_gpu_id" not in choice.args:
                each = int(choice.args.get("tp_size", 1)) * int(choice.args.get("pp_size", 1))
                own["base_gpu_id"] = choice.first_gpu + index * each
            flags = sglang_server.flags(values | own)
            command = [python, "-m", "sglang.launch_server", *flags]
            number, place = self.first + index, f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"
            yield Owned(number, command, environment, self.folder / f"server{number}.log", place, choice.api_key())

    def _await_ready(self, waiting: list[Owned]) -> None:
        """Until all of them answer. Raises UserError when one dies or is too slow."""
        waiting, told = list(waiting), time.monotonic()
        while waiting and not self._closing.is_set():
            for one in list(waiting):
                seconds = time.monotonic() - one.began
                if not one.is_running():
                    raise UserError(
                        f"engine=sglang: server {one.index} starts; got status {one.process.returncode} after {seconds:.0f} s: "
                        f"{one.complaint()}; see {one.log}"
                    )
                if one.is_ready():
                    waiting.remove(one)
                elif seconds > self.choice.start_seconds:
                    raise UserError(
                        f"engine.start_seconds: server {one.index} answers within {self.choice.start_seconds:g} s; got nothing, "
                        f"its log says: {one.complaint()}; raise it, or see {one.log}"
                    )
            if waiting and time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                names = ", ".join(str(one.index) for one in waiting)
                print(f"engine=sglang: waiting for server {names}, {told - waiting[0].began:.0f} s", file=sys.stderr, flush=True)
            self._closing.wait(POLL_SECONDS if waiting else 0)

    def _keep(self) -> None:
        """Start again what dies, as often as the choice allows; several at once where several have died."""
        starting: list[Owned] = []
        while not self._closing.wait(POLL_SECONDS / 2):
            for one in self.owned:
                if one.is_running() or self._closing.is_set() or self.failure:
                    continue
                if not one.is_missed:
                    one.is_missed = True
                    self.on_death(one.index)
                if self.is_held:
                    continue
                said = one.complaint()
                if self.restarts >= self.choice.restarts:
                    self.failure = UserError(
                        f"engine.restarts: at most {self.choice.restarts} in a run; got one more death of server {one.index}: "
                        f"{said}; see {one.log}"
                    )
                    continue
                self.restarts += 1
                print(f"engine=sglang: server {one.index} has died ({said}); starting it again", file=sys.stderr, flush=True)
                one.start()
                starting = [*(other for other in starting if other is not one), one]
            for one in list(starting):
                if self._closing.is_set() or not one.is_running():
                    continue
                if one.is_ready():
                    starting.remove(one)
                    self.on_ready(one.index)
                elif time.monotonic() - one.began > self.choice.start_seconds and not self.failure:
                    self.failure = UserError(
                        f"engine.start_seconds: server {one.index} answers within {self.choice.start_seconds:g} s; got nothing, "
                        f"its log says: {one.complaint()}; raise it, or see {one.log}"
                    )

    def close(self) -> None:
        """End all of them; nothing of theirs is left when this returns."""
        self._closing.set()
        if getattr(self, "_watch", None) is not None and self._watch is not threading.current_thread():
            self._watch.join(30)
        for one in self.owned:
            if one.process is not None and not one.process.stdin.closed:
                one.process.stdin.close()  # all at once, then wait for each
        for one in self.owned:
            one.end()


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as place:
        place.bind((host, 0))
        return place.getsockname()[1]
