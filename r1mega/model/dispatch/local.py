"""The dispatcher ``local``: rows sorted by expert on the token's own rank. The one that all others are compared with."""

from __future__ import annotations

import torch

from r1mega.model.dispatch.contract import Dispatched, ExpertRanks
from r1mega.ops.permute import RowMap, permute, unpermute


class LocalDispatcher:
    """All experts are here; with ``top_k`` known, nothing waits for the device."""

    is_local = True

    def __init__(self, ranks: ExpertRanks):
        self.top_k = ranks.top_k

    def dispatch(self, hidden_TD: torch.Tensor, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor) -> Dispatched:
        """See :class:`r1mega.model.dispatch.contract.Dispatcher`."""
        got = permute(hidden_TD, probs_TE, routing_map_TE, self.top_k)
        return Dispatched(got.rows_RD, got.counts_E, got.probs_R, got.row_map)

    def combine(self, rows_RD: torch.Tensor, route: RowMap) -> torch.Tensor:
        """See :class:`r1mega.model.dispatch.contract.Dispatcher`."""
        return unpermute(rows_RD, route)
