"""Problems with answers: the record, its JSONL file, and the JSONL and Parquet files of others.

Owns :class:`Problem` and how a record becomes one. Refuses, by line or row, what lacks a question or lacks an answer.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError, nearest
from r1mega.data import code_tests, columns
from r1mega.files.records import read_rows, stem

GENERATED = "reasoning_gym:"
"""Prefix of the source of a generated problem; the data set's name follows."""


@dataclass(frozen=True)
class Problem:
    """One question with its answer.

    source: ``reasoning_gym:<data set>``, or a file's name. answer: the final answer alone; "" only for a generated problem whose
    scorer needs none, and for one with tests. metadata: JSON values, what the data set's scorer reads, or the tests of a program
    (:mod:`r1mega.data.code_tests`). solution: a worked solution, or None.
    """

    id: str
    question: str
    answer: str
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)
    solution: str | None = None

    @property
    def dataset(self) -> str | None:
        """The reasoning-gym data set that made this problem and scores its answers; None for other problems."""
        return self.source.removeprefix(GENERATED) if self.source.startswith(GENERATED) else None

    def entry(self) -> dict[str, Any]:
        """The record that reasoning-gym's ``score_answer(answer, entry)`` takes."""
        return {"question": self.question, "answer": self.answer or None, "metadata": self.metadata}


def load_problems(
    path: str | Path,
    *,
    limit: int = 0,
    name: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
) -> list[Problem]:
    """Problems of a JSONL or Parquet file, or a folder of them, in order: our own records, or those of others by the column names
    of :mod:`r1mega.data.columns`.

    limit: problems from the start; 0: all. name: source of foreign records; None: the file's name without suffix. Columns: null for
    the known names. Raises UserError with the line or row for a record that cannot be read or has no question or no answer, and
    for an empty file.
    """
    source = name or stem(path)
    problems: list[Problem] = []
    for row in read_rows(path):
        if limit and len(problems) == limit:
            break
        record = row.values
        if not (question_column or answer_column) and _is_ours(record):
            problem = Problem(**{key: record[key] for key in _FIELDS if key in record})
        else:
            problem = Problem(
                id=columns.find_id(record) or f"{source}:{row.key}",
                question=columns.find_question(record, question_column) or "",
                answer=columns.find_answer(_without_tests(record), answer_column) or "",
                source=source,
                metadata=code_tests.find_tests(record) or {},
                solution=columns.find_solution(record),
            )
        _check(problem, row.where, record, question_column, answer_column)
        problems.append(problem)
    if not problems:
        raise UserError(f"{path}: a problem file holds at least one problem; got an empty file; check the path")
    return problems


def write_problems(path: str | Path, problems: Iterable[Problem]) -> int:
    """Write problems as JSONL, one a line, aside and then renamed. Returns how many."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    num = 0
    with aside.open("w", encoding="utf-8") as out:
        for problem in problems:
            out.write(json.dumps(dataclasses.asdict(problem), ensure_ascii=False) + "\n")
            num += 1
    os.replace(aside, target)
    return num


def _without_tests(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose ground truth, where it is tests, is not taken for an answer."""
    inner = record.get("reward_model")
    return {**record, "reward_model": {}} if isinstance(inner, dict) and code_tests.find_tests({"reward_model": inner}) else record


_FIELDS = tuple(f.name for f in dataclasses.fields(Problem))


def _is_ours(record: dict[str, Any]) -> bool:
    texts = all(isinstance(record.get(key), str) for key in ("id", "question", "answer", "source"))
    return texts and isinstance(record.get("metadata"), dict) and isinstance(record.get("solution"), str | None)


def _check(problem: Problem, where: str, record: dict[str, Any], question_column: str | None, answer_column: str | None) -> None:
    has = "columns " + ", ".join(record)
    if not problem.question.strip():
        looked = question_column or ", ".join(columns.QUESTION_COLUMNS)
        near = nearest(question_column, record) if question_column and question_column not in record else ""
        raise UserError(f"{where}: a problem has a question in {looked}; got {has}; {near}set question_column")
    if not problem.answer.strip() and problem.dataset is None and not problem.metadata.get("inputs"):
        looked = answer_column or ", ".join(columns.ANSWER_COLUMNS) + ", a solution with #### or \\boxed{}, or tests"
        near = nearest(answer_column, record) if answer_column and answer_column not in record else ""
        raise UserError(
            f"{where}: a problem has an answer in {looked}; got {has}; {near}add the answer, drop the {where.split()[-2]} or set "
            "answer_column"
        )
