"""The dispatcher ``alltoall``: each row to the rank of its expert and back, by uneven all-to-alls without padding.

Way out: :func:`permute` sorts this rank's rows by expert, hence by rank; one exchange of the counts ``[ranks, e]``; one of rows;
ranks that hold parts of the same experts share what they received (one more exchange of counts there); a second :func:`permute`
sorts by local expert. The way back is the mirror image; parts of an answer are summed in the order of the ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1mega.model.dispatch.contract import Dispatched, ExpertRanks
from r1mega.model.dispatch.exchange import exchange_counts, reduce, share, swap
from r1mega.ops.permute import RowMap, permute, unpermute


class _Route(NamedTuple):
    """``sent``, ``received``: rows a rank of the axis expert; ``shared``: rows a rank of expert_tensor; maps of both permutes."""

    row_map: RowMap
    sent: list[int]
    received: list[int]
    shared: list[int]
    by_expert: RowMap | None


class AllToAllDispatcher:
    """On one rank exactly ``local``. Waits for the device once a call where experts are spread: the sizes must be known to the
    host."""

    def __init__(self, ranks: ExpertRanks):
        self.ranks = ranks
        self.is_local = ranks.expert.size == ranks.expert_tensor.size == 1

    def dispatch(self, hidden_TD: torch.Tensor, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor) -> Dispatched:
        """See :class:`r1mega.model.dispatch.contract.Dispatcher`."""
        ranks = self.ranks
        own = permute(hidden_TD, probs_TE, routing_map_TE, ranks.top_k)
        if self.is_local:
            return Dispatched(own.rows_RD, own.counts_E, own.probs_R, _Route(own.row_map, [], [], [], None))
        out = own.counts_E.view(ranks.expert.size, ranks.num_local_experts)
        into = exchange_counts(out, ranks.expert)
        blocks = self._blocks(into)  # [sources, e]: rows of each source by local expert
        n = ranks.expert.size
        sizes = torch.cat([out.sum(1), into.sum(1), blocks.view(ranks.expert_tensor.size, -1).sum(1)]).tolist()
        sent, received, shared = sizes[:n], sizes[n : 2 * n], sizes[2 * n :]
        rows_RD, probs_R = swap((own.rows_RD, own.probs_R), sent, received, ranks.expert)
        rows_RD, probs_R = share((rows_RD, probs_R), shared, ranks.expert_tensor)
        if ranks.num_local_experts == 1:
            return Dispatched(rows_RD, blocks.sum(0), probs_R, _Route(own.row_map, sent, received, shared, None))
        experts = torch.arange(ranks.num_local_experts, device=blocks.device)
        of_row_R = experts.repeat(len(blocks)).repeat_interleave(blocks.reshape(-1), output_size=len(rows_RD))
        # each received row is a token of one expert: the same op sorts it
        got = permute(rows_RD, probs_R.unsqueeze(1).expand(-1, len(experts)), of_row_R.unsqueeze(1) == experts, top_k=1)
        return Dispatched(got.rows_RD, got.counts_E, got.probs_R, _Route(own.row_map, sent, received, shared, got.row_map))

    def _blocks(self, into: torch.Tensor) -> torch.Tensor:
        """Received counts ``[expert ranks, e]`` of this rank to those of all ranks with parts of the same experts, below each
        other."""
        peers = self.ranks.expert_tensor.size
        flat = into.reshape(1, -1).expand(peers, -1)
        return exchange_counts(flat, self.ranks.expert_tensor).reshape(peers * into.shape[0], into.shape[1])

    def combine(self, rows_RD: torch.Tensor, route: _Route) -> torch.Tensor:
        """See :class:`r1mega.model.dispatch.contract.Dispatcher`."""
        if route.by_expert is not None:
            rows_RD = unpermute(rows_RD, route.by_expert)
        rows_RD = reduce(rows_RD, route.shared, self.ranks.expert_tensor)
        (rows_RD,) = swap((rows_RD,), route.received, route.sent, self.ranks.expert)
        return unpermute(rows_RD, route.row_map)
