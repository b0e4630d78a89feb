"""Routing of one microbatch that is given from outside: an engine's experts, or those of an earlier pass (R3 and R2).

A :class:`Replay` is made for one forward pass of one stage and stands at the stage's routers only while that runs
(:meth:`Replay.at`). MTP's routers choose for themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from r1mega.ops.route import Routed, route, route_within


def record_dtype(num_experts: int) -> torch.dtype:
    """Of a record of so many experts: uint8 where one number is left for :func:`absent`."""
    return torch.uint8 if num_experts <= 255 else torch.int16


def absent(dtype: torch.dtype) -> int:
    """What stands in a record for a token without one: -1, in uint8 its 255."""
    return 255 if dtype == torch.uint8 else -1


class Replay:
    """``experts_BSLK``: experts of every token (this context rank's part of the rows) in every decoder layer of the whole model,
    dense ones too, ``K`` different ones or :func:`absent`; None: nothing is given. ``forced``: given tokens take them; else they
    are only compared. ``keeps``: remember what every router chose by itself.

    ``own``: layer to that choice, ``[S / tensor * B, K]``; ``agreement``: layer to int64 ``[2]``, tokens that were given experts,
    and those of them whose own choice is the same set, both of this tensor and context rank's tokens.
    """

    def __init__(self, experts_BSLK: torch.Tensor | None = None, *, forced: bool = False, keeps: bool = False):
        self.experts_BSLK, self.forced, self.keeps = experts_BSLK, forced, keeps
        self.own: dict[int, torch.Tensor] = {}
        self.agreement: dict[int, torch.Tensor] = {}
        self._tensor: Any = None

    @contextlib.contextmanager
    def at(self, stage: torch.nn.Module) -> Iterator[None]:
        """Inside, the routers of the stage's decoder ask and tell this."""
        self._tensor = stage.pg_collection.tp if stage.config.sequence_parallel else None
        routers = [module for module in stage.decoder.modules() if hasattr(module, "replay")]
        for router in routers:
            router.replay = self
        try:
            yield
        finally:
            for router in routers:
                router.replay = None

    def route(self, layer: int, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, **how: Any) -> Routed:
        """For a router, in the place of :func:`r1mega.ops.route.route`. ``layer``: counted from 0 over the whole model."""
        given_TK = None if self.experts_BSLK is None else self._given(layer)
        if given_TK is not None and self.forced:
            routed, own_map_TE = route_within(logits_TE, bias_E, given_TK, **how)
        else:
            routed = route(logits_TE, bias_E, **how)
            own_map_TE = routed.routing_map_TE
        with torch.no_grad():
            if given_TK is not None:
                is_given = given_TK[:, 0] >= 0
                is_same = own_map_TE.gather(1, given_TK.clamp(min=0)).all(dim=1) & is_given
                self.agreement[layer] = torch.stack([is_given.sum(), is_same.sum()])
            if self.keeps:
                best = own_map_TE.to(torch.uint8).topk(how["top_k"], dim=1, sorted=False).indices
                self.own[layer] = best.to(record_dtype(own_map_TE.shape[1]))
        return routed

    def _given(self, layer: int) -> torch.Tensor:
        """Int64 ``[T, K]`` of this tensor rank's tokens, in the router's order, -1 where none are given."""
        experts_SBK = self.experts_BSLK[:, :, layer].transpose(0, 1)
        if self._tensor is not None:
            size = len(experts_SBK) // self._tensor.size()
            experts_SBK = experts_SBK.narrow(0, self._tensor.rank() * size, size)
        given_TK = experts_SBK.reshape(-1, experts_SBK.shape[-1]).long()
        return given_TK if self.experts_BSLK.dtype != torch.uint8 else given_TK.where(given_TK != absent(torch.uint8), -1)

    def own_BSLK(self, tokens_BS: torch.Tensor, num_layers: int) -> torch.Tensor | None:
        """What the stage's routers chose, all tensor ranks' tokens; absent in other layers. None where the stage has no router.

        ``tokens_BS``: the microbatch's (this context rank's part). Called by all tensor ranks.
        """
        if not self.own:
            return None
        layers = sorted(self.own)
        made_TLK = torch.stack([self.own[layer] for layer in layers], dim=1)
        if self._tensor is not None and self._tensor.size() > 1:
            parts = made_TLK.new_empty(self._tensor.size() * len(made_TLK), *made_TLK.shape[1:])
            dist.all_gather_into_tensor(parts, made_TLK.contiguous(), group=self._tensor)
            made_TLK = parts
        rows, length = tokens_BS.shape
        whole = made_TLK.new_full((rows, length, num_layers, made_TLK.shape[-1]), absent(made_TLK.dtype))
        whole[:, :, layers] = made_TLK.view(length, rows, *made_TLK.shape[1:]).transpose(0, 1)
        return whole
