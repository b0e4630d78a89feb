"""AdamW with bf16 moments under Megatron's distributed optimizer: it learns, resumes with the same bits, and moves between layouts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.config.run import ParallelConfig
from r1mega.mesh import close_mesh
from r1mega.testing.ranks import run_ranks
from r1mega.train import checkpoint, fit
from r1mega.train.adamw import AdamW, use_moments
from r1mega.train.pretrain import pretrain
from r1mega.train.trainee import Trainee
from tests.train.cases import MODEL, OPTIM, lines, one_rank, pretrain_config, stored

BF16 = replace(OPTIM, moment_dtype="bf16")


class CutOff(Exception):
    """The process is gone."""


def run(data: Path, out: Path, *, optim=BF16, until: int | None = None, **degrees: int) -> None:
    """Six steps with a checkpoint at the third; gone before step ``until``."""
    config = pretrain_config(data, out, 6, micro_batch_size=2, save_every=3)
    config.optim, config.parallel = optim, ParallelConfig(**degrees)
    rate = fit.learning_rate

    def cut(optim, now, steps):
        if now == until:
            raise CutOff
        return rate(optim, now, steps)

    fit.learning_rate = cut
    try:
        pretrain(config)
    except CutOff:
        pass
    finally:
        fit.learning_rate = rate
        close_mesh()


def on_two_ranks(data: Path, out: Path) -> None:
    run(data, out, expert=2)


@pytest.fixture(scope="module")
def straight(train_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adamw") / "straight"
    run(train_data, out)
    return out


def moments(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if ".exp_avg" in name}


def test_the_checkpoint_holds_bf16_numbers_in_fp32(straight: Path, train_data: Path, tmp_path: Path) -> None:
    run(train_data, tmp_path / "fp32", optim=OPTIM)
    ours, plain = (stored(checkpoint.resolve(out)) for out in (straight, tmp_path / "fp32"))
    assert {name: (value.dtype, value.shape) for name, value in ours.items()} == {
        name: (value.dtype, value.shape) for name, value in plain.items()
    }
    held = moments(ours)
    assert len(held) > 10 and all(torch.equal(value, value.bfloat16().float()) for value in held.values())
    assert not all(torch.equal(value, value.bfloat16().float()) for value in moments(plain).values())
    losses, others = ([line["loss"] for line in lines(out) if "loss" in line] for out in (straight, tmp_path / "fp32"))
    assert losses[-1] < losses[0] and losses == pytest.approx(others, rel=1e-2)


def test_a_run_that_was_cut_off_ends_with_the_same_bits(straight: Path, train_data: Path, tmp_path: Path) -> None:
    run(train_data, tmp_path / "cut", until=5)
    run(train_data, tmp_path / "cut")
    want, got = (stored(checkpoint.resolve(out)) for out in (straight, tmp_path / "cut"))
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.slow
def test_two_ranks_go_on_from_one(straight: Path, train_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "moved"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    run_ranks(on_two_ranks, 2, train_data, out)
    want, got = (stored(checkpoint.resolve(place)) for place in (straight, out))
    assert want.keys() == got.keys()
    assert all(torch.equal(value, value.bfloat16().float()) for value in moments(got).values())
    for name in want:
        if ".param." in name:
            torch.testing.assert_close(got[name], want[name], atol=2e-4, rtol=0)


def test_a_checkpoint_of_fp32_moments_is_rounded_once(seed_run: Path) -> None:
    wide, narrow = (Trainee(MODEL, optim, one_rank(), "fp32") for optim in (OPTIM, BF16))
    for trainee in (wide, narrow):
        checkpoint.load(trainee, checkpoint.resolve(seed_run))
    pairs = 0
    for one, other in zip(wide.optimizer.chained_optimizers, narrow.optimizer.chained_optimizers, strict=True):
        assert isinstance(other.optimizer, AdamW)
        for ours, theirs in zip(other.optimizer.state.values(), one.optimizer.state.values(), strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                assert ours[name].dtype == torch.bfloat16 and torch.equal(ours[name], theirs[name].bfloat16())
                pairs += 1
            assert ours["step"] == theirs["step"] == 1
    assert pairs > 10


def test_another_optimizer_inside_is_refused() -> None:
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1e-3)
    with pytest.raises(UserError, match="got torch.optim.sgd.SGD; use optim.moment_dtype=fp32"):
        use_moments(SimpleNamespace(optimizer=inner), torch.bfloat16)
    use_moments(SimpleNamespace(optimizer=inner), torch.float32)  # another package's, which stays
    begun = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1e-3)
    begun.state["weight"] = {"step": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="before its first step, got one with 1 states"):
        use_moments(SimpleNamespace(optimizer=begun), torch.float32)
    use_moments(SimpleNamespace(optimizer=None), torch.bfloat16)  # a rank without weights


def test_variants_of_torch_are_refused() -> None:
    with pytest.raises(ValueError, match="expected none of torch's other variants, got amsgrad"):
        AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1e-3, amsgrad=True)
