"""MLA's two parts of ours in Megatron-Core's slots: core attention, and the projections and rotary positions before it.

With one context rank core attention is one call of torch's. With more, a rank holds two parts of every sequence
(:mod:`r1mega.model.context`) and ``cp_comm_type``, Megatron's key, says how its queries meet all keys: ``all_gather``, where the
latents (``kv_lora_rank + rope`` wide, whatever the number of heads) are gathered and every rank projects all of them up; or
``p2p``, where keys and values go around the ring. Refuses Megatron's packed format: packed samples come with segment ids.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from r1mega.config.errors import UserError
from r1mega.device import attention_choice, attention_kernels
from r1mega.model.context import ContextPart
from r1mega.model.part_attention import gathered_attention, ring_attention
from r1mega.model.recompute import following, is_remade, remade
from r1mega.ops.mla_rope import mla_rope

EXCHANGES = {"allgather": "all_gather", "ring": "p2p"}
"""``parallel.context_exchange`` to Megatron's ``cp_comm_type``."""
ONE_WIDTH = ("flash", "flash_attn")
"""Kernels that want values as wide as keys."""


@functools.cache
def flash_attention() -> Callable:
    """``flash_attn_func`` of the package flash-attn: ``[B, S, H, d]`` thrice, one width. UserError where it is missing."""
    try:
        from flash_attn import flash_attn_func
    except Exception as error:  # it loads a library: whatever it raises, the package is not usable here
        told = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"device.attention: flash_attn is the package flash-attn; got {type(error).__name__}: {told}; "
            "pip install --no-build-isolation 'r1mega[flash]', or use device.attention=auto"
        ) from None
    return flash_attn_func


class CoreAttention(MegatronModule):
    """Softmax attention with queries and keys wider than values, as MLA has them.

    ``query, key``: ``[S, B, H, nope + rope]``; ``value``: ``[S, B, H, v]``; returns ``[S, B, H * v]``. ``attention_mask``: None
    for plain causal attention; bool ``[B, 1, S, S]``, True where a query may look (packed samples); with several context ranks
    int32 ``[B, S]``, the sample numbers of the whole rows. There ``query`` holds this rank's two parts, and ``key`` and ``value``
    those too (``p2p``) or the whole sequence in order (``all_gather``). Kernels of one width (``device.attention`` flash and
    flash_attn, and a CPU's) get values filled up with zeros to the keys' width; what they add to the output is cut off. Raises
    UserError where torch's kernel that was asked for does not take the heads.
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
        if attention_choice() == "flash_attn":
            flash_attention()  # before a step is made

    @property
    def takes_whole_keys(self) -> bool:
        """True where ``key`` and ``value`` are those of the whole sequence, and ``query`` is a part of it."""
        return self.part.size > 1 and self.exchange == EXCHANGES["allgather"]

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, packed_seq_params=None, **_):
        if packed_seq_params is not None:
            raise NotImplementedError("model: packed samples come with an attention mask; got packed_seq_params; pass segment ids")
        if self.part.size > 1:
            exchanged = gathered_attention if self.takes_whole_keys else ring_attention
            return exchanged(query, key, value, attention_mask, self.part, self.softmax_scale).flatten(2)
        value_dim, choice, masked = value.shape[-1], attention_choice(), attention_mask is not None
        if value.device.type == "cpu" or (choice in ONE_WIDTH and not masked):
            # on a CPU too: torch's fused kernel wants one width; without it the scores are materialised
            missing = max(0, query.shape[-1] - value_dim)
            value = following(lambda value: F.pad(value, (0, missing)), value)
        if choice == "flash_attn" and not masked:
            out_BSHv = flash_attention()(
                *(tensor.transpose(0, 1) for tensor in (query, key, value)),
                softmax_scale=self.softmax_scale,
                causal=True,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )[..., :value_dim]
            return out_BSHv.transpose(0, 1).flatten(2)
        try:
            with attention_kernels(query.device, masked=masked):
                out_BHSv = F.scaled_dot_product_attention(
                    query.permute(1, 2, 0, 3),
                    key.permute(1, 2, 0, 3),
                    value.permute(1, 2, 0, 3),
                    attn_mask=attention_mask,
                    is_causal=not masked,
                    scale=self.softmax_scale,
                )[..., :value_dim]
        except RuntimeError as error:  # the same on all ranks, whose heads are alike
            if "No available kernel" not in str(error):
                raise
            raise UserError(
                f"device.attention: {choice} is a kernel of torch's that takes the model's heads on this device; got keys "
                f"{key.shape[-1]} wide and values {value_dim} wide in {value.dtype}; use device.attention=auto"
            ) from error
        return out_BHSv.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


class LatentAttention(MLASelfAttention):
    """Megatron's MLA with rotary positions in one pass; where core attention takes whole keys, their latents are gathered before
    they are projected up.

    A gathered token is ``kv_lora_rank + rope`` numbers instead of ``H * (nope + rope + v)``: 576 to 40,960 in DeepSeek-V3. The
    price is that every context rank projects the whole sequence up. The projections up and what follows them can be made again in
    the backward pass (:mod:`r1mega.model.recompute`). Refuses what its path does not have: Megatron's own recompute, its fused
    rotary positions, its packed format and its inference.
    """

    def __init__(self, config, submodules, *args, **kwargs):
        # Megatron takes its own class alone for the projections down; ours, a subclass without state of its own, comes in after it.
        own = {name: getattr(submodules, name) for name in ("linear_q_down_proj", "linear_kv_down_proj")}
        own = {name: cls for name, cls in own.items() if issubclass(cls, ColumnParallelLinear)}
        megatrons = replace(submodules, **dict.fromkeys(own, ColumnParallelLinear))
        super().__init__(config, megatrons, *args, **kwargs)
        for name, cls in own.items():
            if hasattr(self, name):
                getattr(self, name).__class__ = cls
        if self.recompute_up_proj or config.apply_rope_fusion or config.rotary_interleaved:
            refused = "Megatron's recompute of mla_up_proj, apply_rope_fusion and rotary_interleaved"
            raise ValueError(f"model.attention: {refused} are not there; got one; leave it out")

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
        """Query of own tokens, key and value of those that core attention takes, and both latents of own tokens."""
        if packed_seq_params is not None:
            raise NotImplementedError("model: packed samples come with an attention mask; got packed_seq_params; pass segment ids")
        if inference_context is not None or inference_params is not None:
            raise NotImplementedError("model: Megatron's inference is not there; got its context; use r1mega.rl.engine")
        config, query_latent = self.config, hidden_states
        if config.q_lora_rank is not None:
            query_latent = self._scattered(self._down(self.linear_q_down_proj, hidden_states, config.q_lora_rank))
            query_latent = self.q_layernorm(query_latent)
        widths = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
        latent, shared_key = self._down(self.linear_kv_down_proj, hidden_states, sum(widths)).split(widths, dim=-1)
        latent = self.kv_layernorm(self._scattered(latent))
        if config.sequence_parallel and is_remade("mla_up"):
            shared_key = shared_key.contiguous()  # kept by itself: nobody else keeps the projection that it is a part of
        tables = self._cos_sin(hidden_states)
        whole = self._cos_sin(hidden_states, whole=True) if self.core_attention.takes_whole_keys else None
        made = remade("mla_up", lambda *parts: self._projected_up(*parts, tables, whole), query_latent, latent, shared_key)
        return *made, query_latent, latent

    def _projected_up(
        self,
        query_latent: torch.Tensor,
        latent: torch.Tensor,
        shared_key: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        whole: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value. ``tables``: cosines and sines of own tokens; ``whole``: of all, where core attention takes all."""
        config, nope, heads = self.config, self.config.qk_head_dim, self.num_attention_heads_per_partition
        tensor, context = self.pg_collection.tp, self.pg_collection.cp
        project = self.linear_q_proj if config.q_lora_rank is None else self.linear_q_up_proj
        query = project(query_latent)[0].unflatten(-1, (heads, self.q_head_dim))
        both = self.linear_kv_up_proj(gather_from_sequence_parallel_region(latent, group=context) if whole else latent)[0]
        both = both.unflatten(-1, (heads, nope + config.v_head_dim))
        if whole:
            # Under sequence parallelism the projection gathers over the tensor axis what has been gathered over the context axis.
            in_order, pieces = self.core_attention.part.in_order, tensor.size() if config.sequence_parallel else 1
            both, shared_key = in_order(both, pieces), in_order(gather_from_sequence_parallel_region(shared_key, group=context))
        if tensor.size() > 1:  # all heads share the key: its gradient is the sum over those of all tensor ranks
            shared_key = copy_to_tensor_model_parallel_region(shared_key, group=tensor)

        if not whole:
            return tuple(mla_rope(query, both, shared_key, *tables, nope))
        # Queries are a part of the sequence and keys all of it: each is turned by itself, with none of the other's heads.
        own_key = shared_key.new_empty(*query.shape[:2], shared_key.shape[-1])
        turned, _, _ = mla_rope(query, query.new_empty(*query.shape[:2], 0, both.shape[-1]), own_key, *tables, nope)
        no_query = query.new_empty(*both.shape[:2], 0, query.shape[-1])
        _, key, value = mla_rope(no_query, both, shared_key, *whole, nope)
        return turned, key, value

    def _cos_sin(self, hidden_states, *, whole: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """``[S / C, rope / 2]`` each, of own tokens' places; ``whole``: ``[S, rope / 2]``, of all. One pair for all layers."""
        length = self.rotary_pos_emb.get_rotary_seq_len(None, None, hidden_states, self.config, None)
        context = (0, 1) if whole else (self.pg_collection.cp.rank(), self.pg_collection.cp.size())
        key = (length, *context, hidden_states.device, *(getattr(self.config, name) for name in ROTARY))
        if key not in _tables:
            with torch.inference_mode(False), torch.no_grad():  # what evaluation makes here, training reads
                # Megatron cuts angles by context rank, but for packed sequences
                angles = self.rotary_pos_emb(length, packed_seq=whole)
                angles, mscale = angles if isinstance(angles, tuple) else (angles, 1.0)
                angles = angles[:, 0, 0, : angles.shape[-1] // 2]  # the second half is the same
                while len(_tables) >= MOST_TABLES:
                    del _tables[next(iter(_tables))]
                _tables[key] = (angles.cos() * mscale).contiguous(), (angles.sin() * mscale).contiguous()
        return _tables[key]

    def _down(self, linear, hidden_states, width: int):
        """A down-projection, whole on every tensor rank: ``[S / C, B, width]``."""
        out = linear(hidden_states)[0]
        return out if out.shape[-1] == width else gather_from_tensor_model_parallel_region(out)

    def _scattered(self, latent):
        """A latent as the projections up take it: under sequence parallelism this tensor rank's rows."""
        return scatter_to_sequence_parallel_region(latent) if self.config.sequence_parallel else latent


ROTARY = (
    "rope_type",
    "qk_pos_emb_head_dim",
    "rotary_base",
    "rotary_percent",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
"""What of Megatron's config decides the angles."""
MOST_TABLES = 8
_tables: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
"""Cosines and sines by length, part and config, the oldest first."""
