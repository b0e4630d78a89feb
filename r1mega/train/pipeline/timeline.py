"""What ran when: events of a pipeline's ranks, kept as JSON lines, their bubble, and a picture in letters. Imports no torch.

A run keeps ``OUT/timeline/rank{r}.jsonl``, r the place on the pipeline axis, a line a recorded step:
``{"step": 7, "events": [[work, stage, microbatch, begin_seconds, end_seconds], ...]}``. All ranks of a pipeline use one clock (on
several hosts: as far as their clocks agree). The bubble of a rank is the share of the step in which it runs nothing: the step lasts
from the first begin to the last end over all ranks, so waiting before the first and after the last work of a rank counts; what runs
at the same time on one rank counts once. The whole bubble is the mean over the ranks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from r1mega.config.errors import UserError

FOLDER = "timeline"
IDLE = "."


@dataclass(frozen=True)
class Event:
    """``work`` (F, B, I or W) of ``stage`` on ``microbatch`` ran from ``begin_seconds`` to ``end_seconds``."""

    work: str
    stage: int
    microbatch: int
    begin_seconds: float
    end_seconds: float


EventsByRank = Sequence[Sequence[Event]]


@dataclass(frozen=True)
class Recorded:
    """One recorded step: its number, and the events of each rank in the order in which they ran."""

    step: int
    events_by_rank: tuple[tuple[Event, ...], ...]


def write_events(out: str | Path, rank: int, step: int, events: Sequence[Event]) -> Path:
    """Add what pipeline rank ``rank`` of one pipeline did in ``step`` to the run's folder. Returns the file."""
    path = Path(out) / FOLDER / f"rank{rank}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "events": [astuple(event) for event in events]}) + "\n")
    return path


def read_events(out: str | Path) -> Recorded:
    """The newest step of which every rank has events, as the run that wrote last left it.

    A last line that is cut short (the run was killed) does not count. Raises UserError where there is nothing, or a line is wrong.
    """
    out = Path(out)
    found = {int(match[1]): path for path in (out / FOLDER).glob("rank*.jsonl") if (match := _NAME.fullmatch(path.name))}
    if not found:
        raise UserError(
            f"run: a run that recorded its pipeline in {FOLDER}/rank0.jsonl and so on; got {out}, which has no such file; "
            "run it again with profile=true"
        )
    if sorted(found) != list(range(len(found))):
        missing = min(set(range(max(found))) - set(found))
        raise UserError(f"{out / FOLDER}: a file of every rank; got none of rank {missing}; run it again with profile=true")
    by_rank = [_steps(found[rank]) for rank in sorted(found)]
    steps = set.intersection(*map(set, by_rank))
    if not steps:
        raise UserError(f"{out / FOLDER}: a step that every rank recorded; got none; run it again with profile=true")
    step = max(steps)
    return Recorded(step, tuple(ranks[step] for ranks in by_rank))


_NAME = re.compile(r"rank(\d+)\.jsonl")


def _steps(path: Path) -> dict[int, tuple[Event, ...]]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    steps = {}
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line feed was not finished
        try:
            body = json.loads(line)
            steps[int(body["step"])] = tuple(_event(*values) for values in body["events"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} line {number}: a recorded step; got {line[:60]!r} ({error}); remove the folder and run with profile=true"
            ) from error
    return {step: events for step, events in steps.items() if events}


def _event(work: str, stage: int, microbatch: int, begin: float, end: float) -> Event:
    if work not in ("F", "B", "I", "W") or not float(begin) <= float(end):
        raise ValueError(f"F, B, I or W from a begin to an end, not {work!r} from {begin} to {end}")
    return Event(work, int(stage), int(microbatch), float(begin), float(end))


def span(events_by_rank: EventsByRank) -> tuple[float, float]:
    """First begin and last end over all ranks, in seconds. Raises ValueError without events."""
    events = [event for events in events_by_rank for event in events]
    if not events:
        raise ValueError("timeline: at least one event; got none")
    return min(event.begin_seconds for event in events), max(event.end_seconds for event in events)


def bubble_shares(events_by_rank: EventsByRank) -> tuple[float, ...]:
    """Rank to the share of the step in which it idles, as the module's doc string defines it."""
    first, last = span(events_by_rank)
    if last <= first:
        return (0.0,) * len(events_by_rank)
    return tuple(1.0 - _busy(events) / (last - first) for events in events_by_rank)


def bubble_share(events_by_rank: EventsByRank) -> float:
    """The mean of :func:`bubble_shares`."""
    shares = bubble_shares(events_by_rank)
    return sum(shares) / len(shares)


def _busy(events: Sequence[Event]) -> float:
    """Seconds in which at least one of ``events`` runs."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda one: one.begin_seconds):
        total += max(event.end_seconds - max(event.begin_seconds, until), 0.0)
        until = max(until, event.end_seconds)
    return total


def draw_text(events_by_rank: EventsByRank, width: int = 100) -> str:
    """A line a rank, at most ``width`` wide: a letter is what runs for most of its share of the time, a dot where nothing does.

    Where a forward and a backward run at the same time, their letters alternate.
    """
    first, last = span(events_by_rank)
    heads = [f"rank {rank} " for rank in range(len(events_by_rank))]
    margin = max(map(len, heads))
    columns = max(width - margin, 1)
    slot = (last - first) / columns or 1.0
    lines = []
    for head, events in zip(heads, events_by_rank, strict=True):
        seconds: list[dict[str, float]] = [{} for _ in range(columns)]
        for event in events:
            begin, end = (event.begin_seconds - first) / slot, (event.end_seconds - first) / slot
            for column in range(int(begin), min(int(end) + 1, columns)):
                share = min(end, column + 1) - max(begin, column)
                seconds[column][event.work] = seconds[column].get(event.work, 0.0) + share
        lines.append(head.ljust(margin) + "".join(_letter(works, column) for column, works in enumerate(seconds)))
    return "\n".join(lines)


def _letter(works: dict[str, float], column: int) -> str:
    most = max(works.values(), default=0.0)
    if most < max(1.0 - sum(works.values()), 1e-9):
        return IDLE
    equal = [work for work, share in works.items() if share > most - 1e-6]
    return equal[column % len(equal)]
