"""SIGTERM: the run saves, ends with a status of its own, and the same command goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from r1mega.cli import STOPPED
from r1mega.config.errors import Stopped, UserError
from r1mega.train import checkpoint, stop
from tests.train.cases import LENGTH, one_rank, stored, write_data

ROOT = Path(__file__).resolve().parents[2]


def overrides(data: Path, out: Path, processes: int, steps: int) -> list[str]:
    sizes = "model.hidden_size=32 model.num_layers=2 model.num_heads=2 model.num_experts=8 model.moe_ffn_size=16 model.ffn_size=48"
    return [
        "pretrain", "model=tiny", *sizes.split(), f"tokenizer={data}/tok", f"out={out}", f"data.train={{{data}/text: 1}}",
        f"data.sequence_length={LENGTH}", f"trainer.steps={steps}", "trainer.global_batch_size=8", "trainer.micro_batch_size=4",
        "trainer.log_every=1", "optim.warmup_steps=2", "optim.lr=1e-3", "optim.decay=constant", f"launch.processes={processes}",
    ]  # fmt: skip


def start(arguments: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "r1mega", *arguments], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def rng(run: Path) -> list[list[int]]:
    """The generators' states by rank."""
    return [state["cpu"].tolist() for state in torch.load(checkpoint.resolve(run) / "rng.pt", weights_only=True)]


def steps_made(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_asked_to_end_saves_and_goes_on_bit_for_bit(tmp_path: Path, processes: int) -> None:
    data, steps = write_data(tmp_path / "data"), 400
    command = overrides(data, tmp_path / "run", processes, steps)
    run = start(command)
    deadline = time.monotonic() + 90
    while steps_made(tmp_path / "run") < 3 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    told = run.communicate(timeout=60)[1]
    assert run.returncode == STOPPED, told
    held = checkpoint.read_state(checkpoint.resolve(tmp_path / "run"))["step"]
    assert 3 <= held < steps and held == steps_made(tmp_path / "run")
    assert f"stopped: SIGTERM came, step {held} of {steps} is saved; the same command goes on from there" in told
    assert "Traceback" not in told and "launch:" not in told
    for name in ("run", "straight"):  # the schedule is constant, so that fewer steps are the same steps
        arguments = overrides(data, tmp_path / name, processes, held + 4)
        subprocess.run([sys.executable, "-m", "r1mega", *arguments], cwd=ROOT, check=True, capture_output=True)
    left, right = (stored(checkpoint.resolve(tmp_path / name)) for name in ("run", "straight"))
    assert left.keys() == right.keys() and not [name for name in left if not torch.equal(left[name], right[name])]
    assert rng(tmp_path / "run") == rng(tmp_path / "straight")
    states = [checkpoint.read_state(checkpoint.resolve(tmp_path / name)) for name in ("run", "straight")]
    assert states[0]["step"] == held + 4 and states[0]["cursor"] == states[1]["cursor"]


def test_an_error_after_the_signal_is_told() -> None:
    """A save that fails after SIGTERM says so; the signal does not hide it."""
    mesh = one_rank()
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with pytest.raises(UserError, match="the disk"), stop.heeding():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked(mesh)
            raise UserError("the disk is full")
        assert not got
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_comes_too_late_takes_its_usual_course(monkeypatch) -> None:
    mesh, got = one_rank(), []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with stop.heeding():
            assert not stop.asked(mesh)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked(mesh) and not got
        assert got == [signal.SIGTERM], "nobody acted upon it"
        with pytest.raises(Stopped), stop.heeding():
            assert not stop.asked(mesh), "an earlier signal is not remembered"
            os.kill(os.getpid(), signal.SIGTERM)
            raise Stopped("saved")
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
