"""Our parts in Megatron-Core's slots: RMSNorm, core attention, the routed experts. They take Megatron's ``[S, B, D]``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from r1mega.device import allocation_device

LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms on the query and key/value latents: fixed in DeepSeek's and transformers' code, whatever the model's own."""


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (arXiv 1910.07467): ``x / sqrt(mean(x^2) + eps) * weight``, the mean in fp32.

    ``[..., hidden_size]`` to the same shape and dtype. Under sequence parallelism the weight is marked, so that its gradient is
    summed over the tensor axis.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.eps = eps
        device = "meta" if config.init_model_with_meta_device else None
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The weight, the same on every tensor rank."""
        return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, {}, sharded_offsets)


class LatentRMSNorm(RMSNorm):
    """RMSNorm of a latent: its epsilon is fixed."""

    def __init__(self, config, hidden_size: int, eps: float = LATENT_NORM_EPS, **kwargs):
        super().__init__(config, hidden_size, LATENT_NORM_EPS, **kwargs)


class CoreAttention(MegatronModule):
    """Softmax attention with queries and keys wider than values, as MLA has them.

    ``query, key``: ``[S, B, H, nope + rope]``; ``value``: ``[S, B, H, v]``; ``attention_mask``: None for plain causal attention, or
    bool ``[B, 1, S, S]``, True where a query may look (packed samples). Returns ``[S, B, H * v]``.
    """

    def __init__(self, config, layer_number: int, attn_mask_type, attention_type: str, softmax_scale: float, **_):
        super().__init__(config)
        self.softmax_scale = softmax_scale

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, packed_seq_params=None, **_):
        if packed_seq_params is not None:
            raise NotImplementedError("model: packed samples come with an attention mask; got packed_seq_params; pass segment ids")
        if self.config.tensor_model_parallel_size > 1:
            # All heads share the rotary key. Megatron's plain path leaves its gradient at the part of this rank's heads; sum it.
            rotary = self.config.qk_pos_emb_head_dim
            own, shared = key.split([key.shape[-1] - rotary, rotary], dim=-1)
            key = torch.cat([own, copy_to_tensor_model_parallel_region(shared)], dim=-1)
        value_dim = value.shape[-1]
        if value.device.type == "cpu":  # torch's fused kernel for the CPU wants one width; without it the scores are materialised
            value = F.pad(value, (0, query.shape[-1] - value_dim))
        out_BHSv = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
        )[..., :value_dim]
        return out_BHSv.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


class GroupedExperts(MegatronModule):
    """This rank's ``e`` routed experts as two stacked weights, so that a layer is two parameters whatever ``e`` is.

    Expert i: ``down_i(silu(gate_i x) * up_i x) * prob``; ``weight1``: ``[e, 2F, D]`` (gate rows, then up rows), ``weight2``:
    ``[e, D, F]``. Takes the slot of Megatron's ``experts`` in a MoE layer.
    """

    def __init__(self, num_local_experts: int, config, submodules=None, pg_collection=None):
        super().__init__(config)
        self.num_local_experts = num_local_experts
        self.expert_parallel_group = pg_collection.ep
        self.expert_data_group = pg_collection.expt_dp
        width, hidden = config.moe_ffn_hidden_size, config.hidden_size
        device = "meta" if config.init_model_with_meta_device else allocation_device()
        shapes = {"weight1": (num_local_experts, 2 * width, hidden), "weight2": (num_local_experts, hidden, width)}
        inits = {"weight1": config.init_method, "weight2": config.output_layer_init_method}
        for name, shape in shapes.items():
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
            if config.perform_initialization and not weight.is_meta:
                for expert in weight.data:
                    inits[name](expert)
            # Megatron: reduced over the expert-data axis, not the data axis where experts or tensor ranks cut the tokens.
            # The same in every layout, so that the optimizer has the same parts in every layout and checkpoints move between them.
            weight.allreduce = False
            # No two ranks hold the same shard of an expert's gradient, tensor ranks included: all count in the gradient's norm.
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
            self.register_parameter(name, weight)

    def forward(self, rows_RD: torch.Tensor, tokens_per_expert: torch.Tensor, probs_R: torch.Tensor):
        """``rows_RD``: tokens sorted by expert; ``tokens_per_expert``: int64 ``[e]``, sum R. Returns ``([R, D], None)``."""
        if rows_RD.is_cuda and rows_RD.dtype == torch.bfloat16:
            offsets = tokens_per_expert.to(rows_RD.device).cumsum(0).to(torch.int32)
            hidden = F.grouped_mm(rows_RD, self.weight1.transpose(1, 2), offs=offsets)
            return F.grouped_mm(_swiglu(hidden, probs_R), self.weight2.transpose(1, 2), offs=offsets), None
        counts = tokens_per_expert.tolist()
        # unbind, not indexing: the backward of an index fills a zero stack for every expert
        parts = zip(rows_RD.split(counts), probs_R.split(counts), self.weight1.unbind(0), self.weight2.unbind(0), strict=True)
        return torch.cat([F.linear(_swiglu(F.linear(rows, up), probs), down) for rows, probs, up, down in parts]), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The stacks, cut along the expert axis over the expert-parallel ranks."""
        state = {}
        for name in ("weight1", "weight2"):
            offset = (len(sharded_offsets), self.expert_parallel_group.rank(), self.expert_parallel_group.size())
            state[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name,
                getattr(self, name),
                *sharded_offsets,
                offset,
                replica_id=(0, 0, self.expert_data_group.rank()),
                prepend_axis_num=len(sharded_offsets),
            )
        return state

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; ours are never delayed."""


def _swiglu(hidden_R2F: torch.Tensor, probs_R: torch.Tensor) -> torch.Tensor:
    gate, up = hidden_R2F.chunk(2, dim=-1)
    return (F.silu(gate) * up * probs_R.unsqueeze(-1)).to(hidden_R2F.dtype)
