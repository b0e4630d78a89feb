"""The dispatcher ``alltoall``: each row to the rank of its expert and back, by uneven all-to-alls without padding.

Way out: one exchange of the counts ``[ranks, e]`` (one more where ranks hold parts of the same experts), whose numbers are then on
their way to the host; this rank's rows, sorted by expert, hence by rank; there :meth:`AllToAllDispatcher.begin` ends. One exchange
of rows; ranks that hold parts of the same experts share what they received; :func:`permute` sorts by local expert. The way back is
the mirror image; parts of an answer are summed in the order of the ranks. The backward pass knows all sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from r1mega.device import HostCopy
from r1mega.model.dispatch.contract import Dispatched, ExpertRanks
from r1mega.model.dispatch.exchange import exchange_counts, reduce, share, swap
from r1mega.ops.permute import RowMap, permute, permute_probs, permute_rows, unpermute
from r1mega.ops.row_map import map_rows


class _Route(NamedTuple):
    """``sent``, ``received``: rows a rank of the axis expert; ``shared``: rows a rank of expert_tensor; maps of both permutes."""

    row_map: RowMap
    sent: list[int]
    received: list[int]
    shared: list[int]
    by_expert: RowMap | None


class AllToAllDispatcher:
    """On one rank exactly ``local``. Where experts are spread the host must know the sizes: it waits for them once a call, between
    the two halves."""

    def __init__(self, ranks: ExpertRanks):
        self.ranks = ranks
        self.is_local = ranks.expert.size == ranks.expert_tensor.size == 1

    def dispatch(self, hidden_TD: torch.Tensor, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor) -> Dispatched:
        """See :class:`r1mega.model.dispatch.contract.Dispatcher`."""
        return self.begin(hidden_TD, probs_TE, routing_map_TE)()

    def begin(self, hidden_TD: torch.Tensor, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor) -> Callable[[], Dispatched]:
        """See :class:`r1mega.model.dispatch.contract.Dispatcher`."""
        ranks, sizes, blocks = self.ranks, None, None
        row_map = map_rows(routing_map_TE, ranks.top_k)
        if not self.is_local:
            out = row_map.counts_E.view(ranks.expert.size, ranks.num_local_experts)
            into = exchange_counts(out, ranks.expert)
            blocks = self._blocks(into)  # [sources, e]: rows of each source by local expert
            sizes = HostCopy(torch.cat([out.sum(1), into.sum(1), blocks.view(ranks.expert_tensor.size, -1).sum(1)]))
        probs_R = permute_probs(probs_TE, row_map)
        rows_RD = permute_rows(hidden_TD, row_map)
        if sizes is None:
            return lambda: Dispatched(rows_RD, row_map.counts_E, probs_R, _Route(row_map, [], [], [], None))
        return lambda: self._exchanged(rows_RD, probs_R, row_map, blocks, sizes)

    def _exchanged(
        self, rows_RD: torch.Tensor, probs_R: torch.Tensor, row_map: RowMap, blocks: torch.Tensor, sizes: HostCopy
    ) -> Dispatched:
        """The second half, which waits for ``sizes``: rows to each rank, from each rank, and of each part."""
        ranks, n = self.ranks, self.ranks.expert.size
        counts = sizes.wait().tolist()
        sent, received, shared = counts[:n], counts[n : 2 * n], counts[2 * n :]
        rows_RD, probs_R = swap((rows_RD, probs_R), sent, received, ranks.expert)
        rows_RD, probs_R = share((rows_RD, probs_R), shared, ranks.expert_tensor)
        if ranks.num_local_experts == 1:
            return Dispatched(rows_RD, blocks.sum(0), probs_R, _Route(row_map, sent, received, shared, None))
        experts = torch.arange(ranks.num_local_experts, device=blocks.device)
        of_row_R = experts.repeat(len(blocks)).repeat_interleave(blocks.reshape(-1), output_size=len(rows_RD))
        # each received row is a token of one expert: the same op sorts it
        got = permute(rows_RD, probs_R.unsqueeze(1).expand(-1, len(experts)), of_row_R.unsqueeze(1) == experts, top_k=1)
        return Dispatched(got.rows_RD, got.counts_E, got.probs_R, _Route(row_map, sent, received, shared, got.row_map))

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
