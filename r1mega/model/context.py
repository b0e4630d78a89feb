"""Which part of every sequence a context rank holds, and how whole rows are cut and put together again.

A sequence of S tokens is cut into 2C equal parts for C context ranks; rank i holds parts i and 2C - 1 - i, one early and one
late, so that causal attention costs every rank the same (and so Megatron-Core's rotary embedding and MTP have it). Refuses
lengths that 2C does not divide. ``cut`` takes ``[B, S, ...]`` to ``[B, S / C, ...]``; ``gather`` is its inverse over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ContextPart:
    """A rank's place on the context axis. ``group``: the axis's process group; None where ``size`` is 1."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def of(cls, axis: Any) -> ContextPart:
        """Of a mesh's context axis (``mesh.axes["context"]``)."""
        return cls(axis.rank, axis.size, axis.group) if axis.size > 1 else cls()

    @classmethod
    def of_group(cls, group: dist.ProcessGroup | None) -> ContextPart:
        """Of the axis's process group."""
        return cls() if group is None or group.size() == 1 else cls(group.rank(), group.size(), group)

    @property
    def parts(self) -> tuple[int, int]:
        """Numbers of the two parts that this rank holds, the early one first."""
        return self.rank, 2 * self.size - 1 - self.rank

    @property
    def multiple(self) -> int:
        """What divides a sequence's length."""
        return 2 * self.size if self.size > 1 else 1

    def cut(self, whole: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This rank's two parts of ``whole`` along ``dim``. Raises ValueError for a length that 2C does not divide."""
        if self.size == 1:
            return whole
        length = whole.shape[dim]
        if length % self.multiple:
            raise ValueError(f"context: a length that 2 x {self.size} parts divide; got {length}; pad it to a multiple")
        size = length // self.multiple
        return torch.cat([whole.narrow(dim, number * size, size) for number in self.parts], dim)

    def gather(self, own: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The whole of which every rank holds its :meth:`cut`, on every rank; without gradient."""
        if self.size == 1:
            return own
        rows = own.detach().movedim(dim, 0).contiguous()
        by_rank = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(by_rank, rows, group=self.group)
        return self.in_order(by_rank).movedim(0, dim)

    def in_order(self, by_rank: torch.Tensor, pieces: int = 1) -> torch.Tensor:
        """Rows (dim 0) that were gathered rank by rank, in the order of the sequence; keeps the gradient.

        ``pieces``: into how many equal pieces each rank's rows were cut before, of which the first of all ranks come first (a
        sequence-parallel gather around the one over the context axis).
        """
        rest = by_rank.shape[1:]
        halves = by_rank.reshape(pieces, self.size, -1, *rest).transpose(0, 1).reshape(self.size, 2, -1, *rest)
        return torch.cat([halves[:, 0], halves[:, 1].flip(0)]).flatten(0, 1)

    def sum(self, own: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks' values, on every rank; any shape, without gradient."""
        if self.size == 1:
            return own
        total = own.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def positions(self, length: int, device: torch.device) -> torch.Tensor:
        """Places in the whole sequence of ``length`` own tokens: int64 ``[length]``."""
        return self.cut(torch.arange(length * self.size, device=device), dim=0)


ALONE = ContextPart()
"""Where the context axis has one rank."""
