"""Counts what this rank enters: collectives, a group a line, and messages, a direction a line.

:func:`install` wraps the methods of torch's ProcessGroup, which every caller ends in, whatever name it has imported before: a
counter and a word a call, no traffic, no look at a tensor. Functional collectives, which go past Python, are not seen.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

NAMES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce_coalesced",
    "allgather": "all_gather",
    "_allgather_base": "all_gather_into_tensor",
    "all_gather_single": "all_gather_into_tensor",
    "allgather_coalesced": "all_gather_coalesced",
    "allgather_into_tensor_coalesced": "all_gather_into_tensor",
    "all_gather_single_coalesced": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_tensor",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all_single",
    "all_to_all_single": "all_to_all_single",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "send": "send",
    "recv": "recv",
}
"""Method of torch's ProcessGroup to the name of the function that users call."""

KEPT_NAMES = 256
"""Operations of a line whose names are remembered."""


@dataclasses.dataclass
class Line:
    """What this rank has entered on one group, or one direction between two ranks of it."""

    members: tuple[int, ...]
    count: int = 0
    names: collections.deque[str] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=KEPT_NAMES))
    _numbers: Any = dataclasses.field(default_factory=lambda: itertools.count(1))

    def enter(self, name: str) -> None:
        self.names.append(name)
        self.count = next(self._numbers)  # one step: backward passes run in threads of their own

    def name_of(self, number: int) -> str:
        """The operation with that number, or of the oldest one that is remembered."""
        names, count = list(self.names), self.count
        return names[max(0, len(names) - 1 - (count - number))] if names else "an operation"


class Record:
    """All lines of this rank. ``latest``, ``latest_key``: the operation that it has entered last; ``total``: how many."""

    def __init__(self, rank: int):
        self.rank = rank
        self.lines: dict[str, Line] = {}
        self.latest, self.latest_key, self.total = "nothing yet", "", 0

    def enter(self, group: dist.ProcessGroup, method: str, arguments: tuple[Any, ...]) -> None:
        """Note an operation before it begins."""
        key = group.group_name
        if method in ("send", "recv"):
            ranks = self._ranks(group)
            if not ranks:
                return
            here, there = self.rank, ranks[arguments[1]]
            source, target = (here, there) if method == "send" else (there, here)
            key = f"{key}:{source}>{target}"
            line = self.lines.get(key) or self.lines.setdefault(key, Line((source, target)))
            name = f"message from rank {source} to rank {target}"
        else:
            line = self.lines.get(key)
            if line is None:
                ranks = self._ranks(group)
                if not ranks:
                    return
                line = self.lines.setdefault(key, Line(ranks))
            name = NAMES[method]
        line.enter(name)
        self.latest, self.latest_key = name, key
        self.total += 1

    @staticmethod
    def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
        """The group's ranks in its order; empty while the group is being made."""
        try:
            return tuple(dist.get_process_group_ranks(group))
        except (KeyError, RuntimeError, ValueError):
            return ()


_record: Record | None = None
_originals: dict[str, Any] = {}


def install(record: Record) -> None:
    """Note every operation of every process group in ``record`` from now on, in the place of the one before."""
    global _record
    _record = record
    for method in NAMES:
        original = vars(dist.ProcessGroup).get(method)
        if original is not None and method not in _originals:
            _originals[method] = original
            setattr(dist.ProcessGroup, method, _noted(method, getattr(dist.ProcessGroup, method)))


def uninstall() -> None:
    """Put torch's own methods back."""
    global _record
    _record = None
    while _originals:
        method, original = _originals.popitem()
        setattr(dist.ProcessGroup, method, original)


def _noted(method: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original, updated=())
    def call(group: dist.ProcessGroup, *arguments: Any, **named: Any) -> Any:
        if _record is not None:
            _record.enter(group, method, arguments)
        return original(group, *arguments, **named)

    return call
