"""A dispatcher of your own: rows travel by point-to-point messages in turns, to the next rank, then to the one after it, and so on.

In turn ``n`` each rank sends to the rank ``n`` places ahead and receives from the one ``n`` places behind: no two ranks write to
the same one at once, and no collective but the exchange of counts is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from r1mega.model.dispatch import Dispatched, ExpertRanks
from r1mega.model.dispatch.exchange import exchange_counts, reduce, share
from r1mega.ops.permute import permute, unpermute
from r1mega.registry import register


@register("dispatcher", "ring")
@dataclass(frozen=True)
class Ring:
    """Rows by point-to-point messages, a turn for each distance between ranks."""

    def build(self, ranks: ExpertRanks) -> RingDispatcher:
        return RingDispatcher(ranks)


class RingDispatcher:
    """Keeps nothing between calls: what the way back needs is the route."""

    def __init__(self, ranks: ExpertRanks):
        self.ranks = ranks

    def dispatch(self, hidden_TD: torch.Tensor, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor) -> Dispatched:
        line, parts, e = self.ranks.expert, self.ranks.expert_tensor, self.ranks.num_local_experts
        # 1. A row for each (token, expert), sorted by expert and therefore by rank.
        mine = permute(hidden_TD, probs_TE, routing_map_TE, self.ranks.top_k)
        # 2. How many rows come from each rank for each local expert.
        out = mine.counts_E.view(line.size, e)
        into = exchange_counts(out, line)
        sent, received = out.sum(1).tolist(), into.sum(1).tolist()
        # 3. The rows, in turns.
        rows, probs = _Turns.apply(sent, received, line, mine.rows_RD, mine.probs_R)
        # 4. Ranks that hold parts of the same experts need each other's rows (parallel.expert_tensor above 1).
        blocks = exchange_counts(into.reshape(1, -1).expand(parts.size, -1), parts).reshape(-1, e)
        shared = blocks.view(parts.size, -1).sum(1).tolist()
        rows, probs = share((rows, probs), shared, parts)
        # 5. What came lies by sender; a row is now a token of one expert, and the same op sorts it.
        experts = torch.arange(e, device=blocks.device)
        of_row = experts.repeat(len(blocks)).repeat_interleave(blocks.reshape(-1), output_size=len(rows))
        here = permute(rows, probs.unsqueeze(1).expand(-1, e), of_row.unsqueeze(1) == experts, top_k=1)
        return Dispatched(here.rows_RD, here.counts_E, here.probs_R, (mine.row_map, here.row_map, sent, received, shared))

    def combine(self, rows_RD: torch.Tensor, route: Any) -> torch.Tensor:
        mine, here, sent, received, shared = route
        rows = reduce(unpermute(rows_RD, here), shared, self.ranks.expert_tensor)
        (rows,) = _Turns.apply(received, sent, self.ranks.expert, rows)
        return unpermute(rows, mine)


class _Turns(torch.autograd.Function):
    """Rows to their ranks; the gradients travel back the other way. One node for all tensors: ranks then agree on the order."""

    @staticmethod
    def forward(ctx, sent, received, line, *tensors):
        ctx.way = (received, sent, line)
        return tuple(_turns(sent, received, line, tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *(_turns(*ctx.way, grad) for grad in grads)


def _turns(sent, received, line, rows: torch.Tensor) -> torch.Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    going, coming = rows.contiguous().split(sent), out.split(received)
    coming[line.rank].copy_(going[line.rank])
    for distance in range(1, line.size):
        ahead, behind = (line.rank + distance) % line.size, (line.rank - distance) % line.size
        messages = []
        if len(going[ahead]):
            messages.append(dist.P2POp(dist.isend, going[ahead], line.ranks[ahead], line.group))
        if len(coming[behind]):
            messages.append(dist.P2POp(dist.irecv, coming[behind], line.ranks[behind], line.group))
        for request in dist.batch_isend_irecv(messages) if messages else ():
            request.wait()
    return out
