"""Multiple choice: which answers mean the reference's letter, and which must not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from r1mega.rl.reward.accuracy import AccuracyReward
from r1mega.rl.reward.choice import choices_of, labelled

CITIES = "Which is the capital of France?\nA) Rome\nB) Paris\nC) Oslo\nD) a dog\nAnswer with the letter."
HALVES = "What is 2/4? (A) 1/3 (B) 1/2, (C) $\\frac{3}{4}$ [D] none"


def problem(question, answer, **metadata):
    return SimpleNamespace(id="p", question=question, answer=answer, source="quiz", metadata=metadata, solution=None)


def score(question, reference, answer, **metadata):
    reward = AccuracyReward().build()
    return reward(problem(question, reference, **metadata), f"r</think><answer>{answer}</answer>")


@pytest.mark.parametrize("question, reference, answers", [
    (CITIES, "B", ["B", "b", "(B)", "[b]", "B)", "B.", "\uff08\uff22\uff09", "**B**", "\\boxed{B}", "$\\text{(B)}$"]),
    (CITIES, "B", ["B) Paris", "(B) paris.", "B: Paris", "B - Paris", "Paris", "PARIS."]),
    (CITIES, "B", ["The answer is B", "the correct answer is (B).", "Answer: B", "answer: B) Paris", "Option B", "option (b)"]),
    (CITIES, "B", ["It is not A, so the answer is B", "The answer is Paris", "\u7b54\u6848\u662fB"]),
    (CITIES, "D", ["the answer is a dog", "A dog"]),
    (CITIES, "(B)", ["B"]),
    (CITIES, "B) Paris", ["B", "Paris"]),
    (HALVES, "B", ["B", "0.5", "\\frac{1}{2}", "(B) 1/2"]),
    (HALVES, "D", ["none", "[D]"]),
    ("Which?", "B", ["B", "(B)", "b", "B) Paris", "the answer is B"]),
    ("No choices, a variable", "b", ["b", "B"]),
    ("No choices, a variable", "x", ["x"]),
])  # fmt: skip
def test_right(question, reference, answers):
    assert [answer for answer in answers if score(question, reference, answer) != 1.0] == []


@pytest.mark.parametrize("question, reference, answers", [
    (CITIES, "A", ["a dog", "the answer is a dog", "The answer is a", "an apple", "A dog", "B", "Paris"]),
    (CITIES, "A", ["A or B", "A, B", "A) or B)", "A) B) C) D)", "ABCD", "not A", "The answer is not A", "A) Paris"]),
    (CITIES, "B", ["A", "B) Rome", "C) Paris", "B or C", "(A) (B)", "A) B", "Because", "Paris or Rome", "the answer is A"]),
    (HALVES, "B", ["1/3", "B) 1/3", "A"]),
    ("Which?", "A", ["a dog", "the answer is a dog", "A dog", "A) or B)", "A. B. C.", "(A) (B)", "A: B", "the answer is a"]),
    ("Which?", "I", ["I think so", "i think"]),
    ("No choices, a variable", "x", ["y", "x) y", "the answer is x"]),
])  # fmt: skip
def test_wrong(question, reference, answers):
    assert [answer for answer in answers if score(question, reference, answer) != 0.0] == []


def test_two_choices_of_one_text_mean_neither():
    assert score("Which? A) 1/2 B) 0.5 C) 1", "B", "0.5") == 0.0
    assert score("Which? A) 1/2 B) 0.5 C) 1", "B", "B") == 1.0


def test_choices_in_the_question():
    assert labelled(CITIES) == {"A": "Rome", "B": "Paris", "C": "Oslo", "D": "a dog"}
    assert labelled(HALVES) == {"A": "1/3", "B": "1/2", "C": "$\\frac{3}{4}$", "D": "none"}
    assert labelled("a) one b) two") == {"A": "one", "B": "two"}
    assert labelled("Is vitamin A. a letter? It is (a) and then (c)") == {}
    assert labelled("First: A) 1 B) 2. Second: A) 3 B) 4 C) 5") == {"A": "3", "B": "4", "C": "5"}


@pytest.mark.parametrize("metadata", [
    {"choices": ["Rome", "Paris"]},
    {"options": {"A": "Rome", "(B)": "Paris"}},
    {"choices": {"label": ["A", "B"], "text": ["Rome", "Paris"]}},
])  # fmt: skip
def test_choices_in_the_metadata(metadata):
    assert choices_of(problem("Which?", "B", **metadata)) == {"A": "Rome", "B": "Paris"}
    assert score("Which?", "B", "paris", **metadata) == 1.0
    assert score("Which?", "B", "B) Rome", **metadata) == 0.0
    assert score("A variable", "C", "c", **metadata) == 1.0, "no choice has this letter: an ordinary text"
