"""Worked solutions: steps by hand, and every answer right by reasoning-gym's own scorer."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from r1mega.data.problems import GENERATED, Problem
from r1mega.data.split import generate
from r1mega.data.worked import REMARKS, STYLES, careful, worked_solution

SOLVED = ["chain_sum", "basic_arithmetic", "letter_counting", "spell_backward", "number_sorting", "gcd", "base_conversion"]


def problem(dataset, answer, **metadata):
    return Problem("p", "question", answer, GENERATED + dataset, metadata)


@pytest.mark.parametrize(
    ("dataset", "answer", "metadata", "reasoning"),
    [
        ("chain_sum", "14", {"expression": "4 + 3 + 9 - 2"}, "4 + 3 = 7, 7 + 9 = 16, 16 - 2 = 14"),
        ("chain_sum", "-3", {"expression": "-5 - -2"}, "-5 - -2 = -3"),
        ("chain_sum", "8", {"expression": "8"}, "It is 8"),
        ("basic_arithmetic", "-8", {"expression": "2 - ( 3 + 4 ) * 6 / 3 + 4"},
         "3 + 4 = 7, 7 * 6 = 42, 42 / 3 = 14, 2 - 14 = -12, -12 + 4 = -8"),
        ("basic_arithmetic", "3", {"expression": "-( 2 - 5 )"}, "2 - 5 = -3, -(-3) = 3"),
        ("letter_counting", "3", {"span": ["Hub", "ohh", "no"], "target_letter": "h"}, "Hub 1, ohh 3, no 3"),
        ("spell_backward", "tac", {"word": "cat"}, "c a t, t a c"),
        ("number_sorting", "['-2.0', '10']", {"original_numbers": ["10", "-2.0"], "direction": "ascending"},
         "Of 10, -2.0 the smallest is -2.0.\nOf 10 the smallest is 10."),
        ("gcd", "6", {"numbers": [18, 12]}, "18 = 1 * 12 + 6, 12 = 2 * 6 + 0, so 6"),
        ("base_conversion", "1b", {"source_base": 3, "target_base": 16, "source_repr": "1000", "target_repr": "1b"},
         "0 * 3 + 1 = 1\n1 * 3 + 0 = 3\n3 * 3 + 0 = 9\n9 * 3 + 0 = 27\n27 = 1 * 16 + 11 (b)\n1 = 0 * 16 + 1 (1)\nso 1b"),
    ],
)  # fmt: skip
def test_careful_steps_by_hand(dataset, answer, metadata, reasoning):
    worked = worked_solution(problem(dataset, answer, **metadata), "careful", random.Random(0))
    assert worked == (reasoning, answer)


@pytest.mark.parametrize("dataset", SOLVED)
@pytest.mark.parametrize("style", STYLES)
def test_answers_score_full_marks(dataset, style):
    from reasoning_gym import get_score_answer_fn

    score, rng = get_score_answer_fn(dataset), random.Random(1)
    for made in itertools.islice(generate(dataset, {}, seed=11), 50):
        worked = worked_solution(made, style, rng)
        assert worked is not None
        answer = re.fullmatch(r".+</think><answer>(.*)</answer>", worked.response, re.DOTALL).group(1)
        assert score(answer, made.entry()) == 1.0
        if style == "careful":  # the last thing that the reasoning arrives at is the answer
            last = {"number_sorting": re.findall(r"is (\S+)\.", worked.reasoning)[-1:], "spell_backward": [worked.reasoning[-1]]}
            arrived = last.get(dataset) or [re.split(r"[ \n]", worked.reasoning)[-1]]
            ends = {"number_sorting": answer.split("'")[-2:-1], "spell_backward": [answer[-1]]}
            assert arrived == ends.get(dataset, [answer])
        else:
            assert worked.reasoning in REMARKS


def test_a_solution_text_is_the_careful_style():
    solved = Problem("p", "q", "4", "file", {}, "two and two")
    assert worked_solution(solved, "careful", random.Random(0)) == ("two and two", "4")
    assert worked_solution(solved, "terse", random.Random(0)).answer == "4"


def test_what_cannot_be_worked_out_is_none():
    rng = random.Random(0)
    assert worked_solution(Problem("p", "q", "4", "file"), "careful", rng) is None
    assert worked_solution(problem("rush_hour", ""), "terse", rng) is None
    for expression in ("7 / 2", "1 / 0", "2 ** 3", "1 +", "a + 1"):
        assert worked_solution(problem("basic_arithmetic", "?", expression=expression), "careful", rng) is None
    with pytest.raises(ValueError, match="careful, terse; got 'loud'"):
        worked_solution(problem("chain_sum", "1", expression="1"), "loud", rng)


def test_plain_document_has_no_conversation_tokens():
    worked = worked_solution(problem("chain_sum", "7", expression="4 + 3"), "careful", random.Random(0))
    assert worked.document("4 + 3 =") == "Question: 4 + 3 =\nReasoning: 4 + 3 = 7\nAnswer: 7"


def test_another_module_adds_a_solver(monkeypatch):
    monkeypatch.setattr("r1mega.data.worked._careful", {})
    careful("my_set")(lambda metadata: f"about {metadata['n']}")
    assert worked_solution(problem("my_set", "3", n=3), "careful", random.Random(0)) == ("about 3", "3")
