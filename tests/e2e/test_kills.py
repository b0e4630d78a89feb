"""kill -9 of any process at any moment, saving included: the same command goes on, and the end is the uninterrupted run's, bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from r1mega.train import checkpoint
from r1mega.train.manifest import verify
from tests.e2e.kills import Killer, start
from tests.train.cases import LENGTH, stored, write_data

SMALL = "model.hidden_size=32 model.num_layers=2 model.num_heads=2 model.num_experts=8 model.moe_ffn_size=16 model.ffn_size=48"
TRAINER = (
    "trainer.global_batch_size=8 trainer.micro_batch_size=4 trainer.log_every=1 trainer.save_every=2 "
    "optim.lr=1e-3 optim.min_lr=1e-4 optim.warmup_steps=2 launch.processes=2"
)
TIMED = ("seconds", "tokens_per_second", "mfu", "peak_", "idle_share", "push_gbps")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, problems, and the uninterrupted run of each command (``straight-COMMAND``)."""
    folder = write_data(tmp_path_factory.mktemp("kills"))
    problems = [{"question": f"{left}+1", "answer": str(left + 1)} for left in range(6)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    for command in ("pretrain", "sft", "rl"):
        run = start(arguments(command, folder, folder / f"straight-{command}"))
        told = run.communicate(timeout=300)[1]
        assert run.returncode == 0, told[-3000:]
    return folder


def arguments(command: str, folder: Path, out: Path) -> list[str]:
    if command == "pretrain":
        data = [f"tokenizer={folder}/tok", f"data.train={{{folder}/text: 1}}", f"data.sequence_length={LENGTH}"]
        return ["pretrain", f"out={out}", "model=tiny", *SMALL.split(), *data, *TRAINER.split(), "trainer.steps=30"]
    if command == "sft":
        data = [f"init={folder}/straight-pretrain", f"data.train={{{folder}/samples: 1}}", f"data.sequence_length={3 * LENGTH}"]
        return ["sft", f"out={out}", *data, *TRAINER.split(), "trainer.steps=24"]
    sizes = (
        "rl.rollouts=8 rl.prompts_per_rollout=4 rl.group_size=4 rl.updates_per_rollout=2 rl.micro_batch_size=4 rl.save_every=1 "
        "rl.sampling.max_new_tokens=12 optim.lr=1e-3 optim.warmup_steps=1 launch.processes=2 rl.ref_refresh_updates=4"
    )
    return ["rl", f"out={out}", f"init={folder}/straight-sft", f"data.problems={folder}/problems.jsonl", *sizes.split()]


def metric_lines(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not any(name in key for name in TIMED)} for line in lines]


def check(command: str, place: Path, out: Path, moments: int, seed: int) -> list[str]:
    killer = Killer(moments, random.Random(seed))
    while True:
        killer.finish(arguments(command, place, out), out)
        if killer.moments == 0:
            break
        # the run was over before all kills were made: again from the start, in a folder of its own
        compare(command, place, out)
        out = out.with_name(out.name + "x")
    compare(command, place, out)
    return killer.log


def compare(command: str, place: Path, out: Path) -> None:
    held = checkpoint.resolve(out)
    verify(held)
    left, right = stored(checkpoint.resolve(place / f"straight-{command}")), stored(held)
    assert left.keys() == right.keys() and any("exp_avg_sq" in name for name in left)
    assert not [name for name in left if not torch.equal(left[name], right[name])]
    ours, theirs = (
        torch.load(folder / "rng.pt", weights_only=True) for folder in (checkpoint.resolve(place / f"straight-{command}"), held)
    )
    assert len(ours) == len(theirs) == 2 and all(torch.equal(a["cpu"], b["cpu"]) for a, b in zip(ours, theirs, strict=True))
    states = [checkpoint.read_state(folder) for folder in (checkpoint.resolve(place / f"straight-{command}"), held)]
    assert states[0]["cursor"] == states[1]["cursor"] and states[0]["tokens"] == states[1]["tokens"]
    if command == "rl":
        left, right = stored(checkpoint.resolve(place / "straight-rl"), "reference"), stored(held, "reference")
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert metric_lines(place / f"straight-{command}") == metric_lines(out)
    assert not list((out / "checkpoints").glob(".step-*")) and not list((out / "checkpoints").glob("damaged-*"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "sft", "rl"])
def test_thirty_kills(place: Path, tmp_path: Path, command: str) -> None:
    """Ten of each command; ``pytest -s`` shows what was hit."""
    for line in check(command, place, tmp_path / command, moments=10, seed=len(command)):
        print(f"{command}: {line}")
