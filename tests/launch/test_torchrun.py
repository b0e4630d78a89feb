"""launch=torchrun: options of the launcher, what is refused, and each way in which hosts do not meet, as one line."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1mega.config.compose import compose
from r1mega.config.errors import UserError
from r1mega.launch import start, torchrun
from r1mega.launch.local import LaunchError, free_port

ROOT = Path(__file__).resolve().parents[2]


def config(*overrides: str):
    usual = ["data.train={text: 1}", "trainer.steps=4", "optim.warmup_steps=0", "data.sequence_length=64", "launch.kind=torchrun"]
    return compose("pretrain", [*usual, *overrides])


def run(folder: Path, body: str, *overrides: str) -> None:
    """Ranks that run ``body`` in place of r1mega, in ``folder``."""
    (folder / "rank.py").write_text(f"import os, pathlib, signal, sys, time\nfolder = pathlib.Path({str(folder)!r})\n{body}\n")
    assert torchrun.start([str(folder / "rank.py")], config(*overrides), {"PYTHONPATH": str(ROOT)}) is True


def test_ranks_get_their_places(tmp_path: Path) -> None:
    run(
        tmp_path,
        "(folder / os.environ['RANK']).write_text(os.environ['WORLD_SIZE'] + os.environ['LOCAL_WORLD_SIZE'])",
        "launch.processes=2",
    )
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["22", "22"]


@pytest.mark.slow
def test_a_failed_rank_and_its_status(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        run(tmp_path, "time.sleep(0 if os.environ['RANK'] == '1' else 30); sys.exit(7)", "launch.processes=2")
    assert (caught.value.rank, caught.value.status) == (1, 7)


@pytest.mark.slow
def test_failed_ranks_start_again(tmp_path: Path) -> None:
    body = (
        "again = (folder / 'tried').exists()\n(folder / 'tried').touch()\nos.environ['RANK'] == '0' and not again and sys.exit(3)"
    )
    run(tmp_path, body, "launch.restarts=1")


@pytest.mark.slow
def test_no_rank_outlives_the_command(tmp_path: Path) -> None:
    """kill -9 of the command: its launcher and the ranks go with it. SIGTERM reaches the ranks."""
    body = (
        "from r1mega.launch.local import tie_to_launcher\ntie_to_launcher()\n"
        "signal.signal(signal.SIGTERM, lambda *_: ((folder / 'asked').touch(), os._exit(0)))\n"
        "(folder / 'pid').write_text(str(os.getpid()))\ntime.sleep(60)"
    )
    (tmp_path / "rank.py").write_text(f"import os, pathlib, signal, time\nfolder = pathlib.Path({str(tmp_path)!r})\n{body}\n")
    program = f"import tests.launch.test_torchrun as t\nt.torchrun.start([{str(tmp_path / 'rank.py')!r}], t.config(), {{}})"
    for number in (signal.SIGTERM, signal.SIGKILL):
        (tmp_path / "pid").unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        deadline = time.monotonic() + 40
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        process.wait(20)
        pid = int((tmp_path / "pid").read_text())
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert (tmp_path / "asked").exists()


def fault(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        torchrun.start(["-m", "r1mega", "--version"], config(*overrides), {"PYTHONPATH": str(ROOT)})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_a_rendezvous_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        told = fault("launch.hosts=2", f"launch.rendezvous=127.0.0.1:{port}")
    assert told.startswith(f"launch.rendezvous: a free port of this host; got {port}, which is in use; use another, as ")


@pytest.mark.slow
def test_a_rendezvous_that_nobody_knows_or_answers() -> None:
    assert fault("launch.hosts=2", "launch.rendezvous=no-such-host.invalid:29500").startswith(
        "launch.rendezvous no-such-host.invalid:29500: a host that this one can find; got 'no-such-host.invalid': "
    )
    told = fault(
        "launch.hosts=2", "launch.host_rank=1", f"launch.rendezvous=127.0.0.1:{free_port()}", "launch.rendezvous_timeout_seconds=1"
    )
    assert "rank 0's host answers there within launch.rendezvous_timeout_seconds=1; got nobody listens" in told


def test_a_wrong_host_rank() -> None:
    told = fault("launch.hosts=2", "launch.host_rank=0", "launch.rendezvous=192.0.2.1:29500")
    assert told == (
        f"launch.host_rank: 0 on the host of launch.rendezvous alone; got 0 on host {socket.gethostname()}, which has no address 192.0.2.1; "
        "use launch.host_rank=1 or above here, or this host's address in launch.rendezvous"
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["null", "0"])
def test_too_few_hosts(rank: str) -> None:
    told = fault(
        "launch.hosts=2",
        f"launch.host_rank={rank}",
        f"launch.rendezvous=127.0.0.1:{free_port()}",
        "launch.rendezvous_timeout_seconds=2",
    )
    assert told.startswith(
        "launch.hosts: 2 hosts meet at launch.rendezvous within launch.rendezvous_timeout_seconds=2; got fewer ("
    )
    assert told.endswith("start the same command on the other hosts, or use a longer time")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("launch.kind=local launch.hosts=2", "launch.hosts: 1 with launch=local, which is this machine; got 2; use launch.hosts=1, or launch=torchrun on each host, or launch=slurm"),
        ("launch.kind=local launch.host_rank=0", "launch.host_rank: null with launch=local, which finds it itself; got 0; use launch.host_rank=null, or launch=torchrun"),
        ("launch.hosts=2", "launch.rendezvous: needed for launch.hosts=2; got null; give launch.rendezvous=ADDRESS:PORT of one of the hosts, the same on all"),
        ("launch.rendezvous=node1", "launch.rendezvous: ADDRESS:PORT, a port from 1 to 65535; got 'node1'; give launch.rendezvous=node1:29500, an IPv6 address as '[ADDRESS]:PORT'"),
        ("launch.rendezvous='a:99999'", "launch.rendezvous: ADDRESS:PORT, a port from 1 to 65535; got 'a:99999'; give ..."),
        ("launch.hosts=2 launch.rendezvous='a:1' launch.host_rank=2", "launch.host_rank: below launch.hosts 2; got 2; use launch.host_rank=0 or 1, or launch.hosts=3"),
        ("launch.hosts=2 launch.rendezvous='a:1' launch.host_rank=1 launch.restarts=1", "launch.host_rank: null with launch.restarts above 0 and several hosts, which meet anew and are numbered anew; got 1; use launch.host_rank=null, or launch.restarts=0"),
        ("launch.kind=slurm launch.time_limit=soon", "launch.time_limit: [DAYS-]HOURS:MINUTES:SECONDS; got 'soon'; give launch.time_limit=12:00:00, or 2-00:00:00 for two days"),
        ("launch.kind=slurm launch.options=[qos]", "launch.options: options of sbatch; got 'qos'; give launch.options=['--qos=high']"),
        ("launch.kind=slurm launch.options=['--nodes=3']", "launch.options: none that the file has already, as --nodes; got '--nodes=3'; leave it out"),
        ("launch.stall_timeout_seconds=1", "launch.stall_timeout_seconds: 0 or at least 2; got 1.0; use launch.stall_timeout_seconds=600.0"),
        ("device.kind=cuda launch.processes=3", "launch.processes: at most the 2 GPUs that this machine shows, one a process; got 3; use launch.processes=2, and more hosts for more processes"),
        ("launch.kind=ssh", "launch.kind: one of local, torchrun, slurm; got ssh; use launch.kind=local"),
    ],
)  # fmt: skip
def test_what_is_refused(monkeypatch, overrides: str, line: str) -> None:
    monkeypatch.setattr("r1mega.config.launch_rules.GPUS_OF_DRIVER", Path("/nowhere"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError) as caught:
        config("trainer.global_batch_size=48", *shlex.split(overrides.replace("'", "\\'")))
    told = str(caught.value)
    assert told.startswith(line[:-3]) if line.endswith("...") else told == line


def test_dry_runs_start_nothing(capsys) -> None:
    given = [
        "launch.hosts=2",
        "launch.rendezvous='[fd00::1]:29500'",
        "launch.host_rank=1",
        "launch.processes=4",
        "launch.dry_run=true",
        "name='a b'",
    ]
    given.append("trainer.global_batch_size=64")
    arguments = ["launch.dry_run=true", "trainer.steps=4", "name='a b'"]
    assert start.start("pretrain", arguments, config(*given), {}) is False
    words = shlex.split(capsys.readouterr().out)
    assert words[1:3] == ["-m", "torch.distributed.run"] and words[-5:] == [
        "-m",
        "r1mega",
        "pretrain",
        "trainer.steps=4",
        "name='a b'",
    ]
    assert {
        "--nnodes=2",
        "--nproc-per-node=4",
        "--node-rank=1",
        "--master-addr=fd00::1",
        "--master-port=29500",
        "--rdzv-id=a-b",
    } <= set(words)
    from torch.distributed import run

    args = run.parse_args(words[3:])  # torch's launcher takes all of them
    assert (args.nnodes, args.node_rank, args.module, args.training_script) == ("2", 1, True, "r1mega")
    local = config("launch.kind=local", "launch.processes=2", "launch.dry_run=true")
    assert start.start("pretrain", ["trainer.steps=4"], local, {}) is False
    assert capsys.readouterr().out == f"2 x {sys.executable} -m r1mega pretrain trainer.steps=4\n"


def test_who_starts_ranks() -> None:
    assert start.starts(config()) and start.starts(config("launch.kind=slurm")) and not start.starts(config("launch.kind=local"))
    for key in ("launch.processes=2", "launch.restarts=1", "launch.dry_run=true"):
        assert start.starts(config("launch.kind=local", key))
