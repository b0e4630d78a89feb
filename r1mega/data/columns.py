"""Which column of a foreign record means what: GSM8K's, open-r1's, verl's and their kin's names for question, answer and solution.

Owns recognition and the extraction of a final answer from a worked solution (``#### 42``, ``\\boxed{42}``). In: one decoded JSON
object or Parquet row; out: strings, or None where the record says nothing. Reads no files.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

QUESTION_COLUMNS = ("question", "problem", "prompt", "input", "instruction", "query", "messages")
ANSWER_COLUMNS = (
    "final_answer",
    "answer",
    "gold",
    "expected_answer",
    "ground_truth",
    "gt_answer",
    "gold_answer",
    "target",
    "label",
)
SOLUTION_COLUMNS = ("solution", "rationale", "explanation", "worked_solution", "answer")
ID_COLUMNS = ("id", "uuid", "unique_id", "problem_id", "idx")

_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator notes: 16 - 3 = <<16-3=13>>13
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
_MARKER = "####"


def find_question(record: dict[str, Any], column: str | None = None) -> str | None:
    """The question, from ``column`` or the first known one that holds text or a conversation (its last user turn); or None."""
    for name in (column,) if column else QUESTION_COLUMNS:
        value = _cell(record, name)
        if isinstance(value, list):
            turns = [turn.get("content") for turn in value if isinstance(turn, dict) and turn.get("role") == "user"]
            value = turns[-1] if turns else None
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def find_answer(record: dict[str, Any], column: str | None = None) -> str | None:
    """The final answer, from ``column``, the first known one, ``reward_model.ground_truth``, or a solution; None without one.

    A text that ends in ``#### 42`` or holds ``\\boxed{42}`` gives 42; a whole float is written without its point (27.0 is 27).
    """
    for name in (column,) if column else ANSWER_COLUMNS:
        if answer := _final(_cell(record, name)):
            return answer
    if column:
        return None
    if answer := _final(_cell(record, "reward_model.ground_truth")):
        return answer
    for name in SOLUTION_COLUMNS:
        text = record.get(name)
        if isinstance(text, str) and (answer := from_solution(text)):
            return answer
    return None


def find_solution(record: dict[str, Any]) -> str | None:
    """A worked solution without its final-answer line and calculator notes; None without one, or when the record calls it wrong."""
    if record.get("is_correct") is False or record.get("correct") is False:
        return None
    for name in SOLUTION_COLUMNS:
        text = record.get(name)
        if not isinstance(text, str) or (name == "answer" and _MARKER not in text):
            continue  # GSM8K's answer column holds solution and answer; elsewhere it is the answer alone
        text = _CALCULATOR.sub("", text.rsplit(_MARKER, 1)[0]).strip()
        if text:
            return text
    return None


def find_id(record: dict[str, Any]) -> str | None:
    """The record's own name as text; None without one."""
    for name in ID_COLUMNS:
        if isinstance(record.get(name), str | int) and str(record[name]).strip():
            return str(record[name])
    return None


def from_solution(text: str) -> str | None:
    """The final answer that a worked solution marks: after the last ``####``, or in the last ``\\boxed{}``; None without a mark."""
    if _MARKER in text:
        return _clean(text.rsplit(_MARKER, 1)[1]) or None
    return boxed(text)


def boxed(text: str) -> str | None:
    """What the last ``\\boxed{...}`` (or ``\\fbox{...}``, ``\\boxed 5``) of ``text`` holds, braces balanced; None without one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].split("box", 1)[1].removeprefix("ed")
    if rest.startswith(" ") and not rest.lstrip().startswith("{"):
        return _clean(re.split(r"[\s$]", rest.lstrip(), maxsplit=1)[0]) or None
    rest = rest.lstrip()
    if not rest.startswith("{"):
        return None
    depth = 0
    for i, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return _clean(rest[1:i]) or None
    return None


def _cell(record: dict[str, Any], name: str) -> Any:
    """The column ``name``; where there is none of that name, what its dots lead to (``reward_model.ground_truth``); else None."""
    if name in record or "." not in name:
        return record.get(name)
    first, _, rest = name.partition(".")
    inner = record.get(first)
    return _cell(inner, rest) if isinstance(inner, dict) else None


def _final(value: Any) -> str | None:
    """An answer cell as text."""
    if isinstance(value, Decimal):  # Parquet has them
        value = int(value) if value == value.to_integral_value() else str(value.normalize())
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str) and value.strip():
        return from_solution(value) or (None if _MARKER in value else _clean(value))
    return None


def _clean(text: str) -> str:
    text = text.strip()
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
