"""GRPO's objective against hand-worked numbers and gradients; scoring against torch's log_softmax."""

from __future__ import annotations

import math

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.rl.logprobs import token_logprobs
from r1mega.rl.loss import DapoLoss, GrpoLoss, LossInput
from r1mega.rl.loss.stats import MAXIMA, SUMS, summary


def run(choice, logprobs, old, advantages, mask=None, ref=None, **sizes):
    mask = torch.ones_like(logprobs) if mask is None else mask
    sizes = {"num_sequences": logprobs.shape[0], "num_tokens": int(mask.sum()), **sizes}
    logprobs = logprobs.clone().requires_grad_()
    loss, stats = choice.build()(LossInput(logprobs, old, advantages, mask, ref_BS=ref, **sizes))
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
    told = {"clip_share": 0.0, "dropped_share": 0.0, "is_weight": 1.0, "kl": k3 / 2, "ratio_max": 2.0, "num_tokens": 2.0}
    assert {name: stats.summary()[name] for name in told} == pytest.approx(told, rel=1e-6)


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
    assert (stats.num_clipped_low, stats.num_clipped_high) == (0, 1)


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


def test_statistics_by_hand():
    # ratios 2, 1/2, 1 at A = 1: one above its bound and clipped, one below and not (its gradient helps); A = -1: the other way round
    old = torch.tensor([[-1.0, -1.0, -1.0]]).repeat(2, 1)
    now = old + torch.tensor([math.log(2), -math.log(2), 0.0])
    rollout = old - torch.tensor([[math.log(4), 0.0, 0.0], [0.0, 0.0, 0.0]])  # weights 4 and 1
    choice = DapoLoss(correction="mask", correction_high=3.0)
    given = LossInput(now, old, torch.tensor([1.0, -1.0]), torch.ones(2, 3), 2, 6, rollout_BS=rollout)
    _, stats = choice.build()(given)
    told = stats.summary()
    assert (told["clip_share_low"], told["clip_share_high"]) == pytest.approx((1 / 6, 0.0)), "of the dropped token nothing counts"
    assert (told["dropped_share"], told["is_weight"], told["is_weight_max"]) == pytest.approx((1 / 6, 5 / 6, 1.0))
    assert told["ratio_max"] == pytest.approx(2.0) and told["num_tokens"] == 6
    everything = {name: 0.0 for name in SUMS}
    assert summary(everything)["clip_share"] == 0.0 and not {"ratio_max", "is_weight_max"} & set(summary(everything))
    assert stats.maxima().tolist() == [getattr(stats, name).item() for name in MAXIMA]


@pytest.mark.parametrize("knob, value, off", [
    ("kl_coef", 0.1, "0"),
    ("distill_coef", 1.0, "0"),
    ("ratio_to", "rollout", "trainer"),
    ("correction", "mask", "none"),
    ("correction_veto", 1e-4, "0"),
])  # fmt: skip
def test_missing_logprobs_are_an_error(knob, value, off):
    with pytest.raises(UserError, match=rf"policy_loss.{knob}: .* logprobs; .*policy_loss.{knob}={off}"):
        run(DapoLoss(**{knob: value}), torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1))


def test_a_constant_divisor_needs_the_longest_response():
    with pytest.raises(UserError, match="aggregation"):
        run(GrpoLoss(kl_coef=0, aggregation="constant"), torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1))


def test_a_minibatch_of_which_nothing_counts_has_no_loss():
    for aggregation in ("sequence", "token"):
        choice = GrpoLoss(kl_coef=0, aggregation=aggregation)
        loss, grad, stats = run(choice, torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3), num_sequences=0)
        assert loss == 0 and not grad.any() and stats.summary()["num_tokens"] == 0


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
