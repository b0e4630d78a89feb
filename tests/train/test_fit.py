"""The loop of pretraining and SFT: what is learnt, what is logged, that a cut-off run goes on bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1mega import api
from r1mega.config.errors import UserError
from r1mega.data.loader import PretrainLoader, SftLoader
from r1mega.data.tokenizer import train_tokenizer
from r1mega.model.forward import TokenTensors, token_losses
from r1mega.train import fit
from r1mega.train.checkpoint import latest
from r1mega.train.pretrain import pretrain
from r1mega.train.sft import sft, tuned_model
from r1mega.train.trainee import Trainee
from tests.train.cases import LENGTH, MODEL, OPTIM, lines, one_rank, pretrain_config, sft_config, stored

TIMED = {"tokens_per_second", "mfu", "step_seconds", "peak_gib", "save_stall_seconds"}


def sound(loss: float, grad_norm: float) -> str:
    """A judge that finds nothing wrong."""
    return ""


class CutOff(Exception):
    """The process is gone."""


@pytest.fixture
def cut_after(monkeypatch):
    """Make the next run end before optimizer step ``step`` (0-based)."""

    def arm(step: int) -> None:
        rate = fit.learning_rate

        def until(optim, now, steps):
            if now == step:
                monkeypatch.setattr(fit, "learning_rate", rate)
                raise CutOff
            return rate(optim, now, steps)

        monkeypatch.setattr(fit, "learning_rate", until)

    return arm


def assert_same_runs(left: Path, right: Path) -> None:
    ours, theirs = (stored(latest(run / "checkpoints")) for run in (left, right))
    assert (
        ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours) and any("expert_bias" in name for name in ours)
    )
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not differing, f"not bit for bit: {differing}"
    told = [[{key: value for key, value in line.items() if key not in TIMED} for line in lines(run)] for run in (left, right)]
    assert told[0] == told[1]


def test_pretraining_learns_a_repetitive_text_and_says_so(train_data: Path, tmp_path: Path) -> None:
    config = pretrain_config(train_data, tmp_path / "run", 30, valid_every=10, log_every=5)
    config.optim = replace(OPTIM, lr=1e-2, min_lr=1e-3)
    result = pretrain(config)
    told = lines(tmp_path / "run")
    assert [line["step"] for line in told] == [1, 5, 10, 15, 20, 25, 30]
    assert told[0]["lm_loss"] > 4.5 and told[-1]["lm_loss"] < 1.5 and told[-1]["mtp_loss"] < told[0]["mtp_loss"] - 1
    assert [line["step"] for line in told if "valid_loss" in line] == [10, 20, 30]
    assert result["valid_loss"] == pytest.approx(told[-1]["valid_loss"], rel=1e-4) and result["valid_loss"] < 1.5
    assert (result["steps"], result["tokens"]) == (30, 30 * 8 * LENGTH) and told[-1]["tokens"] == result["tokens"]
    for line in told:
        assert len(line["expert_load"]) == 1 and sum(line["expert_load"][0]) == pytest.approx(1, abs=1e-4)
        assert line["loss"] == pytest.approx(line["lm_loss"] + 0.3 * line["mtp_loss"] + 1e-4 * line["aux_loss"], rel=1e-4)
        assert line["tokens_per_second"] > 0 and line["mfu"] > 0 and line["peak_gib"] > 0 and line["grad_norm"] > 0
    assert told[0]["lr"] == pytest.approx(5e-3) and told[1]["lr"] < 1e-2
    assert result["checkpoint"] == str(tmp_path / "run/checkpoints/step-00000030")


def test_a_pretraining_that_is_cut_off_goes_on_bit_for_bit(train_data: Path, tmp_path: Path, cut_after) -> None:
    config = {name: pretrain_config(train_data, tmp_path / name, 6, save_every=3) for name in ("straight", "cut")}
    pretrain(config["straight"])
    cut_after(5)
    with pytest.raises(CutOff):
        pretrain(config["cut"])
    assert [line["step"] for line in lines(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    pretrain(config["cut"])
    assert_same_runs(tmp_path / "straight", tmp_path / "cut")
    before = (tmp_path / "cut/metrics.jsonl").read_bytes()
    again = pretrain(config["cut"])
    assert again["steps"] == 6 and (tmp_path / "cut/metrics.jsonl").read_bytes() == before, "a finished run has nothing to do"


def test_an_sft_that_is_cut_off_goes_on_bit_for_bit(train_data: Path, seed_run: Path, tmp_path: Path, cut_after) -> None:
    config = {name: sft_config(train_data, seed_run, tmp_path / name, 6, save_every=3) for name in ("straight", "cut")}
    result = sft(config["straight"])
    cut_after(4)
    with pytest.raises(CutOff):
        sft(config["cut"])
    sft(config["cut"])
    assert_same_runs(tmp_path / "straight", tmp_path / "cut")
    assert (Path(result["checkpoint"]) / "tokenizer/tokenizer.json").is_file()
    told = lines(tmp_path / "straight")
    assert told[-1]["lm_loss"] < told[0]["lm_loss"]


def test_a_prompt_alone_teaches_nothing() -> None:
    trainee = Trainee(replace(MODEL, seq_aux_loss_coef=0.0), OPTIM, one_rank(), "fp32")
    tokens = torch.randint(0, MODEL.vocab_size, (2, 12))
    silent = TokenTensors(tokens, tokens.roll(-1, 1), torch.zeros(2, 12), torch.ones(2, 12, dtype=torch.int32))
    result = trainee.step([silent, silent], token_losses, fit.masked_sum, 1e-3, sound)
    assert (result.grad_norm, result.loss, result.count) == (0.0, 0.0, 0)
    spoken = replace(silent, loss_mask_BS=torch.tensor([[0.0] * 6 + [1.0] * 6, [0.0] * 12]))
    result = trainee.step([spoken, silent], token_losses, fit.masked_sum, 0.0, sound)
    assert result.grad_norm > 0 and result.count == 6
    # the labels of a prompt do not matter, those of an answer do
    prompt, answer = tokens.roll(-1, 1), tokens.roll(-1, 1)
    prompt[0, :5] += 1
    answer[0, 8] = (answer[0, 8] + 1) % MODEL.vocab_size
    prompt %= MODEL.vocab_size
    same, other = (
        trainee.step([replace(spoken, labels_BS=labels), silent], token_losses, fit.masked_sum, 0.0, sound)
        for labels in (prompt, answer)
    )
    assert same.loss == result.loss and other.loss != result.loss


@pytest.mark.parametrize("kind, loader", [("samples", SftLoader), ("text", PretrainLoader)])
def test_the_step_is_the_same_however_rows_are_cut(train_data: Path, kind: str, loader) -> None:
    """The balance loss too: each row weighs the same, however many of its tokens are learnt."""
    batch = loader({str(train_data / kind): 1.0}, 48, 6, seed=1).next()
    assert (batch.loss_mask_BS.mean() == 1) == (kind == "text") and batch.loss_mask_BS.sum() > 0
    seen = {}
    for size in (6, 3, 1):
        mesh = one_rank()  # seeds the weights
        trainee = Trainee(replace(MODEL, seq_aux_loss_coef=0.1), OPTIM, mesh, "fp32")
        parts = fit.tensors(batch, size, mesh, segments=True)
        assert len(parts) == 6 // size and torch.equal(
            torch.cat([part.tokens_BS for part in parts]), torch.from_numpy(batch.tokens_BS)
        )
        seen[size] = trainee.step(parts, token_losses, fit.masked_sum, 1e-3, sound), dict(trainee.named_tensors())
    whole, weights = seen.pop(6)
    assert whole.count == int(batch.loss_mask_BS.sum())
    for result, others in seen.values():
        assert result.count == whole.count
        assert result.loss == pytest.approx(whole.loss, abs=1e-5) and result.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
        assert all(torch.allclose(others[name], tensor, atol=1e-5, rtol=0) for name, tensor in weights.items())


def test_a_text_of_another_tokenizer_is_refused(train_data: Path, tmp_path: Path) -> None:
    other = train_tokenizer(["abc abc abc"], tmp_path / "other", vocab_size=268)
    config = pretrain_config(train_data, tmp_path / "run", 1)
    config.tokenizer = str(other.path)
    with pytest.raises(UserError, match="share one tokenizer"):
        pretrain(config)
    small = pretrain_config(train_data, tmp_path / "small", 1, model=replace(MODEL, vocab_size=200))
    with pytest.raises(UserError, match="vocabulary holds the tokenizer's"):
        pretrain(small)


def test_sft_changes_training_fields_alone(seed_run: Path) -> None:
    path = latest(seed_run / "checkpoints")
    assert tuned_model(path, {"mtp_loss_coef": 0.1}) == replace(MODEL, mtp_loss_coef=0.1)
    with pytest.raises(UserError, match="model.num_layers: .*training fields alone"):
        tuned_model(path, {"num_layers": 3})


def test_a_run_that_goes_on_tells_what_is_new(train_data: Path, tmp_path: Path, capfd) -> None:
    config = pretrain_config(train_data, tmp_path / "run", 2)
    api.pretrain(config)
    assert "going on" not in capfd.readouterr().err
    config = pretrain_config(train_data, tmp_path / "run", 3)
    config.optim = replace(OPTIM, lr=1e-3)
    config.launch = replace(config.launch, timeout_seconds=99.0)
    api.pretrain(config)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("going on")]
    assert told == [
        "going on with optim.lr=0.001, which was 0.002 until here",
        "going on with trainer.steps=3, which was 2 until here",
    ]
