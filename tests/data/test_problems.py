"""Problem files: our own records, those of others, and line-numbered errors."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest

from r1mega.config.errors import UserError
from r1mega.data.problems import Problem, load_problems, write_problems

MATH = Path(__file__).parents[3] / "shared" / "data" / "math"


def test_own_records_round_trip(tmp_path):
    problems = [
        Problem("a", "1 + 1 =", "2", "reasoning_gym:chain_sum", {"expression": "1 + 1", "difficulty": {"num_terms": [2, 6]}}),
        Problem("b", "why?", "because é", "file", {}, "a solution"),
        Problem("c", "open", "", "reasoning_gym:rush_hour", {"board": [1]}),
    ]
    assert write_problems(tmp_path / "deep" / "p.jsonl", problems) == 3
    assert load_problems(tmp_path / "deep" / "p.jsonl") == problems
    assert load_problems(tmp_path / "deep" / "p.jsonl", limit=2) == problems[:2]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["p.jsonl"]
    assert problems[0].dataset == "chain_sum" and problems[1].dataset is None
    assert problems[2].entry() == {"question": "open", "answer": None, "metadata": {"board": [1]}}


def test_foreign_records_get_the_file_as_source(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        json.dumps({"question": "q", "answer": "s\n#### 4"})
        + "\n"
        + json.dumps({"id": 7, "problem": "p", "answer": 5, "source": "web"})
        + "\n"
    )
    assert load_problems(path) == [Problem("mine:1", "q", "4", "mine", {}, "s"), Problem("7", "p", "5", "mine")]
    assert load_problems(path, name="other", limit=1)[0].source == "other"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{oops", "line 2: each line is one JSON object; got '{oops'"),
        ('{"answer": "1"}', "line 2: a problem has a question in question, problem, .*; got columns answer"),
        ('{"question": "q"}', "line 2: a problem has an answer in .*; got columns question"),
        ('{"question": "q", "answer": null}', "line 2: a problem has an answer"),
        (
            '{"id": "x", "question": "q", "answer": "", "source": "s", "metadata": {}, "solution": null}',
            "line 2: a problem has an answer",
        ),
    ],
)
def test_bad_lines_are_named_by_number(tmp_path, line, says):
    (tmp_path / "p.jsonl").write_text('{"question": "q", "answer": "1"}\n' + line + "\n")
    with pytest.raises(UserError, match=says):
        load_problems(tmp_path / "p.jsonl")


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(UserError, match="at least one problem; got an empty file"):
        load_problems(tmp_path / "p.jsonl")
    with pytest.raises(UserError, match="no such file"):
        load_problems(tmp_path / "none.jsonl")
    (tmp_path / "p.jsonl").write_text('{"question": "q", "answer": "1"}\n')
    with pytest.raises(UserError, match="answer in reply; got columns question, answer; .* set answer_column"):
        load_problems(tmp_path / "p.jsonl", answer_column="reply")


def test_a_compressed_file_and_a_folder_of_files(tmp_path):
    line = json.dumps({"question": "q", "answer": "1"}) + "\n"
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "b.jsonl.gz").write_bytes(gzip.compress((line * 2).encode()))
    (tmp_path / "shards" / "a.jsonl").write_text(line)
    (tmp_path / "shards" / "notes.txt").write_text("no record")
    assert [(p.id, p.source) for p in load_problems(tmp_path / "shards" / "b.jsonl.gz")] == [("b:1", "b"), ("b:2", "b")]
    assert [p.id for p in load_problems(tmp_path / "shards")] == [
        f"shards:{key}" for key in ("a.jsonl:1", "b.jsonl.gz:1", "b.jsonl.gz:2")
    ]


def test_parquet_records_with_nested_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "What is 1 + 1?"}]
    rows = [
        {"messages": turns, "reward_model": {"ground_truth": "2", "style": "rule"}, "extra": {"task": {"text": "t"}, "gold": Decimal("2.50")}},
        {"messages": turns, "reward_model": {"ground_truth": "3", "style": "rule"}, "extra": {"task": {"text": "u"}, "gold": Decimal("3.00")}},
    ]  # fmt: skip
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert load_problems(path) == [Problem("p:1", "What is 1 + 1?", "2", "p"), Problem("p:2", "What is 1 + 1?", "3", "p")]
    own = load_problems(path, question_column="extra.task.text", answer_column="extra.gold")
    assert [(p.question, p.answer) for p in own] == [("t", "2.5"), ("u", "3")]
    with pytest.raises(
        UserError, match=r"p.parquet row 1: .* in mesages; got columns messages, .*; did you mean messages\? set question_column"
    ):
        load_problems(path, question_column="mesages")
    with pytest.raises(
        UserError,
        match=r"p.parquet row 1: .* in extr.gold; .*; did you mean extra\? add the answer, drop the row or set answer_column",
    ):
        load_problems(path, answer_column="extr.gold")


@pytest.mark.skipif(not MATH.is_dir(), reason="the public math files are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "num", "answer", "solved"),
    [("gsm8k_train", 7473, "72", True), ("gsm8k_test", 1319, "18", True), ("gsm8k_judged", 600, "18", False),
     ("aime24", 30, "204", True), ("amc23", 40, "27", False), ("minerva_math", 272, "1.6", True)],
)  # fmt: skip
def test_public_files_load_as_they_are(name, num, answer, solved):
    problems = load_problems(MATH / f"{name}.jsonl")
    assert len(problems) == num and problems[0].answer == answer and (problems[0].solution is not None) == solved
    assert all(p.question and p.answer and "####" not in p.answer and "<<" not in (p.solution or "") for p in problems)
