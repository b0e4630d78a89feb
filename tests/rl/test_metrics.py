"""One metric line of a rollout, by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from r1mega.rl.batch import RolloutRow
from r1mega.rl.metrics import Pace, mean_load, rollout_line, source_line
from r1mega.rl.rollouts import Busy, Taken
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
        "response_length_max": 4.0,
        "responses": 4,
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
    assert [line.pop("responses") for line in both] == [4, 2]
    assert both[0] == pytest.approx(both[1])


def test_rewards_by_source_are_over_all_ranks() -> None:
    def sample(source: str) -> Sample:
        return Sample(0, 0, SimpleNamespace(source=source), [1], Completion([2], [0.0], "stop"))

    other = {"gsm8k": (3.0, 1), "elsewhere": (0.5, 2)}
    line = source_line(lambda mine: [mine, other], [sample("gsm8k"), sample("sums"), sample("gsm8k")], [1.0, 0.25, 2.0])
    assert line == {"reward/elsewhere": 0.25, "reward/gsm8k": 2.0, "reward/sums": 0.25} and list(line) == sorted(line)


def test_a_stopwatch_of_what_runs_side_by_side(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("r1mega.rl.rollouts.time.perf_counter", lambda: now[0])
    busy = Busy()
    now[0] = 5.0
    with busy:
        now[0] = 6.0
        with busy:
            now[0] = 8.0
        busy.pause(True)
        now[0] = 20.0
        assert busy.seconds == 3.0
        busy.pause(False)
        now[0] = 21.0
    now[0] = 30.0
    assert busy.seconds == 4.0


def test_pace_is_what_has_grown_since_the_line_before(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("r1mega.rl.metrics.time.perf_counter", lambda: now[0])
    made = SimpleNamespace(
        tokens=100,
        busy=SimpleNamespace(seconds=1.0),
        judge=SimpleNamespace(seconds=0.5),
        engine=SimpleNamespace(counts={"deaths": 1}),
    )
    others = {"tokens": 50.0, "busy_seconds": 4.0, "reward_seconds": 0.25, "engine_requests": 3, "engine_deaths": 2}
    pace = Pace(SimpleNamespace(gather_everywhere=lambda mine: [mine, others, {}]), made)
    made.tokens, made.busy.seconds, made.judge.seconds, made.engine.counts = 250, 3.0, 1.5, {"deaths": 2, "requests": 7}
    now[0] = 10.0
    line = pace.line({"score": 1.0, "train": 3.0, "push": 9.0}, trained_tokens=600)
    assert line == {
        "generated_tokens_per_second": (150 + 50) / 4.0,
        "engine_idle_share": pytest.approx(0.6),
        "tokens_per_second": 150.0,
        "reward_seconds": 1.0,
        "engine_requests": 10,
        "engine_deaths": 2,
    }
    again = pace.line({}, 0)
    assert again["generated_tokens_per_second"] == 50 / 4.0 and again["reward_seconds"] == 0.25, "the rank's own stood still"


def test_a_rank_without_an_engine_has_nothing_to_tell() -> None:
    pace = Pace(SimpleNamespace(gather_everywhere=lambda mine: [mine]), None)
    line = pace.line({"train": 2.0}, 10)
    assert (line["generated_tokens_per_second"], line["tokens_per_second"], line["engine_idle_share"]) == (0.0, 5.0, 1.0)


def test_mean_load() -> None:
    loads = [[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [0.0, 1.0]]]
    results = [StepResult(0.0, 1, 0.0, expert_load=load) for load in loads]
    assert mean_load(results) == [[0.375, 0.625], [0.5, 0.5]]
    assert mean_load([StepResult(0.0, 1, 0.0)]) == []
