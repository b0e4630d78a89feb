"""Tests of programs in the forms of published sets."""

from __future__ import annotations

import json

import pytest

from r1mega.config.errors import UserError
from r1mega.data.code_tests import find_tests, read_tests
from r1mega.data.problems import load_problems

PLAIN = {"inputs": ["1\n"], "outputs": ["2\n"]}


@pytest.mark.parametrize("record, tests", [
    ({"input_output": json.dumps(PLAIN)}, PLAIN),
    ({"input_output": json.dumps({**PLAIN, "inputs": [[1]], "outputs": [2], "fn_name": "f"})},
     {"inputs": [[1]], "outputs": [2], "fn_name": "f"}),
    (PLAIN, PLAIN),
    ({"public_tests": {"input": ["1\n"], "output": ["2\n"]}, "private_tests": {"input": ["3"], "output": ["4"]}},
     {"inputs": ["1\n", "3"], "outputs": ["2\n", "4"]}),
    ({"public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}])}, PLAIN),
    ({"public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "4"}]), "metadata": json.dumps({"func_name": "f"})},
     {"inputs": [[[1, 2], 3]], "outputs": [4], "fn_name": "f"}),
    ({"reward_model": {"ground_truth": json.dumps(PLAIN), "style": "rule"}}, PLAIN),
    ({"tests": [{"input": "1\n", "output": "2\n"}]}, PLAIN),
    ({"question": "?", "answer": "4"}, None),
    ({"inputs": "a text", "outputs": "another"}, None),
    ({"reward_model": {"ground_truth": "42"}}, None),
    ({"input_output": "{broken"}, None),
    ({"tests": {"input": ["1"], "output": []}}, None),
])  # fmt: skip
def test_forms(record, tests) -> None:
    assert find_tests(record) == tests


def test_of_metadata() -> None:
    assert read_tests({"inputs": ["1", ["2", "3"]], "outputs": [4, ["5"]]}) == (["1", "2\n3"], ["4", "5"], None)
    assert read_tests({"inputs": [[1]], "outputs": [2], "fn_name": "Solution.f"}) == ([[1]], [2], "f")
    assert read_tests({"input_output": json.dumps(PLAIN)}) == (["1\n"], ["2\n"], None)
    for metadata in ({}, {"inputs": [], "outputs": []}, {"inputs": ["1"], "outputs": []}, {"inputs": "1", "outputs": "2"}):
        with pytest.raises(ValueError, match="inputs and outputs"):
            read_tests(metadata)
    for name in ("1f", "", "f()", 3):
        with pytest.raises(ValueError, match="fn_name"):
            read_tests({"inputs": [[1]], "outputs": [1], "fn_name": name})
    with pytest.raises(ValueError, match="argument lists"):
        read_tests({"inputs": [1], "outputs": [1], "fn_name": "f"})


def test_a_problem_with_tests_needs_no_answer(tmp_path) -> None:
    path = tmp_path / "code.jsonl"
    rows = [
        {"question": "Double it.", "input_output": json.dumps(PLAIN)},
        {"prompt": "Double it.", "reward_model": {"ground_truth": json.dumps(PLAIN)}},
        {"id": "a", "question": "Double it.", "answer": "", "source": "own", "metadata": PLAIN, "solution": None},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(path)
    assert [problem.metadata for problem in problems] == [PLAIN] * 3 and [problem.answer for problem in problems] == [""] * 3
    path.write_text(json.dumps({"question": "Double it.", "input_output": "{}"}))
    with pytest.raises(UserError, match="or tests; got columns question, input_output"):
        load_problems(path)
