"""Ledgers made by hand, through the writer that a run has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from r1mega.rl.ledger import Ledger
from r1mega.rl.rollouts import recorded
from r1mega.rl.types import Completion, RewardRecord, Sample

CLOCK = 1.7e9
"""When the first question was asked."""
PROMPT = [5, 6, 7]


def sample(item: int, member: int, version: int, **other: Any) -> Sample:
    """A judged sample: ``item + member + 1`` tokens, begun ``item`` seconds after :data:`CLOCK`. ``other``: its fields, and of
    ``tokens``, ``versions``, ``routing``, ``seconds``, ``failure``, ``note``, ``source`` and ``reason``, what is not the usual."""
    tokens = other.pop("tokens", [10 + item] * (item + member + 1))
    made = Completion(
        tokens,
        [-0.5 * (place + 1) for place in range(len(tokens))],
        other.pop("reason", "stop"),
        other.pop("versions", ((version, 0, len(tokens)),)),
        other.pop("routing", None),
    )
    record = RewardRecord(float(member), other.pop("seconds", 0.25), other.pop("failure", ""), other.pop("note", ""))
    problem = SimpleNamespace(id=f"p{item}", source=other.pop("source", f"source{item % 2}"), question="", answer="")
    times = {"began": CLOCK + item, "generated": CLOCK + item + 2.0, "judged": CLOCK + item + 2.5}
    fields = {"records": {"accuracy": record}, "reward": float(member), **times, **other}
    return Sample(item, member, problem, PROMPT, made, **fields)


def write_samples(ledger: Ledger, items: Sequence[int], version: int, size: int = 2, **other: Any) -> list[str]:
    """A group of ``size`` for each item; the ids."""
    return [ledger.write("sample", *recorded(sample(item, member, version, **other))) for item in items for member in range(size)]


def write_use(ledger: Ledger, rollout: int, items: Sequence[int], samples: Sequence[str], **other: Any) -> str:
    """Rollout ``rollout``, of two updates, trained on these, 10 seconds a rollout."""
    last = 2 * rollout
    values = {
        "rollout": rollout,
        "update": last,
        "consumed": max(items, default=-1) + 1,
        "time": CLOCK + 10.0 * rollout,
        "seconds": {"rollout": 5.0, "train": 3.0, "push": 1.0},
        "items": list(items),
        "samples": list(samples),
        "advantages": [(-1.0) ** place for place in range(len(samples))],
        "updates": [last - 1 + place % 2 for place in range(len(samples))],
    }
    return ledger.write("use", {**values, **other})


def write_drop(ledger: Ledger, rollout: int, items: Sequence[int], reason: str = "rl.dynamic_sampling", **other: Any) -> str:
    """Rollout ``rollout`` left these out."""
    values = {"rollout": rollout, "update": 2 * rollout, "consumed": max(items) + 1, "time": CLOCK + 10.0 * rollout}
    return ledger.write("drop", {**values, "items": list(items), "reason": reason, **other})


def write_run(folder: Path, rollouts: int = 2) -> list[list[str]]:
    """One start of one rank: two questions a rollout, two samples a question; the ids by rollout."""
    ledger, ids = Ledger(folder, 1, 0, 0, 0), []
    for rollout in range(1, rollouts + 1):
        items = [2 * rollout - 2, 2 * rollout - 1]
        ids.append(write_samples(ledger, items, version=2 * rollout - 2))
        write_use(ledger, rollout, items, ids[-1])
    ledger.close()
    return ids


ROUTING = torch.arange(12, dtype=torch.int16).view(3, 2, 2)
