"""What a hypothesis is given and what it finds: rows, judge, the side that is off, and how much of it something explains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from r1mega.rl.autopsy.evidence import Held, Row
from r1mega.rl.autopsy.judge import Judge

CONVICTS = 0.9
"""Share of the difference that a cause explains."""


@dataclass(frozen=True)
class Finding:
    """One cause. ``kind``: tokens, sampling, weights, routing, quantisation, staleness, layer, decoding or rounding; ``where``: the
    rows, tensors or layers that it names; ``explained``: share of the difference that is gone if it is assumed, at most 1;
    ``left``: mean difference in nats that stays; ``says``: one sentence with the numbers; ``is_certain``: seen, not only fitted."""

    kind: str
    where: tuple[str, ...]
    explained: float
    left: float
    says: str
    is_certain: bool = False

    @property
    def convicts(self) -> bool:
        """Is that enough?"""
        return self.explained >= CONVICTS


@dataclass
class Case:
    """``rows``: those that differ most; ``nominal``: the judge's log-probabilities of them; ``side``: "engine" or "trainer", the
    one that is further from the judge; ``is_exact``: the judge has that rollout's weights. ``older``: version to published tensors,
    of the run's earlier checkpoints, read when asked for. ``roles``: published name to its role (linear, bias, plain). ``facts``,
    ``held``, ``sums``: the evidence's. ``passes``: that a search may use."""

    rows: list[Row]
    judge: Judge
    version: int
    facts: dict[str, Any]
    roles: dict[str, str]
    nominal: list[torch.Tensor] = field(default_factory=list)
    side: str = "engine"
    is_exact: bool = True
    older: dict[int, Callable[[], dict[str, torch.Tensor]]] = field(default_factory=dict)
    held: Held | None = None
    sums: dict[str, str] = field(default_factory=dict)
    passes: int = 20_000

    def suspect(self, row: Row) -> torch.Tensor:
        """The log-probabilities of the side that is off."""
        return row.engine if self.side == "engine" else row.trainer

    def misfit(self, place: int, values: torch.Tensor) -> float:
        """Sum of |suspect - values| over own tokens of a row."""
        row = self.rows[place]
        return float(_finite((self.suspect(row) - values)[row.own_T].abs()).sum())

    @property
    def tokens(self) -> int:
        """Own tokens of all rows."""
        return sum(int(row.own_T.sum()) for row in self.rows)

    @property
    def before(self) -> float:
        """The misfit of all rows with nothing assumed."""
        return sum(self.misfit(place, values) for place, values in enumerate(self.nominal))

    def finding(
        self,
        kind: str,
        where: Sequence[str],
        values: Sequence[torch.Tensor | None] | Sequence[float],
        says: str,
        *,
        is_certain: bool = False,
    ) -> Finding:
        """A finding whose assumption gives ``values`` (log-probabilities a row, or misfits; None: the row stays). ``says``: has
        ``{before}`` and ``{left}`` in it."""
        misfits = [
            value if isinstance(value, float) else self.misfit(place, self.nominal[place] if value is None else value)
            for place, value in enumerate(values)
        ]
        before, count = max(self.before, 1e-30), max(self.tokens, 1)
        left = sum(misfits) / count
        text = says.format(before=f"{before / count:.3g}", left=f"{left:.2g}")
        return Finding(kind, tuple(where), 1 - sum(misfits) / before, left, text, is_certain)

    def can_search(self) -> bool:
        """Are there passes left?"""
        return self.judge.passes < self.passes


def _finite(values: torch.Tensor) -> torch.Tensor:
    """A difference that is no number counts as a large one."""
    return torch.nan_to_num(values, nan=1e3, posinf=1e3, neginf=1e3)
