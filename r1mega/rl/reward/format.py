"""The format reward and the grammar of a response; in: response text, out: its parts, or 1 and 0. Judges no content.

A response is ``reasoning</think><answer>answer</answer>``; the opening think tag is the prompt's, and is accepted here too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from r1mega.registry import register

THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"


@register("reward", "format")
@dataclass(frozen=True)
class FormatReward:
    """1 when the response has exactly the asked-for form, else 0 (R1: format reward)."""

    value_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def build(self) -> Callable[[Any, str], float]:
        """``(problem, response_text) -> 1.0 or 0.0``; the problem is not looked at."""
        return lambda problem, response: 1.0 if split_response(response) is not None else 0.0


def split_response(response: str) -> tuple[str, str] | None:
    """(reasoning, answer) of a response of exactly the asked-for form, stripped; None for any other.

    One closing think tag, one pair of answer tags, at most one opening think tag and that at the start; reasoning and answer are
    not blank; only white space between the think and answer tags and after the last.
    """
    text = response.strip().removeprefix(THINK)
    if [text.count(tag) for tag in (THINK, END_THINK, ANSWER, END_ANSWER)] != [0, 1, 1, 1]:
        return None
    reasoning, _, rest = text.partition(END_THINK)
    rest = rest.strip()
    if not (rest.startswith(ANSWER) and rest.endswith(END_ANSWER)):
        return None
    answer = rest[len(ANSWER) : -len(END_ANSWER)].strip()
    reasoning = reasoning.strip()
    return (reasoning, answer) if reasoning and answer else None


def extract_answer(response: str) -> str | None:
    """The text of the last answer pair after the reasoning is closed, stripped; None if there is none or it is blank."""
    _, closed, rest = response.partition(END_THINK)
    end = rest.rfind(END_ANSWER) if closed else -1
    start = rest.rfind(ANSWER, 0, end) if end >= 0 else -1
    return (rest[start + len(ANSWER) : end].strip() or None) if start >= 0 else None
