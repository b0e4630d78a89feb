"""How long a schedule takes: every action's begin and end for given times, from the schedule's own lists. Pure Python.

A rank does its actions in order, one at a time, each as soon as what it needs is done (:func:`~.schedule.needs`) and has arrived.
Bubbles of the result are those of :mod:`r1mega.train.pipeline.timeline`, the same as for recorded events.

With times that are equal for all stages the bubble is that of DeepSeek-V3 Table 2 (recipe.md 2.3), B = I + W:

    1f1b        idle seconds of a rank = (P - 1) (F + B)
    zb1p        (P - 1) (F + B - 2W), from P microbatches on, where W takes no longer than F and than I
    dualpipev   (P - 1) (F&B + B - 3W) on the rank that idles longest, where F = I and W takes no longer: what the published picture
                assumes. The table counts stages: DualPipe's PP stages lie on PP ranks that hold the model twice, the V's on
                P = PP/2 ranks, so its (PP/2 - 1) is P - 1. Ranks idle less where they have more overlapped pairs in their list.
                Without ``overlapped`` an F need not wait for the B beside it, and that is (P - 1) (F + I - W).
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from r1mega.train.pipeline.schedule import (
    BACKWARD,
    FORWARD,
    INPUT_GRAD,
    WEIGHT_GRAD,
    Action,
    Pipeline,
    leaves,
    needs,
    rank_of_stage,
)
from r1mega.train.pipeline.timeline import Event, EventsByRank, bubble_share, bubble_shares, span

PerStage = float | Sequence[float]
"""One number for all stages, or one a stage."""


@dataclass(frozen=True)
class Times:
    """Seconds of each kind of work. ``backward``: of a whole backward; None: input_grad + weight_grad."""

    forward: PerStage
    input_grad: PerStage
    weight_grad: PerStage
    backward: PerStage | None = None

    def __call__(self, action: Action) -> float:
        """Seconds that ``action`` takes."""
        if action.work == BACKWARD and self.backward is None:
            return _at(self.input_grad, action.stage) + _at(self.weight_grad, action.stage)
        given = {FORWARD: self.forward, BACKWARD: self.backward, INPUT_GRAD: self.input_grad, WEIGHT_GRAD: self.weight_grad}
        return _at(given[action.work], action.stage)


@dataclass(frozen=True)
class Simulation:
    """The events of each rank, in its order, from second 0 on."""

    events_by_rank: tuple[tuple[Event, ...], ...]

    @property
    def makespan(self) -> float:
        """Seconds from the first begin to the last end."""
        first, last = span(self.events_by_rank)
        return last - first

    @property
    def bubble_shares(self) -> tuple[float, ...]:
        """Rank to idle / makespan."""
        return bubble_shares(self.events_by_rank)

    @property
    def bubble_share(self) -> float:
        """Mean of :attr:`bubble_shares`."""
        return bubble_share(self.events_by_rank)


def simulate(
    pipeline: Pipeline,
    num_microbatches: int,
    seconds: Callable[[Action], float],
    *,
    overlapped: float | Callable[[Action, Action], float] | None = None,
    message: float = 0.0,
) -> Simulation:
    """Run the lists of ``pipeline`` on paper.

    ``seconds``: an action's duration, such as :class:`Times`. ``overlapped``: the duration of an F and a B that the schedule means
    to run at the same time, which then begin and end together (F&B in DeepSeek's notation); None: one after the other.
    ``message``: seconds from the end of an action until a stage on another rank has its result; the sender goes on meanwhile.
    Raises ValueError where ranks wait for each other, UserError as ``pipeline.actions``.
    """
    lists, holder = pipeline.actions(num_microbatches), rank_of_stage(pipeline.placement)
    last = max(holder)
    ends: dict[tuple[str, int, int], float] = {}
    free, places = [0.0] * len(lists), [0] * len(lists)
    events: list[list[Event]] = [[] for _ in lists]

    def arrival(action: Action) -> float | None:
        """When all that ``action`` needs is there; None: some of it has not run yet."""
        latest = 0.0
        for need in needs(action, last):
            if need not in ends:
                return None
            latest = max(latest, ends[need] + (message if holder[need[1]] != holder[action.stage] else 0.0))
        return latest

    waiting = collections.deque(range(len(lists)))
    idle = 0  # ranks looked at since something ran last
    while waiting and idle < len(waiting):
        rank = waiting.popleft()
        idle += 1
        while places[rank] < len(lists[rank]):
            action = lists[rank][places[rank]]
            group = [action]
            if action.overlaps and overlapped is not None:
                group.append(lists[rank][places[rank] + 1])
            arrivals = [arrival(one) for one in group]
            if None in arrivals:
                break
            begin = max(free[rank], *arrivals)
            if len(group) == 1:
                lasts = seconds(action)
            else:
                lasts = overlapped(*group) if callable(overlapped) else overlapped
            for one in group:
                ends[leaves(one)] = begin + lasts
                events[rank].append(Event(one.work, one.stage, one.microbatch, begin, begin + lasts))
            free[rank] = begin + lasts
            places[rank] += len(group)
            idle = 0
        if places[rank] < len(lists[rank]):
            waiting.append(rank)
    if waiting:
        stuck = ", ".join(f"rank {rank} at {lists[rank][places[rank]]}" for rank in sorted(waiting))
        raise ValueError(f"actions: all ranks reach their end; got ranks that wait for each other: {stuck}")
    return Simulation(tuple(map(tuple, events)))


def mean_seconds(events_by_rank: EventsByRank) -> Callable[[Action], float]:
    """Each action's duration as the mean of what its stage took for such work in ``events_by_rank``, over the microbatches."""
    taken: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
    for events in events_by_rank:
        for event in events:
            taken[event.work, event.stage].append(event.end_seconds - event.begin_seconds)
    means = {key: sum(values) / len(values) for key, values in taken.items()}
    return lambda action: means[action.work, action.stage]


def _at(given: PerStage, stage: int) -> float:
    return float(given) if isinstance(given, int | float) else given[stage]
