"""The prompt stream: shuffled epochs, and a cursor that goes on exactly."""

from __future__ import annotations

import json

import pytest

from r1mega.config.errors import UserError
from r1mega.data.problems import Problem
from r1mega.data.prompts import PromptStream

PROBLEMS = [Problem(str(i), f"question {i}", str(i), "file") for i in range(10)]


def test_each_problem_once_an_epoch():
    stream = PromptStream(PROBLEMS, 5, seed=1)
    epochs = [[p.id for _ in range(2) for p in stream.next()] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [str(i) for i in range(10)]
    assert epochs[0] != epochs[1] and stream.epoch == 2.0
    assert [p.id for p in PromptStream(PROBLEMS, 5, seed=2).next()] != epochs[0][:5]


def test_cursor_goes_on_exactly_also_within_an_epoch():
    stream = PromptStream(PROBLEMS, 4, seed=1)
    stream.next()
    state = json.loads(json.dumps(stream.state_dict()))
    later = [stream.next() for _ in range(5)]
    other = PromptStream(PROBLEMS, 4, seed=1)
    other.load_state_dict(state)
    assert [other.next() for _ in range(5)] == later


def test_other_problems_or_seed_are_refused():
    state = PromptStream(PROBLEMS, 4, seed=1).state_dict()
    with pytest.raises(UserError, match="problems and seed it began with; got seed 2 for 1"):
        PromptStream(PROBLEMS, 4, seed=2).load_state_dict(state)
    with pytest.raises(UserError, match="got sha256"):
        PromptStream(PROBLEMS[:9], 4, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="at least one problem"):
        PromptStream([], 4, seed=1)
