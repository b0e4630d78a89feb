"""Published tensors on their way to servers: gathered from all ranks, walked by those that send.

In: a policy on any layout, what sends on this rank. Out: what it returned. Called by all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from r1mega.train.policy import Policy

Pairs = Iterable[tuple[str, torch.Tensor]]


def walked(policy: Policy, send: Callable[[Pairs], Any] | None, *, everywhere: bool) -> Any:
    """``send(tensors)`` of this rank, None where it sends nothing; raises on a rank what that rank's raises.

    ``everywhere``: each sending rank has an engine in its own process, and there is one walk of all ranks in step. Else the first
    rank alone sends, and may walk as often as it likes: a proof that fails looks once more for the tensor that is wrong.
    """
    mesh = policy.mesh
    if everywhere and mesh.world_size > 1:
        tensors = policy.published_tensors()
        try:
            return send(tensors) if send else None
        finally:
            for _ in tensors:  # of a rank that sends nothing, or has failed
                pass
    walk = Walk(policy)
    if not mesh.is_first:
        return walk.follow()
    try:
        return send(walk)
    finally:
        walk.close()


class Walk:
    """Every published tensor, as often as the sender walks it: a proof that fails looks once more for the tensor that is wrong.

    The first rank iterates it and closes it; the others :meth:`follow`, and gather along in each walk.
    """

    def __init__(self, policy: Policy):
        self._policy, self._mesh = policy, policy.mesh
        self._under_way: Iterator[tuple[str, torch.Tensor]] = iter(())

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._end()
        self._mesh.broadcast_object(True)
        self._under_way = self._policy.published_tensors(everywhere=False)
        return self._under_way

    def _end(self) -> None:
        for _ in self._under_way:  # the sender may have lost interest, the others are in the midst of it
            pass

    def close(self) -> None:
        """No walk follows."""
        self._end()
        self._mesh.broadcast_object(False)

    def follow(self) -> None:
        """The other ranks' part, until the sender closes."""
        while self._mesh.broadcast_object(None):
            for _ in self._policy.published_tensors(everywhere=False):
                pass
