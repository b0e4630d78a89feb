"""RL's reference policy in checkpoints: it comes back beside the policy, where somebody wants it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from r1mega.train import checkpoint
from r1mega.train.lineage import Lineage
from r1mega.train.policy import Policy
from r1mega.train.saving import Saver, TrainState
from tests.train.cases import MODEL, OPTIM, one_rank, stored


def fresh(dtype: str, factor: float, has_reference: bool = True) -> Policy:
    """A policy whose weights and whose reference are ``factor`` times those of a start."""
    policy = Policy(MODEL, OPTIM, one_rank(), dtype)
    change(policy, lambda tensor: tensor.mul_(factor))
    if has_reference:
        policy.copy_to_reference()
    return policy


def change(policy: Policy, how) -> None:
    with torch.no_grad():
        for _, tensor in policy.trainee.named_tensors():
            how(tensor)


def held(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.trainee.named_tensors()}


def saved(policy: Policy, folder: Path, background: bool = False) -> Path:
    with Saver(one_rank(), folder, Lineage("rl", "test"), background=background, keep_last=2) as saver:
        path = policy.save(saver, TrainState(3))
        saver.wait()
    return path


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_come_back(tmp_path: Path, dtype: str, capsys) -> None:
    policy = fresh(dtype, 1.0)
    change(policy, lambda tensor: tensor.add_(0.5))
    policy.trainee.optimizer.reload_model_params()
    own = held(policy)
    with policy.as_reference():
        reference = held(policy)
    assert not same(own, reference) and same(held(policy), own)
    path = saved(policy, tmp_path / "one")
    assert same(held(policy), own)
    assert {"__0_0.distcp", "common.pt", ".metadata", "metadata.json"} == {file.name for file in (path / "reference").iterdir()}

    again = fresh(dtype, 3.0)
    again.load(path, weights_only=False)
    assert same(held(again), own)
    with again.as_reference():
        assert same(held(again), reference)
    twice = saved(again, tmp_path / "two", background=True)
    for folder in ("weights", "reference"):
        assert same(stored(path, folder), stored(twice, folder)), "main parameters and moments too"

    without = fresh(dtype, 3.0, has_reference=False)
    without.load(path, weights_only=False)
    assert same(held(without), own)
    plain = saved(without, tmp_path / "three")
    assert not (plain / "reference").exists()

    kept = fresh(dtype, 3.0)
    capsys.readouterr()
    kept.load(plain, weights_only=False)
    assert capsys.readouterr().err == f"checkpoint {plain}: without a reference; the KL is to the policy that the run began with\n"
    assert same(held(kept), own)
    with kept.as_reference():
        assert same(held(kept), held(fresh(dtype, 3.0)))

    torch.save(reference, path / "reference.pt")  # as it was before
    shutil.rmtree(path / "reference")
    older = fresh(dtype, 3.0)
    older.load(path, weights_only=False, verified=True)
    assert same(held(older), own)
    with older.as_reference():
        assert same(held(older), reference)
    assert checkpoint.read_state(path)["step"] == 3
