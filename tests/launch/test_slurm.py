"""launch=slurm: the file, its submission, and the script's run with srun, scontrol and sbatch put in their places."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1mega.config.compose import compose
from r1mega.config.errors import UserError
from r1mega.launch import slurm

RANK = [
    "-c",
    "import os; names = 'RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT MINE'.split(); os.write(1, ' '.join([*map(os.environ.get, names), chr(10)]).encode())",
    "it's $HOME",
]
SRUN = """#!/bin/bash
# One process a task, as srun would start them on two hosts; SIGTERM goes to the tasks, the highest status comes back.
[ "$1 $2 $3 $4 $5" = "--nodes=2 --ntasks-per-node=2 --kill-on-bad-exit=0 --wait=120 bash" ] || { echo "srun $*" >&2; exit 99; }
echo "$MASTER_PORT" >> ports
trap 'kill -TERM ${tasks[@]}' TERM
for ((task = 0; task < 4; task++)); do
    SLURM_PROCID=$task SLURM_NTASKS=4 SLURM_LOCALID=$((task % 2)) bash -c "$7" & tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    while :; do wait "$task"; status=$?; if ! kill -0 "$task" 2>/dev/null; then break; fi; done
    wait "$task" 2>/dev/null; status=$?
    if ((status > highest)); then highest=$status; fi
done
exit "$highest"
"""
SCONTROL = '#!/bin/bash\nif [ "$1 $2" = "show hostnames" ]; then printf "node7\\nnode8\\n"; else echo "$*" >> requeued; fi\n'


def config(folder: Path, *overrides: str):
    usual = [
        f"out={folder}/out",
        "data.train={text: 1}",
        "trainer.steps=4",
        "optim.warmup_steps=0",
        "data.sequence_length=64",
        "launch.kind=slurm",
    ]
    return compose("pretrain", [*usual, "launch.hosts=2", "launch.processes=2", "launch.setup=['export MINE=\"a b\"']", *overrides])


def commands(folder: Path, **scripts: str) -> dict[str, str]:
    """A PATH whose first folder holds ``scripts``."""
    place = folder / "bin"
    place.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, **scripts}.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
    return {
        **clean,
        "PATH": f"{place}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "OMP_NUM_THREADS": "1",
    }


def begin(folder: Path, rank: list[str], *overrides: str) -> subprocess.Popen:
    (folder / "job").write_text(slurm.script(rank, config(folder, *overrides)))
    return subprocess.Popen(
        ["bash", "job"],
        cwd=folder,
        env=commands(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def body(text: str) -> list[str]:
    return ["-c", f"import os, pathlib, signal, sys, time\nrank = os.environ['RANK']\n{text}"]


SAVES = body("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\npathlib.Path('up' + rank).touch()\ntime.sleep(60)")


def up(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while len(list(folder.glob("up*"))) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_task_gets_its_place(tmp_path: Path) -> None:
    out, err = (run := begin(tmp_path, RANK)).communicate(timeout=30)
    port = str(20000 + 1234 * 8 % 12000)
    assert run.returncode == 0 and err == ""
    assert sorted(out.splitlines()) == [f"{rank} 4 {rank % 2} 2 node7 {port} a b " for rank in range(4)]


def test_the_header(tmp_path: Path) -> None:
    given = [
        "launch.partition=gpu",
        "launch.account='my team'",
        "launch.time_limit=1-12:00:00",
        "launch.cpus=8",
        "launch.save_seconds=120",
    ]
    text = slurm.script(
        RANK, config(tmp_path, *given, "launch.options=['--qos=high']", "device.kind=cuda", "name=one", "launch.interface=ib0")
    )
    head = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert head == [
        "--job-name=one", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=8", "--partition=gpu",
        '--account="my team"', "--time=1-12:00:00", f"--chdir={Path.cwd()}", f"--output={tmp_path}/out/slurm-%j.log",
        "--open-mode=append", "--requeue", "--signal=B:USR1@120", "--qos=high",
    ]  # fmt: skip
    assert "export GLOO_SOCKET_IFNAME=ib0" in text and "export NCCL_SOCKET_IFNAME=ib0" in text
    plain = slurm.script(RANK, config(tmp_path, "launch.requeue=false", "launch.save_seconds=0"))
    assert "--no-requeue" in plain and "requeue=no" in plain and "--signal" not in plain and "gpus" not in plain


@pytest.mark.parametrize("overrides", [(), ("launch.requeue=false", "launch.restarts=3")])
def test_shells_accept_the_script(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    path = tmp_path / "job"
    path.write_text(slurm.script(RANK, config(tmp_path, *overrides)))
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_near_the_time_limit_the_ranks_save_and_the_job_is_queued_again(tmp_path: Path) -> None:
    run = begin(tmp_path, SAVES)
    up(tmp_path)
    run.send_signal(signal.SIGUSR1)  # to the script alone, as --signal=B: does
    err = run.communicate(timeout=30)[1]
    assert run.returncode == 75 and (tmp_path / "requeued").read_text() == "requeue 1234\n"
    assert "launch: the ranks have saved; job 1234 goes back to the queue" in err


def test_a_job_that_is_not_to_be_queued_again(tmp_path: Path) -> None:
    run = begin(tmp_path, SAVES, "launch.requeue=false")
    up(tmp_path)
    run.send_signal(signal.SIGUSR1)
    run.communicate(timeout=30)
    assert run.returncode == 75 and not (tmp_path / "requeued").exists()


def test_a_cancelled_job_saves_and_stays_cancelled(tmp_path: Path) -> None:
    run = begin(tmp_path, SAVES, "launch.restarts=2")
    up(tmp_path)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=30)
    assert run.returncode == 75 and not (tmp_path / "requeued").exists() and len((tmp_path / "ports").read_text().split()) == 1


def test_failed_ranks_start_again_at_another_port(tmp_path: Path) -> None:
    fails = body(
        "first = not pathlib.Path('tried' + rank).exists()\npathlib.Path('tried' + rank).touch()\nsys.exit(9 if first and rank == '2' else 0)"
    )
    run = begin(tmp_path, fails, "launch.restarts=1")
    err = run.communicate(timeout=30)[1]
    assert run.returncode == 0 and "launch: the ranks have ended with status 9; restart 1 of 1 from the last checkpoint" in err
    assert len(set((tmp_path / "ports").read_text().split())) == 2


def test_wrong_input_is_not_tried_again(tmp_path: Path) -> None:
    run = begin(tmp_path, body("sys.exit(2)"), "launch.restarts=5")
    run.communicate(timeout=30)
    assert run.returncode == 2 and len((tmp_path / "ports").read_text().split()) == 1


def test_submission(tmp_path: Path, monkeypatch, capsys) -> None:
    places = commands(tmp_path, sbatch='#!/bin/bash\ncp "$1" submitted\necho "Submitted batch job 99"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", places["PATH"])
    assert slurm.start(RANK, config(tmp_path)) is False
    job = tmp_path / "out" / "job.sbatch"
    assert capsys.readouterr().out == f"Submitted batch job 99: {job}, output in {tmp_path}/out/slurm-%j.log\n"
    assert (tmp_path / "submitted").read_text() == job.read_text() == slurm.script(RANK, config(tmp_path))
    commands(tmp_path, sbatch='#!/bin/bash\necho "sbatch: error: invalid partition" >&2\nexit 1\n')
    with pytest.raises(
        UserError, match="^launch.kind: sbatch takes .*job.sbatch; got sbatch: error: invalid partition; change launch.partition"
    ):
        slurm.start(RANK, config(tmp_path))


def test_no_sbatch(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match="^launch.kind: sbatch is on PATH where launch=slurm is submitted; got no sbatch; run this on a login node"
    ):
        slurm.start(RANK, config(tmp_path))
    assert not (tmp_path / "out").exists()
    assert slurm.start(RANK, config(tmp_path, "launch.dry_run=true")) is False
    assert capsys.readouterr().out == slurm.script(RANK, config(tmp_path)) and sys.executable in slurm.script(
        RANK, config(tmp_path)
    )
    assert not (tmp_path / "out").exists()
