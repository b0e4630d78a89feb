"""A reward for tests, in a module that a reward's process imports at once."""

from __future__ import annotations


def early(problem, response: str) -> float:
    """The share of a response's characters that come before n in the alphabet: something that a few updates teach."""
    return sum("a" <= char < "n" for char in response) / max(len(response), 1)
