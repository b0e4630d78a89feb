"""Foreign column names and final answers, by hand."""

from __future__ import annotations

import pytest

from r1mega.data.columns import boxed, find_answer, find_question, find_solution, from_solution


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{42}$.", "42"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5$", "5"),
        (r"\boxed {x+1}", "x+1"),
        (r"\boxed{1,234}", "1234"),
        (r"\boxed{1, 2}", "1, 2"),
        (r"\boxed{never closed", None),
        (r"\boxed{}", None),
        ("nothing", None),
    ],
)
def test_boxed(text, answer):
    assert boxed(text) == answer


def test_marks_of_a_final_answer():
    assert from_solution("3 * 4 = <<3*4=12>>12\n#### 12") == "12"
    assert from_solution("#### 70,000\n") == "70000"
    assert from_solution(r"\boxed{3}") == "3"
    assert from_solution("12") is None


@pytest.mark.parametrize(
    ("record", "question", "answer", "solution"),
    [
        ({"question": " q ", "answer": "a b\n#### 7"}, "q", "7", "a b"),  # GSM8K
        ({"question": "q", "answer": "16-3=<<16-3=13>>13 left\n#### 13"}, "q", "13", "16-3=13 left"),
        ({"problem": "p", "solution": r"so \boxed{3}", "answer": "3"}, "p", "3", r"so \boxed{3}"),  # open-r1
        ({"problem": "p", "solution": r"so \boxed{3}"}, "p", "3", r"so \boxed{3}"),
        ({"problem": "p", "answer": 27.0}, "p", "27", None),
        ({"problem": "p", "answer": 2.5}, "p", "2.5", None),
        ({"prompt": "p", "final_answer": "x", "answer": "words"}, "p", "x", None),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}],
                "reward_model": {"ground_truth": "9"},
            },
            "p",
            "9",
            None,
        ),
        ({"question": "q", "gold": "18", "solution": "wrong way", "is_correct": False}, "q", "18", None),
        ({"question": "q", "answer": ""}, "q", None, None),
        ({"question": "q", "answer": "no mark ####"}, "q", None, "no mark"),
        ({"text": "t"}, None, None, None),
    ],
)
def test_records(record, question, answer, solution):
    assert find_question(record) == question
    assert find_answer(record) == answer
    assert find_solution(record) == solution


def test_named_columns_alone_are_used():
    record = {"question": "q", "ask": "other", "answer": "1", "reply": "2"}
    assert find_question(record, "ask") == "other" and find_answer(record, "reply") == "2"
    assert find_question(record, "missing") is None and find_answer(record, "missing") is None
