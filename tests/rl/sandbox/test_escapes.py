"""Escape attempts: the rows of :mod:`tests.rl.sandbox.attempts` in a few sandboxes; none gets out, as root or as another user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1mega.rl.sandbox import PYTHON
from tests.rl.sandbox.attempts import ATTEMPTS
from tests.rl.sandbox.trial import attempt

ROOT = Path(__file__).resolve().parents[3]
BYSTANDER = """
import os, sys, time
while os.getpid() < 1000:  # a number that no process of a sandbox has
    if os.fork():
        os.wait()
        os._exit(0)
os.setsid()
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def facts(tmp_path: Path) -> Iterator[dict]:
    """What is outside, for the attempts to reach: a secret that anybody may read, sockets, a process; unharmed at the end."""
    mark = uuid.uuid4().hex
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    secret = tmp_path / "secret"
    secret.write_text(mark)
    secret.chmod(0o644)
    path, abstract = str(tmp_path / "socket"), f"r1mega-{mark}"
    servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    for server, address in ((servers[1], path), (servers[2], f"\0{abstract}")):
        server.bind(address)
        server.listen()
    os.chmod(path, 0o777)
    bystander = subprocess.Popen(
        [sys.executable, "-S", "-c", BYSTANDER], stdout=subprocess.PIPE, env={"MARK": mark}, stdin=subprocess.DEVNULL
    )
    pid = int(bystander.stdout.readline())
    found = {"secret": str(secret), "socket": path, "abstract": abstract, "port": servers[0].getsockname()[1], "pid": pid}
    yield found | {"parent": pid, "work": str(ROOT), "mark": mark}
    try:
        os.kill(pid, 0)
        assert secret.read_text() == mark and secret.stat().st_nlink == 1
        for server in servers:
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()  # nobody came
            server.close()
    finally:
        os.kill(pid, signal.SIGKILL)
        bystander.communicate()


def judge(found: dict[str, list[str]]) -> None:
    """Every row was tried and held, and none only because its code is wrong."""
    assert len(ATTEMPTS) >= 200 and set(found) == {*ATTEMPTS, "end"}
    assert not {name: how for name, (outcome, how) in found.items() if outcome != "held"}
    broken = ("NameError", "SyntaxError", "TypeError", "AttributeError", "IndexError", "KeyError", "struct.error", "ArgumentError")
    assert not {name: how for name, (_, how) in found.items() if how.startswith(broken)}


def test_no_attempt_gets_out(facts: dict, monkeypatch) -> None:
    monkeypatch.setenv("R1MEGA_SECRET", facts["mark"])
    before = Path("/proc/self/mountinfo").read_text()
    judge(attempt(facts, 2))
    assert Path("/proc/self/mountinfo").read_text() == before


def test_no_attempt_gets_out_of_a_sandbox_that_no_root_made(facts: dict, tmp_path: Path) -> None:
    """As a user of another number, with an interpreter that such a user may read."""
    if os.getuid() != 0:
        pytest.skip("the other test does it: this is not root")
    python = next((path for path in (PYTHON, "/usr/bin/python3", "/usr/local/bin/python3") if runs(path)), None)
    if python is None:
        assert "R1MEGA_CI" not in os.environ, "CI has an interpreter for all users"
        pytest.skip("no interpreter that another user may run")
    site = tmp_path / "site"
    shutil.copytree(ROOT / "r1mega", site / "r1mega", ignore=lambda folder, names: [name for name in names if ".so" in name])
    shutil.copytree(ROOT / "tests" / "rl" / "sandbox", site / "tests" / "rl" / "sandbox")
    done = subprocess.run([python, "-m", "tests.rl.sandbox.trial", json.dumps(facts)], cwd=site, **ANOTHER)
    assert done.returncode == 0, done.stderr
    judge(json.loads(done.stdout))


ANOTHER = {"capture_output": True, "text": True, "user": 54321, "group": 54321, "extra_groups": [], "env": {"PATH": "/usr/bin"}}


def runs(path: str) -> bool:
    """Whether the other user runs this interpreter, new enough."""
    try:
        code = "import sys; sys.exit(sys.version_info < (3, 11))"
        return subprocess.run([path, "-c", code], cwd="/", **ANOTHER).returncode == 0
    except OSError:
        return False
