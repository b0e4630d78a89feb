"""Floating-point operations of training, on paper: the numerator of MFU. Imports no torch."""

from __future__ import annotations

from r1mega.config.model import ModelConfig


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Operations of one forward pass a token: 2 a multiply-add of every active weight, causal attention counted once, MTP included.

    The convention of Megatron-Core (and, without MTP, of arXiv 2505.09343 table 4): head counted, embedding look-up and router not.
    """
    head_dim = model.qk_nope_head_dim + model.qk_rope_head_dim
    hidden, heads = model.hidden_size, model.num_heads
    query = hidden * heads * head_dim if model.q_lora_rank is None else model.q_lora_rank * (hidden + heads * head_dim)
    latent = hidden * (model.kv_lora_rank + model.qk_rope_head_dim)
    key_value = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    attention = query + latent + key_value + heads * model.v_head_dim * hidden
    scores = heads * (head_dim + model.v_head_dim) * sequence_length / 2
    dense = 3 * hidden * model.ffn_size
    mixture = 3 * hidden * model.moe_ffn_size * (model.top_k + model.num_shared_experts)
    num_moe = model.num_layers - model.first_k_dense
    head = hidden * model.vocab_size
    weights = model.num_layers * (attention + scores) + model.first_k_dense * dense + num_moe * mixture + head
    weights += model.num_mtp_layers * (attention + scores + (mixture if num_moe else dense) + 2 * hidden * hidden + head)
    return 2.0 * weights


def train_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Forward and backward: three times the forward pass."""
    return 3.0 * forward_flops_per_token(model, sequence_length)
