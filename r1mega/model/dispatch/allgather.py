"""The dispatcher ``allgather``: all tokens to all ranks; each keeps the rows of its experts; partial sums go back.

Moves ``ranks x T x D`` both ways whatever the routing is, in a few large messages, and a rank's own experts are summed before they
travel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1mega.model.dispatch.contract import Dispatched, ExpertRanks
from r1mega.model.dispatch.exchange import exchange_counts, reduce, share
from r1mega.ops.permute import RowMap, permute, unpermute


class _Route(NamedTuple):
    """Tokens a rank along both axes, and the rows of all tokens."""

    by_expert_rank: list[int]
    by_part: list[int]
    row_map: RowMap


class AllGatherDispatcher:
    """Uneven numbers of tokens included; the only sizes that the host must know are those."""

    def __init__(self, ranks: ExpertRanks):
        self.ranks = ranks

    def dispatch(self, hidden_TD: torch.Tensor, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor) -> Dispatched:
        """See :class:`r1mega.model.dispatch.contract.Dispatcher`."""
        ranks = self.ranks
        by_expert_rank = self._lengths(len(hidden_TD), hidden_TD.device, ranks.expert)
        hidden, probs = share((hidden_TD, probs_TE), by_expert_rank, ranks.expert)
        (chosen,) = share((routing_map_TE.to(torch.uint8),), by_expert_rank, ranks.expert)
        by_part = self._lengths(len(hidden), hidden.device, ranks.expert_tensor)
        hidden, probs = share((hidden, probs), by_part, ranks.expert_tensor)
        (chosen,) = share((chosen,), by_part, ranks.expert_tensor)
        here = ranks.local_slice
        top_k = ranks.top_k if ranks.expert.size == 1 else None  # a token has some of its experts here
        got = permute(hidden, probs[:, here], chosen[:, here].bool(), top_k)
        return Dispatched(got.rows_RD, got.counts_E, got.probs_R, _Route(by_expert_rank, by_part, got.row_map))

    @staticmethod
    def _lengths(own: int, device: torch.device, axis) -> list[int]:
        """Every rank's number of tokens along ``axis``."""
        if axis.size == 1:
            return [own]
        return exchange_counts(torch.full((axis.size, 1), own, dtype=torch.int64, device=device), axis).view(-1).tolist()

    def combine(self, rows_RD: torch.Tensor, route: _Route) -> torch.Tensor:
        """See :class:`r1mega.model.dispatch.contract.Dispatcher`."""
        sums = unpermute(rows_RD, route.row_map)
        sums = reduce(sums, route.by_part, self.ranks.expert_tensor)
        return reduce(sums, route.by_expert_rank, self.ranks.expert)
