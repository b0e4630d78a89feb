"""DeepSeek's MoE layer on Megatron's ``MoELayer``: its shared experts, our router and experts, any dispatcher of the kind.

``[S, B, D]`` to the same; under sequence parallelism S is this tensor rank's part, so that all ranks of ``expert`` and
``expert_tensor`` have tokens of their own. Refuses Megatron's options that this layer does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from r1mega.mesh import Axis
from r1mega.model.dispatch.choices import AllToAll
from r1mega.model.dispatch.contract import ExpertRanks, begin_dispatch
from r1mega.model.layers import Slot
from r1mega.model.router import Router, check_router

REFUSED = ("moe_latent_size", "moe_shared_expert_overlap", "moe_router_padding_for_quantization")


class MixtureOfExperts(MoELayer):
    """Router, dispatch, experts, combine, and what shared experts add: a device computes them while the host waits for the sizes
    that a dispatcher must know. ``dispatcher``: a choice of the kind; None: alltoall.

    Built through :func:`mixture_spec`. ``pg_collection``: Megatron's groups, of which ``ep`` and ``expt_tp`` are the axes of the
    dispatcher; None: those that Megatron keeps globally.
    """

    def __init__(self, config, submodules=None, layer_number=None, pg_collection=None, *, dispatcher: Any = None):
        for name in REFUSED:
            if getattr(config, name, None):
                raise ValueError(f"model.moe: {name} is not there; got {getattr(config, name)!r}; leave it unset")
        check_router(config)
        groups = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, groups)
        self.router.__class__ = Router  # MoELayer names Megatron's
        if self.moe_layer_recompute or self.shared_experts_recompute:
            raise ValueError("model.moe: recompute of a part of the layer is not there; got recompute_modules of moe; leave it out")
        ranks = ExpertRanks(config.num_moe_experts, _axis(self.ep_group), _axis(groups.expt_tp), config.moe_router_topk)
        self.token_dispatcher = (dispatcher or AllToAll()).build(ranks)
        self._order: tuple[tuple[int, ...], torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor, intermediate_tensors=None, padding_mask: torch.Tensor | None = None):
        """``[S, B, D]`` to ``([S, B, D], None)``; ``padding_mask``: ``[B, S]``, True for padding, for balance alone."""
        if intermediate_tensors is not None:
            raise ValueError("model.moe: the layer runs as a whole; got intermediate_tensors of a graph's part; leave them out")
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError("model.moe: tensor ranks have tokens of their own; got all the same; use sequence parallelism")
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        # A node before the router's: the gradient of the shared experts comes last to the sum, whenever it is computed.
        of_shared = hidden_states.view_as(hidden_states)
        probs_TE, routing_map_TE = self.route(hidden_states, padding_mask)
        probs_TE, routing_map_TE = self._to_slots(probs_TE, routing_map_TE)
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        output, shared = self.routed(hidden_TD, probs_TE, routing_map_TE, meanwhile=lambda: self.shared_experts_compute(of_shared))
        output = output.view(hidden_states.shape)
        return output if shared is None else output + shared, None

    def routed(
        self,
        hidden_TD: torch.Tensor,
        probs_TE: torch.Tensor,
        routing_map_TE: torch.Tensor,
        meanwhile: Callable[[], torch.Tensor | None] = lambda: None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The routed experts alone: ``[T, D]`` to each token's sum of answers, ``[T, D]``; the others' columns are slots.

        ``meanwhile``: what the device can do while the host waits for a dispatcher's sizes; its result comes second.
        """
        if self.experts.fp8 is not None and getattr(self.token_dispatcher, "is_local", False):
            output = self.experts.on_tokens(hidden_TD, probs_TE, routing_map_TE, self.config.moe_router_topk)
            return output, meanwhile()
        finish = begin_dispatch(self.token_dispatcher, hidden_TD, probs_TE, routing_map_TE)
        other = meanwhile()
        sent = finish()
        rows_RD, _ = self.experts(sent.rows_RD, sent.tokens_per_expert, sent.probs_R)
        return self.token_dispatcher.combine(rows_RD, sent.route), other

    def _to_slots(self, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's columns, by logical expert, in the order of the slots where the experts lie."""
        placement = self.experts.placement
        if placement == tuple(range(len(placement))):
            return probs_TE, routing_map_TE
        if self._order is None or self._order[0] != placement:  # once a move: a copy to the device waits for it
            self._order = placement, torch.tensor(placement, device=probs_TE.device)
        order = self._order[1]
        return probs_TE.index_select(1, order), routing_map_TE.index_select(1, order)


def mixture_spec(submodules: Any, groups: Any, dispatcher: Any = None) -> Slot:
    """The slot ``mlp`` of a MoE layer. ``submodules``: Megatron's ``MoESubmodules``; ``groups``: its ``ProcessGroupCollection``."""
    return Slot(MixtureOfExperts, submodules, {"pg_collection": groups, "dispatcher": dispatcher})


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(group.rank(), group.size(), tuple(dist.get_process_group_ranks(group)), group)
