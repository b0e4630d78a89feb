"""runtime=ray on a cluster of this machine, with small programs in the ranks' place: places, logs, failures, restarts, servers that die.

One run of the loop, by one rank; runs of more stand in tests/e2e/test_ray_rl.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from r1mega.config.compose import compose
from r1mega.config.errors import UserError
from r1mega.launch.local import RESULT_VARIABLE, LaunchError
from r1mega.mesh import close_mesh
from r1mega.rl.loop import rl
from r1mega.train.checkpoint import latest
from r1mega.train.pretrain import pretrain
from tests.launch import ray_cases
from tests.launch.ray_cases import ROOT, config, is_there, needs_ray, wait_until
from tests.rl.engine.test_sglang_launch import KNOWN, SERVER
from tests.train.cases import lines, pretrain_config, stored, write_data

pytestmark = needs_ray


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of eight places, and no GPU."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder, ray_cases.cluster(Path(folder) / "r") as address:
        yield address


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A test that fails leaves the cluster."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and hasattr(ray, "shutdown"):
        ray.shutdown()


def program(folder: Path, body: str) -> list[str]:
    """Ranks that run ``body`` in place of r1mega."""
    (folder / "rank.py").write_text(
        f"import json, os, pathlib, signal, sys, time\nfolder = pathlib.Path({str(folder)!r})\n{body}\n"
    )
    return [str(folder / "rank.py")]


def run(folder: Path, address: str, body: str, *overrides: str, env: dict[str, str] | None = None) -> bool:
    from r1mega.launch.ray import driver
    from r1mega.launch.start import FINAL

    given = config(folder / "run", f"runtime.address={address}", *overrides)
    return driver.start(program(folder, body), given, env or {}, FINAL)


def test_places_logs_and_the_result(address: str, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("NCCL_MINE", "1")
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NCCL_MINE", "OWN", "COPY"]
    body = f"""
(folder / os.environ["RANK"]).write_text(json.dumps({{name: os.environ.get(name) for name in {names!r}}}))
print("said by", os.environ["RANK"])
print("told by", os.environ["RANK"], file=sys.stderr)
pathlib.Path(os.environ["{RESULT_VARIABLE}"]).write_bytes(b"made by " + os.environ["RANK"].encode())
"""
    env = {RESULT_VARIABLE: str(tmp_path / "result"), "COPY": "here"}
    assert run(tmp_path, address, body, "runtime.environment={OWN: a}", env=env) is True
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert [(one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"]) for one in found] == [
        ("0", "0", "2", "2"),
        ("1", "1", "2", "2"),
    ]
    assert found[0]["MASTER_PORT"] == found[1]["MASTER_PORT"] and found[0]["MASTER_ADDR"] == found[1]["MASTER_ADDR"]
    assert all((one["NCCL_MINE"], one["OWN"], one["COPY"]) == ("1", "a", "here") for one in found)
    assert (tmp_path / "result").read_text() == "made by 0"
    logs = [(tmp_path / f"run/logs/rank-{rank}.log").read_text() for rank in range(2)]
    assert all(f"said by {rank}\n" in text and f"told by {rank}\n" in text for rank, text in enumerate(logs))
    out, err = capfd.readouterr()
    assert "said by 0\n" in out and "told by 0\n" in err and "by 1" not in out + err, "rank 0's passes through"


def test_a_rank_of_the_cluster_gives_the_bits_of_this_process(address: str, tmp_path: Path) -> None:
    close_mesh()
    place = write_data(tmp_path / "data")
    (place / "problems.jsonl").write_text("".join(json.dumps({"question": f"{one}+1", "answer": "1"}) + "\n" for one in range(6)))
    pretrain(pretrain_config(place, place / "seed", 1))
    sizes = "rl.rollouts=1 rl.prompts_per_rollout=2 rl.group_size=4 rl.updates_per_rollout=2 rl.sampling.max_new_tokens=6 device.threads=1"
    given = [f"init={place}/seed", f"data.problems={place}/problems.jsonl", *sizes.split(), "optim.lr=2e-3", "optim.warmup_steps=1"]
    given += ["reward.weights={tests.launch.ray_cases.by_length:1}", "launch.processes=1"]
    rl(compose("rl", [*given, f"out={tmp_path}/here"]))
    there = [f"out={tmp_path}/there", "runtime=ray", f"runtime.address={address}"]
    command = [sys.executable, "-m", "r1mega", "rl", *given, *there]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (stored(latest(tmp_path / name / "checkpoints")) for name in ("here", "there"))
    assert ours.keys() == theirs.keys() and not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    (line,) = lines(tmp_path / "there")
    assert line["grad_norm"] > 0 and line["reward_std"] > 0
    assert (tmp_path / "there/logs/rank-0.log").is_file()


@pytest.mark.slow
def test_ranks_start_again_together_and_the_telling_line(address: str, tmp_path: Path, capfd) -> None:
    """The first time the actor of rank 1 is killed with kill -9, the second time its process fails: once too often."""
    body = """
rank = os.environ["RANK"]
with (folder / f"starts-{rank}").open("a") as file:
    file.write(f"{os.getpid()}\\n")
count = len((folder / f"starts-{rank}").read_text().split())
if rank == "1" and count == 1:
    os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)
if rank == "1" and count == 2:
    print("loading"); print("ValueError: no such thing", file=sys.stderr); print("more", file=sys.stderr); sys.exit(7)
time.sleep(60)
"""
    with pytest.raises(LaunchError) as caught:
        run(tmp_path, address, body, "launch.restarts=1")
    assert (caught.value.rank, caught.value.status) == (1, 7)
    pids = [(tmp_path / f"starts-{rank}").read_text().split() for rank in range(2)]
    assert [len(found) for found in pids] == [2, 2] and not any(is_there(int(pid)) for found in pids for pid in found)
    err = capfd.readouterr().err
    log = tmp_path / "run/logs/rank-1.log"
    assert re.search(rf"runtime=ray: rank 1 on \S+ has ended with status 137: it said nothing; see {log}\n", err)
    assert "launch: all ranks start again from the last checkpoint, restart 1 of 1\n" in err
    assert re.search(rf"runtime=ray: rank 1 on \S+ has ended with status 7: ValueError: no such thing; see {log}\n", err)


COMMAND = """
import sys
from pathlib import Path
from r1mega.launch.local import LaunchError
import tests.launch.test_ray as t
try:
    t.run(Path(sys.argv[1]), sys.argv[2], t.WAITING)
except LaunchError as error:
    sys.exit(error.status)
except KeyboardInterrupt:
    sys.exit(130)
"""
WAITING = """
def end(*_):
    (folder / ("asked" + os.environ["RANK"])).touch()
    os._exit(75)
signal.signal(signal.SIGTERM, end)
(folder / ("pid" + os.environ["RANK"])).write_text(f"{os.getpid()} {os.getppid()}")
time.sleep(120)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_driver(address: str, tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM reaches the ranks, whose status counts; after Ctrl-C and kill -9 nothing is left either."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(tmp_path), address], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        files = [tmp_path / f"pid{rank}" for rank in range(2)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files) or process.poll() is not None)
        started = [int(text) for file in files for text in file.read_text().split()]
        process.send_signal(number)
        status = process.wait(60)
        wait_until(lambda: not any(map(is_there, started)))
        assert status == {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[number]
        if number == signal.SIGTERM:
            assert all((tmp_path / f"asked{rank}").exists() for rank in range(2))
    finally:
        process.kill()
        process.wait()


def test_a_cluster_of_another_version_and_one_that_is_too_small(address: str, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match="runtime=ray: needs 9 CPU cores .*; got 8 in a cluster of 1 node; add nodes with"):
        run(tmp_path, address, "", "launch.processes=3", "runtime.rank_cpus=3", "rl.prompts_per_rollout=3")
    import ray

    mine = ray.__version__
    monkeypatch.setattr(ray, "__version__", "1.0.0")
    with pytest.raises(UserError) as caught:
        run(tmp_path, address, "")
    told = str(caught.value)
    assert told.startswith("runtime.address: Ray and Python of the cluster's versions; got ") and "\n" not in told
    assert mine in told and "1.0.0" in told and told.endswith("; install the cluster's versions here, or there these")


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter that says it has sglang, and whose server answers at the address that it is given."""
    (tmp_path / "server.py").write_text(SERVER.replace('"127.0.0.1"', 'arguments[arguments.index("--host") + 1]'))
    said = json.dumps({"sglang": "0.5.16", "flashinfer": None, "arguments": KNOWN})
    file = tmp_path / "python"
    file.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then echo \'{said}\'; else exec {sys.executable} {tmp_path}/server.py "$@"; fi\n'
    )
    file.chmod(0o755)
    return str(file)


ROSTER = """
from r1mega.config.compose import compose
from r1mega.rl.engine.contract import EngineRuntime
from r1mega.rl.engine.sglang import SglangEngine, roster
rank = os.environ["RANK"]
def note(*words):
    with (folder / f"events-{rank}").open("a") as file:
        file.write(" ".join(map(str, words)) + "\\n")
while rank == "1" and not (folder / "events-0").exists():
    time.sleep(0.1)
try:
    count = int(os.environ.get("COUNT", "2"))
    made = roster.given(SglangEngine(servers=count, start_seconds=60), EngineRuntime({"model_type": "deepseek_v3"}))
except ValueError as error:
    print(error, file=sys.stderr); sys.exit(2)
note("up", *[one.server.info["pid"] for one in made.owned])
made.on_death = lambda index: note("death", index)
made.on_ready = lambda index: note("ready", index, made.owned[index].server.url, made.owned[index].server.info["pid"])
while not (folder / "done").exists() and made.failure is None:
    time.sleep(0.1)
if made.failure:
    print(made.failure, file=sys.stderr); sys.exit(2)
made.close()
"""


@pytest.mark.slow
def test_servers_that_die_start_again_and_all_ranks_learn_it(address: str, tmp_path: Path, python: str) -> None:
    """First the server's process is killed, then its actor: it comes back, elsewhere. The third death is one too many."""
    knobs = ["engine=sglang", "engine.servers=2", f"engine.python={python}", "engine.restarts=2", "engine.start_seconds=60"]
    code = f"""
import sys
from pathlib import Path
import tests.launch.test_ray as t
from r1mega.launch.local import LaunchError
try:
    t.run(Path(sys.argv[1]), sys.argv[2], t.ROSTER, *{knobs!r})
except LaunchError as error:
    sys.exit(error.status)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), address], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )

    def events(rank: int) -> list[list[str]]:
        file = tmp_path / f"events-{rank}"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def both_have(count: int) -> None:
        wait_until(lambda: all(len(events(rank)) >= count for rank in range(2)) or process.poll() is not None)

    try:
        both_have(1)
        first = events(0)[0]
        assert events(1)[0] == first and first[0] == "up" and len(set(first)) == 3
        server = int(first[1])
        os.kill(server, signal.SIGKILL)
        both_have(3)
        assert [event[:2] for event in events(0)[1:3]] == [["death", "0"], ["ready", "0"]]
        assert events(0) == events(1), "the same address and process"
        url, second = events(0)[2][2:]
        os.kill(actor_of(int(second)), signal.SIGKILL)
        both_have(5)
        assert events(0)[3] == ["death", "0"] and events(0) == events(1)
        other, third = events(0)[4][2:]
        assert other != url and not is_there(int(second)), "the keeper has ended what the actor left"
        assert "server 0 on " in (tmp_path / "run/logs/server-0.log").read_text()
        os.kill(int(third), signal.SIGKILL)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 2
        assert "engine.restarts: at most 2 in a run; got one more death of server 0" in err, err
        assert not any(is_there(int(pid)) for pid in [*first[1:], second, third])
    finally:
        process.kill()
        process.communicate()


def actor_of(pid: int) -> int:
    """The actor's process above a server's keeper."""
    while "keeper.py" not in Path(f"/proc/{pid}/cmdline").read_text():
        pid = parent_of(pid)
    return parent_of(pid)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_a_server_that_does_not_start_is_told_with_its_first_error(address: str, tmp_path: Path, capfd, python: str) -> None:
    text = (tmp_path / "server.py").read_text().replace('if "--die" in arguments:', "if True:")
    (tmp_path / "server.py").write_text(text)
    began = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        run(tmp_path, address, ROSTER, "engine=sglang", "engine.servers=2", f"engine.python={python}", "launch.restarts=3")
    assert caught.value.status == 2 and time.monotonic() - began < 60
    err = capfd.readouterr().err
    log = tmp_path / r"run/logs/server-[01].log"
    assert re.search(rf"server [01] starts; got status 3 after .*: ValueError: no such attention backend; see {log}", err)
    assert "loading\n" in "".join(file.read_text() for file in (tmp_path / "run/logs").glob("server-*.log"))
