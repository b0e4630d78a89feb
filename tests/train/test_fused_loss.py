"""``parallel.fused_loss``: a step of pretraining or RL that never holds the logits of all words is the step that does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from r1mega.config.run import LaunchConfig, ParallelConfig
from r1mega.device import open_device
from r1mega.mesh import close_mesh, open_mesh
from r1mega.model import head
from r1mega.model.forward import TokenTensors, token_losses
from r1mega.model.outputs import Hidden
from r1mega.rl.logprobs import token_logprobs
from r1mega.train.fit import masked_sum
from r1mega.train.policy import Policy
from r1mega.train.trainee import Trainee
from tests.train.cases import CPU, LENGTH, MODEL, OPTIM

WIDE = replace(MODEL, vocab_size=1200, vocab_padding=56)
"""Three pieces of words with :func:`pieces`."""


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(head, "PIECE_LOGITS", 1)
    yield
    close_mesh()


def mesh(fused: bool):
    """With the generators at the same place, so that fresh weights are the same."""
    close_mesh()
    torch.manual_seed(7)
    return open_mesh(open_device(CPU), ParallelConfig(fused_loss=fused), LaunchConfig(), 1)


def drawn(seed: int) -> torch.Tensor:
    return torch.randint(3, 1100, (2, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


def assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert float((tensor - wanted[name]).norm()) <= 1e-5 * float(wanted[name].norm()) + 1e-8, name


@pytest.mark.parametrize("tied", [False, True])
def test_pretraining(tied: bool, monkeypatch) -> None:
    """MTP's loss and a tied head included."""
    results, weights = {}, {}
    model = replace(WIDE, tie_embeddings=tied)
    for fused in (False, True):
        made = []
        plain = head._Losses.forward
        monkeypatch.setattr(head._Losses, "forward", staticmethod(lambda *args: made.append(1) or plain(*args)))  # noqa: B023
        trainee = Trainee(model, OPTIM, mesh(fused), "fp32")
        batches = [TokenTensors(rows[:, :-1], rows[:, 1:], torch.ones(2, LENGTH)) for rows in map(drawn, (1, 2))]
        results[fused] = [trainee.step(batches, token_losses, masked_sum, OPTIM.lr, lambda loss, norm: "") for _ in range(2)]
        weights[fused] = {name: tensor.clone() for name, tensor in trainee.named_tensors()}
        assert bool(made) == (not fused)
        monkeypatch.setattr(head._Losses, "forward", staticmethod(plain))
    for found, wanted in zip(results[True], results[False], strict=True):
        for name in ("loss", "mtp_loss", "grad_norm"):
            assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-5), name
    assert_near(weights[True], weights[False])


@dataclass
class Rows:
    """A microbatch of RL."""

    tokens_BS: torch.Tensor
    targets_BS: torch.Tensor


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_reinforcement(temperature: float) -> None:
    found = {}
    for fused in (False, True):
        policy = Policy(WIDE, OPTIM, mesh(fused), "fp32")
        batches = [Rows(rows[:, :-1], rows[:, 1:]) for rows in map(drawn, (3, 4))]

        def objective(output, batch):
            logprobs, entropy = token_logprobs(output, batch.targets_BS, temperature)
            return (logprobs * torch.linspace(-1, 1, LENGTH)).sum(), {"entropy": float(entropy.sum())}

        scores = policy.score(batches, lambda output, batch: token_logprobs(output, batch.targets_BS, temperature))
        assert policy.score(batches, lambda output, batch: isinstance(output, Hidden)) == [fused] * 2
        result = policy.update(batches, objective, OPTIM.lr, lambda loss, norm: "")
        weights = {name: tensor.clone() for name, tensor in policy.trainee.named_tensors()}
        found[fused] = scores, result, weights
    for (got, entropy), (want, its) in zip(found[True][0], found[False][0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy, its, rtol=1e-5, atol=1e-5)
    for name in ("loss", "grad_norm"):
        assert getattr(found[True][1], name) == pytest.approx(getattr(found[False][1], name), rel=1e-4), name
    assert found[True][1].stats == pytest.approx(found[False][1].stats, rel=1e-5)
    assert_near(found[True][2], found[False][2])
