"""``r1mega COMMAND -m key=a,b``: one run a combination of values, each in a process and a folder of its own, one after another.

In: a command and its overrides in Hydra's sweep grammar. Out: the exit status, a table, and ``sweep.json`` beside the runs'
folders. All jobs are composed and checked before the first one starts. A job that fails does not stop the others; Ctrl-C and
SIGTERM end the running one and the sweep. A job's folder is named after its values, so the same sweep, or a longer one, goes on
where runs were cut off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from r1mega.config.errors import Stopped, UserError
from r1mega.config.groups import config_dir
from r1mega.config.overrides import Job, expand
from r1mega.files.remote import is_url, quoted
from r1mega.launch.local import _dies_with, _sigterm_forwarded
from r1mega.recipe.store import write_json
from r1mega.report.readers import read_run

FILE_NAME = "sweep.json"
METRICS = ("loss", "valid_loss", "reward", "pass_at_1")
"""What the table shows of a job: the last value of each that it logged."""

END_SECONDS = 10.0
"""From Ctrl-C handed on to a job to SIGKILL."""

LONGEST_LABEL = 100  # characters of a folder's name; file systems take 255 bytes

Checker = Callable[[str, Sequence[str]], Any]


@dataclasses.dataclass
class Row:
    """One job: its values, its folder and how it went.

    ``status``: waiting, running, done, failed, or stopped (with the sweep); ``exit_status``: as a shell has it.
    """

    overrides: list[str]
    out: str
    status: str = "waiting"
    exit_status: int | None = None
    seconds: float | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


def sweep(command: str, overrides: Sequence[str], check: Checker, *, end_seconds: float = END_SECONDS) -> int:
    """Run all jobs and return 0, or 1 where one failed.

    ``check(command, overrides)`` composes and checks one job and raises UserError. Raises UserError, before anything starts, with a
    line a fault. Ctrl-C and SIGTERM are handed on to the running job; once it has ended and the table is written, they raise
    KeyboardInterrupt, and Stopped (the job has saved) or SystemExit.
    """
    if "RANK" in os.environ:
        raise UserError(f"-m: a sweep starts its own processes; got RANK={os.environ['RANK']}; use launch.processes, not torchrun")
    jobs = expand(command, map(quoted, overrides), config_dir())
    outs = _all(jobs, [job.arguments for job in jobs], lambda line: _out(command, line))
    if any(map(is_url, outs)):
        raise UserError(f"out: a folder on this machine, where sweep.json can lie; got {outs[0]}; give out=FOLDER")
    folders = _folders(jobs, outs)
    lines = [
        job.arguments if folder == out else (*_without_out(job.arguments), f"out={_quoted(folder)}")
        for job, out, folder in zip(jobs, outs, folders, strict=True)
    ]
    _all(jobs, lines, lambda line: check(command, line))
    rows = [Row(list(job.swept), folder) for job, folder in zip(jobs, folders, strict=True)]
    target = Path(os.path.commonpath([os.path.abspath(out) for out in outs])) / FILE_NAME

    def save() -> None:
        write_json(target, {"command": command, "overrides": list(overrides), "jobs": [dataclasses.asdict(row) for row in rows]})

    try:
        for index, (row, line) in enumerate(zip(rows, lines, strict=True), start=1):
            print(f"[{index}/{len(rows)}] {' '.join(row.overrides)} -> {row.out}", flush=True)
            _run(command, line, row, end_seconds)
            save()
    finally:
        save()
        print(f"\n{table(rows)}\n\n{os.path.relpath(target)}", flush=True)
    return int(any(row.status != "done" for row in rows))


def _all(jobs: Sequence[Job], lines: Sequence[Sequence[str]], act: Callable[[Sequence[str]], Any]) -> list[Any]:
    """``act`` of every line. Raises UserError with all faults, each once, with the jobs that have it."""
    found, faults = [], {}
    for index, line in enumerate(lines):
        try:
            found.append(act(line))
        except UserError as error:
            for fault in str(error).splitlines():
                faults.setdefault(fault, []).append(index)
    if faults:
        raise UserError("\n".join(_whose(jobs, indices) + fault for fault, indices in faults.items()))
    return found


def _whose(jobs: Sequence[Job], indices: Sequence[int]) -> str:
    if len(indices) == len(jobs):
        return ""
    first = " ".join(jobs[indices[0]].swept)
    return f"job {first}: " if len(indices) == 1 else f"job {first} and {len(indices) - 1} more: "


def _out(command: str, line: Sequence[str]) -> str:
    from r1mega.config.compose import composition

    return composition(command, line).config.out


def _folders(jobs: Sequence[Job], outs: Sequence[str]) -> list[str]:
    """Each job's own folder: its ``out`` where the user told them all apart, else one below it, named after the job's values."""
    if len(set(outs)) == len(outs):
        return list(outs)
    names = [_label(job.swept) for job in jobs]
    places = [f"{out}/{name}" for out, name in zip(outs, names, strict=True)]
    return [f"{place}_{index}" if places.count(place) > 1 else place for index, place in enumerate(places)]


def _label(swept: Sequence[str]) -> str:
    """``optim.lr-1e-3_seed-2``: letters that need no quotes in a later override (``init=...``), where Hydra takes no ``=``.

    Where more than that is lost, a hash of the values keeps those of different sweeps apart.
    """
    parts = [override for override in swept if _key(override) not in ("name", "out")]
    plain = "_".join(part.replace("=", "-", 1) for part in parts)
    label = re.sub(r"[^A-Za-z0-9_.-]+", "-", plain)[:LONGEST_LABEL].strip("-.")
    return label if label == plain else f"{label}-{hashlib.sha256(plain.encode()).hexdigest()[:6]}"


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _without_out(line: Sequence[str]) -> list[str]:
    return [override for override in line if _key(override) != "out"]


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _run(command: str, line: Sequence[str], row: Row, end_seconds: float) -> None:
    """One job from start to end, into ``row``. In a session of its own: the terminal's Ctrl-C reaches it once, from here."""
    parent = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH", "")]))
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        jobs: list[subprocess.Popen] = []
        came = stack.enter_context(_sigterm_forwarded(jobs))
        row.status = "running"
        job = subprocess.Popen(
            [sys.executable, "-m", "r1mega", command, *line],
            env={**os.environ, "PYTHONPATH": search},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_dies_with(os.getpid()),  # noqa: PLW1509 - runs two system calls, takes no lock
        )
        jobs.append(job)
        if came:  # before there was a job to hand it on to
            job.send_signal(came[0])
        try:
            job.wait()
        except (KeyboardInterrupt, SystemExit) as error:  # Ctrl-C, or a second SIGTERM
            row.status = "stopped"
            _end(job, end_seconds if isinstance(error, KeyboardInterrupt) else 0.0)
            raise
        finally:
            code = job.returncode
            row.exit_status = code if code >= 0 else 128 - code
            row.seconds = round(time.monotonic() - start, 3)
            row.metrics = last_metrics(Path(row.out))
            if row.status == "running":
                row.status = "done" if code == 0 else "stopped" if came else "failed"
    if came:
        if code in (0, os.EX_TEMPFAIL):
            raise Stopped("sweep: stopped by SIGTERM; the same command goes on")
        raise SystemExit(128 + came[0])


def _end(job: subprocess.Popen, end_seconds: float) -> None:
    """Hand Ctrl-C on; SIGKILL to the job and all that it started after ``end_seconds``, or at a second signal."""
    job.send_signal(signal.SIGINT)
    try:
        job.wait(end_seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def last_metrics(folder: Path) -> dict[str, float]:
    """The last value of each of METRICS in a run's folder; of a recipe its last pass@1. Empty where there is none."""
    try:
        run = read_run(folder)
    except UserError:
        return {}
    measured = [stage for stage in run.evaluated() if not stage.is_control]
    found = {"pass_at_1": measured[-1].figures["pass_at_1"]} if measured and "pass_at_1" in measured[-1].figures else {}
    if run.kind == "training":
        found |= {name: points[-1][1] for name in METRICS if (points := run.stages[0].points(name))}
    return found


def table(rows: Sequence[Row]) -> str:
    """The jobs as aligned text: a column for each swept key, then status, seconds and metrics."""
    keys = list(dict.fromkeys(_key(override) for row in rows for override in row.overrides))
    shown = [name for name in METRICS if any(name in row.metrics for row in rows)]
    lines = [[*keys, "status", "seconds", *(name.replace("pass_at_1", "pass@1") for name in shown)]]
    for row in rows:
        values = {_key(override): override.partition("=")[2] for override in row.overrides}
        status = f"failed ({row.exit_status})" if row.status == "failed" else row.status
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        metrics = (f"{row.metrics[name]:.4g}" if name in row.metrics else "-" for name in shown)
        lines.append([*(values.get(key, "") for key in keys), status, seconds, *metrics])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in text)
