"""What the tests of the autopsy share: a tiny run whose rollouts can be spoilt between push and scoring."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from r1mega.config.rl import DiffBudgetConfig, ProblemDataConfig, RewardConfig, RlConfig, RolloutConfig
from r1mega.config.run import SamplingConfig
from r1mega.rl.advantage import GroupAdvantage
from r1mega.rl.engine import LocalEngine
from r1mega.rl.engine.weights import destinations
from r1mega.rl.environment import Single
from r1mega.rl.loss import GrpoLoss
from r1mega.rl.push import AutoPush
from r1mega.rl.run import Run
from r1mega.rl.setup import open_run_mesh
from r1mega.rl.types import RewardRecord
from r1mega.train import checkpoint
from tests.train.cases import CPU, OPTIM

SIZES = RolloutConfig(
    rollouts=4,
    prompts_per_rollout=2,
    group_size=4,
    micro_batch_size=8,
    sampling=SamplingConfig(temperature=1.0, max_new_tokens=12),
    ref_refresh_updates=0,
    save_every=1,
    async_save=False,
    diff_budget=DiffBudgetConfig(rows=8),
)


class Lengths:
    """Stands in for the reward processes: something by which the responses of a group differ."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args) -> None:
        pass

    def score(self, problems, texts):
        return [{"accuracy": RewardRecord(len(text) % 7 / 2, 0.0), "format": RewardRecord(0.0, 0.0)} for text in texts]


def write_problems(folder: Path) -> None:
    """A few sums."""
    problems = [{"question": f"{left}+1", "answer": str(left + 1)} for left in range(6)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))


def config(place: Path, out: Path, engine: Any = None, temperature: float = 1.0, **sizes: Any) -> RlConfig:
    sampling = replace(SIZES.sampling, temperature=temperature)
    return RlConfig(
        name=out.name,
        out=str(out),
        device=CPU,
        init=str(place / "seed"),
        data=ProblemDataConfig(problems=str(place / "problems.jsonl")),
        rl=replace(SIZES, **{"sampling": sampling, **sizes}),
        reward=RewardConfig(),
        advantage=GroupAdvantage(),
        policy_loss=GrpoLoss(kl_coef=0.0),
        engine=engine or LocalEngine(),
        push=AutoPush(),
        environment=Single(),
        optim=replace(OPTIM, lr=5e-3, warmup_steps=1, decay="constant"),
    )


def opened(settings: RlConfig, stack: ExitStack) -> Run:
    """A run before its first push."""
    run = Run(settings, open_run_mesh(settings), checkpoint.resolve(settings.init), Lengths(), stack)
    stack.enter_context(run.saver)
    return run


def places(run: Run) -> dict[str, torch.Tensor]:
    """What the engine holds, by published name: its memory."""
    return destinations(run.engine.model)


def rollout(run: Run, spoil: Callable[[Run], None] = lambda run: None, rows: Callable[[list], None] = lambda rows: None) -> bool:
    """Push, spoil the engine, generate, spoil the rows, score, look."""
    run.push()
    spoil(run)
    made, _ = run.value(run.take())
    rows(made)
    run.learner.score(made)
    return run.watch(made)
