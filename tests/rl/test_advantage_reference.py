"""Advantages against the papers' equations in plain Python, batch baselines included."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from r1mega.registry import choices
from r1mega.rl.advantage import BatchAdvantage
from r1mega.testing.contracts import check_advantage


def grpo(groups):
    return [[(r - statistics.fmean(group)) / statistics.pstdev(group) for r in group] for group in groups]


def dr_grpo(groups):
    return [[r - statistics.fmean(group) for r in group] for group in groups]


def rloo(groups):
    return [[r - statistics.fmean(group[:i] + group[i + 1 :]) for i, r in enumerate(group)] for group in groups]


def reinforce_pp(groups):
    every = [r for group in groups for r in group]
    return [[(r - statistics.fmean(every)) / statistics.pstdev(every) for r in group] for group in groups]


def reinforce_pp_baseline(groups):
    return reinforce_pp(dr_grpo(groups))


REFERENCES = {
    "grpo": (grpo, {}),
    "dr_grpo": (dr_grpo, {}),
    "rloo": (rloo, {}),
    "reinforce++": (reinforce_pp, {}),
    "reinforce++ with baseline": (reinforce_pp_baseline, {"group_baseline": True}),
}


def test_every_choice_has_its_reference():
    assert {name.partition(" ")[0] for name in REFERENCES} == set(choices("advantage"))


@pytest.mark.parametrize("name", REFERENCES)
def test_equal_to_the_paper(name):
    reference, knobs = REFERENCES[name]
    draw = random.Random(name)
    groups = [[draw.choice([0.0, 1.0, 2.0]) + draw.random() for _ in range(7)] for _ in range(5)]
    got = choices("advantage")[name.partition(" ")[0]](**knobs).build()(torch.tensor(groups, dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor(reference(groups)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_masked_responses_are_as_if_they_were_not_drawn(name):
    """Groups of unlike size against the reference over what is left of them."""
    reference, knobs = REFERENCES[name]
    rewards = torch.tensor([[1.0, 0.0, 5.0, 0.5], [2.0, 7.0, 1.0, 0.0], [0.0, 3.0, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 0, 0]]).bool()
    got = choices("advantage")[name.partition(" ")[0]](**knobs).build()(rewards, mask)
    want = reference([row[keep].tolist() for row, keep in zip(rewards, mask, strict=True)])
    torch.testing.assert_close(got[mask], torch.tensor([a for group in want for a in group]), rtol=1e-5, atol=1e-6)
    assert (got[~mask] == 0).all()


def test_a_batch_baseline_needs_all_prompts():
    """What one data rank would make of its own half is another thing: the loop gathers first."""
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    whole = BatchAdvantage().build()(rewards)
    assert whole[0, 0] > 0 and (BatchAdvantage().build()(rewards[:1]) == 0).all()
    assert BatchAdvantage().baseline == "batch" and BatchAdvantage(group_baseline=True).baseline == "group"


def test_one_counted_response_has_nobody_to_be_left_out_for():
    got = choices("advantage")["rloo"]().build()(torch.tensor([[4.0, 1.0]]), torch.tensor([[True, False]]))
    assert torch.equal(got, torch.zeros(1, 2))


def test_contract_of_the_group_baseline():
    check_advantage(BatchAdvantage(group_baseline=True))


def test_the_contract_finds_a_baseline_that_is_not_what_it_says():
    class Lies:
        baseline = "group"

        def build(self):
            return BatchAdvantage().build()

    with pytest.raises(AssertionError, match="in a group"):
        check_advantage(Lies())
