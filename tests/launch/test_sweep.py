"""Sweeps (``-m``): Hydra's grammar, checks before the first job, a process and a folder a job, signals, the table and sweep.json."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1mega import api
from r1mega.cli import main
from r1mega.config.compose import load_config
from r1mega.config.errors import UserError
from r1mega.config.groups import config_dir
from r1mega.config.overrides import MOST_JOBS, expand
from r1mega.launch import sweep as sweep_module
from r1mega.launch.sweep import Row, last_metrics, table

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable  # a test may put another one in its place


def swept(command: str, *arguments: str) -> list[str]:
    return [" ".join(job.swept) for job in expand(command, arguments, config_dir())]


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("seed=1,2", ["1", "2"]),
        ("seed=range(1,7,2)", ["1", "3", "5"]),
        ("optim.lr=choice(1e-3, 3e-3)", ["0.001", "0.003"]),
        ("optim.lr=1e-3,3e-3", ["0.001", "0.003"]),
        ("optim.decay=sort(cosine,constant)", ["constant", "cosine"]),
        ("name='a,b',c", ["'a,b'", "c"]),
        ("data.train={a:1,b:2},{c:1}", ["{a:1,b:2}", "{c:1}"]),
        ("optim=glob(r1_*)", ["r1_rl", "r1_sft"]),
        ("optim=glob(*,exclude=r1*)", ["v3"]),
    ],
)
def test_the_grammar_is_hydras(argument, values) -> None:
    key = argument.partition("=")[0]
    assert swept("pretrain", argument) == [f"{key}={value}" for value in values]


def test_a_comma_inside_a_value_is_no_sweep() -> None:
    for argument in ("text=[a,b]", "problems={a: {num_train: 1, num_test: 2}}", "name='a,b'", 'name="a,b"'):
        (job,) = expand("prepare", [argument, "seed=3"], config_dir())
        assert job.arguments == (argument, "seed=3") and job.swept == ()


def test_every_combination_comes_once_with_the_last_key_fastest() -> None:
    jobs = expand("pretrain", ["seed=1,2", "trainer.steps=5", "+data.train.a=1,2"], config_dir())
    assert [job.arguments for job in jobs] == [
        (f"seed={seed}", "trainer.steps=5", f"+data.train.a={weight}") for seed in (1, 2) for weight in (1, 2)
    ]


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ["optim.lr=interval(0,1)"],
            ["optim.lr: values that can be counted; got interval(0,1); write optim.lr=a,b or optim.lr=range(START,STOP,STEP)"],
        ),
        (["seed=range(3,3)"], ["seed: at least one value of a sweep; got range(3,3), which has none; write seed=a,b"]),
        (["seed=glob(*)"], ["seed: at least one value of a sweep; got glob(*), which has none; write seed=a,b"]),
        (
            ["seed=1,", "-x", "debug=true"],
            ["seed: a value in Hydra's grammar; got 'seed=1,'", "arguments: group=choice or key=value; got '-x'"],
        ),
        (["hydra.sweep.dir=a,b"], ["hydra.sweep.dir: a key of the command; got one of Hydra's own"]),
        (["seed=range(0,100000000)"], [f"-m: at most {MOST_JOBS} jobs a sweep; got {MOST_JOBS + 1} or more"]),
        (["seed=range(0,100)", "optim.lr=range(1,12)"], ["-m: at most 1000 jobs a sweep; got 1100 or more; take fewer values"]),
    ],
)
def test_what_is_no_sweep_is_a_line_a_fault(arguments, lines) -> None:
    with pytest.raises(UserError) as caught:
        expand("pretrain", arguments, config_dir())
    said = str(caught.value).splitlines()
    assert len(said) == len(lines) and all(found.startswith(line) for found, line in zip(said, lines, strict=True))


@pytest.fixture
def text(tmp_path, monkeypatch) -> list[str]:
    """Overrides with which ``prepare`` passes its checks; the test runs in a folder of its own, alone."""
    (tmp_path / "text.txt").write_text("some words to learn from, and some more\n" * 200)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return ["text=[text.txt]", "tokenizer.vocab_size=300"]


JOB = """#!/bin/sh
shift 3  # -m r1mega COMMAND
echo "$$ $*" >> jobs
case "$*" in
    *seed=3*) exit 5 ;;
    *seed=4*) kill -9 $$ ;;
    *seed=6*) trap 'echo INT >> signals; exit 130' INT; trap 'echo TERM >> signals; exit 75' TERM ;;
    *seed=7*) trap '' INT; trap 'exit 143' TERM ;;
    *) exit 0 ;;
esac
: > ready
while :; do sleep 0.02; done
"""


@pytest.fixture
def fake(text, tmp_path, monkeypatch) -> list[str]:
    """As ``text``, but a job is a shell script that acts by its seed (see JOB); returns the overrides."""
    (tmp_path / "python").write_text(JOB)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return text


def read(folder: Path) -> dict:
    return json.loads((folder / "sweep.json").read_text())


def test_a_failing_job_does_not_stop_the_others(fake, tmp_path, capfd) -> None:
    assert main(["prepare", "-m", *fake, "name=exp", "seed=2,3,4,5"]) == 1
    shown = capfd.readouterr().out.splitlines()
    assert shown[:2] == ["[1/4] seed=2 -> runs/exp/seed-2", "[2/4] seed=3 -> runs/exp/seed-3"]
    rows = [line.split() for line in shown[shown.index("") + 1 : -2]]
    assert [row[:2] for row in rows] == [["seed", "status"], ["2", "done"], ["3", "failed"], ["4", "failed"], ["5", "done"]]
    assert rows[2][2] == "(5)" and rows[3][2] == "(137)" and shown[-1] == "runs/exp/sweep.json"
    body = read(tmp_path / "runs" / "exp")
    assert body["command"] == "prepare" and body["overrides"] == [*fake, "name=exp", "seed=2,3,4,5"]
    assert [(job["overrides"], job["status"], job["exit_status"]) for job in body["jobs"]] == [
        (["seed=2"], "done", 0), (["seed=3"], "failed", 5), (["seed=4"], "failed", 137), (["seed=5"], "done", 0),
    ]  # fmt: skip
    ran = [line.split(" ", 1) for line in (tmp_path / "jobs").read_text().splitlines()]
    assert len({process for process, _ in ran}) == 4
    assert ran[0][1] == f"{' '.join(fake)} name=exp seed=2 out='runs/exp/seed-2'"


@pytest.mark.parametrize(
    ("arguments", "place", "folders"),
    [
        (["seed=2,5", "worked=-1,1"], "runs/prepare", [f"runs/prepare/seed-{s}_worked-{w}" for s in (2, 5) for w in (-1, 1)]),
        (["name=a,b"], "runs", ["runs/a", "runs/b"]),
        (["name=a,b", "seed=2,5"], "runs", [f"runs/{name}/seed-{seed}" for name in "ab" for seed in (2, 5)]),
        (["out=x,y/z"], ".", ["x", "y/z"]),
        (["out=my/${seed}", "seed=2,5"], "my", ["my/2", "my/5"]),
        (["seed=2"], "runs/prepare", ["runs/prepare"]),
        (["name='my run'", "seed=2,2"], "runs/my run", ["runs/my run/seed-2_0", "runs/my run/seed-2_1"]),
        (["text=[text.txt],['./text.txt']"], "runs/prepare", ["runs/prepare/text--text.txt-a69a18", "runs/prepare/text--.-text.txt-53ca36"]),
    ],
)  # fmt: skip
def test_every_job_has_a_folder_of_its_own(arguments, place, folders, fake, tmp_path, capfd) -> None:
    assert main(["prepare", "-m", *fake, *arguments]) == 0
    assert [job["out"] for job in read(tmp_path / place)["jobs"]] == folders


def test_a_folder_can_be_named_in_a_later_override_without_quotes(fake, tmp_path, capfd) -> None:
    from r1mega.config.compose import compose

    assert main(["prepare", "--multirun", *fake, "worked_careful_share=0.25,5e-1", "text=[text.txt],['text.txt']"]) == 0
    for job in read(tmp_path / "runs" / "prepare")["jobs"]:
        assert compose("export", [f"checkpoint={job['out']}"]).checkpoint == job["out"]


def test_all_jobs_are_checked_before_the_first_one_starts(fake, tmp_path, capfd) -> None:
    assert main(["prepare", "-m", *fake, "seed=2,5", "valid_share=0.1,0.7", "text_column=3"]) == 2
    assert main(["prepare", "-m", *fake, "text=[text.txt],[nowhere]", "seed=-1"]) == 2
    assert main(["prepare", "-m", *fake, "seed=2,5", "worke=1"]) == 2
    shown = capfd.readouterr()
    assert shown.err.splitlines() == [
        "job seed=2 valid_share=0.7 and 1 more: valid_share: from 0 to 0.5; got 0.7; use valid_share=0.01",
        "seed: at least 0; got -1; use seed=1",
        "worke: no such key of prepare; got 'worke=1'; did you mean worked? see r1mega prepare --help",
    ]
    assert shown.out == "" and not (tmp_path / "jobs").exists() and not (tmp_path / "runs").exists()
    assert main(["prepare", "-m", *fake, "text=[text.txt],[nowhere]"]) == 2
    assert capfd.readouterr().err.startswith("job text=[nowhere]: text: a file, a folder, or stdlib; got no such path nowhere;")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["report", "-m", "run=a,b"], "-m: a command whose runs have a folder; got report; leave -m out"),
        (["prepare", "-m", "--cfg", "job", "seed=1,2"], "--cfg: the config of one job; got -m too; leave one of them out"),
        (
            ["prepare", "seed=1,2"],
            "seed: one value; got '1,2'; for a list write seed=[a,b], for text with a comma quote it, for a run with",
        ),
        (["prepare", "-m", "seed=1,2", "nothing"], "arguments: group=choice or key=value, nothing positional; got 'nothing'"),
        (
            ["prepare", "-m", "seed=1,2", "out=s3://bucket/x"],
            "out: a folder on this machine, where sweep.json can lie; got s3://bucket/x;",
        ),
        (["prpare", "-m", "seed=1,2"], "command: no such command; got 'prpare'; did you mean prepare?"),
    ],
)
def test_wrong_input_is_one_line(arguments, line, text, capsys) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(line) and shown.err.count("\n") == 1


def test_a_rank_starts_no_sweep(text, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["prepare", "-m", *text, "seed=1,2"]) == 2
    assert capsys.readouterr().err == "-m: a sweep starts its own processes; got RANK=0; use launch.processes, not torchrun\n"


@pytest.mark.slow
def test_real_jobs_run_the_command_and_save_their_configs(text, tmp_path, capfd) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\nnot json\n')
    assert main(["prepare", "-m", *text[1:], "text=[text.txt],[broken.jsonl]", "seed=7"]) == 1
    body = read(tmp_path / "runs" / "prepare")
    good, bad = [tmp_path / job["out"] for job in body["jobs"]]
    assert [job["status"] for job in body["jobs"]] == ["done", "failed"] and body["jobs"][1]["exit_status"] == 2
    assert (good / "text.json").is_file() and not (bad / "text.json").exists()
    assert load_config(good).text == ["text.txt"] and load_config(good).out == "runs/prepare/text--text.txt-a69a18"
    assert "broken.jsonl" in capfd.readouterr().err


SWEEP = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # as on a terminal, though the runner of the tests may ignore it
sys.executable = "./python"
from r1mega.launch import sweep
sweep.sweep.__kwdefaults__["end_seconds"] = float(sys.argv.pop(1))
from r1mega.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def started(fake):
    """``started(seeds)``: a sweep in a process of its own, once its job is ready for signals."""
    processes = []

    def start(seeds: str, end_seconds: float = 60) -> subprocess.Popen:
        line = [PYTHON, "-c", SWEEP, str(end_seconds), "prepare", "-m", *fake, "name=exp", f"seed={seeds}"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        for _ in range(1200):
            if Path("ready").exists():
                return processes[-1]
            assert processes[-1].poll() is None, processes[-1].stderr.read()
            time.sleep(0.05)
        raise AssertionError("the job did not start")

    yield start
    for process in processes:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen) -> tuple[int, list[str], str]:
    """Status, the statuses of all jobs, standard error."""
    _, error = process.communicate(timeout=60)
    return process.returncode, [job["status"] for job in read(Path("runs/exp"))["jobs"]], error


def test_ctrl_c_ends_the_running_job_and_the_sweep(started) -> None:
    process = started("2,6,5")
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, ["done", "stopped", "waiting"], "interrupted\n")
    assert Path("signals").read_text() == "INT\n"


def test_a_job_that_does_not_hear_ctrl_c_is_killed(started) -> None:
    process = started("7,5", end_seconds=0.2)
    process.send_signal(signal.SIGINT)
    assert ended(process)[:2] == (130, ["stopped", "waiting"])
    assert read(Path("runs/exp"))["jobs"][0]["exit_status"] == 137


@pytest.mark.parametrize(("seed", "status"), [(6, 75), (7, 143)])
def test_sigterm_is_handed_on_and_the_status_is_the_jobs(seed, status, started) -> None:
    process = started(f"{seed},5")
    process.send_signal(signal.SIGTERM)
    code, statuses, error = ended(process)
    assert (code, statuses) == (status, ["stopped", "waiting"])
    assert error == ("sweep: stopped by SIGTERM; the same command goes on\n" if status == 75 else "")


def test_no_job_outlives_its_sweep(started) -> None:
    process = started("7,5")
    process.kill()
    process.communicate(timeout=60)
    job = Path("/proc") / Path("jobs").read_text().split()[0] / "cmdline"
    for _ in range(100):
        if not job.exists() or not job.read_bytes():
            return
        time.sleep(0.05)
    raise AssertionError("the job still runs")


def test_the_last_metrics_of_a_run_an_evaluation_and_a_recipe(tmp_path) -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "valid_loss": 2.5}, {"step": 3, "loss": float("nan")}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    assert last_metrics(tmp_path) == {"loss": 2.0, "valid_loss": 2.5}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "eval.json").write_text(json.dumps({"pass_at_1": 0.25, "standard_error": 0.01}))
    assert last_metrics(tmp_path / "eval") == {"pass_at_1": 0.25}
    stages = [{"name": "sft", "command": "sft", "pass_at_1": 0.5}, {"name": "control", "command": "rl", "pass_at_1": 0.1}]
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "summary.json").write_text(json.dumps({"recipe": "r", "stages": stages}))
    assert last_metrics(tmp_path / "recipe") == {"pass_at_1": 0.5}
    assert last_metrics(tmp_path / "nowhere") == {}


def test_the_table_has_a_column_a_key_and_a_metric() -> None:
    rows = [
        Row(["optim.lr=1e-3", "seed=1"], "a", "done", 0, 12.34, {"loss": 1.23456, "pass_at_1": 0.5}),
        Row(["optim.lr=3e-3", "seed=1"], "b", "failed", 2, 0.5),
        Row(["optim.lr=5e-3", "seed=1"], "c"),
    ]
    assert table(rows).splitlines() == [
        "optim.lr  seed  status      seconds  loss   pass@1",
        "1e-3      1     done        12.3     1.235  0.5",
        "3e-3      1     failed (2)  0.5      -      -",
        "5e-3      1     waiting     -        -      -",
    ]


def test_the_check_of_a_job_is_the_commands_own(text, monkeypatch) -> None:
    """A sweep without processes: what ``check`` is given, and that its errors come before a start."""
    seen = []
    monkeypatch.setattr(sweep_module, "_run", lambda command, line, row, end_seconds: setattr(row, "status", "done"))
    assert sweep_module.sweep("prepare", [*text, "seed=1,2"], check=lambda command, line: seen.append((command, *line))) == 0
    assert seen == [("prepare", *text, f"seed={seed}", f"out='runs/prepare/seed-{seed}'") for seed in (1, 2)]
    config, arguments, choices = api.checked("prepare", [*text, "seed=2"])
    assert (config.seed, arguments, choices) == (2, (*text, "seed=2"), {})
