"""The choices of the kind ``balance``: none, and eplb, which moves experts between ranks at checkpoints. Imports no torch.

What moves is where an expert lies, never what it computes: placements are permutations, and training goes on with the same numbers
but for the order of sums. Redundant experts are for serving (:func:`r1mega.model.balance.eplb.balance_experts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from r1mega.config.knob import at_least, between, knob
from r1mega.registry import register

Placement = tuple[int, ...]
"""The logical expert of each slot; slots in the order of the ranks of the axis ``expert``, as many a rank."""


@dataclass(frozen=True)
class Proposal:
    """What to do with each MoE layer. ``placements``: by layer. ``before``, ``after``: each layer's balancedness, mean over maximum
    of the ranks' loads under the measured load. ``moves``: some placement differs from the present one.
    """

    placements: tuple[Placement, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    moves: bool

    def metrics(self) -> dict[str, float]:
        """For a metric line: the mean over layers before and after."""
        count = max(1, len(self.before))
        return {"balancedness_before": sum(self.before) / count, "balancedness_after": sum(self.after) / count}


class Balancer(Protocol):
    """What a choice of the kind ``balance`` builds."""

    def due(self, checkpoint: int) -> bool:
        """True where the run's ``checkpoint``-th save (from 1) may move experts."""
        ...

    def propose(
        self,
        load_LE: Sequence[Sequence[float]],
        placements: Sequence[Placement],
        num_ranks: int,
        num_nodes: int = 1,
        num_groups: int = 1,
    ) -> Proposal:
        """From measured shares of assignments by logical expert, and where experts lie now, where they should lie."""
        ...


@register("balance", "none")
@dataclass(frozen=True)
class Unmoved:
    """Experts stay where they are: expert x on rank x // e."""

    def build(self) -> Balancer:
        return _Unmoved()


class _Unmoved:
    def due(self, checkpoint: int) -> bool:
        return False

    def propose(self, load_LE, placements, num_ranks, num_nodes=1, num_groups=1) -> Proposal:
        from r1mega.model.balance.eplb import balancedness

        now = tuple(balancedness(load, place, num_ranks) for load, place in zip(load_LE, placements, strict=True))
        return Proposal(tuple(map(tuple, placements)), now, now, False)


@register("balance", "eplb")
@dataclass(frozen=True)
class Eplb:
    """Experts move to even out the ranks' measured load (DeepSeek's EPLB), at a checkpoint; the run goes on from it."""

    every: int = knob(1, "reconsider at every n-th checkpoint", "checkpoints", **at_least(1))
    min_gain: float = knob(
        0.02, "least gain in a layer's balancedness (mean / maximum of the ranks' load) to move it", "1", **between(0, 1)
    )

    def build(self) -> Balancer:
        return _Eplb(self.every, self.min_gain)


class _Eplb:
    def __init__(self, every: int, min_gain: float):
        self.every, self.min_gain = every, min_gain

    def due(self, checkpoint: int) -> bool:
        return checkpoint % self.every == 0

    def propose(self, load_LE, placements, num_ranks, num_nodes=1, num_groups=1) -> Proposal:
        """A layer that gains less than ``min_gain`` stays."""
        from r1mega.model.balance.eplb import balance_experts, balancedness

        found, before, after = [], [], []
        for load, place in zip(load_LE, placements, strict=True):
            best = balance_experts([load], len(place), num_groups, num_nodes, num_ranks).slots_LP[0]
            now, then = balancedness(load, place, num_ranks), balancedness(load, best, num_ranks)
            moves = then > now and then - now >= self.min_gain
            found.append(tuple(best) if moves else tuple(place))
            before.append(now)
            after.append(then if moves else now)
        return Proposal(tuple(found), tuple(before), tuple(after), found != list(map(tuple, placements)))
