"""Group advantages against hand-worked numbers, and the contract of every registered choice."""

from __future__ import annotations

import math

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.registry import choices
from r1mega.rl.advantage import GroupAdvantage
from r1mega.testing.contracts import check_advantage


def test_hand_worked_group():
    # mean 0.25, population variance (0.75^2 + 3 * 0.25^2) / 4 = 0.1875
    got = GroupAdvantage(eps=1e-12).build()(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    std = math.sqrt(0.1875)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor([[0.75 / std, -0.25 / std, -0.25 / std, -0.25 / std]]))
    assert got[0, 0].item() == pytest.approx(math.sqrt(3), rel=1e-6)  # the bound sqrt(G - 1)


def test_without_std():
    got = GroupAdvantage(scale_by_std=False).build()(torch.tensor([[2.0, 1.0, 0.0], [0.5, 0.5, 2.0]]))
    torch.testing.assert_close(got, torch.tensor([[1.0, 0.0, -1.0], [-0.5, -0.5, 1.0]]))


def test_masked_response_neither_counts_nor_learns():
    rewards = torch.tensor([[1.0, 0.0, float("nan"), 1.0]])
    mask = torch.tensor([[True, True, False, True]])
    got = GroupAdvantage().build()(rewards, mask)
    want = GroupAdvantage().build()(torch.tensor([[1.0, 0.0, 1.0]]))
    assert got[0, 2] == 0
    torch.testing.assert_close(got[0, [0, 1, 3]], want[0])


def test_equal_rewards_are_exactly_zero_although_their_mean_rounds():
    got = GroupAdvantage().build()(torch.full((1, 7), 0.1, dtype=torch.float64))
    assert torch.equal(got, torch.zeros(1, 7))
    alone = GroupAdvantage().build()(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]]))
    assert torch.equal(alone, torch.zeros(1, 2))


@pytest.mark.parametrize("rewards, mask, says", [
    (torch.zeros(3), None, "P, G"),
    (torch.zeros(1, 3), torch.ones(3, 1), "shape"),
    (torch.tensor([[float("inf"), 0.0]]), None, "finite"),
])  # fmt: skip
def test_wrong_input_is_named(rewards, mask, says):
    with pytest.raises(UserError, match=says):
        GroupAdvantage().build()(rewards, mask)


@pytest.mark.parametrize("name", sorted(choices("advantage")))
def test_contract(name):
    check_advantage(choices("advantage")[name]())
