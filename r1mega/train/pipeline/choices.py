"""The schedules: none, 1f1b, interleaved, zb1p, dualpipev. Pure functions of ranks and microbatches; no torch, no clock.

Each choice's ``build(num_ranks)`` returns a :class:`Schedule`. What a schedule costs is told by
:mod:`r1mega.train.pipeline.simulate` and :func:`r1mega.train.pipeline.schedule.peak_activations`. With P ranks, m microbatches and
the times of one stage (B = I + W), a rank idles for (DeepSeek-V3 Table 2; the last one with F&B for F and B at the same time):

    1f1b          (P - 1) (F + B), and holds at most P activations of a stage
    interleaved   (P - 1) (F + B) in the times of a chunk, which is a ``chunks``-th of a rank's layers
    zb1p          (P - 1) (F + B - 2W), and P
    dualpipev     (P - 1) (F&B + B - 3W) in the times of a chunk, half of a rank's layers, and 2P + 1 of a chunk
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from dataclasses import dataclass

from r1mega.config.errors import UserError, either
from r1mega.config.knob import at_least, knob
from r1mega.registry import register
from r1mega.train.pipeline.schedule import BACKWARD, FORWARD, INPUT_GRAD, WEIGHT_GRAD, Action

Lists = tuple[tuple[Action, ...], ...]


class Schedule:
    """A :class:`~r1mega.train.pipeline.schedule.Pipeline` from a function of rank and microbatches to the rank's actions.

    ``refuses``: number of microbatches to the rule that it breaks and the nearest numbers that keep it, or None.
    """

    def __init__(
        self,
        placement: tuple[tuple[int, ...], ...],
        of_rank: Callable[[int, int], list[Action]],
        refuses: Callable[[int], tuple[str, list[int]] | None] = lambda num_microbatches: None,
    ):
        self.placement = placement
        self._of_rank, self._refuses = of_rank, refuses
        self.actions = functools.lru_cache(maxsize=4)(self._actions)  # asked for once a step

    def _actions(self, num_microbatches: int) -> Lists:
        fault = ("at least 1", [1]) if num_microbatches < 1 else self._refuses(num_microbatches)
        if fault:
            rule, near = fault
            raise UserError(f"microbatches: {rule}; got {num_microbatches}; use microbatches={either(near)}")
        return tuple(tuple(self._of_rank(rank, num_microbatches)) for rank in range(len(self.placement)))


@register("pipeline", "none")
@dataclass(frozen=True)
class NoPipeline:
    """One rank holds the whole model: forward and backward of each microbatch in turn."""

    def build(self, num_ranks: int) -> Schedule:
        """For one rank; UserError for more."""
        if num_ranks != 1:
            raise UserError(
                f"pipeline: one rank with pipeline=none, which cuts the model into no stages; got {num_ranks} ranks; "
                "use pipeline=1f1b, or one rank (parallel.pipeline=1; ranks=1 of r1mega timeline)"
            )
        return OneForwardOneBackward().build(1)


@register("pipeline", "1f1b")
@dataclass(frozen=True)
class OneForwardOneBackward:
    """1F1B (arXiv 2104.04473): one stage a rank; after filling the pipeline, a forward and a backward in turn."""

    def build(self, num_ranks: int) -> Schedule:
        """For any number of ranks and microbatches."""

        def of_rank(rank: int, num_microbatches: int) -> list[Action]:
            return _alternate(num_ranks - 1 - rank, num_microbatches, lambda index: (rank, index), lambda index: (rank, index))

        return Schedule(_one_stage_a_rank(num_ranks), of_rank)


@register("pipeline", "interleaved")
@dataclass(frozen=True)
class Interleaved:
    """Interleaved 1F1B (arXiv 2104.04473): ``chunks`` stages a rank, dealt out in turn: the pipeline fills in smaller steps."""

    chunks: int = knob(2, "stages of one rank", "stages", **at_least(2))

    def build(self, num_ranks: int) -> Schedule:
        """For any number of ranks, and microbatches that are a multiple of it."""
        size = num_ranks * self.chunks

        def place(rank: int, index: int, *, back: bool) -> tuple[int, int]:
            """Stage and microbatch of a rank's ``index``-th forward (``back``: backward): as many microbatches as ranks a chunk."""
            turn, inside = divmod(index, size)
            chunk, member = divmod(inside, num_ranks)
            chunk = self.chunks - 1 - chunk if back else chunk
            return chunk * num_ranks + rank, turn * num_ranks + member

        def of_rank(rank: int, num_microbatches: int) -> list[Action]:
            # The first backward needs all chunks of the first microbatches, and two steps for each rank that comes after this one.
            ahead = (self.chunks - 1) * num_ranks + 2 * (num_ranks - 1 - rank)
            return _alternate(
                ahead,
                num_microbatches * self.chunks,
                functools.partial(place, rank, back=False),
                functools.partial(place, rank, back=True),
            )

        def refuses(num_microbatches: int) -> tuple[str, list[int]] | None:
            below = num_microbatches // num_ranks * num_ranks
            near = [num for num in (below, below + num_ranks) if num]
            rule = f"a multiple of the {num_ranks} pipeline ranks with pipeline=interleaved"
            return (rule, near) if num_microbatches % num_ranks else None

        placement = tuple(tuple(range(rank, size, num_ranks)) for rank in range(num_ranks))
        return Schedule(placement, of_rank, refuses)


@register("pipeline", "zb1p")
@dataclass(frozen=True)
class ZeroBubble:
    """ZB-H1 (arXiv 2401.10241; ZB1P in DeepSeek's papers): 1F1B whose weight gradients wait for gaps. As much memory as 1F1B."""

    def build(self, num_ranks: int) -> Schedule:
        """For any number of ranks and microbatches."""

        def of_rank(rank: int, num_microbatches: int) -> list[Action]:
            ahead = min(num_ranks - 1 - rank, num_microbatches)
            actions = [Action(FORWARD, rank, index) for index in range(ahead)]
            for index in range(num_microbatches):
                if ahead + index < num_microbatches:
                    actions.append(Action(FORWARD, rank, ahead + index))
                actions.append(Action(INPUT_GRAD, rank, index))
                # A later rank runs fewer forwards ahead: it may keep that many more activations back for W. Then all ranks hold
                # as many as rank 0 of 1F1B, and each has W left for the time in which the last input gradients go to rank 0.
                if index >= rank:
                    actions.append(Action(WEIGHT_GRAD, rank, index - rank))
            left = range(max(num_microbatches - rank, 0), num_microbatches)
            return actions + [Action(WEIGHT_GRAD, rank, index) for index in left]

        return Schedule(_one_stage_a_rank(num_ranks), of_rank)


@register("pipeline", "dualpipev")
@dataclass(frozen=True)
class DualPipeV:
    """DualPipeV, the V of DeepSeek-V3's DualPipe: rank r of P holds stages r and 2P - 1 - r, forwards overlap backwards."""

    def build(self, num_ranks: int) -> Schedule:
        """For any number of ranks, and at least twice as many microbatches."""

        def refuses(num_microbatches: int) -> tuple[str, list[int]] | None:
            rule = f"at least 2 for each of the {num_ranks} pipeline ranks with pipeline=dualpipev"
            return (rule, [2 * num_ranks]) if num_microbatches < 2 * num_ranks else None

        placement = tuple((rank, 2 * num_ranks - 1 - rank) for rank in range(num_ranks))
        return Schedule(placement, lambda rank, num: _dualpipev(rank, num_ranks, num), refuses)


class _Writer:
    """Writes the actions of one rank; each kind of work goes through the microbatches of a stage in order."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._next: collections.Counter[tuple[str, int]] = collections.Counter()
        self._waiting: collections.deque[tuple[int, int]] = collections.deque()

    def _add(self, work: str, stage: int, *, overlaps: bool = False) -> int:
        counter = (FORWARD if work == FORWARD else BACKWARD, stage)
        microbatch = self._next[counter]
        self._next[counter] += 1
        self.actions.append(Action(work, stage, microbatch, overlaps))
        return microbatch

    def forward(self, stage: int) -> None:
        self._add(FORWARD, stage)

    def backward(self, stage: int, *, split: bool = False) -> None:
        """``split``: the input gradient now, the weight gradients when :meth:`weight` comes to them."""
        microbatch = self._add(INPUT_GRAD if split else BACKWARD, stage)
        if split:
            self._waiting.append((stage, microbatch))

    def both(self, forward: int, backward: int, *, overlaps: bool = True) -> None:
        """A forward of one stage and a backward of the other."""
        self._add(FORWARD, forward, overlaps=overlaps)
        self._add(BACKWARD, backward)

    def weight(self) -> None:
        """The weight gradients that have waited longest."""
        self.actions.append(Action(WEIGHT_GRAD, *self._waiting.popleft()))


def _dualpipev(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """What ``rank`` does. ``down``: its stage on the way to the last rank; ``up``: its stage on the way back to rank 0."""
    down, up, after, upto = rank, 2 * num_ranks - 1 - rank, num_ranks - 1 - rank, rank + 1
    write = _Writer()
    for _ in range(2 * after):  # until the first microbatch is back from the ranks after this one
        write.forward(down)
    for _ in range(upto):
        write.forward(down)
        write.forward(up)
    for _ in range(after):  # the first gradients: split, so that the ranks that wait for them wait less
        write.backward(up, split=True)
        write.weight()
        write.forward(up)
    for index in range(num_microbatches - 2 * num_ranks + upto):
        # On the last rank the first of these forwards leads to the first backward: nothing to overlap with yet.
        write.both(down, up, overlaps=bool(index or after))
        write.both(up, down)
    for _ in range(after):
        write.backward(up)
        write.both(up, down)
    for index in range(upto):  # no forward is left; the second half is split, to keep weight gradients for the tail
        write.backward(up, split=2 * index >= upto)
        write.backward(down, split=2 * index + 1 >= upto)
    for _ in range(after):
        write.weight()
        write.backward(down, split=True)
    for _ in range(upto):
        write.weight()
    return write.actions


def _one_stage_a_rank(num_ranks: int) -> tuple[tuple[int, ...], ...]:
    return tuple((rank,) for rank in range(num_ranks))


def _alternate(
    ahead: int, total: int, forward: Callable[[int], tuple[int, int]], backward: Callable[[int], tuple[int, int]]
) -> list[Action]:
    """``ahead`` forwards, then one forward and one backward in turn, then what backwards are left; each ``total`` in number."""
    ahead = min(ahead, total)
    actions = [Action(FORWARD, *forward(index)) for index in range(ahead)]
    for index in range(total):
        if ahead + index < total:
            actions.append(Action(FORWARD, *forward(ahead + index)))
        actions.append(Action(BACKWARD, *backward(index)))
    return actions
