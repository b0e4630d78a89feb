"""``launch=slurm``: an sbatch file that runs the same command once a rank, and its submission.

In: what a rank runs and the config. Out: the file, and a job that slurm has taken; or UserError. The job's script finds the meeting
place (first host of the job, a port from the job's number), gives every task its rank, hands signals on, and queues the job again
once it has saved.

Before the time limit slurm signals the script with USR1, which becomes SIGTERM for the ranks: they save and end with status 75, and
the job goes back to the queue. TERM, which scancel sends, is handed on too, but a job that somebody cancels stays cancelled.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from r1mega.config.errors import STOPPED, UserError
from r1mega.config.launch_rules import INTERFACE_VARIABLES
from r1mega.config.run import ComputeConfig
from r1mega.files.remote import is_url

FILE_NAME = "job.sbatch"
SUBMIT_SECONDS = 120.0
END_SECONDS = 120
"""From the end of the first task to that of the others, which srun ends then."""

BODY = """\
set -uo pipefail
requeue=@REQUEUE@

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]:?no host in SLURM_JOB_NODELIST}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-}
[ -n "$SRUN_CPUS_PER_TASK" ] || unset SRUN_CPUS_PER_TASK

step='' asked='' saving=''
hand_on() {  # the ranks save on SIGTERM
    asked=1
    if [ -n "$step" ]; then kill -TERM "$step" 2>/dev/null; fi
}
trap 'interrupted=1; saving=1; hand_on' USR1  # the time limit is near
trap 'interrupted=1; hand_on' TERM            # scancel, or the machine goes away

status=0
for ((attempt = 0; attempt <= @RESTARTS@; attempt++)); do
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 8 + attempt) % 12000))  # below the ports that systems give out by themselves
    srun --nodes=@HOSTS@ --ntasks-per-node=@PROCESSES@ --kill-on-bad-exit=0 --wait=@WAIT@ bash -c "$rank" &
    step=$!
    if [ -n "$asked" ]; then hand_on; fi
    while :; do
        interrupted=''
        wait "$step"
        status=$?
        if [ -z "$interrupted" ]; then break; fi
    done
    case $status in 0 | 2 | @STOPPED@ | 130) break ;; esac
    if [ -n "$asked" ] || ((attempt == @RESTARTS@)); then break; fi
    echo "launch: the ranks have ended with status $status; restart $((attempt + 1)) of @RESTARTS@ from the last checkpoint" >&2
done
if [ "$status" = @STOPPED@ ] && [ -n "$saving" ] && [ "$requeue" = yes ]; then
    echo "launch: the ranks have saved; job $SLURM_JOB_ID goes back to the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def start(rank: Sequence[str], config: ComputeConfig) -> bool:
    """Write the file and submit it, or print it (``launch.dry_run``); False, as no rank has run here."""
    text = script(rank, config)
    if config.launch.dry_run:
        print(text, end="")
        return False
    if shutil.which("sbatch") is None:
        raise UserError(
            "launch.kind: sbatch is on PATH where launch=slurm is submitted; got no sbatch; run this on a login node of the "
            "cluster, or add launch.dry_run=true and submit the file that it prints"
        )
    path = folder(config) / FILE_NAME
    Path(output(config)).parent.mkdir(parents=True, exist_ok=True)  # slurm makes no folder, and drops the output without it
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, timeout=SUBMIT_SECONDS)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise UserError(f"launch.kind: sbatch takes {path}; got {said}; change launch.partition, .account, .time_limit or .options")
    print(f"{done.stdout.strip()}: {path}, output in {output(config)}")
    return False


def folder(config: ComputeConfig) -> Path:
    """Where file and output lie: the run's folder, or below this one where the run's is at a URL."""
    return Path("slurm", re.sub(r"[^\w.-]+", "-", config.name)) if is_url(config.out) else Path(config.out)


def output(config: ComputeConfig) -> str:
    """The job's output file, in slurm's pattern."""
    return config.launch.output or str(folder(config) / "slurm-%j.log")


def script(rank: Sequence[str], config: ComputeConfig) -> str:
    """The sbatch file. ``rank``: arguments of python."""
    launch = config.launch
    values = {
        "@RESTARTS@": launch.restarts,
        "@HOSTS@": launch.hosts,
        "@PROCESSES@": launch.processes,
        "@WAIT@": END_SECONDS,
        "@STOPPED@": STOPPED,
        "@REQUEUE@": "yes" if launch.requeue else "no",
    }
    body = BODY
    for name, value in values.items():
        body = body.replace(name, str(value))
    head = "\n".join(["#!/bin/bash", *(f"#SBATCH {option}" for option in options(config))])
    return f"{head}\n\nrank=$(cat <<'END_OF_RANK'\n{task(rank, config)}\nEND_OF_RANK\n)\n{body}"


def options(config: ComputeConfig) -> Iterator[str]:
    """What stands behind ``#SBATCH``; sbatch reads quotes as a shell does."""
    launch = config.launch
    gpus = launch.gpus if launch.gpus is not None else launch.processes if not is_cpu(config) else 0
    yield f"--job-name={_quoted(config.name)}"
    yield f"--nodes={launch.hosts}"
    yield f"--ntasks-per-node={launch.processes}"
    if gpus:
        yield f"--gpus-per-node={gpus}"
    if launch.cpus:
        yield f"--cpus-per-task={launch.cpus}"
    if launch.partition:
        yield f"--partition={_quoted(launch.partition)}"
    if launch.account:
        yield f"--account={_quoted(launch.account)}"
    if launch.time_limit:
        yield f"--time={launch.time_limit}"
    yield f"--chdir={_quoted(os.getcwd())}"
    yield f"--output={_quoted(output(config))}"
    yield "--open-mode=append"
    yield "--requeue" if launch.requeue else "--no-requeue"
    if launch.save_seconds:
        yield f"--signal=B:USR1@{launch.save_seconds}"
    yield from launch.options


def is_cpu(config: ComputeConfig) -> bool:
    """True where the ranks need no GPU."""
    return config.device.kind == "cpu"


def task(rank: Sequence[str], config: ComputeConfig) -> str:
    """The shell line of every task: its place from slurm's variables, the user's lines, the command in this shell's stead."""
    launch = config.launch
    package = shlex.quote(str(Path(__file__).resolve().parents[2]))
    lines = [
        "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID",
        f"export LOCAL_WORLD_SIZE={launch.processes}",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
        f"export PYTHONPATH={package}${{PYTHONPATH:+:$PYTHONPATH}}",
        *(f"export {name}={shlex.quote(launch.interface)}" for name in INTERFACE_VARIABLES if launch.interface),
        *launch.setup,
        f"exec {shlex.join([sys.executable, *rank])}",
    ]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """As an option's value: in double quotes where it has more than plain letters."""
    return text if re.fullmatch(r"[\w./%:,@+-]+", text) else json.dumps(text, ensure_ascii=False)
