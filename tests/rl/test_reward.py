"""Rewards against hand-made responses, and the contract of every registered choice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from r1mega.registry import choices
from r1mega.rl.reward.accuracy import AccuracyReward, parse_number, same_answer
from r1mega.rl.reward.format import FormatReward, extract_answer, split_response
from r1mega.testing.contracts import check_reward

GOOD = "So it is 42.</think><answer>42</answer>"


def problem(answer, source="numbers", **metadata):
    return SimpleNamespace(id="p", question="?", answer=answer, source=source, metadata=metadata, solution=None)


@pytest.mark.parametrize("response, value", [
    (GOOD, 1.0),
    ("<think>" + GOOD, 1.0),
    ("\n" + GOOD.replace("<answer>", "\n<answer>") + "\n", 1.0),
    (GOOD + "!", 0.0),
    (GOOD + GOOD, 0.0),
    ("</think><answer>42</answer>", 0.0),
    ("  </think><answer>42</answer>", 0.0),
    ("r</think><answer> </answer>", 0.0),
    ("r</think>so <answer>42</answer>", 0.0),
    ("r</think></think><answer>42</answer>", 0.0),
    ("r<think>s</think><answer>42</answer>", 0.0),
    ("r <answer>1</answer></think><answer>42</answer>", 0.0),
    ("r</think><answer>42", 0.0),
    ("r<answer>42</answer></think>", 0.0),
    ("42", 0.0),
])  # fmt: skip
def test_format(response, value):
    assert FormatReward().build()(problem("42"), response) == value


def test_parts_of_a_response():
    assert split_response("<think> r </think> <answer> a b </answer>") == ("r", "a b")
    assert extract_answer("x <answer>0</answer></think><answer>1</answer> then <answer> 2 </answer> end") == "2"
    assert extract_answer("<answer>0</answer>") is None and extract_answer("</think><answer></answer>") is None
    assert extract_answer("</think></answer><answer>3") is None


@pytest.mark.parametrize("reference, answer, same", [
    ("1234", "1,234", True),
    ("1,234.50", "$1234.5", True),
    ("steps <<1+1=2>>2\n#### 42", "42", True),
    ("42", "#### 42", True),
    ("72", "72.", True),
    ("72", "7,2", False),
    ("0.5", "1/2", True),
    ("-3", "\u22123", True),
    ("75%", "75", True),
    ("10 \\%", "10\\%", True),
    ("\\frac{1}{2}", "0.50", True),
    ("-\\dfrac{3}{4}", "-0.75", True),
    ("5", "5 or 6", False),
    ("5", "the answer is 5", False),
    ("1/0", "1/0", True),
    ("1", "1/0", False),
    ("Paris", " paris. ", True),
    ("\\text{Blue}", "blue", True),
    ("\\boxed{7}", "7", True),
    ("Paris", "London", False),
    ("x^2+2x+1", "1+2x+x^2", True),
    ("(x+1)^2", "x^2+2x+2", False),
    ("\\sqrt{8}", "2\\sqrt{2}", True),
    ("\\frac{\\pi}{2}", "\\pi/2", True),
    ("(1, 2)", "(1,2)", True),
    ("7", "1, 2, 3, 4, 5, 6, 7 = ?", False),
    ("1" + "0" * 30, "1" + "0" * 29 + "1", False),
    ("", "", False),
])  # fmt: skip
def test_same_answer(reference, answer, same):
    assert same_answer(reference, answer) is same


@pytest.mark.parametrize("reference, right, wrong", [
    ("\\frac{1}{2}", ["\\dfrac12", "0.5", "\\tfrac{2}{4}", "1/2"], ["\\frac{1}{3}", "\\frac{2}{1}"]),
    ("1\\frac{1}{2}", ["\\frac{3}{2}", "1.5"], ["\\frac{1}{2}"]),
    ("\\{1, 2\\}", ["\\{2,1\\}", "1, 2"], ["\\{1,2,3\\}", "\\{1\\}"]),
    ("(1, 2)", ["(1,2.0)", "\\left(1, 2\\right)"], ["(2, 1)", "[1, 2]", "(1, 2, 3)"]),
    ("[0, 1)", ["[0,1)"], ["[0,1]", "(0,1]", "(0,1)"]),
    ("(-\\infty, 2] \\cup [3, \\infty)", ["[3,\\infty)\\cup(-\\infty,2]"], ["(-\\infty, 2]", "(2, 3)"]),
    ("5 \\text{ cm}", ["5", "5 cm", "5\\,\\mathrm{cm}"], ["6 \\text{ cm}"]),
    ("90^\\circ", ["90", "90^{\\circ}"], ["80^\\circ"]),
    ("x = 3", ["3", "x=3"], ["x=4", "y=3", "4"]),
    ("y = 2x + 1", ["2x+1", "2x+1=y", "y=1+2x"], ["y=2x+2", "2x"]),
    ("x = 1, x = 2", ["1, 2", "x=1 \\text{ or } x=2"], ["1", "1, 3"]),
    ("\\pm 2", ["2, -2", "\\{-2, 2\\}"], ["2", "\\pm 3"]),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", ["\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}"], ["\\begin{pmatrix}1&2\\\\4&3\\end{pmatrix}"]),
    ("x > 3", ["3 < x", "(3, \\infty)"], ["x < 3", "x \\ge 3"]),
    ("2\\cdot 10^{3}", ["2000", "2,000"], ["200"]),
    ("12", ["12", "x = 12"], ["12 \\text{ or } 13", "\\boxed{12} \\boxed{13}", "$12$ $13$", "11, 12, 13", "x"]),
])  # fmt: skip
def test_latex_through_math_verify(reference, right, wrong):
    assert [answer for answer in right if not same_answer(reference, answer)] == []
    assert [answer for answer in wrong if same_answer(reference, answer)] == []


def test_numbers_are_exact_and_bounded():
    assert parse_number("0.1") * 3 == parse_number("0.3")
    assert (
        parse_number("1e999999999") is None
        and parse_number("9" * 5000) is None
        and parse_number(".") is None
        and parse_number("\u0664") is None
    )


def test_accuracy_reads_the_answer_after_the_reasoning():
    score = AccuracyReward().build()
    assert score(problem("42"), GOOD) == 1.0
    assert score(problem("42"), "42 is <answer>42</answer>") == 0.0
    assert score(problem("42"), "</think><answer>42</answer><answer>41</answer>") == 0.0
    assert AccuracyReward(longest_answer=1).build()(problem("42"), GOOD) == 0.0


def test_reasoning_gym_scores_count_only_when_full():
    score = AccuracyReward().build()
    chain = problem("1000", "reasoning_gym:chain_sum", difficulty={})
    assert score(chain, "r</think><answer>+1,000.0</answer>") == 1.0
    assert score(chain, "r</think><answer>1000 apples</answer>") == 0.0  # the scorer's partial credit for containing it
    assert score(chain, "r</think><answer>999</answer>") == 0.0


def test_a_broken_scorer_is_seen_and_a_choking_one_is_not():
    reward = AccuracyReward().build()

    def chokes_on_words(answer, entry):
        return float(int(answer) == int(entry["answer"]))

    reward.scorers = {"a": chokes_on_words, "b": lambda answer, entry: entry["metadata"]["missing"]}
    assert reward(problem("7", "reasoning_gym:a"), "</think><answer>seven</answer>") == 0.0
    with pytest.raises(KeyError):
        reward(problem("7", "reasoning_gym:b"), "</think><answer>7</answer>")


@pytest.mark.parametrize("name", sorted(set(choices("reward")) - {"judge"}))  # its contract needs a server: test_judge.py
def test_contract(name):
    check_reward(choices("reward")[name]())
