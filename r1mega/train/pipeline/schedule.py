"""What a pipeline schedule is: which rank holds which stages, and what each rank does in which order. Imports no torch.

A stage ``s`` is a part of the model; its activations go to stage ``s + 1``, the gradients of them come back. Work on a microbatch:
``F`` forward; ``B`` the whole backward pass; or, split as zero-bubble schedules do (arXiv 2401.10241), ``I`` the gradient of the
stage's input, and later ``W`` the gradients of its weights.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from r1mega.config.errors import UserError

FORWARD, BACKWARD, INPUT_GRAD, WEIGHT_GRAD = "F", "B", "I", "W"

RANKS_TRIED, MICROBATCHES_TRIED = range(1, 9), range(1, 25)
"""What :func:`check_pipeline` tries."""


@dataclass(frozen=True)
class Action:
    """One piece of work: ``work`` (F, B, I or W) of ``stage`` on ``microbatch``.

    ``overlaps``: an F that the schedule means to run at the same time as the B that follows it in the list, the communication of
    one under the computation of the other (DeepSeek-V3 3.2.1). Who cannot do that runs one after the other, to the same result.
    """

    work: str
    stage: int
    microbatch: int
    overlaps: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.work}{self.stage}.{self.microbatch}"


class Pipeline(Protocol):
    """What a choice of the kind ``pipeline`` builds, for a number of ranks."""

    placement: tuple[tuple[int, ...], ...]
    """Rank to its stages, in the order of its model chunks; every rank as many."""

    def actions(self, num_microbatches: int) -> tuple[tuple[Action, ...], ...]:
        """Rank to what it does, in order. Raises UserError for a number of microbatches that the schedule cannot serve."""


def rank_of_stage(placement: tuple[tuple[int, ...], ...]) -> dict[int, int]:
    """Stage to the rank that holds it."""
    return {stage: rank for rank, stages in enumerate(placement) for stage in stages}


def peak_activations(pipeline: Pipeline, num_microbatches: int) -> tuple[int, ...]:
    """Rank to the most activations that it holds at once, in those of one stage and microbatch.

    An activation lives from F to the end of B; where the backward is split, to the end of W, which still needs the stage's inputs.
    """
    peaks = []
    for actions in pipeline.actions(num_microbatches):
        live = peak = 0
        for action in actions:
            live += {FORWARD: 1, BACKWARD: -1, WEIGHT_GRAD: -1}.get(action.work, 0)
            peak = max(peak, live)
        peaks.append(peak)
    return tuple(peaks)


def check(pipeline: Pipeline, num_microbatches: int) -> None:
    """Raise ValueError, naming rank and action, where a schedule cannot run.

    Each stage of the placement does F, and B or I with W, once a microbatch, on its own rank, W after I, and all ranks reach their
    end when each waits for what it needs: F of the stage before, B or I of the stage after, and its own F.
    """
    placement, lists = pipeline.placement, pipeline.actions(num_microbatches)
    holder = rank_of_stage(placement)
    if sorted(holder) != list(range(sum(map(len, placement)))) or not holder or len({len(stages) for stages in placement}) != 1:
        raise ValueError(f"placement: every stage on one rank, as many stages a rank; got {placement}")
    if len(lists) != len(placement):
        raise ValueError(f"actions: a list a rank; got {len(lists)} for {len(placement)} ranks")
    for rank, actions in enumerate(lists):
        done = collections.defaultdict(list)
        for place, action in enumerate(actions):
            if holder.get(action.stage) != rank or not 0 <= action.microbatch < num_microbatches:
                raise ValueError(
                    f"actions: a rank works on its own stages and the step's microbatches; got {action} on rank {rank}"
                )
            done[action.stage, action.microbatch].append(action.work)
            if action.overlaps:
                other = actions[place + 1] if place + 1 < len(actions) else None
                if action.work != FORWARD or other is None or other.work != BACKWARD:
                    raise ValueError(f"actions: an F overlaps with the B after it; got {action}, then {other} on rank {rank}")
        for stage in placement[rank]:
            for index in range(num_microbatches):
                works = sorted(done[stage, index])
                if works not in (["B", "F"], ["F", "I", "W"]):
                    raise ValueError(
                        f"actions: F and B, or F, I and W, once; got {works} for stage {stage}, microbatch {index} on rank {rank}"
                    )
    _walk(lists, max(holder))


def check_pipeline(choice: Any, ranks: Iterable[int] = RANKS_TRIED, microbatches: Iterable[int] = MICROBATCHES_TRIED) -> None:
    """The contract of every choice of the kind ``pipeline``, as far as it holds without a model.

    For every number of ranks and microbatches the schedule passes :func:`check`, twice the same, or refuses with a UserError; it
    works on one rank; and on every number of ranks that it builds for it serves some number of microbatches, of those tried.
    Raises ValueError naming what is broken.
    """
    for num_ranks in ranks:
        try:
            pipeline = choice.build(num_ranks)
        except UserError:
            if num_ranks == 1:
                raise ValueError("build: every schedule works on one rank; got a refusal of 1") from None
            continue
        if len(pipeline.placement) != num_ranks:
            raise ValueError(f"placement: a tuple of stages a rank; got {len(pipeline.placement)} for {num_ranks} ranks")
        served = 0
        for num_microbatches in microbatches:
            try:
                lists = pipeline.actions(num_microbatches)
            except UserError:
                continue
            if lists != pipeline.actions(num_microbatches):
                raise ValueError(f"actions: the same for the same number; got two lists for {num_microbatches} microbatches")
            check(pipeline, num_microbatches)
            served += 1
        if not served:
            raise ValueError(
                f"actions: some number of microbatches is served; got none of {list(microbatches)} on {num_ranks} ranks"
            )


def _walk(lists: tuple[tuple[Action, ...], ...], last: int) -> None:
    done: set[tuple[str, int, int]] = set()
    places = [0] * len(lists)
    while any(place < len(actions) for place, actions in zip(places, lists, strict=True)):
        moved = False
        for rank, actions in enumerate(lists):
            while places[rank] < len(actions) and all(need in done for need in needs(actions[places[rank]], last)):
                done.add(leaves(actions[places[rank]]))
                places[rank] += 1
                moved = True
        if not moved:
            stuck = [f"rank {rank} at {actions[places[rank]]}" for rank, actions in enumerate(lists) if places[rank] < len(actions)]
            raise ValueError(f"actions: all ranks reach their end; got ranks that wait for each other: {', '.join(stuck)}")


def needs(action: Action, last_stage: int) -> list[tuple[str, int, int]]:
    """What must be done before ``action``: (work, stage, microbatch), where work B stands for B or I."""
    stage, microbatch = action.stage, action.microbatch
    if action.work == FORWARD:
        return [("F", stage - 1, microbatch)] if stage else []
    if action.work == WEIGHT_GRAD:
        return [("B", stage, microbatch)]
    return [("F", stage, microbatch)] + ([("B", stage + 1, microbatch)] if stage < last_stage else [])


def leaves(action: Action) -> tuple[str, int, int]:
    """What is done after ``action``, in the words of :func:`needs`."""
    work = BACKWARD if action.work == INPUT_GRAD else action.work
    return (work, action.stage, action.microbatch)
