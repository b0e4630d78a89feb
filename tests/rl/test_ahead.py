"""What running ahead is for: with a slow engine, a step takes little longer than the longer of rollout and training."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from r1mega.rl.engine.contract import EngineRuntime, Request
from r1mega.rl.engine.inprocess import InProcessEngine
from r1mega.rl.engine.local import LocalEngine
from r1mega.rl.learner import Learner
from r1mega.rl.ledger import History
from r1mega.rl.loop import rl
from tests.rl.test_loop import Digits, config, lines, place  # noqa: F401  place is a fixture

pytestmark = pytest.mark.slow  # waits on purpose

DELAY = 3.0
"""Seconds that a rollout takes, and a training on it."""


@dataclass(frozen=True)
class Slow:
    """``engine=local`` whose responses take their time, as a server's do: interrupted, they go on where they were."""

    def build(self, runtime: EngineRuntime) -> InProcessEngine:
        """The engine."""
        engine = LocalEngine().build(runtime)
        true = engine.complete

        async def complete(request: Request):
            await asyncio.sleep(DELAY)
            return await true(request)

        engine.complete = complete
        return engine


def seconds(place: Path, out: Path, lag: int) -> tuple[float, float]:  # noqa: F811
    """A step's wait for its rollout and the trainer's own work, in the run's own record, without the first two steps: the first
    rollout has nothing to overlap with."""
    settings = config(place, out, rollouts=6, lag=lag, save_every=0)
    settings.engine = Slow()
    rl(settings)
    told = lines(out)
    assert History(out / "ledger").audit() == []
    parts = (("rollout",), ("value", "score", "train", "push"))
    return tuple(sum(line[f"seconds_{name}"] for line in told[2:] for name in part) / len(told[2:]) for part in parts)


def test_overlap(place: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    true = Learner.train

    def train(self, rows, rollout):
        began = time.perf_counter()
        results = true(self, rows, rollout)
        time.sleep(max(0.0, DELAY - (time.perf_counter() - began)))
        return results

    monkeypatch.setattr(Learner, "train", train)
    monkeypatch.setattr("r1mega.rl.setup.RewardRunner", Digits)
    rollout, training = seconds(place, tmp_path / "0", 0)
    ahead = sum(seconds(place, tmp_path / "1", 1))
    print(f"rollout {rollout:.2f} s and training {training:.2f} s one after the other; a step with rl.lag=1 {ahead:.2f} s")
    assert ahead < 1.15 * max(rollout, training) < 0.6 * 1.15 * (rollout + training)
