"""The prompt stream: shuffled epochs, and a cursor that goes on exactly."""

from __future__ import annotations

import json

import pytest

from r1mega.config.errors import UserError
from r1mega.data.problems import Problem
from r1mega.data.prompts import PromptStream

PROBLEMS = [Problem(str(i), f"question {i}", str(i), "file") for i in range(10)]


def take(stream: PromptStream, count: int) -> list[int]:
    """Take and finish."""
    items = stream.take(count)
    stream.finish(items)
    return items


def test_each_problem_once_an_epoch():
    stream = PromptStream(PROBLEMS, seed=1)
    epochs = [[stream.problem(item).id for item in take(stream, 10)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [str(i) for i in range(10)]
    assert epochs[0] != epochs[1] and stream.consumed == 20
    assert [PromptStream(PROBLEMS, seed=2).problem(item).id for item in range(10)] != epochs[0]


def test_cursor_goes_on_exactly_also_within_an_epoch():
    stream = PromptStream(PROBLEMS, seed=1)
    assert take(stream, 4) == [0, 1, 2, 3]
    ahead = stream.take(4)
    stream.finish([6])
    state = json.loads(json.dumps(stream.state_dict()))
    assert ahead == [4, 5, 6, 7] and (state["consumed"], state["done"]) == (4, [6])
    other = PromptStream(PROBLEMS, seed=1)
    other.load_state_dict(state)
    assert take(other, 5) == [4, 5, 7, 8, 9], "what was taken and not done is taken again, what was done is not"
    assert other.consumed == 10


def test_ranks_share_the_numbers_and_another_number_of_ranks_goes_on():
    ranks = [PromptStream(PROBLEMS, 1, rank, 3) for rank in range(3)]
    assert [stream.take(2) for stream in ranks] == [[0, 3], [1, 4], [2, 5]]
    for stream in ranks:
        stream.finish([0, 3, 1, 4, 2])  # rank 2 has finished one of its two
    assert {stream.consumed for stream in ranks} == {5}
    two = [PromptStream(PROBLEMS, 1, rank, 2) for rank in range(2)]
    for stream in two:
        stream.load_state_dict(ranks[0].state_dict())
    assert sorted(two[0].take(3) + two[1].take(3)) == [5, 6, 7, 8, 9, 10]


def test_released_numbers_are_taken_again():
    stream = PromptStream(PROBLEMS, seed=1)
    assert stream.take(3) == [0, 1, 2] and stream.take(1) == [3]
    stream.finish([1])
    stream.release()
    assert stream.take(3) == [0, 2, 3]


def test_other_problems_or_seed_are_refused():
    state = PromptStream(PROBLEMS, seed=1).state_dict()
    with pytest.raises(UserError, match="problems and seed it began with; got seed 2 for 1"):
        PromptStream(PROBLEMS, seed=2).load_state_dict(state)
    with pytest.raises(UserError, match="got sha256"):
        PromptStream(PROBLEMS[:9], seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="at least one problem"):
        PromptStream([], seed=1)
