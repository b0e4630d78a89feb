"""Overlong punishment, learnable groups and how many prompts are drawn, by hand."""

from __future__ import annotations

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.rl.shaping import learnable_groups, overlong_penalties


def test_the_punishment_is_dapos():
    # L_max 20,480, L_cache 4,096
    lengths = [1, 16384, 16385, 18432, 20480, 30000]
    assert overlong_penalties(lengths, 20480, 4096) == pytest.approx([0, 0, -1 / 4096, -0.5, -1, -1])
    assert overlong_penalties([18432], 20480, 4096, penalty=0.2) == pytest.approx([-0.1])
    assert overlong_penalties(lengths, 20480, 0) == [0.0] * 6
    assert overlong_penalties([5, 10], 10, 10) == pytest.approx([-0.5, -1])
    with pytest.raises(UserError, match="cache_tokens"):
        overlong_penalties([1], 10, 11)


def test_groups_without_a_difference_teach_nothing():
    values = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.1, 0.1, 0.2]])
    assert learnable_groups(values).tolist() == [False, False, True, True]
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 1]])
    assert learnable_groups(values, mask).tolist() == [False] * 4, "what is masked makes no difference"
    assert learnable_groups(values, torch.zeros(4, 3)).tolist() == [False] * 4
    with pytest.raises(UserError, match="P, G"):
        learnable_groups(torch.zeros(3))
