"""The reward of a countdown answer: an expression that uses each number once and gives the target."""

import ast
import re
from dataclasses import dataclass

from r1mega.rl.reward.format import extract_answer

OPERATORS = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b}


def numbers_and_value(node):
    """The numbers of an expression and what it comes to. Raises ValueError for anything but whole numbers and + - *."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [node.value], node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        (left, a), (right, b) = numbers_and_value(node.left), numbers_and_value(node.right)
        return left + right, OPERATORS[type(node.op)](a, b)
    raise ValueError(ast.dump(node))


@dataclass(frozen=True)
class Countdown:
    value_range = (0.0, 1.0)

    def build(self):
        def score(problem, response):
            try:
                tree = ast.parse(extract_answer(response) or "", mode="eval").body
                numbers, value = numbers_and_value(tree)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                return 0.0
            *given, target = map(int, re.findall(r"\d+", problem.question))
            return float(sorted(numbers) == given and value == target)

        return score
