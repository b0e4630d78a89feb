"""The accuracy reward: is the answer right; in: a problem and a response's text, out: 1 or 0. Asks no model.

The answer stands in the answer tags after the reasoning is closed. Sources ``reasoning_gym:NAME`` are judged by that data set's own
scorer, and only its full score counts: partial credit is 0. A reference that is a choice (:mod:`r1mega.rl.reward.choice`) is judged
by the letter that the answer means, every other one by number, then by text, then by math-verify where there is LaTeX. math-verify
leaves units out: 5 cm is 5, and 5 m.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from r1mega.config.knob import at_least, knob
from r1mega.registry import register
from r1mega.rl.reward.choice import answer_letter, reference_letter
from r1mega.rl.reward.format import extract_answer

GYM = "reasoning_gym:"
NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?")
FORMULA_MARKS = frozenset("\\^_{}$+*/=()[]|<>")
FULL_SCORE = 1.0 - 1e-9


@register("reward", "accuracy")
@dataclass(frozen=True)
class AccuracyReward:
    """1 when the answer is right, else 0 (R1: accuracy reward)."""

    longest_answer: int = knob(1000, "a longer answer is wrong without being parsed", "characters", **at_least(1))
    value_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def build(self) -> Callable[[Any, str], float]:
        """``(problem, response_text) -> 1.0 or 0.0``."""
        return _Accuracy(self.longest_answer)


class _Accuracy:
    def __init__(self, longest_answer: int):
        self.longest_answer = longest_answer
        self.scorers: dict[str, Callable] = {}

    def warm(self, source: str) -> None:
        """Import what judges problems of this source."""
        if source.startswith(GYM):
            self.scorer(source.removeprefix(GYM))

    def scorer(self, name: str) -> Callable[[str, dict], float]:
        if name not in self.scorers:
            import reasoning_gym

            self.scorers[name] = reasoning_gym.get_score_answer_fn(name)
        return self.scorers[name]

    def __call__(self, problem: Any, response: str) -> float:
        answer = extract_answer(response)
        if answer is None or len(answer) > self.longest_answer:
            return 0.0
        if problem.source.startswith(GYM):
            return self.gym_score(problem, answer)
        letter, choices = reference_letter(problem)
        if letter is not None:
            return 1.0 if answer_letter(answer, choices, same_answer) == letter else 0.0
        return 1.0 if same_answer(problem.answer, answer) else 0.0

    def gym_score(self, problem: Any, answer: str) -> float:
        score = self.scorer(problem.source.removeprefix(GYM))
        entry = {"question": problem.question, "answer": problem.answer or None, "metadata": problem.metadata}
        try:
            return 1.0 if float(score(answer, entry)) >= FULL_SCORE else 0.0
        except Exception:
            score(problem.answer, entry)  # a scorer that chokes on the right answer too is broken: let that be seen
            return 0.0


def same_answer(reference: str, answer: str) -> bool:
    """Whether two answers say the same: as numbers if the reference is one, else as text, else as formulas (math-verify).

    A reference in GSM8K's form counts from its last ``####`` on. Commas of thousands, $, %, trailing zeros and a final full stop do
    not matter; a/b and \\frac{a}{b} are numbers. Never raises for text that cannot be parsed.
    """
    reference = reference.rpartition("####")[2].strip()
    answer = answer.strip().removeprefix("####").strip()
    if not reference or not answer:
        return False
    want, got = parse_number(reference), parse_number(answer)
    if want is not None and got is not None:
        return want == got
    if normal_text(reference) == normal_text(answer):
        return True
    return bool(FORMULA_MARKS & set(reference + answer)) and same_formula(reference, answer)


def parse_number(text: str) -> Fraction | None:
    """The exact value of a decimal number or fraction ("-1,234.50", "$3", "75%" as 75, "1/2", "\\frac{1}{2}"), or None."""
    text = _unwrap(unicodedata.normalize("NFKC", text).replace("\u2212", "-"))
    for mark in ("\\$", "\\%", "$", "%", "\\!", "\\,"):
        text = text.replace(mark, "")
    text = re.sub(r"^([+-]?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}$", r"\1\2/\3", text.strip())
    upper, slash, lower = text.partition("/")
    top = _decimal(upper.strip())
    if not slash:
        return top
    bottom = _decimal(lower.strip())
    return top / bottom if top is not None and bottom else None


def _decimal(text: str) -> Fraction | None:
    if not NUMBER.fullmatch(text) or not any(char.isdigit() for char in text) or len(text) > 1000:
        return None
    # A final full stop ends a sentence, and Fraction wants a digit after the point.
    text = text.replace(",", "").rstrip(".") if text.endswith(".") else text.replace(",", "")
    return Fraction(text)


def normal_text(text: str) -> str:
    """Case, white space, Unicode forms, math delimiters, \\boxed and \\text, and a final full stop taken away."""
    text = _unwrap(unicodedata.normalize("NFKC", text))
    text = re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r"\1", text)
    return " ".join(text.casefold().split()).rstrip(".").strip()


def _unwrap(text: str) -> str:
    """Without one enclosing $...$, \\(...\\), \\[...\\] and \\boxed{...}."""
    text = text.strip()
    for start, end in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}")):
        if len(text) >= len(start) + len(end) and text.startswith(start) and text.endswith(end):
            text = text[len(start) : len(text) - len(end)].strip()
    return text


def same_formula(reference: str, answer: str) -> bool:
    """math-verify's judgement of two formulas; False where either cannot be parsed. May be slow: run it under a limit."""
    from math_verify import LatexExtractionConfig, parse, verify

    def formula(text: str) -> list:
        # Only LaTeX, and all of it: the default would also fish single numbers out of prose, which pays for listing guesses.
        return parse(f"${_unwrap(text)}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)

    want, got = formula(reference), formula(answer)
    return bool(want and got) and verify(want, got, timeout_seconds=None)
