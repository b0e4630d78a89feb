"""A reward for tests, in a module that a reward's process imports at once."""

from __future__ import annotations


def ascii_share(problem, response: str) -> float:
    """The share of a response's characters that are ASCII: a half by chance, and something that a few updates teach."""
    return sum(char.isascii() for char in response) / max(len(response), 1)
