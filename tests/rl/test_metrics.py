"""One metric line of a rollout, by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from r1mega.rl.batch import RolloutRow
from r1mega.rl.metrics import mean_load, rollout_line
from r1mega.rl.rollouts import Taken
from r1mega.rl.types import Completion, RewardRecord, Sample
from r1mega.train.trainee import StepResult

ALONE = SimpleNamespace(
    device=SimpleNamespace(torch_device=torch.device("cpu")), sum=lambda values: values, max=lambda values: values
)


FIRST = {
    "num_clipped_low": 1.0,
    "num_clipped_high": 2.0,
    "num_dropped": 2.0,
    "weight_sum": 4.0,
    "max_ratio": 2.0,
    "max_weight": 1.5,
}
SECOND = {
    "num_clipped_low": 0.0,
    "num_clipped_high": 1.0,
    "num_dropped": 0.0,
    "weight_sum": 2.0,
    "max_ratio": 3.0,
    "max_weight": 1.0,
}


def row(logprobs: list[float], old: list[float], reason: str) -> RolloutRow:
    return RolloutRow([1, 2], Completion([3] * len(logprobs), logprobs, reason), old=torch.tensor(old))


def taken(rows: list[RolloutRow], versions: list[int], dropped: int = 0) -> Taken:
    """The rows as one group, each drawn from one version, its accuracy judged in as many seconds as it has turns."""
    samples = []
    for member, (each, version) in enumerate(zip(rows, versions, strict=True)):
        made = replace(each.completion, versions=((version, 0, len(each.completion.token_ids)),))
        records = {"accuracy": RewardRecord(0.0, member + 1.0)}
        samples.append(Sample(0, member, None, each.prompt, made, turns=member + 1, records=records))
    return Taken([samples], [samples] * dropped)


def result(**stats: float) -> StepResult:
    return StepResult(loss=stats.pop("loss"), count=1, grad_norm=stats.pop("norm"), stats=stats)


def test_by_hand() -> None:
    rows = [
        row([-1.0, -2.0], [-1.0, -2.5], "stop"),
        row([-1.0], [-0.9], "length"),
        row([-3.0], [-3.0], "stop"),
        row([-1.0] * 4, [-1.0] * 4, "stop"),
    ]
    judged = {"accuracy": [1.0, 0.0, 0.0, 0.0], "format": [1.0, 1.0, 1.0, 1.0], "reward": [2.0, 1.0, 1.0, 1.0]}
    results = [
        result(loss=0.5, norm=2.0, num_tokens=6.0, kl_sum=0.6, entropy_sum=9.0, **FIRST),
        result(loss=-0.1, norm=1.0, num_tokens=2.0, kl_sum=0.2, entropy_sum=3.0, **SECOND),
    ]
    line = rollout_line(ALONE, rows, taken(rows, [4, 4, 2, 3], dropped=1), judged, results, group_size=2, update=4)
    want = {
        "accuracy": 0.25,
        "format": 1.0,
        "reward": 1.25,
        "response_length": 2.0,
        "truncated": 0.25,
        "turns": 2.5,
        "dropped_groups": 0.5,
        "staleness": (1 * 2 + 4 * 1) / 8,
        "staleness_max": 2.0,
        "slowest_reward_seconds": 4.0,
        "reward_std": (1.75 - 1.25**2) ** 0.5,
        "flat_groups": 0.5,
        "rollout_diff_mean": 0.6 / 8,
        "rollout_diff_max": 0.5,
        "kl": 0.1,
        "clip_share": 0.5,
        "clip_share_low": 0.125,
        "clip_share_high": 0.375,
        "dropped_share": 0.25,
        "is_weight": 0.75,
        "is_weight_max": 1.5,
        "ratio_max": 3.0,
        "entropy": 1.5,
        "loss": 0.2,
        "grad_norm": 1.5,
    }
    assert line == pytest.approx(want, abs=1e-6)


def test_tokens_of_an_environment_are_no_difference() -> None:
    mine = row([-1.0, 0.0, -1.0], [-1.5, -9.0, -1.0], "stop")
    mine.own = [True, False, True]
    line = rollout_line(ALONE, [mine, mine], taken([mine, mine], [0, 0]), {"reward": [0.0, 1.0]}, [], group_size=2, update=0)
    assert (line["rollout_diff_mean"], line["rollout_diff_max"]) == (0.25, 0.5) and line["response_length"] == 3


def test_sums_are_over_all_ranks() -> None:
    two = SimpleNamespace(**{**vars(ALONE), "sum": lambda values: 2 * values})  # another rank with the same numbers
    rows, judged = [row([-1.0], [-1.0], "stop"), row([-1.0], [-1.0], "stop")], {"reward": [1.0, 0.0]}
    stats = result(loss=0.0, norm=0.0, num_tokens=2.0, kl_sum=0.0, entropy_sum=0.0, **FIRST)
    both = [rollout_line(mesh, rows, taken(rows, [0, 1]), judged, [stats], 2, 3) for mesh in (two, ALONE)]
    assert both[0] == pytest.approx(both[1])


def test_mean_load() -> None:
    loads = [[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [0.0, 1.0]]]
    results = [StepResult(0.0, 1, 0.0, expert_load=load) for load in loads]
    assert mean_load(results) == [[0.375, 0.625], [0.5, 0.5]]
    assert mean_load([StepResult(0.0, 1, 0.0)]) == []
