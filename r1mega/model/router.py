"""The router of a MoE layer: Megatron's ``TopKRouter`` with the op ``route`` for its choice; gate, losses and state are its own.

Logits ``[S, B, E]`` in, probabilities and map ``[S * B, E]`` out; a :class:`r1mega.model.replay.Replay` may say which experts
tokens take. Refuses the options in :data:`REFUSED` and Sinkhorn, which the op does not have.
"""

from __future__ import annotations

import functools

import torch
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter

from r1mega.model.replay import Replay
from r1mega.ops.route import route

REFUSED = ("moe_expert_capacity_factor", "moe_router_fusion", "moe_enable_routing_replay")


def check_router(config) -> None:
    """Raise ValueError for what Megatron's router has and this one does not."""
    for name in REFUSED:
        if getattr(config, name, None):
            raise ValueError(f"model.moe: {name} is not there; got {getattr(config, name)!r}; leave it unset")
    if "sinkhorn" in config.moe_router_load_balancing_type:
        raise ValueError(
            "model.moe: balance is by bias and losses; got moe_router_load_balancing_type of sinkhorn; use seq_aux_loss"
        )


class Router(TopKRouter):
    """Scores, choice, probabilities and counts in one op. It adds no state: a ``TopKRouter`` becomes one by its ``__class__``.

    ``replay``: of the forward pass that runs, which it alone sets. The balance losses see the router's own scores in any case.
    """

    replay: Replay | None = None

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """``[S, B, E]`` to probabilities (the logits' dtype) and map (bool), both ``[S * B, E]``.

        ``padding_mask``: bool ``[S, B]``, True for padding (as Megatron computes, not as it says), which neither the balance losses
        nor the counts see.
        """
        config, (seq_length, batch_size) = self.config, logits.shape[:2]
        logits_TE = logits.view(-1, config.num_moe_experts)
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits_TE, padding_mask=padding_T)
        pre_softmax = "softmax" if config.moe_router_pre_softmax else "topk_softmax"
        choose = route if self.replay is None else functools.partial(self.replay.route, self.layer_number - 1)
        routed = choose(
            logits_TE,
            self.expert_bias,
            top_k=self.topk,
            num_groups=config.moe_router_num_groups if config.moe_router_group_topk else 1,
            topk_groups=config.moe_router_group_topk or 1,
            score_function="sigmoid" if self.score_function == "sigmoid" else pre_softmax,
            scale=config.moe_router_topk_scaling_factor or 1.0,
        )
        probs_TE = routed.probs_TE
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            map_TE, scores_TE = compute_routing_scores_for_aux_loss(
                logits_TE, self.topk, self.score_function, padding_mask=padding_T
            )  # of all experts by their unbiased scores, groups or not (V3 equations 17 to 20)
            padded = padding_T is not None
            probs_TE = self._apply_aux_loss(probs_TE, scores_TE, map_TE, with_padding_mask=padded)
            probs_TE = self._apply_seq_aux_loss(probs_TE, scores_TE, map_TE, seq_length, batch_size, with_padding_mask=padded)
            probs_TE = self._apply_global_aux_loss(probs_TE, scores_TE, map_TE, with_padding_mask=padded)
        if self.enable_expert_bias and torch.is_grad_enabled():  # not in evaluation, nor twice where activations are recomputed
            with torch.no_grad():
                counts_E = routed.counts_E
                if padding_T is not None:
                    counts_E = (routed.routing_map_TE & ~padding_T.unsqueeze(1)).sum(0)
                self.local_tokens_per_expert += counts_E
        return probs_TE, routed.routing_map_TE
