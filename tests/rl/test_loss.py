"""GRPO's objective against hand-worked numbers and gradients; scoring against torch's log_softmax."""

from __future__ import annotations

import math

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.registry import choices
from r1mega.rl.loss import GrpoLoss, PolicyStats, token_logprobs
from r1mega.testing.contracts import check_policy_loss


def run(choice, logprobs, old, advantages, mask=None, ref=None, **sizes):
    mask = torch.ones_like(logprobs) if mask is None else mask
    sizes = {"num_sequences": logprobs.shape[0], "num_tokens": int(mask.sum()), **sizes}
    logprobs = logprobs.clone().requires_grad_()
    loss, stats = choice.build()(logprobs, old, ref, advantages, mask, **sizes)
    loss.backward()
    return loss.item(), logprobs.grad, stats


def test_hand_worked_loss_with_kl():
    # one response of two tokens: ratios 2 and 1, A = 0.5, pi_ref/pi = 1 and 2 -> k3 = 0 and 2 - ln 2 - 1
    old = torch.tensor([[-2.0, -1.0]])
    now = old + torch.tensor([[math.log(2), 0.0]])
    ref = now + torch.tensor([[0.0, math.log(2)]])
    loss, _, stats = run(GrpoLoss(kl_coef=0.1), now, old, torch.tensor([0.5]), ref=ref)
    k3 = 1 - math.log(2)
    assert loss == pytest.approx((-1.0 - 0.5 + 0.1 * k3) / 2, rel=1e-6)
    assert stats.summary() == pytest.approx({"clip_share": 0.0, "kl": k3 / 2, "ratio_max": 2.0, "num_tokens": 2.0}, rel=1e-6)


def test_kl_gradient():
    # d k3 / d log pi = 1 - pi_ref/pi
    now, ref = torch.tensor([[-1.0]]), torch.tensor([[-1.0 + math.log(3)]])
    _, grad, _ = run(GrpoLoss(kl_coef=0.5), now, now, torch.tensor([0.0]), ref=ref)
    assert grad.item() == pytest.approx(0.5 * (1 - 3), rel=1e-6)


@pytest.mark.parametrize(
    "ratio, advantage, flows", [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True)]
)
def test_clip_stops_the_gradient_on_the_side_that_would_grow(ratio, advantage, flows):
    old = torch.tensor([[-1.0]])
    loss, grad, stats = run(GrpoLoss(clip_low=0.2, clip_high=0.2, kl_coef=0), old + math.log(ratio), old, torch.tensor([advantage]))
    bound = min(max(ratio, 0.8), 1.2)
    assert loss == pytest.approx(-min(ratio * advantage, bound * advantage), rel=1e-6)
    assert grad.item() == pytest.approx(-ratio * advantage if flows else 0.0, rel=1e-6)
    assert stats.summary()["clip_share"] == (0.0 if flows else 1.0)


def test_defaults_are_r1s_and_clip_from_above_only():
    old = torch.tensor([[-9.0, -9.0]])
    now = old + torch.tensor([[math.log(12.0), math.log(0.001)]])
    _, grad, stats = run(GrpoLoss(kl_coef=0), now, old, torch.tensor([1.0]))
    assert grad[0, 0] == 0 and grad[0, 1] < 0
    assert stats.num_clipped == 1


def test_sequence_mean_weighs_responses_and_token_mean_weighs_tokens():
    logprobs, mask = torch.zeros(2, 4), torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
    _, by_sequence, _ = run(GrpoLoss(kl_coef=0), logprobs, logprobs, torch.ones(2), mask)
    torch.testing.assert_close(by_sequence, -torch.tensor([[0.5, 0, 0, 0], [0.125] * 4]))
    _, by_token, _ = run(GrpoLoss(kl_coef=0, aggregation="token"), logprobs, logprobs, torch.ones(2), mask)
    torch.testing.assert_close(by_token, -torch.tensor([[0.2, 0, 0, 0], [0.2] * 4]))


def test_context_parallel_halves_add_up():
    torch.manual_seed(0)
    now, old, ref = -torch.rand(3, 6), -torch.rand(3, 6), -torch.rand(3, 6)
    mask, advantages = torch.rand(3, 6) < 0.7, torch.randn(3)
    whole, grad, _ = run(GrpoLoss(), now, old, advantages, mask, ref)
    parts = [
        run(
            GrpoLoss(),
            now[:, s],
            old[:, s],
            advantages,
            mask[:, s],
            ref[:, s],
            num_tokens=int(mask.sum()),
            lengths_B=mask.sum(dim=1),
        )
        for s in (slice(0, 3), slice(3, 6))
    ]
    assert parts[0][0] + parts[1][0] == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]], dim=1), grad)


def test_stats_add():
    a = PolicyStats.of(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64))
    b = PolicyStats.of(torch.tensor([6.0, 1.0, 1.5], dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64))
    assert (a + b).summary() == {"clip_share": 0.25, "kl": 0.25, "ratio_max": 3.0, "num_tokens": 8.0}


def test_missing_reference_is_an_error():
    with pytest.raises(UserError, match="kl_coef"):
        run(GrpoLoss(kl_coef=0.1), torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1))


@pytest.mark.parametrize("name", sorted(choices("policy_loss")))
def test_contract(name):
    check_policy_loss(choices("policy_loss")[name])


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("block", [7, 1 << 22])
def test_token_logprobs_equal_log_softmax(monkeypatch, temperature, block):
    monkeypatch.setattr("r1mega.rl.logprobs.BLOCK_ELEMENTS", block)
    torch.manual_seed(1)
    logits, targets = (torch.randn(2, 5, 11) * 3).requires_grad_(), torch.randint(0, 11, (2, 5))
    weights = torch.randn(2, 5)
    logprobs, entropy = token_logprobs(logits, targets, temperature)
    (logprobs * weights).sum().backward()
    grad, logits.grad = logits.grad, None
    full = torch.log_softmax(logits / temperature, dim=-1)
    want = full.gather(2, targets[..., None]).squeeze(2)
    (want * weights).sum().backward()
    torch.testing.assert_close(logprobs, want)
    torch.testing.assert_close(grad, logits.grad)
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))
    assert not entropy.requires_grad


def test_token_logprobs_of_bf16_are_fp32_and_keep_excluded_tokens_out():
    logits = torch.tensor([[[0.0, 0.0, float("-inf")]]], dtype=torch.bfloat16, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([[1]]))
    logprobs.sum().backward()
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs.item() == pytest.approx(-math.log(2)) and entropy.item() == pytest.approx(math.log(2))
    assert logits.grad.dtype == torch.bfloat16 and logits.grad.tolist() == [[[-0.5, 0.5, 0.0]]]


def test_scoring_at_temperature_zero_is_an_error():
    with pytest.raises(UserError, match="temperature"):
        token_logprobs(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64), 0.0)
