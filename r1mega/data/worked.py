"""Worked solutions: how a careful and a terse solver would answer a problem, as text to learn from.

Owns the solvers, found by the name of the reasoning-gym data set. "careful" goes step by step and writes each running result;
"terse" states the answer after one short remark. Cold-start data mixes both, so that reinforcement learning has something to choose
between. In: a :class:`~r1mega.data.problems.Problem`; out: reasoning and answer as text. What it cannot work out is None.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from r1mega.data.problems import Problem
from r1mega.data.tokenizer import make_response

STYLES = ("careful", "terse")
REMARKS = ("That is easy.", "I see it at once.", "No need to work it out.")
"""What the terse solver says instead of reasoning."""

Solver = Callable[[dict[str, Any]], "str | None"]
_careful: dict[str, Solver] = {}


class Worked(NamedTuple):
    """A worked solution: the reasoning, and the final answer alone."""

    reasoning: str
    answer: str

    @property
    def response(self) -> str:
        """``reasoning</think><answer>ANSWER</answer>``, as a model writes it."""
        return make_response(self.reasoning, self.answer)

    def document(self, question: str) -> str:
        """The same as plain pretraining text, without the tokens of a conversation: those are what the cold start teaches."""
        return f"Question: {question}\nReasoning: {self.reasoning}\nAnswer: {self.answer}"


def careful(dataset: str) -> Callable[[Solver], Solver]:
    """Decorator: the careful solver of a reasoning-gym data set, from a problem's metadata to its reasoning (None: cannot)."""

    def add(solver: Solver) -> Solver:
        _careful[dataset] = solver
        return solver

    return add


def worked_solution(problem: Problem, style: str, rng: random.Random) -> Worked | None:
    """The worked solution of ``problem`` in a style, or None when there is none (no solver and no solution text, or no answer).

    A problem with a solution text has it as its careful style. Raises ValueError for an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"worked: a style is one of {', '.join(STYLES)}; got {style!r}")
    if not problem.answer:
        return None
    if style == "terse":
        return Worked(rng.choice(REMARKS), problem.answer)
    if problem.solution:
        return Worked(problem.solution, problem.answer)
    solver = _careful.get(problem.dataset or "")
    reasoning = solver(problem.metadata) if solver else None
    return Worked(reasoning, problem.answer) if reasoning else None


@careful("chain_sum")
@careful("basic_arithmetic")
def arithmetic_steps(metadata: dict[str, Any]) -> str | None:
    """One operation after the other with its result: ``4 + 3 = 7, 7 - 9 = -2``. None for a quotient that is not whole."""
    steps: list[str] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.UnaryOp):
            operand = value(node.operand)
            if not isinstance(node.operand, ast.Constant):
                steps.append(f"-({operand}) = {-operand}")
            return -operand
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if not isinstance(node, ast.BinOp):
            raise ValueError(ast.dump(node))
        sign, operation = _OPERATIONS[type(node.op)]
        left, right = value(node.left), value(node.right)
        result = operation(left, right)
        if result.denominator != 1:
            raise ValueError("a quotient that is not whole")
        steps.append(f"{left} {sign} {right} = {result}")
        return result

    try:
        result = value(ast.parse(metadata["expression"].strip(), mode="eval").body)
    except (ValueError, KeyError, SyntaxError, ZeroDivisionError):
        return None
    return ", ".join(steps) or f"It is {result}"


_OPERATIONS: dict[type, tuple[str, Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: ("+", lambda a, b: a + b),
    ast.Sub: ("-", lambda a, b: a - b),
    ast.Mult: ("*", lambda a, b: a * b),
    ast.Div: ("/", lambda a, b: a / b),
}


@careful("letter_counting")
def letter_steps(metadata: dict[str, Any]) -> str:
    """Word by word with the total so far: ``hundred 1, thousand 2, names 2``."""
    total, steps = 0, []
    for word in metadata["span"]:
        total += word.lower().count(metadata["target_letter"])
        steps.append(f"{word} {total}")
    return ", ".join(steps)


@careful("spell_backward")
def backward_steps(metadata: dict[str, Any]) -> str:
    """The letters one by one, then from the last to the first: ``c a t, t a c``."""
    word = metadata["word"]
    return f"{' '.join(word)}, {' '.join(reversed(word))}"


@careful("number_sorting")
def sorting_steps(metadata: dict[str, Any]) -> str:
    """Selection: of what is left, the next one, until nothing is left."""
    left = list(metadata["original_numbers"])
    pick, word = (min, "smallest") if metadata["direction"] == "ascending" else (max, "largest")
    steps = []
    while left:
        chosen = pick(left, key=float)
        steps.append(f"Of {', '.join(left)} the {word} is {chosen}.")
        left.remove(chosen)
    return "\n".join(steps)


@careful("gcd")
def euclid_steps(metadata: dict[str, Any]) -> str:
    """Euclid's divisions until the remainder is 0, number after number: ``780 = 1 * 461 + 319``."""
    numbers = list(metadata["numbers"])
    common, steps = numbers[0], []
    for number in numbers[1:]:
        a, b = max(common, number), min(common, number)
        while b:
            steps.append(f"{a} = {a // b} * {b} + {a % b}")
            a, b = b, a % b
        common = a
        steps.append(f"so {common}")
    return ", ".join(steps)


_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@careful("base_conversion")
def base_steps(metadata: dict[str, Any]) -> str:
    """Into decimal digit by digit, then out of it by division with remainder; decimal on one side leaves that half out."""
    source, target = metadata["source_base"], metadata["target_base"]
    steps: list[str] = []
    value = 0
    for digit in metadata["source_repr"]:
        if source != 10:
            steps.append(f"{value} * {source} + {_DIGITS.index(digit)} = {value * source + _DIGITS.index(digit)}")
        value = value * source + _DIGITS.index(digit)
    while target != 10 and value:
        steps.append(f"{value} = {value // target} * {target} + {value % target} ({_DIGITS[value % target]})")
        value //= target
    steps.append(f"so {metadata['target_repr']}")
    return "\n".join(steps)
