"""Which rewards count for which problems, and how much. In: weights and a problem's source; out: its weights. Runs no reward.

``weights`` are for every source; ``by_source`` maps shell-style patterns (``reasoning_gym:*``, ``gsm8k``, ``math_[ab]``; case
counts) to weights of their own. The first pattern that matches, in the order they are written, decides alone; where none does,
``weights`` does. A reward of weight 0 is run and recorded, and counts nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from r1mega.rl.types import RewardRecord

FAILURES = "reward_failures.jsonl"
"""In a run's folder; see :func:`write_failures`."""
MOST_FAILURES = 20
"""Failures written down a rollout and rank."""

Weights = Mapping[str, float]


def weights_of(source: str, weights: Weights, by_source: Mapping[str, Weights]) -> Weights:
    """Reward name to weight for the problems of ``source``."""
    return next((own for pattern, own in by_source.items() if fnmatchcase(source, pattern)), weights)


def names_of(weights: Weights, by_source: Mapping[str, Weights]) -> list[str]:
    """Every reward that is named anywhere, once, in order."""
    return list(dict.fromkeys(name for mine in (weights, *by_source.values()) for name in mine))


def by_reward(
    records: Sequence[Mapping[str, RewardRecord]], names: Sequence[str], gather: Callable[[Any], list[Any]]
) -> dict[str, list[float]]:
    """Values by reward name, one a response; a response that a reward did not run on holds its mean over those that it ran on.

    So the mean over all responses of all ranks is the mean over those that it ran on. ``gather``: an object of this rank to those
    of all ranks. A reward that ran nowhere is left out.
    """
    mine = {name: [record[name].value for record in records if name in record] for name in names}
    sums = gather({name: (sum(values), len(values)) for name, values in mine.items()})
    found = {}
    for name in names:
        value, count = (sum(part[name][place] for part in sums) for place in (0, 1))
        if count:
            found[name] = [record[name].value if name in record else value / count for record in records]
    return found


def keep_failures(path: Path, done: int) -> None:
    """Drop the failures of rollouts after ``done``, which are made again, and a line that a killed process left half."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if json.loads(line)["rollout"] <= done:
                kept.append(line)
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)


def write_failures(
    path: Path, rollout: int, problems: Sequence[Any], responses: Sequence[str], records: Sequence[Mapping[str, RewardRecord]]
) -> None:
    """Append the first failures of a rollout to a JSONL: rollout, problem, reward, seconds, failure, note, response.

    What rewards noted without a failure ("test 3: wrong") follows where there is room.
    """
    lines = [
        {"rollout": rollout, "problem": problem.id, "reward": name, "seconds": entry.seconds, "failure": entry.failure}
        | {"note": entry.note, "response": response}
        for problem, response, record in zip(problems, responses, records, strict=True)
        for name, entry in record.items()
        if entry.failure or entry.note
    ]
    lines.sort(key=lambda line: not line["failure"])
    if lines:
        with path.open("ab") as file:  # one write, so that lines of several ranks do not mix
            file.write("".join(json.dumps(line) + "\n" for line in lines[:MOST_FAILURES]).encode())
