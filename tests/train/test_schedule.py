"""Learning rate and batch size by hand."""

from __future__ import annotations

import math

import pytest

from r1mega.config.train import OptimConfig
from r1mega.train.schedule import batch_size, learning_rate

COSINE = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4, constant_steps=3)


@pytest.mark.parametrize(
    "step, want",
    [
        (0, 0.25),
        (1, 0.5),
        (3, 1.0),
        (4, 1.0),
        (6, 1.0),
        (7, 1.0),  # the decay starts here, with cos(0)
        (10, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.25))),
        (13, 0.55),  # half way from 7 to 19
        (19, 0.1),
        (25, 0.1),
    ],
)
def test_warm_up_constant_cosine(step: int, want: float) -> None:
    assert learning_rate(COSINE, step, steps=19) == pytest.approx(want)


def test_constant_is_held_to_the_end_and_no_warm_up_starts_at_the_peak() -> None:
    optim = OptimConfig(lr=0.3, min_lr=0.1, warmup_steps=0, decay="constant")
    assert {learning_rate(optim, step, steps=10) for step in (0, 5, 9, 50)} == {0.3}


def test_a_run_that_ends_with_its_constant_part_has_no_decay() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=2, constant_steps=8)
    assert learning_rate(optim, 9, steps=10) == 1.0


def test_batch_ramp() -> None:
    ramp = OptimConfig(batch_ramp_start=8, batch_ramp_steps=4)
    assert [batch_size(ramp, step, full=24, multiple=4) for step in range(6)] == [8, 12, 16, 20, 24, 24]
    assert [batch_size(ramp, step, full=24, multiple=8) for step in range(6)] == [8, 8, 16, 16, 24, 24]
    assert batch_size(OptimConfig(batch_ramp_start=2, batch_ramp_steps=4), 0, full=24, multiple=8) == 8
    assert batch_size(OptimConfig(), 0, full=24, multiple=4) == 24
