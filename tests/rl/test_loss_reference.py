"""Every loss, knob and preset against :mod:`tests.rl.loss_reference`, to 1e-5 in loss and gradients; the contract over all knobs."""

from __future__ import annotations

import math
import random

import pytest
import torch

from r1mega.config.compose import compose
from r1mega.registry import choices
from r1mega.rl.loss import CispoLoss, DapoLoss, GrpoLoss, GspoLoss, LossInput
from r1mega.testing.contracts import check_policy_loss
from tests.rl.loss_reference import Response, Rule, masked, masked_sequence, truncated, truncated_sequence, vetoed

LENGTHS = (5, 1, 8, 3, 6, 2)
MAX_TOKENS = 12


def batch(seed: int, spread: float) -> list[Response]:
    """Six responses; the policies differ by about ``spread`` a token. Numbers are those of fp32, so that both sides have the same."""
    draw = random.Random(seed)

    def near(values: list[float], size: float) -> list[float]:
        return torch.tensor([v + draw.gauss(0, size) for v in values], dtype=torch.float32).double().tolist()

    made = []
    for number, length in enumerate(LENGTHS):
        lp = near([-draw.uniform(0.2, 3) for _ in range(length)], 0)
        shift = spread * draw.gauss(0, 1)
        made.append(
            Response(lp, near([v + shift for v in lp], spread), near([v - shift for v in lp], spread), near(lp, 0.3), near(lp, 0.3),
                     torch.tensor((-1) ** number * draw.uniform(0.3, 2)).item())
        )  # fmt: skip
    return made


def ours(choice, responses: list[Response]):
    """Loss, gradients and statistics of the choice; the rows lie in one padded microbatch, garbage around them."""
    width = max(LENGTHS) + 3

    def rows(name: str) -> torch.Tensor:
        values = torch.full((len(responses), width), float("nan"))
        for idx, response in enumerate(responses):
            values[idx, idx % 3 : idx % 3 + len(response.lp)] = torch.tensor(getattr(response, name))
        return values

    logprobs = rows("lp")
    mask = ~logprobs.isnan()
    leaf = logprobs.requires_grad_()
    given = LossInput(
        leaf,
        rows("old"),
        torch.tensor([response.advantage for response in responses]),
        mask,
        num_sequences=len(responses),
        num_tokens=sum(LENGTHS),
        ref_BS=rows("ref"),
        rollout_BS=rows("rollout"),
        teacher_BS=rows("teacher"),
        max_tokens=MAX_TOKENS,
    )
    loss, stats = choice.build()(given)
    loss.backward()
    return loss.item(), torch.cat([grad[keep] for grad, keep in zip(leaf.grad, mask, strict=True)]).tolist(), stats


def check(choice, rule: Rule, spread: float, seeds=range(4)) -> list:
    """The choice against the rule, on several minibatches; their statistics."""
    found = []
    for seed in seeds:
        responses = batch(seed, spread)
        loss, grads, stats = ours(choice, responses)
        at = [response.lp for response in responses]
        assert loss == pytest.approx(rule.loss(responses, at, at), rel=1e-5, abs=1e-6)
        assert grads == pytest.approx([g for row in rule.gradient(responses) for g in row], rel=1e-5, abs=1e-6)
        found.append(stats)
    return found


CASES = {
    "grpo": (GrpoLoss(), Rule((10, 10), mean="sequence", kl_coef=0.001), 0.5),
    "grpo, tight": (GrpoLoss(clip_low=0.2, clip_high=0.2, kl_coef=0.2), Rule((0.2, 0.2), mean="sequence", kl_coef=0.2), 0.3),
    "dapo": (DapoLoss(), Rule((0.2, 0.28)), 0.3),
    "gspo": (GspoLoss(), Rule((3e-4, 4e-4), surrogate="sequence", mean="sequence"), 4e-4),
    "gspo, wide": (
        GspoLoss(clip_low=0.1, clip_high=0.2, kl_coef=0.1), Rule((0.1, 0.2), surrogate="sequence", mean="sequence", kl_coef=0.1), 0.2
    ),
    "cispo": (CispoLoss(), Rule((1.0, 4.0), surrogate="weighted"), 1.0),
    "cispo, both bounds": (CispoLoss(clip_low=0.3, clip_high=0.3), Rule((0.3, 0.3), surrogate="weighted"), 0.4),
    "dr_grpo": (
        GrpoLoss(clip_low=0.2, clip_high=0.2, kl_coef=0, aggregation="constant"),
        Rule((0.2, 0.2), mean="constant", max_tokens=MAX_TOKENS), 0.3
    ),
    "dual clip": (DapoLoss(dual_clip=1.5), Rule((0.2, 0.28), dual=1.5), 0.5),
    "k1": (GrpoLoss(kl_coef=0.3, kl_kind="k1"), Rule((10, 10), mean="sequence", kl_coef=0.3, kl_kind="k1"), 0.3),
    "k2": (GrpoLoss(kl_coef=0.3, kl_kind="k2"), Rule((10, 10), mean="sequence", kl_coef=0.3, kl_kind="k2"), 0.3),
    "k3": (GrpoLoss(kl_coef=0.3, kl_kind="k3"), Rule((10, 10), mean="sequence", kl_coef=0.3, kl_kind="k3"), 0.3),
    "unbiased": (GrpoLoss(kl_coef=0.3, kl_kind="unbiased"), Rule((10, 10), mean="sequence", kl_coef=0.3, kl_kind="unbiased"), 0.3),
    "token tis": (DapoLoss(correction="truncate", correction_high=1.2), Rule((0.2, 0.28), weight=truncated(1.2)), 0.2),
    "sequence tis": (
        DapoLoss(correction="truncate", correction_level="sequence"), Rule((0.2, 0.28), weight=truncated_sequence(2.0)), 0.2
    ),
    "gspo, sequence tis": (
        GspoLoss(clip_low=0.1, clip_high=0.1, correction="truncate", correction_level="sequence"),
        Rule((0.1, 0.1), surrogate="sequence", mean="sequence", weight=truncated_sequence(2.0)), 0.2
    ),
    "icepop": (DapoLoss(correction="mask"), Rule((0.2, 0.28), weight=masked(0.5, 2.0)), 0.5),
    "sequence mask": (
        DapoLoss(correction="mask", correction_level="sequence", correction_high=3.0),
        Rule((0.2, 0.28), weight=masked_sequence(0.5, 3.0)), 0.2
    ),
    "veto": (
        DapoLoss(correction="truncate", correction_veto=0.6), Rule((0.2, 0.28), weight=vetoed(0.6, truncated(2.0))), 0.3
    ),
    "veto alone": (DapoLoss(correction_veto=0.6), Rule((0.2, 0.28), weight=vetoed(0.6, lambda logs: [1.0] * len(logs))), 0.3),
    "decoupled": (DapoLoss(correction="decoupled"), Rule((0.2, 0.28), weight=truncated(math.inf)), 0.4),
    "stale": (DapoLoss(ratio_to="rollout"), Rule((0.2, 0.28), stale=True), 0.3),
    "off-policy mask": (GrpoLoss(offpolicy_mask=0.1), Rule((10, 10), mean="sequence", kl_coef=0.001, delta=0.1), 0.4),
    "distillation": (DapoLoss(distill_coef=1.0), Rule((0.2, 0.28), distill=1.0), 0.3),
    "cispo, distillation": (CispoLoss(distill_coef=0.5), Rule((1.0, 4.0), surrogate="weighted", distill=0.5), 0.6),
    "v3.2": (
        GrpoLoss(clip_low=0.2, clip_high=0.28, kl_coef=0.1, kl_kind="unbiased", ratio_to="rollout", offpolicy_mask=0.05),
        Rule((0.2, 0.28), mean="sequence", kl_coef=0.1, kl_kind="unbiased", stale=True, delta=0.05), 0.3
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_paper(name):
    check(*CASES[name])


def test_the_cases_reach_what_they_are_about():
    """Tokens are clipped on both sides, some and not all dropped, weights truncated: no case passes for want of the thing."""

    def total(name: str, field: str) -> float:
        return sum(float(getattr(stats, field)) for stats in check(*CASES[name]))

    for name in ("grpo, tight", "dapo", "gspo", "gspo, wide", "cispo, both bounds"):
        assert total(name, "num_clipped_low") > 0 and total(name, "num_clipped_high") > 0, name
    assert total("cispo", "num_clipped_high") > 0 and total("cispo", "num_clipped_low") == 0
    assert total("dual clip", "num_clipped_high") > total("dapo", "num_clipped_high")
    for name in ("icepop", "sequence mask", "veto", "veto alone", "off-policy mask", "v3.2"):
        assert 0 < total(name, "num_dropped") < total(name, "num_tokens"), name
    for name, cap in (("token tis", 1.2), ("sequence tis", 2.0)):
        assert max(float(stats.max_weight) for stats in check(*CASES[name])) == pytest.approx(cap)
    assert max(float(stats.max_weight) for stats in check(*CASES["decoupled"])) > 2


def test_every_loss_has_its_reference():
    assert set(choices("policy_loss")) <= set(CASES)


PRESETS = {
    "default": "grpo",
    "r1_zero": "grpo",
    "r1_stage1": "grpo",
    "r1_stage2": "grpo",
    "dapo": "dapo",
    "gspo": "gspo",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_its_paper(preset):
    made = compose("rl", [f"rl={preset}", "init=x", "data.problems=y", "rl.rollouts=1000"])
    _, rule, spread = CASES[PRESETS[preset]]
    check(made.policy_loss, rule, spread)


@pytest.mark.parametrize("knobs", [
    {},
    {"dual_clip": 3.0},
    {"aggregation": "constant"},
    {"aggregation": "sequence", "kl_coef": 0.1, "kl_kind": "unbiased"},
    {"correction": "truncate", "correction_level": "sequence"},
    {"correction": "mask", "correction_level": "sequence", "correction_veto": 0.5},
    {"correction": "mask", "correction_veto": 0.4},
    {"ratio_to": "rollout", "offpolicy_mask": 0.05},
    {"correction": "decoupled", "distill_coef": 0.7, "kl_coef": 0.1, "kl_kind": "k2"},
])  # fmt: skip
@pytest.mark.parametrize("name", sorted(choices("policy_loss")))
def test_contract(name, knobs):
    check_policy_loss(choices("policy_loss")[name], **knobs)


def test_the_contract_finds_a_sequence_ratio_of_one_rank_alone(monkeypatch):
    """Planted: a context rank takes the mean over its own part only."""
    monkeypatch.setattr("r1mega.rl.loss.objective._whole", lambda given, values: values.detach().double().sum(dim=1))
    with pytest.raises(AssertionError):
        check_policy_loss(GspoLoss, clip_low=0.5, clip_high=0.5)


def test_what_is_dropped_may_have_overflown():
    """A response that training must not see has a ratio of e^200: no nan comes of it."""
    now = torch.tensor([[-1.0, -1.0], [-1.0, -2.0]], requires_grad=True)
    far = torch.tensor([[-201.0, -1.0], [-1.0, -2.0]])
    for choice in (DapoLoss(correction="mask"), GspoLoss(correction="mask", correction_level="sequence")):
        loss, _ = choice.build()(
            LossInput(now, far, torch.tensor([-1.0, 1.0]), torch.ones(2, 2), num_sequences=2, num_tokens=4, rollout_BS=now.detach())
        )
        now.grad = None
        loss.backward()
        assert loss.isfinite() and now.grad.isfinite().all() and now.grad[1].abs().sum() > 0
