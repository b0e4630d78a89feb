"""What one optimizer step counts and sums: items, batches without any, which weights' buffers are overwritten, skipped collectives."""

from __future__ import annotations

import pytest
import torch

from r1mega.model.forward import TokenTensors, token_losses
from r1mega.train import gradients
from r1mega.train.fit import masked_sum
from r1mega.train.trainee import Trainee
from tests.train.cases import LENGTH, MODEL, OPTIM, one_rank


def batch(mask: float) -> TokenTensors:
    rows = torch.randint(3, MODEL.vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return TokenTensors(rows[:, :-1], rows[:, 1:], torch.full((2, LENGTH), mask))


def step(trainee: Trainee, mask: float, loss=masked_sum):
    return trainee.step([batch(mask)], token_losses, loss, OPTIM.lr, lambda loss, norm: "")


@pytest.fixture(scope="module")
def trainee() -> Trainee:
    return Trainee(MODEL, OPTIM, one_rank(), "fp32")


def test_a_loss_that_counts_other_items_than_its_batch_is_told(trainee: Trainee) -> None:
    def miscounted(losses, given):
        return losses.sum(), 1, {}

    with pytest.raises(
        ValueError, match=f"expected as many items as the batches count, {2 * LENGTH}, got 1; give a batch a num_learnt"
    ):
        step(trainee, 1.0, miscounted)


def test_a_batch_without_a_learnt_token_moves_nothing(trainee: Trainee) -> None:
    result = step(trainee, 0.0)
    assert (result.loss, result.count, result.grad_norm) == (0.0, 0, 0.0)


def test_buffers_are_overwritten_of_linear_layers_and_experts_alone(trainee: Trainee) -> None:
    ours = {id(weight) for weight in gradients.summed_here(trainee.stages)}
    names = {name for stage in trainee.stages for name, weight in stage.named_parameters() if id(weight) in ours}
    assert any(name.endswith("mlp.experts.weight1") for name in names) and any("linear_proj" in name for name in names)
    assert any("shared_experts.linear_fc2" in name for name in names)
    assert not any(part in name for name in names for part in ("embedding", "output_layer", "router", "norm"))


def test_a_step_does_not_see_the_one_before(trainee: Trainee) -> None:
    """The gradients of the same weights and batch are the same, whatever lies in the buffers."""
    norms = [trainee.step([batch(1.0)], token_losses, masked_sum, 0.0, lambda loss, norm: "no").grad_norm for _ in range(2)]
    for buffer in (*trainee.model.buffers, *trainee.model.expert_parallel_buffers):
        buffer.grad_data.mul_(3.0)
    norms.append(trainee.step([batch(1.0)], token_losses, masked_sum, 0.0, lambda loss, norm: "no").grad_norm)
    assert norms[0] > 0 and norms == [norms[0]] * 3


def test_groups_of_one_rank_are_not_summed_over(trainee: Trainee, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("a collective over one rank")

    for group in (*trainee.model.bucket_groups, *trainee.model.expert_parallel_bucket_groups):
        monkeypatch.setattr(group, "start_grad_sync", refuse)
    assert step(trainee, 1.0).grad_norm > 0
    group = trainee.model.bucket_groups[0]
    monkeypatch.setattr(group, "intra_distributed_optimizer_instance_size", 2)
    with pytest.raises(AssertionError, match="over one rank"):
        step(trainee, 1.0)
