"""What the loop does with lengths, masks, batch baselines and the other losses; one process."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from r1mega.config.rl import OverlongConfig
from r1mega.rl.advantage import BatchAdvantage
from r1mega.rl.batch import RolloutRow, microbatches
from r1mega.rl.loop import rl
from r1mega.rl.loss import CispoLoss, DapoLoss, GspoLoss
from r1mega.rl.run import Run
from r1mega.rl.setup import open_policy, open_run_mesh
from r1mega.rl.types import Completion
from r1mega.train import checkpoint
from tests.rl.test_loop import Digits, config, digits, loop, place, same, taken, weights  # noqa: F401  fixtures
from tests.train.cases import lines


def test_a_batch_baseline_is_over_all_data_ranks() -> None:
    theirs, ours, counts = [0.0, 1.0, 1.0, 1.0], [4.0, 2.0, 0.0, 0.0], [True, False, True, True]

    def gather_objects(mine):
        assert mine == (ours, counts)
        return [(theirs, [True] * 4), mine]

    run = SimpleNamespace(
        mesh=SimpleNamespace(gather_objects=gather_objects, data_rank=1),
        sizes=SimpleNamespace(group_size=2),
        advantages=BatchAdvantage().build(),
    )
    got = Run.advantages_of(run, ours, counts)
    counted = torch.tensor([*theirs, 4.0, 0.0, 0.0])
    want = (torch.tensor(ours) - counted.mean()) / counted.std(correction=0)
    assert got == pytest.approx([want[0].item(), 0.0, want[2].item(), want[3].item()], rel=1e-5)


def test_rows_that_do_not_count_are_in_no_sum() -> None:
    rows = [
        RolloutRow([1, 2], Completion([3, 4], [-0.5, -0.25], "length"), counts=False, old=torch.tensor([-1.0, -2.0])),
        RolloutRow([1], Completion([5, 6, 7], [-1.0, -2.0, -3.0], "stop"), teacher=torch.tensor([-1.0, -1.5, -2.5])),
    ]
    (batch,) = microbatches(rows, 2, 9, torch.device("cpu"))
    assert batch.mask_BS.tolist() == [[False] * 3, [True] * 3] and batch.lengths_B.tolist() == [0, 3]
    assert [values.tolist() for values in batch.split(batch.rollout_BS)] == [[-0.5, -0.25], [-1.0, -2.0, -3.0]], "all are scored"
    assert batch.teacher_BS is None, "one row has none"
    given = batch.loss_input(torch.zeros(2, 3), 1, 3, 12)
    assert given.rollout_BS is batch.rollout_BS and given.lengths_B is batch.lengths_B and given.max_tokens == 12
    assert given.over_sequence(torch.tensor([2.0, 3.0])).tolist() == [2.0, 3.0]
    (alone,) = microbatches(rows[1:], 2, 9, torch.device("cpu"))
    assert alone.teacher_BS.tolist() == [[-1.0, -1.5, -2.5]]


def test_overlong_responses_are_punished_and_truncated_ones_do_not_count(loop) -> None:  # noqa: F811
    run = loop(overlong=OverlongConfig(cache_tokens=4, penalty=0.5, mask_truncated=True))
    made = run.take()
    made.samples[0].completion = Completion([30, 31, 32], [-1.0] * 3, "stop")
    made.samples[1].completion = Completion([30] * 6, [-1.0] * 6, "length")
    rows, judged = run.value(made)
    assert judged["overlong"][:2] == [-0.125, -0.5]
    for row, punished, reward, accuracy in zip(rows, judged["overlong"], judged["reward"], judged["accuracy"], strict=True):
        assert reward == pytest.approx(accuracy + punished)
        assert row.counts == (row.completion.finish_reason != "length") and (row.counts or row.advantage == 0)
    run.learner.score(rows)
    trained = sum(result.stats["num_tokens"] for result in run.learner.train(rows, 0))
    counted = sum(len(row.completion.token_ids) for row in rows if row.counts)
    assert 0 < trained == counted < sum(len(row.completion.token_ids) for row in rows)


def test_a_minibatch_of_truncated_responses_has_no_loss(loop) -> None:  # noqa: F811
    run = loop(overlong=OverlongConfig(mask_truncated=True))
    made = run.take()
    for sample in made.samples:
        sample.completion = Completion([30] * 6, [-1.0] * 6, "length")
    rows, _ = run.value(made)
    run.learner.score(rows)
    for result in run.learner.train(rows, 0):  # what gradient there is, is the balance loss's
        assert result.loss == 0 and not result.trouble and result.stats["num_tokens"] == 0


@pytest.mark.parametrize("choice", [
    DapoLoss(correction="truncate", dual_clip=3.0),
    GspoLoss(correction="mask", correction_level="sequence", clip_low=0.2, clip_high=0.2),
    CispoLoss(offpolicy_mask=0.5, aggregation="constant"),
])  # fmt: skip
def test_other_losses_train(place: Path, digits, tmp_path: Path, choice) -> None:  # noqa: F811
    """Without a KL there is no reference; the metric line says what the corrections did: next to nothing with this engine."""
    settings = config(place, tmp_path / "run")
    settings.policy_loss, settings.advantage = choice, BatchAdvantage(group_baseline=True)
    rl(settings)
    for line in lines(tmp_path / "run"):
        assert line["kl"] == 0 and line["dropped_share"] == 0
        assert line["is_weight"] == pytest.approx(1, abs=1e-3) and 1 - 1e-3 < line["is_weight_max"] < 1 + 1e-2
        assert line["ratio_max"] >= 1 and line["clip_share"] == line["clip_share_low"] + line["clip_share_high"]
        assert line["grad_norm"] > 0
    assert not list((tmp_path / "run").rglob("reference"))


def test_a_teacher_pulls_the_policy_to_itself(place: Path, digits, tmp_path: Path) -> None:  # noqa: F811
    """On-policy distillation alone, no reward: the student's log-probabilities of what it drew go towards the teacher's."""
    untaught = config(place, tmp_path / "teacher", rollouts=1)
    untaught.policy_loss, untaught.optim = DapoLoss(), replace(untaught.optim, lr=3e-3, warmup_steps=0)
    rl(untaught)
    settings = config(place, tmp_path / "student", rollouts=6, updates_per_rollout=1)
    settings.teacher = str(checkpoint.latest(tmp_path / "teacher/checkpoints"))
    settings.policy_loss, settings.advantage = DapoLoss(distill_coef=1.0), Nothing()
    settings.optim = replace(settings.optim, lr=1e-3, warmup_steps=0)
    mesh, init = open_run_mesh(settings), checkpoint.resolve(place / "seed")
    seed = {name: value.clone() for name, value in open_policy(settings, init, mesh, None, {}).trainee.named_tensors()}
    with ExitStack() as stack:
        run = Run(settings, mesh, init, Digits(), stack)
        start = weights(run)
        assert not same(start, run.policy._teacher) and same(start, seed), "the policy begins with its own weights"
        run.push()
        rows, _ = taken(run)

        def gap() -> float:
            run.learner.score(rows)
            return torch.cat([row.old - row.teacher for row in rows]).abs().mean().item()

        before = gap()
        taught = {name: tensor.clone() for name, tensor in run.policy._teacher.items()}
        for rollout in range(4):
            run.learner.train(rows, rollout)
        assert gap() < 0.9 * before and same(taught, run.policy._teacher)


class Nothing:
    """An advantage of 0 for all."""

    def build(self):
        return lambda rewards_PG, mask_PG=None: torch.zeros(rewards_PG.shape)
