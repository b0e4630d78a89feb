"""A loss that is not sound: noticed by all ranks, skipped or rolled back, logged; the run goes on or says why not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.data.loader import PretrainLoader
from r1mega.mesh import close_mesh
from r1mega.model.forward import token_losses
from r1mega.testing.ranks import run_ranks
from r1mega.train import checkpoint, fit
from r1mega.train.health import Health
from r1mega.train.pretrain import pretrain
from r1mega.train.trainee import Trainee
from tests.train.cases import LENGTH, MODEL, OPTIM, lines, one_rank, pretrain_config, stored


def test_what_is_called_a_spike() -> None:
    health = Health(sigma=6.0, window=8)
    for loss in (2.0, 2.1, 1.9):
        assert health.judge(99.0, 1.0) == "", "too little is known"
        health.sound(loss)
    health.sound(2.0)
    assert health.judge(2.4, 1.0) == "" and health.judge(0.1, 1e9) == ""
    assert "loss 2.7 is 9.9 standard deviations above 2, the mean of 4 steps" in health.judge(2.7, 1.0)
    for loss, norm in ((float("nan"), 1.0), (float("inf"), 1.0), (2.0, float("nan")), (2.0, float("inf"))):
        assert "not both finite" in health.judge(loss, norm)
    calm = Health(sigma=6.0, window=8)
    for _ in range(8):
        calm.sound(2.0)
    assert calm.judge(2.1, 1.0) == "" and calm.judge(2.13, 1.0), "a deviation counts as 1% of the mean at least"
    assert Health(sigma=0.0).judge(1e30, 1.0) == ""


def test_the_limit_and_what_is_saved() -> None:
    health = Health(window=4, limit=2)
    for _ in range(2):
        health.trouble("x")
    other = Health(window=4, limit=2)
    other.load_state_dict(json.loads(json.dumps(health.state_dict())))
    for judged in (health, other):
        with pytest.raises(UserError, match="at most 2 spikes in a row; got one more, loss nan; lower optim.lr"):
            judged.trouble("loss nan")
    again = Health(window=4, limit=2)
    again.trouble("x")
    for loss in (0.1, 0.2, 0.3, 0.4, 0.5):
        again.sound(loss)
    assert again.troubles == 0 and again.state_dict()["losses"] == [0.2, 0.3, 0.4, 0.5]
    again.trouble("x")
    again.load_state_dict(Health(window=4).state_dict(), keep_troubles=True)
    assert again.troubles == 1 and not again.losses


def broken_from(monkeypatch, call: int, until: int, value: float) -> None:
    """The loss of microbatches ``call`` to ``until - 1`` of the process (0-based) is multiplied by ``value``."""
    true, calls = fit.masked_sum, iter(range(1_000_000))

    def sometimes(losses_BS, batch):
        total, count, stats = true(losses_BS, batch)
        return (total * value if call <= next(calls) < until else total), count, stats

    monkeypatch.setattr(fit, "masked_sum", sometimes)


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("value", [float("nan"), 1e4])
def test_a_step_that_is_wrong_changes_nothing(train_data: Path, value: float) -> None:
    mesh = one_rank()
    trainee = Trainee(MODEL, OPTIM, mesh, "fp32")
    loader = PretrainLoader({str(train_data / "text"): 1.0}, LENGTH, 8, seed=1)

    def step(factor: float, judge):
        parts = fit.tensors(loader.next(), 4, mesh, segments=False)

        def loss(losses_BS, batch):
            total, count, stats = fit.masked_sum(losses_BS, batch)
            return total * factor, count, stats

        return trainee.step(parts, token_losses, loss, 1e-3, judge)

    def state():
        moments = [
            value.clone()
            for part in trainee.optimizer.chained_optimizers
            for held in part.optimizer.state.values()
            for value in held.values()
        ]
        return [tensor.clone() for _, tensor in trainee.named_tensors()] + moments

    judge = Health(sigma=6.0, window=8)
    for _ in range(4):
        assert not step(1.0, judge.judge).trouble
        judge.sound(5.6)
    before = state()
    result = step(value, judge.judge)
    assert ("not both finite" if value != value else "standard deviations above") in result.trouble
    assert all(torch.equal(old, new) for old, new in zip(before, state(), strict=True))
    assert not step(1.0, judge.judge).trouble
    assert not all(torch.equal(old, new) for old, new in zip(before, state(), strict=True))


def test_a_wrong_step_is_skipped_and_logged(train_data: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    broken_from(monkeypatch, 4, 6, float("nan"))  # two microbatches a step: the third step
    result = pretrain(pretrain_config(train_data, tmp_path / "run", 5))
    told = lines(tmp_path / "run")
    assert result["steps"] == 5 and [line["step"] for line in told] == [1, 2, 3, 3, 4, 5]
    (event,) = [line for line in told if "event" in line]
    assert event["event"] == "step skipped" and event["step"] == 3 and "loss nan" in event["reason"]
    skipped = [line for line in told if line["step"] == 3 and "event" not in line]
    assert "lm_loss" not in skipped[0] and skipped[0]["lr"] > 0, "what is not a number is left out"
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    assert "step 3: loss nan and gradient norm nan are not both finite; step skipped" in capfd.readouterr().err
    assert all(torch.isfinite(tensor).all() for tensor in stored(result["checkpoint"]).values())


def test_a_roll_back_goes_on_with_other_data(train_data: Path, tmp_path: Path, monkeypatch) -> None:
    """Broken at step 4 after a checkpoint at 3: the same as a run whose data lacks the fourth batch."""
    with monkeypatch.context() as patch:
        broken_from(patch, 6, 8, float("inf"))
        result = pretrain(pretrain_config(train_data, tmp_path / "run", 6, save_every=3, on_spike="rollback"))
    told = lines(tmp_path / "run")
    assert [line["step"] for line in told] == [1, 2, 3, 4, 4, 5, 6]
    assert [line["event"] for line in told if "event" in line] == ["rolled back to step 3"]
    true = PretrainLoader.next

    def without_the_fourth(self, rows):
        batch = true(self, rows)
        self.calls = getattr(self, "calls", 0) + 1
        return true(self, rows) if self.calls == 4 else batch

    monkeypatch.setattr(PretrainLoader, "next", without_the_fourth)
    other = pretrain(pretrain_config(train_data, tmp_path / "other", 6, save_every=3))
    assert_equal(stored(result["checkpoint"]), stored(other["checkpoint"]))
    assert checkpoint.read_state(Path(result["checkpoint"]))["cursor"] == checkpoint.read_state(Path(other["checkpoint"]))["cursor"]


def test_a_roll_back_without_a_checkpoint_skips(train_data: Path, tmp_path: Path, monkeypatch) -> None:
    broken_from(monkeypatch, 0, 2, float("nan"))
    assert pretrain(pretrain_config(train_data, tmp_path / "run", 2, on_spike="rollback"))["steps"] == 2
    assert lines(tmp_path / "run")[0]["event"] == "step skipped"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"on_spike": "stop"}, r"training: sound losses with trainer.on_spike=stop; got loss nan .* at step 2; lower optim.lr, or"),
        ({"on_spike": "skip", "spike_limit": 2}, r"training: at most 2 spikes in a row; got one more, loss nan"),
        ({"on_spike": "rollback", "spike_limit": 2}, r"training: at most 2 spikes in a row; got one more, loss nan"),
    ],
)
def test_a_run_that_cannot_be_helped_ends(train_data: Path, tmp_path: Path, monkeypatch, fields, says) -> None:
    broken_from(monkeypatch, 2, 99, float("nan"))
    with pytest.raises(UserError, match=says):
        pretrain(pretrain_config(train_data, tmp_path / "run", 9, save_every=1, **fields))
    assert pretrain(pretrain_config(train_data, tmp_path / "run", 1, save_every=1))["steps"] >= 1, "what was saved is whole"


def ranks_disagree(data: str, out: str) -> tuple[int, list[dict], list[float]]:
    """Only the second rank's loss is broken, and only its judge sees it: both skip."""
    import os

    rank, true = int(os.environ["RANK"]), Health.judge
    seen = iter(range(1_000))
    Health.judge = lambda self, loss, norm: "made up" if rank == 1 and next(seen) == 1 else true(self, loss, norm)
    config = pretrain_config(Path(data), Path(out), 3)
    result = pretrain(config)
    weights = stored(result["checkpoint"])
    told = lines(Path(out)) if rank == 0 else []
    close_mesh()
    return result["steps"], told, [float(weights[name].double().sum()) for name in sorted(weights)]


@pytest.mark.slow
def test_all_ranks_notice_together(train_data: Path, tmp_path: Path) -> None:
    first, second = run_ranks(ranks_disagree, 2, str(train_data), str(tmp_path / "run"))
    assert first[0] == second[0] == 3 and first[2] == second[2]
    (event,) = [line for line in first[1] if "event" in line]
    assert (event["step"], event["reason"]) == (2, "another rank found a trouble")


def test_a_spike_in_a_run_after_a_resume(train_data: Path, tmp_path: Path, monkeypatch) -> None:
    """What is known of earlier losses is part of the checkpoint: the first step after it can be called a spike."""
    fields = {"save_every": 4, "spike_window": 8}
    config = pretrain_config(train_data, tmp_path / "run", 4, **fields)
    config.optim = replace(OPTIM, decay="constant")
    pretrain(config)
    broken_from(monkeypatch, 0, 2, 100.0)
    config = pretrain_config(train_data, tmp_path / "run", 6, **fields)
    config.optim = replace(OPTIM, decay="constant")
    pretrain(config)
    (event,) = [line for line in lines(tmp_path / "run") if "event" in line]
    assert event["step"] == 5 and "the mean of 4 steps" in event["reason"]
