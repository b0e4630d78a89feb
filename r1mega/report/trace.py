"""The samples of an ``r1mega rl`` run as a trace in Chrome's format, for Perfetto (ui.perfetto.dev) or chrome://tracing.

A process a rank that generates, whose threads are as many as its samples overlap; a sample is three slices: generate, judge, wait
until used (or dropped). A process "trainer" with a thread a rank that wrote what its rollouts used: the turn's phases. Times are in
microseconds from the first sample on.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from r1mega.report.samples import Phase, Seen
from r1mega.report.spans import NAMES

TRAINER = 0
"""Process id of the trainers; rank r's samples have r + 1."""
SLICES = ("generate", "judge", "wait")


def trace(samples: Sequence[Seen], phases: Iterable[Phase]) -> dict[str, Any]:
    """The JSON object. Phases that end before the first sample began are left out. Raises ValueError without samples."""
    first = min(one.values["began"] for one in samples)
    events: list[dict[str, Any]] = []
    names: dict[tuple[int, int | None], str] = {}

    def put(process: int, thread: int, name: str, kind: str, began: float, ended: float, told: dict[str, Any]) -> None:
        spot = {"ph": "X", "pid": process, "tid": thread, "ts": 1e6 * (began - first), "dur": 1e6 * (ended - began)}
        events.append({"name": name, "cat": kind, **spot, "args": told})

    for phase in phases:
        if phase.ended > first:
            names |= {(TRAINER, None): "trainer", (TRAINER, phase.rank): f"rank {phase.rank}"}
            told = {"rollout": phase.rollout}
            put(TRAINER, phase.rank, NAMES[phase.name], "trainer", phase.began, phase.ended, told)
    for rank, mine in _by_rank(samples).items():
        names[rank + 1, None] = f"samples of rank {rank}"
        for lane, one in _lanes(mine):
            names[rank + 1, lane] = f"lane {lane}"
            label = f"{one.values['problem']} {one.values['item']}.{one.values['member']}"
            for kind, (began, ended) in zip(SLICES, _three(one), strict=False):
                if ended > began:
                    put(rank + 1, lane, label, kind, began, ended, _told(one))
    for (process, thread), name in names.items():
        kind = "process_name" if thread is None else "thread_name"
        events.append({"ph": "M", "pid": process, "tid": thread or 0, "name": kind, "args": {"name": name}})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"began": first}}


def _three(one: Seen) -> list[tuple[float, float]]:
    """Begin and end of generation, judging and, where it has ended, waiting."""
    moments = [one.values[key] for key in ("began", "generated", "judged")] + ([] if one.ended is None else [one.ended])
    return list(itertools.pairwise(moments))


def _told(one: Seen) -> dict[str, Any]:
    values = one.values
    return {
        "sample": one.frame.id,
        "source": values["source"],
        "prompt_tokens": one.num_prompt_tokens,
        "tokens": one.num_tokens,
        "weights": values["versions"],
        "finish_reason": values["finish_reason"],
        "reward": values["reward"],
        "fate": one.fate,
        "rollout": one.rollout,
        "update": one.update,
        "advantage": one.advantage,
        "reward_seconds": {name: said.seconds for name, said in one.rewards.items()},
    }


def _by_rank(samples: Iterable[Seen]) -> dict[int, list[Seen]]:
    found = defaultdict(list)
    for one in samples:
        found[one.frame.rank].append(one)
    return dict(sorted(found.items()))


def _lanes(samples: Iterable[Seen]) -> list[tuple[int, Seen]]:
    """Each sample with a lane, as low as can be, in which nothing else is while it lives."""
    free: list[int] = []
    taken: list[tuple[float, int]] = []
    found, count = [], 0
    for one in sorted(samples, key=lambda one: one.values["began"]):
        while taken and taken[0][0] <= one.values["began"]:
            heapq.heappush(free, heapq.heappop(taken)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane, count = count, count + 1
        heapq.heappush(taken, (max(ended for _, ended in _three(one)), lane))
        found.append((lane, one))
    return found
