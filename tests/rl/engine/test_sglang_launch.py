"""Servers that we start, with a made-up interpreter in sglang's place: readiness, deaths, restarts, what a log says, and no orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1mega.compat import sglang_cpu, sglang_server
from r1mega.config.errors import UserError
from r1mega.rl.engine import EngineRuntime, SglangEngine
from r1mega.rl.engine.sglang import launch

KNOWN = ["model_path", "port", "tp_size", "mem_fraction_static", "skip_tokenizer_init"]

SERVER = """
import http.server, json, os, subprocess, sys, time
arguments = sys.argv[sys.argv.index("sglang.launch_server") + 1:]
if "--die" in arguments:
    print("loading"); print("ValueError: no such attention backend", flush=True); print("more"); sys.exit(3)
print("environment", json.dumps({name: os.environ.get(name) for name in ("SGLANG_USE_CPU_ENGINE", "RANK", "MINE")}), flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
from multiprocessing import resource_tracker, shared_memory
held = shared_memory.SharedMemory(f"sglang_test_{os.getpid()}", create=True, size=4096)
resource_tracker.unregister(held._name, "shared_memory")  # nobody tidies up after a kill
print("pids", os.getpid(), child.pid, flush=True)
if "--slow" in arguments:
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data = json.dumps({"version": "0.5.16", "pid": os.getpid()}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *rest):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def python(tmp_path: Path) -> Iterator[str]:
    """An interpreter that says it has sglang, and whose server is :data:`SERVER`."""
    (tmp_path / "server.py").write_text(SERVER)
    said = json.dumps({"sglang": "0.5.16", "flashinfer": None, "arguments": [*KNOWN, "die", "slow"]})
    file = tmp_path / "python"
    file.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then echo \'{said}\'; else exec {sys.executable} {tmp_path}/server.py "$@"; fi\n'
    )
    file.chmod(0o755)
    yield str(file)
    for pid in (pid for index in range(2) if (tmp_path / f"engine/server{index}.log").exists() for pid in pids(tmp_path, index)):
        Path(f"/dev/shm/sglang_test_{pid}").unlink(missing_ok=True)  # of a server that was killed before the keeper looked


def fleet(python: str, folder: Path, **knobs) -> launch.Fleet:
    runtime = EngineRuntime({"model_type": "deepseek_v3"}, folder=str(folder))
    return launch.Fleet(SglangEngine(python=python, **knobs), runtime)


def pids(folder: Path, index: int = 0) -> list[int]:
    lines = (folder / f"engine/server{index}.log").read_text().splitlines()
    return [int(text) for line in lines if line.startswith("pids") for text in line.split()[1:]]


def is_there(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until(what, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "in time"
        time.sleep(0.02)


def test_two_servers_start_and_end(python: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "3")
    servers = fleet(python, tmp_path, servers=2, environment={"MINE": "1"}, args={"tp_size": 2})
    started = [*pids(tmp_path, 0), *pids(tmp_path, 1)]
    assert len(started) == 4 and all(map(is_there, started)) and servers.owned[0].server.url != servers.owned[1].server.url
    assert json.loads((tmp_path / "engine/model/config.json").read_text())["model_type"] == "deepseek_v3"
    command = servers.owned[0].command
    assert command[command.index("--tp-size") + 1] == "2" and command[command.index("--load-format") + 1] == "dummy"
    log = (tmp_path / "engine/server0.log").read_text()
    assert json.loads(log.splitlines()[0].partition(" ")[2]) == {"SGLANG_USE_CPU_ENGINE": "1", "RANK": None, "MINE": "1"}
    shared = [Path(f"/dev/shm/sglang_test_{pid}") for pid in (started[0], started[2])]
    assert all(file.exists() for file in shared)
    servers.close()
    assert not any(map(is_there, started)), "the children in sessions of their own too"
    assert not any(file.exists() for file in shared)


def test_a_server_that_dies_at_its_start_is_told_with_its_first_error(python: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="server 0 starts; got status 3 after .*: ValueError: no such attention backend; see .*server0.log"
    ):
        fleet(python, tmp_path, args={"die": True})


def test_a_server_that_never_answers_is_ended_at_the_deadline(python: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="engine.start_seconds: server 0 answers within 1.5 s"):
        fleet(python, tmp_path, args={"slow": True}, start_seconds=1.5)
    assert not any(map(is_there, pids(tmp_path)))


def test_a_dead_server_is_started_again_at_its_address_until_it_is_too_often(python: str, tmp_path: Path) -> None:
    servers = fleet(python, tmp_path, restarts=1)
    told: list[tuple[str, int]] = []
    servers.on_death = lambda index: told.append(("death", index))
    servers.on_ready = lambda index: told.append(("ready", index))
    first, url = servers.owned[0].server.info["pid"], servers.owned[0].server.url
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: ("ready", 0) in told)
    assert told == [("death", 0), ("ready", 0)] and servers.owned[0].server.url == url
    second = servers.owned[0].server.info["pid"]
    assert second != first and len(pids(tmp_path)) == 4 and not any(map(is_there, pids(tmp_path)[:2]))
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: servers.failure is not None)
    assert "engine.restarts: at most 1 in a run" in str(servers.failure)
    servers.close()
    assert not any(map(is_there, pids(tmp_path)))


def test_a_server_that_dies_while_its_memory_is_lent_comes_back_when_it_is_given_back(python: str, tmp_path: Path) -> None:
    servers = fleet(python, tmp_path)
    told: list[str] = []
    servers.on_death = lambda index: told.append("death")
    servers.on_ready = lambda index: told.append("ready")
    servers.is_held = True
    os.kill(servers.owned[0].server.info["pid"], signal.SIGKILL)
    wait_until(lambda: told == ["death"])
    time.sleep(4 * launch.POLL_SECONDS)
    assert told == ["death"] and not servers.owned[0].is_running() and servers.restarts == 0
    servers.is_held = False
    wait_until(lambda: told == ["death", "ready"])
    servers.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_trainer(python: str, tmp_path: Path, number: signal.Signals) -> None:
    code = f"""
        import time
        from r1mega.rl.engine import EngineRuntime, SglangEngine
        from r1mega.rl.engine.sglang.launch import Fleet
        made = Fleet(SglangEngine(python={python!r}, servers=2), EngineRuntime({{}}, folder={str(tmp_path)!r}))
        print("up", flush=True)
        time.sleep(600)
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "up\n"
    started = [*pids(tmp_path, 0), *pids(tmp_path, 1)]
    assert len(started) == 4 and all(map(is_there, started))
    trainer.send_signal(number)
    trainer.wait()
    wait_until(lambda: not any(map(is_there, started)))


def test_unknown_arguments_and_ours_are_refused_before_a_start(python: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="engine.args.mem_fraction_statik: .*did you mean mem_fraction_static"):
        fleet(python, tmp_path, args={"mem_fraction_statik": 0.5})
    with pytest.raises(UserError, match="engine.args.port: the engine's own"):
        fleet(python, tmp_path, args={"port": 5})
    assert not (tmp_path / "engine/server0.log").exists()


def test_widths_that_a_cpu_server_pads_are_refused_before_a_start(python: str, tmp_path: Path) -> None:
    for name, width in (("ffn_size", 48), ("moe_ffn_size", 80)):
        keys = {"ffn_size": "intermediate_size", "moe_ffn_size": "moe_intermediate_size"}
        runtime = EngineRuntime({keys["ffn_size"]: 64, keys["moe_ffn_size"]: 64} | {keys[name]: width}, folder=str(tmp_path))
        with pytest.raises(UserError, match=rf"model.{name}: a multiple of 32 .* got {width}; use {width + 16}, or engine=local"):
            launch.Fleet(SglangEngine(python=python), runtime)
    sglang_server.check_widths("cuda:0", {"moe_intermediate_size": 80}, 2, "a GPU pads nothing")
    with pytest.raises(UserError, match="a multiple of 64 .* got 96; use 128"):
        sglang_server.check_widths("cpu", {"moe_intermediate_size": 96}, 2, "two ranks")


def test_where_the_interpreter_is(tmp_path: Path, monkeypatch) -> None:
    assert launch.interpreter("/x/python") == "/x/python"
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(launch, "BESIDE", "no/such/python")
    with pytest.raises(UserError, match="make sglang"):
        launch.interpreter(None)
    with pytest.raises(UserError, match="engine.python: an interpreter that has sglang; got /no/python"):
        sglang_server.installed("/no/python")
    with pytest.raises(UserError, match="without; make sglang"):
        fleet(sys.executable, tmp_path)


@pytest.mark.parametrize("place", ["server_args.py", "arg_groups/fields/memory.py"])
def test_argument_names_are_read_where_versions_keep_them(tmp_path: Path, monkeypatch, place: str) -> None:
    """Up to 0.5.19 in one class, from 0.5.20 on in a file a group."""
    files = {"__init__.py": "", "srt/server_args.py": "class ServerArgs:\n    def port(self): ...\n"}
    name = "Memory" if "fields" in place else "ServerArgs"
    files[f"srt/{place}"] = f"class {name}:\n    _NS_PATH = 1\n    mem_fraction_static: float = 0.5\n"
    for file, text in files.items():
        path = tmp_path / "sglang" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert sglang_server.installed(sys.executable)["arguments"] == ["mem_fraction_static"]
    (tmp_path / "sglang/srt" / place).write_text("class Other: ...\n")
    assert sglang_server.installed(sys.executable)["arguments"] is None, "nothing is refused for what cannot be read"


def test_flags_and_tables_by_device() -> None:
    assert sglang_server.flags({"a_b": True, "c": False, "d": None, "e": 0.5, "f": [1, 2], "g": {"h": 1}}) == [
        "--a-b", "--e", "0.5", "--f", "1", "2", "--g", '{"h": 1}',
    ]  # fmt: skip
    bare, full = {"flashinfer": None}, {"flashinfer": "0.6"}
    assert sglang_server.arguments("cpu", bare)["attention_backend"] == "torch_native"
    assert sglang_server.arguments("cuda:0", bare)["attention_backend"] == "triton"
    assert "attention_backend" not in sglang_server.arguments("cuda:0", full)
    assert sglang_server.environment("cuda:0", bare)["SGLANG_IS_FLASHINFER_AVAILABLE"] == "false"
    path = sglang_server.environment("cpu", bare)["PYTHONPATH"].split(os.pathsep)
    assert path[0] == str(sglang_cpu.STAND_INS) and (sglang_cpu.STAND_INS / "sitecustomize.py").is_file()


def test_what_a_log_says(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert launch.first_error(log) == "an empty log"
    log.write_text("start\nTraceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: no more\nRuntimeError: later\n")
    assert launch.first_error(log) == "torch.OutOfMemoryError: no more"
    log.write_text("usage: ...\nlaunch_server.py: error: argument --x: invalid choice\n")
    assert "invalid choice" in launch.first_error(log)
    log.write_text("one\ntwo\n")
    assert launch.first_error(log) == "two"
