"""``r1mega rl runtime=ray``: the same numbers as runtime=local to the last bit, also after kill -9; a real server; two hosts.

The tests of two hosts make a Ray node of each of two network namespaces, with a cable between them (:mod:`tests.e2e.test_hosts`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from r1mega.config.compose import preset
from r1mega.mesh import close_mesh
from r1mega.rl.ledger import History
from r1mega.train.checkpoint import latest
from r1mega.train.pretrain import pretrain
from tests.e2e.test_hosts import ADDRESSES, Hosts, ending, wait_for
from tests.launch import ray_cases
from tests.launch.ray_cases import ROOT, needs_ray
from tests.launch.test_ray import ROSTER, python  # noqa: F401 - a fixture
from tests.train.cases import lines, pretrain_config, stored, write_data

pytestmark = needs_ray
SIZES = (
    "rl.rollouts=2 rl.prompts_per_rollout=2 rl.group_size=4 rl.updates_per_rollout=2 rl.micro_batch_size=3 rl.save_every=1 "
    "rl.sampling.max_new_tokens=6 device.threads=1 optim.lr=2e-3 optim.min_lr=2e-4 optim.warmup_steps=1 optim.decay=constant "
    "launch.processes=2 reward.weights={tests.launch.ray_cases.by_length:1}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Problems and a checkpoint to start from."""
    close_mesh()
    folder = write_data(tmp_path_factory.mktemp("ray"))
    problems = [{"question": f"{left}+1", "answer": str(left + 1)} for left in range(6)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    pretrain(pretrain_config(folder, folder / "seed", 1))
    return folder


def begin(place: Path, out: Path, *overrides: str, init: str = "seed", line: list[str] | tuple[str, ...] = ()) -> subprocess.Popen:
    given = [f"out={out}", f"init={place}/{init}", f"data.problems={place}/problems.jsonl", *SIZES.split(), *overrides]
    env = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*line, sys.executable, "-m", "r1mega", "rl", *given]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(run: subprocess.Popen, seconds: float = 300) -> str:
    with ending(run):
        told = run.communicate(timeout=seconds)[1]
    assert run.returncode == 0, told[-3000:]
    return told


@pytest.fixture(scope="module")
def straight(place: Path) -> Path:
    """The run on this machine's processes."""
    finish(begin(place, place / "straight"))
    return place / "straight"


def same(left: Path, right: Path) -> None:
    """All tensors of the last checkpoints, moments too, to the last bit; and what the metric lines say of them."""
    ours, theirs = (stored(latest(run / "checkpoints")) for run in (left, right))
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours)
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    told = [[(line["rollout"], line["loss"], line["reward"], line["grad_norm"]) for line in lines(run)] for run in (left, right)]
    assert told[0] == told[1] and len(told[0]) == 2 and all(line[3] > 0 for line in told[0])


@pytest.mark.slow
def test_ray_gives_the_same_bits(place: Path, straight: Path, tmp_path: Path) -> None:
    finish(begin(place, tmp_path / "run", "runtime=ray", "runtime.address=local"))
    same(straight, tmp_path / "run")
    logs = tmp_path / "run/logs"
    assert sorted(file.name for file in logs.iterdir()) == ["rank-0.log", "rank-1.log"]


def process_of(marks: dict[str, str], out: Path, word: str) -> psutil.Process:
    """The process of the run in ``out`` whose command has ``word`` and whose environment has ``marks``."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            text = " ".join(process.cmdline())
            if word in text and (not marks or marks.items() <= process.environ().items()) and str(out) in text:
                return process
    raise AssertionError(f"no process with {word} and {marks}")


@pytest.mark.slow
def test_a_killed_rank_changes_no_bit(place: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = begin(place, out, "runtime=ray", "runtime.address=local", "launch.restarts=1", "rl.async_save=false")
    with ending(run):
        wait_for(lambda: latest(out / "checkpoints") is not None, run, seconds=200)
        process_of({"RANK": "1"}, out, "r1mega rl").kill()
        told = run.communicate(timeout=300)[1]
    assert run.returncode == 0, told[-3000:]
    assert "rank 1 on" in told and "restart 1 of 1" in told
    same(straight, out)
    assert History(out / "ledger").audit() == []


@pytest.mark.slow
def test_a_real_server_and_a_rank_are_killed_and_the_run_goes_on(place: Path, tmp_path: Path) -> None:
    """SGLang's server as an actor: its processes are killed, later a rank; every sample is used once."""
    out = tmp_path / "run"
    if not (place / "tiny").exists():
        pretrain(pretrain_config(place, place / "tiny", 1, model=preset("model", "tiny")))
    more = ["runtime=ray", "runtime.address=local", "engine=sglang", "launch.restarts=1", "rl.rollouts=6", "engine.restarts=2"]
    run = begin(place, out, *more, init="tiny")
    with ending(run):
        wait_for(lambda: done(out) >= 1, run, seconds=400)
        server = re.findall(r"server 0 on \S+ \(([\d.]+)\)", (out / "logs/server-0.log").read_text())
        keeper = next(process for process in below(run.pid) if any("keeper.py" in word for word in process.cmdline()))
        for process in keeper.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        wait_for(lambda: done(out) >= 3, run, seconds=400)
        process_of({"RANK": "1"}, out, "r1mega rl").kill()
        told = run.communicate(timeout=500)[1]
    assert run.returncode == 0, told[-3000:]
    assert server and "server 0 has died" in told and "restart 1 of 1" in told
    history = History(out / "ledger")
    assert history.audit() == [] and sorted(history.uses()) == [1, 2, 3, 4, 5, 6]
    assert all(line["rollout_diff_max"] < 1e-3 for line in lines(out) if "rollout_diff_max" in line)


def done(out: Path) -> int:
    file = out / "metrics.jsonl"
    return max((json.loads(line)["rollout"] for line in file.read_text().splitlines()), default=0) if file.exists() else 0


def below(pid: int) -> list[psutil.Process]:
    """Processes below the driver: a cluster of this machine alone is its child."""
    return [process for process in psutil.Process(pid).children(recursive=True) if process.is_running()]


@pytest.fixture
def hosts() -> Iterator[tuple[Hosts, str, Path]]:
    """Two namespaces, the head of a cluster in the first one, where the driver is; the cluster's address and folder."""
    with contextlib.ExitStack() as stack:
        made = Hosts(stack)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp"))) / "r"
        stack.callback(ray_cases.end_cluster, folder)
        folder.mkdir()
        at = (f"--node-ip-address={ADDRESSES[0]}", "--head", "--port=6390", "--include-dashboard=false", f"--temp-dir={folder}")
        ray_cases.start_node(*at, line=tuple(made.line(0)), cpus=4)
        yield made, f"{ADDRESSES[0]}:6390", folder


def join(made: Hosts, host: int, address: str, cpus: int) -> None:
    """One more node of the cluster."""
    at = (f"--node-ip-address={ADDRESSES[host]}", f"--address={address}")
    ray_cases.start_node(*at, line=tuple(made.line(host)), cpus=cpus)


@pytest.mark.slow
def test_two_hosts_give_the_same_bits(hosts, place: Path, straight: Path, tmp_path: Path) -> None:
    made, address, _ = hosts
    join(made, 1, address, cpus=4)
    before = made.sent_bytes()
    spread = ["runtime=ray", f"runtime.address={address}", "launch.processes=1", "launch.hosts=2"]
    finish(begin(place, tmp_path / "run", *spread, line=made.line(0)))
    same(straight, tmp_path / "run")
    heads = [(tmp_path / f"run/logs/rank-{rank}.log").read_text().splitlines()[0] for rank in range(2)]
    assert {re.search(r"\(([\d.]+)\)", head)[1] for head in heads} == set(ADDRESSES)
    assert made.sent_bytes() - before > 100_000, "the ranks have spoken over the cable"


@pytest.mark.slow
def test_a_server_of_a_lost_host_comes_back_on_another(hosts, tmp_path: Path, python: str) -> None:  # noqa: F811
    """The ranks fit the first host alone, the server the second. Its processes are killed as one, as a host goes; a node with room
    joins on the first: the ranks learn the address there."""
    made, address, folder = hosts
    join(made, 1, address, cpus=3)
    knobs = ["engine=sglang", f"engine.python={python}", "engine.start_seconds=120", "runtime.environment={COUNT: '1'}"]
    knobs += ["runtime.rank_cpus=2", "runtime.server_cpus=3"]
    code = f"""
import sys
from pathlib import Path
import tests.launch.test_ray as t
t.run(Path(sys.argv[1]), sys.argv[2], t.ROSTER, *{knobs!r})
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [*made.line(0), sys.executable, "-c", code, str(tmp_path), address]
    run = subprocess.Popen(line, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    files = [tmp_path / f"events-{rank}" for rank in range(2)]

    def events(rank: int) -> list[list[str]]:
        return [text.split() for text in files[rank].read_text().splitlines()] if files[rank].exists() else []

    with ending(run):
        wait_for(lambda: all(events(rank) for rank in range(2)), run, seconds=200)
        assert ADDRESSES[1] in (tmp_path / "run/logs/server-0.log").read_text()
        inside = os.stat(f"/proc/{made.pids[1]}/ns/net").st_ino
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if int(pid) != made.pids[1] and os.stat(f"/proc/{pid}/ns/net").st_ino == inside:
                    os.kill(int(pid), signal.SIGKILL)
        wait_for(lambda: all(["death", "0"] in events(rank) for rank in range(2)), run, seconds=120)
        join(made, 0, address, cpus=3)
        wait_for(lambda: all(events(rank)[-1][0] == "ready" for rank in range(2)), run, seconds=200)
        assert events(0) == events(1) and events(0)[-1][2].startswith(f"http://{ADDRESSES[0]}:")
        (tmp_path / "done").touch()
        told = run.communicate(timeout=100)[1]
    assert run.returncode == 0, told[-3000:]
    assert "server 0 has died (its actor is gone" in told
