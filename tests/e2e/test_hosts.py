"""Several hosts: two network namespaces, joined by one cable, train as one machine does; a killed rank and a cut cable.

Each namespace has its own interfaces, routes and host name, as a host has; the folder of the run is shared, as on a cluster. Where
the kernel lets nobody make namespaces the tests are skipped; anything else that is missing fails them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from r1mega.train import checkpoint
from tests.train.cases import LENGTH, stored, write_data

ROOT = Path(__file__).resolve().parents[2]
STEPS, PORT = 6, 29517
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("nodea", "nodeb")
MODEL = "model.hidden_size=32 model.num_layers=2 model.num_heads=2 model.num_experts=8 model.moe_ffn_size=16 model.ffn_size=48"
TRAINER = (
    "trainer.global_batch_size=8 trainer.micro_batch_size=4 trainer.log_every=1 trainer.save_every=2 trainer.peak_tflops=0.01 "
    "optim.lr=1e-3 optim.min_lr=1e-4 optim.warmup_steps=2 device.threads=1"
)


def command(data: Path, out: Path, *overrides: str, steps: int = STEPS) -> list[str]:
    given = [f"tokenizer={data}/tok", f"data.train={{{data}/text: 1}}", f"data.sequence_length={LENGTH}", f"trainer.steps={steps}"]
    return [
        sys.executable,
        "-m",
        "r1mega",
        "pretrain",
        "model=tiny",
        f"out={out}",
        *MODEL.split(),
        *TRAINER.split(),
        *given,
        *overrides,
    ]


def begin(arguments: list[str]) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


@contextlib.contextmanager
def ending(*runs: subprocess.Popen) -> Iterator[None]:
    """Whatever happens, nothing of ``runs`` is left."""
    try:
        yield
    finally:
        for run in runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()


def wait_for(condition, *runs: subprocess.Popen, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        for run in runs:
            assert run.poll() is None, run.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rank_of(run: subprocess.Popen, rank: int) -> psutil.Process:
    """The process of ``rank`` below a launcher."""
    for child in psutil.Process(run.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.environ().get("RANK") == str(rank) and "r1mega" in child.cmdline():
                return child
    raise AssertionError(f"no rank {rank} below {run.pid}")


def saved(out: Path, step: int) -> bool:
    return any(int(path.name.rpartition("-")[2]) >= step for path in (out / "checkpoints").glob("step-*"))


def same(left: Path, right: Path) -> None:
    """All tensors of the last checkpoints, moments too, to the last bit."""
    ours, theirs = (stored(checkpoint.resolve(run)) for run in (left, right))
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours)
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    states = [checkpoint.read_state(checkpoint.resolve(run)) for run in (left, right)]
    assert states[0]["step"] == states[1]["step"] == STEPS and states[0]["cursor"] == states[1]["cursor"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and the run of two ranks of one machine (``straight``)."""
    folder = write_data(tmp_path_factory.mktemp("hosts"))
    run = begin(command(folder, folder / "straight", "launch.processes=2"))
    with ending(run):
        told = run.communicate(timeout=120)[1]
    assert run.returncode == 0, told[-3000:]
    return folder


class Hosts:
    """Two namespaces with a cable between them. ``line(host)``: what stands before a command that runs there."""

    def __init__(self, stack: contextlib.ExitStack):
        is_root = os.geteuid() == 0
        own = [] if is_root else ["--user", "--map-root-user"]
        refused = subprocess.run(["unshare", *own, "--net", "--uts", "true"], capture_output=True, text=True)
        if refused.returncode:
            pytest.skip(f"the kernel lets this user make no namespaces: {refused.stderr.strip()}")
        assert shutil.which("ip"), "ip: lays the cable between the namespaces; got no such program; install iproute2"
        self.user = [] if is_root else ["--user", "--preserve-credentials"]
        self.pids: list[int] = []
        for index in range(2):
            inside = [] if is_root or index == 0 else ["nsenter", "--target", str(self.pids[0]), *self.user, "--"]
            keeper = subprocess.Popen([*inside, "unshare", *(own if index == 0 else []), "--net", "--uts", "sleep", "600"])
            stack.callback(keeper.wait)
            stack.callback(keeper.kill)
            self.pids.append(keeper.pid)
            wait_for(
                lambda pid=keeper.pid: os.path.exists(f"/proc/{pid}/exe") and os.readlink(f"/proc/{pid}/exe").endswith("sleep"),
                seconds=20,
            )
        self.run(0, "ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(self.pids[1]))
        for index in range(2):
            self.run(index, "sh", "-c", f"echo {NAMES[index]} > /proc/sys/kernel/hostname")
            self.run(index, "ip", "address", "add", f"{ADDRESSES[index]}/24", "dev", "cable")
            for name in ("cable", "lo"):
                self.run(index, "ip", "link", "set", name, "up")

    def line(self, host: int) -> list[str]:
        return ["nsenter", "--target", str(self.pids[host]), *self.user, "--net", "--uts", "--"]

    def run(self, host: int, *arguments: str) -> str:
        done = subprocess.run([*self.line(host), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def sent_bytes(self) -> int:
        return int(re.search(r"TX:.*\n\s*(\d+)", self.run(0, "ip", "-statistics", "link", "show", "cable"))[1])


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with contextlib.ExitStack() as stack:
        yield Hosts(stack)


def pair(hosts: Hosts, place: Path, out: Path, *overrides: str, steps: int = STEPS) -> list[subprocess.Popen]:
    """The same command on both hosts."""
    given = ["launch=torchrun", "launch.hosts=2", f"launch.rendezvous={ADDRESSES[0]}:{PORT}", *overrides]
    return [
        begin([*hosts.line(host), *command(place, out, *(text.format(host=host) for text in given), steps=steps)])
        for host in range(2)
    ]


@pytest.mark.slow
def test_two_hosts_train_as_one_machine(hosts: Hosts, place: Path, tmp_path: Path) -> None:
    """launch=torchrun on each of two hosts: the weights of two ranks on one machine, bit for bit, over the cable."""
    runs = pair(hosts, place, tmp_path / "two")
    with ending(*runs):
        for run in runs:
            told = run.communicate(timeout=120)[1]
            assert run.returncode == 0, told[-3000:]
    same(place / "straight", tmp_path / "two")
    assert hosts.sent_bytes() > 100_000  # the gradients of six steps, not only the meeting


@pytest.mark.slow
def test_a_killed_rank_and_a_restart(place: Path, tmp_path: Path) -> None:
    """kill -9 of one of two ranks: all start again from the last checkpoint and end with the undisturbed run's weights."""
    run = begin(command(place, tmp_path / "killed", "launch.processes=2", "launch.restarts=1"))
    with ending(run):
        wait_for(lambda: saved(tmp_path / "killed", 2), run)
        rank_of(run, 1).kill()
        told = run.communicate(timeout=120)[1]
    assert run.returncode == 0, told[-3000:]
    assert "launch: rank 1 of 2 has ended with status 137; all ranks start again from the last checkpoint, restart 1 of 1" in told
    same(place / "straight", tmp_path / "killed")


@pytest.mark.slow
def test_a_killed_rank_of_another_host_and_a_restart(hosts: Hosts, place: Path, tmp_path: Path) -> None:
    runs = pair(hosts, place, tmp_path / "killed", "launch.restarts=2")
    with ending(*runs):
        wait_for(lambda: saved(tmp_path / "killed", 2), *runs)
        victims = [child for child in psutil.Process(runs[1].pid).children(recursive=True) if "RANK" in child.environ()]
        victims[-1].kill()
        for run in runs:
            told = run.communicate(timeout=180)[1]
            assert run.returncode == 0, told[-3000:]
    same(place / "straight", tmp_path / "killed")


@pytest.mark.slow
def test_a_cut_cable(hosts: Hosts, place: Path, tmp_path: Path) -> None:
    """Nobody is told that a host has vanished: each names the other's rank, host and collective within the timeout."""
    runs = pair(hosts, place, tmp_path / "cut", "launch.host_rank={host}", "launch.stall_timeout_seconds=6", steps=5000)
    with ending(*runs):
        wait_for(lambda: saved(tmp_path / "cut", 2), *runs)
        hosts.run(0, "ip", "link", "set", "cable", "down")
        began = time.monotonic()
        told = [run.communicate(timeout=60)[1] for run in runs]
        assert time.monotonic() - began < 6 + 10  # and the time that the launchers take to end
    assert [run.returncode for run in runs] == [1, 1], told
    for other, text in zip((1, 0), told, strict=True):
        assert re.search(rf"got rank {other} on host {NAMES[other]} did not (reach|finish) \w+ #\d+ of ranks [01, ]+", text), text[
            -3000:
        ]


@pytest.mark.slow
def test_sigterm_on_one_host_saves_on_all(hosts: Hosts, place: Path, tmp_path: Path) -> None:
    """The launcher hands it on, all ranks save the same step, each host's command ends with 75, and the same commands go on."""
    runs = pair(hosts, place, tmp_path / "stop", "launch.restarts=1", steps=5000)
    with ending(*runs):
        wait_for(lambda: saved(tmp_path / "stop", 2), *runs)
        runs[1].send_signal(signal.SIGTERM)
        told = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [75, 75], told
    assert any("is saved; the same command goes on from there" in text for text in told)
