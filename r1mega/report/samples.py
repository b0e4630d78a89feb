"""What became of every sample of an ``r1mega rl`` run, from its ledger's headers: when it was made, judged and used, or why not.

In: a :class:`r1mega.rl.ledger.History`. Out: :class:`Seen`, phases of the trainers, and rewards that took long. Reads no arrays.
Times are seconds since 1970 by the clocks of the hosts that wrote them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError
from r1mega.rl.ledger import FOLDER, Frame, History
from r1mega.rl.types import RewardRecord

USED, DROPPED, WAITING, VOID = "used", "dropped", "waiting", "void"
"""Trained on; left out with its whole group; not used yet; from weights or a start that the run has gone back behind."""


@dataclass(frozen=True)
class Seen:
    """One sample. ``fate``: above. ``rollout``: that used or dropped it; ``ended``: when that was written, None of a roll-back's;
    ``advantage``, ``update``: of a used one; ``reason``: of a dropped one."""

    frame: Frame
    fate: str
    rollout: int | None = None
    ended: float | None = None
    advantage: float | None = None
    update: int | None = None
    reason: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """What the ledger says of it."""
        return self.frame.values

    @property
    def rewards(self) -> dict[str, RewardRecord]:
        """What each reward said."""
        return {name: RewardRecord(*record) for name, record in self.frame.values["rewards"].items()}

    @property
    def num_tokens(self) -> int:
        """Of the response, an environment's included."""
        return self.frame.shapes["tokens"][1][0]

    @property
    def num_prompt_tokens(self) -> int:
        """Of the prompt."""
        return self.frame.shapes["prompt"][1][0]


PHASES = ("rollout", "value", "score", "train", "push")
"""Of a turn, in the loop's order."""


@dataclass(frozen=True)
class Phase:
    """What a trainer did from ``began`` to ``ended``, for ``rollout``; ``rank``: whose record says so."""

    rank: int
    rollout: int
    name: str
    began: float
    ended: float


def phases(history: History) -> list[Phase]:
    """The phases of the rollouts that still hold, laid end to end before the moment at which each was written down."""
    found = []
    for rollout, frames in sorted(history.uses().items()):
        for frame in frames:
            seconds, ended = frame.values.get("seconds", {}), frame.values.get("time")
            if frame.kind != "use" or ended is None:
                continue
            for name in reversed([name for name in PHASES if name in seconds]):
                found.append(Phase(frame.rank, rollout, name, ended - seconds[name], ended))
                ended -= seconds[name]
    return sorted(found, key=lambda phase: (phase.rank, phase.began))


def has_ledger(run: Path) -> bool:
    """Is ``run`` the folder of a run of ``r1mega rl``?"""
    return (run / FOLDER).is_dir()


def seen(history: History) -> list[Seen]:
    """Every sample in the ledger, in the order of its files."""
    used, dropped = {}, {}
    for rollout, frames in history.uses().items():
        for frame in frames:
            values = frame.values
            if frame.kind == "drop":
                dropped |= dict.fromkeys(values["items"], (rollout, values.get("time"), values["reason"]))
                continue
            updates = values.get("updates") or [None] * len(values["samples"])
            for name, advantage, update in zip(values["samples"], values["advantages"], updates, strict=True):
                used[name] = (rollout, values.get("time"), advantage, update)
    held, found = {frame.id for frame in history.samples().values()}, []
    for frame in history.frames:
        if frame.kind != "sample":
            continue
        if frame.id in used:
            found.append(Seen(frame, USED, *used[frame.id]))
        elif frame.id in held and (drop := dropped.get(frame.values["item"])):
            found.append(Seen(frame, DROPPED, drop[0], drop[1], reason=drop[2]))
        else:
            found.append(Seen(frame, WAITING if frame.id in held else VOID))
    return found


@dataclass(frozen=True)
class Slow:
    """One call of a reward. ``said``: why it failed, or what it noted."""

    seconds: float
    reward: str
    problem: str
    sample: str
    rollout: int | None
    value: float
    said: str


def slowest(samples: Iterable[Seen], count: int) -> list[Slow]:
    """The ``count`` calls of rewards that took longest, the longest first."""
    calls = (
        Slow(said.seconds, name, one.values["problem"], one.frame.id, one.rollout, said.value, said.failure or said.note)
        for one in samples
        for name, said in one.rewards.items()
    )
    return heapq.nlargest(count, calls, key=lambda call: call.seconds)


def newest(samples: Iterable[Seen], rollouts: int) -> list[Seen]:
    """Samples of the newest ``rollouts`` rollouts (0: of all), and those that wait."""
    samples = [one for one in samples if one.fate != VOID]
    last = max((one.rollout for one in samples if one.rollout is not None), default=0)
    first = last - rollouts + 1 if rollouts else 0
    return [one for one in samples if one.rollout is None or one.rollout >= first]


def history_of(run: Path) -> History | None:
    """The history of a run that has a ledger with something in it, else None."""
    if not has_ledger(run):
        return None
    try:
        return History(run / FOLDER)
    except UserError:
        return None
