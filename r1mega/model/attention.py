"""MLA's two parts of ours in Megatron-Core's slots: core attention, and the projections around its key/value latents.

With one context rank core attention is one call of torch's. With more, a rank holds two parts of every sequence
(:mod:`r1mega.model.context`) and ``cp_comm_type``, Megatron's key, says how its queries meet all keys: ``all_gather``, where the
latents (``kv_lora_rank + rope`` wide, whatever the number of heads) are gathered and every rank projects all of them up; or
``p2p``, where keys and values go around the ring. Refuses Megatron's packed format: packed samples come with segment ids.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from r1mega.model.context import ContextPart
from r1mega.model.part_attention import gathered_attention, ring_attention

EXCHANGES = {"allgather": "all_gather", "ring": "p2p"}
"""``parallel.context_exchange`` to Megatron's ``cp_comm_type``."""


class CoreAttention(MegatronModule):
    """Softmax attention with queries and keys wider than values, as MLA has them.

    ``query, key``: ``[S, B, H, nope + rope]``; ``value``: ``[S, B, H, v]``; returns ``[S, B, H * v]``. ``attention_mask``: None
    for plain causal attention; bool ``[B, 1, S, S]``, True where a query may look (packed samples); with several context ranks
    int32 ``[B, S]``, the sample numbers of the whole rows. There ``query`` holds this rank's two parts, and ``key`` and ``value``
    those too (``p2p``) or the whole sequence in order (``all_gather``).
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        softmax_scale: float,
        cp_comm_type: str | None = None,
        pg_collection=None,
        **_,
    ):
        super().__init__(config)
        self.softmax_scale = softmax_scale
        self.part = ContextPart.of_group(getattr(pg_collection, "cp", None))
        self.exchange = cp_comm_type or EXCHANGES["allgather"]
        if self.exchange not in EXCHANGES.values():
            raise ValueError(f"model: cp_comm_type is one of {', '.join(EXCHANGES.values())}; got {cp_comm_type!r}")

    @property
    def takes_whole_keys(self) -> bool:
        """True where ``key`` and ``value`` are those of the whole sequence, and ``query`` is a part of it."""
        return self.part.size > 1 and self.exchange == EXCHANGES["allgather"]

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, packed_seq_params=None, **_):
        if packed_seq_params is not None:
            raise NotImplementedError("model: packed samples come with an attention mask; got packed_seq_params; pass segment ids")
        if self.config.tensor_model_parallel_size > 1:
            # All heads share the rotary key. Megatron's plain path leaves its gradient at the part of this rank's heads; sum it.
            rotary = self.config.qk_pos_emb_head_dim
            own, shared = key.split([key.shape[-1] - rotary, rotary], dim=-1)
            key = torch.cat([own, copy_to_tensor_model_parallel_region(shared)], dim=-1)
        if self.part.size > 1:
            exchanged = gathered_attention if self.takes_whole_keys else ring_attention
            return exchanged(query, key, value, attention_mask, self.part, self.softmax_scale).flatten(2)
        value_dim = value.shape[-1]
        if value.device.type == "cpu":  # torch's fused kernel for the CPU wants one width; without it the scores are materialised
            value = F.pad(value, (0, max(0, query.shape[-1] - value_dim)))
        out_BHSv = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
        )[..., :value_dim]
        return out_BHSv.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


class LatentAttention(MLASelfAttention):
    """Megatron's MLA; where core attention takes whole keys, their latents are gathered before they are projected up.

    A gathered token is ``kv_lora_rank + rope`` numbers instead of ``H * (nope + rope + v)``: 576 to 40,960 in DeepSeek-V3. The
    price is that every context rank projects the whole sequence up.
    """

    def __init__(self, config, submodules, *args, **kwargs):
        # Megatron takes its own class alone for the projections down; ours, a subclass without state of its own, comes in after it.
        own = {name: getattr(submodules, name) for name in ("linear_q_down_proj", "linear_kv_down_proj")}
        megatrons = replace(submodules, **dict.fromkeys(own, ColumnParallelLinear))
        super().__init__(config, megatrons, *args, **kwargs)
        for name, cls in own.items():
            if hasattr(self, name):
                getattr(self, name).__class__ = cls

    def get_query_key_value_tensors(
        self,
        hidden_states,
        key_value_states=None,
        position_ids=None,
        packed_seq_params=None,
        inference_context=None,
        *,
        inference_params=None,
    ):
        """Query of own tokens, key and value of whole sequences, and both latents of own tokens."""
        if not self.core_attention.takes_whole_keys:
            return super().get_query_key_value_tensors(
                hidden_states,
                key_value_states,
                position_ids,
                packed_seq_params,
                inference_context,
                inference_params=inference_params,
            )
        config, nope, heads = self.config, self.config.qk_head_dim, self.num_attention_heads_per_partition
        turn = self._rotary(hidden_states)
        if config.q_lora_rank is None:
            query_latent, project = hidden_states, self.linear_q_proj
        else:
            query_latent = self._scattered(self._down(self.linear_q_down_proj, hidden_states, config.q_lora_rank))
            query_latent, project = self.q_layernorm(query_latent), self.linear_q_up_proj
        query = project(query_latent)[0]
        query = query.view(*query.shape[:2], heads, self.q_head_dim)
        query = torch.cat([query[..., :nope], turn(query[..., nope:])], dim=-1)

        widths = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
        latent, shared_key = self._down(self.linear_kv_down_proj, hidden_states, sum(widths)).split(widths, dim=-1)
        latent = self.kv_layernorm(self._scattered(latent))
        group, in_order = self.pg_collection.cp, self.core_attention.part.in_order
        # Under sequence parallelism the projection gathers over the tensor axis what has been gathered over the context axis.
        pieces = self.pg_collection.tp.size() if config.sequence_parallel else 1
        both = self.linear_kv_up_proj(gather_from_sequence_parallel_region(latent, group=group))[0]
        both = in_order(both.view(*both.shape[:2], heads, nope + config.v_head_dim), pieces)
        shared_key = in_order(gather_from_sequence_parallel_region(turn(shared_key.unsqueeze(-2)), group=group))
        key = torch.cat([both[..., :nope], shared_key.expand(-1, -1, heads, -1)], dim=-1)
        return query, key, both[..., nope:].contiguous(), query_latent, latent

    def _rotary(self, hidden_states):
        """Turns ``[S / C, B, heads, rope]`` by the places of own tokens."""
        length = self.rotary_pos_emb.get_rotary_seq_len(None, None, hidden_states, self.config, None)
        angles = self.rotary_pos_emb(length)
        angles, mscale = angles if isinstance(angles, tuple) else (angles, 1.0)
        return lambda x: apply_rotary_pos_emb(x, angles, config=self.config, mscale=mscale, cp_group=self.pg_collection.cp)

    def _down(self, linear, hidden_states, width: int):
        """A down-projection, whole on every tensor rank: ``[S / C, B, width]``."""
        out = linear(hidden_states)[0]
        return out if out.shape[-1] == width else gather_from_tensor_model_parallel_region(out)

    def _scattered(self, latent):
        """A latent as the projections up take it: under sequence parallelism this tensor rank's rows."""
        return scatter_to_sequence_parallel_region(latent) if self.config.sequence_parallel else latent
