"""Operations of a toy model, counted by hand."""

from __future__ import annotations

from dataclasses import replace

from r1mega.config.model import ModelConfig
from r1mega.model.flops import forward_flops_per_token, train_flops_per_token

TOY = ModelConfig(
    vocab_size=10,
    hidden_size=4,
    num_layers=2,
    num_heads=2,
    q_lora_rank=None,
    kv_lora_rank=3,
    qk_nope_head_dim=2,
    qk_rope_head_dim=2,
    v_head_dim=1,
    first_k_dense=1,
    ffn_size=6,
    moe_ffn_size=5,
    num_experts=4,
    num_shared_experts=1,
    top_k=2,
    num_groups=1,
    topk_groups=1,
)
# q: 4 x 8 = 32; latent: 4 x (3 + 2) = 20; k and v up: 3 x 2 x (2 + 1) = 18; out: 2 x 4 = 8
ATTENTION = 32 + 20 + 18 + 8
SCORES = 2 * (4 + 1) * 8 // 2  # heads x (query width + value width) x half of 8 tokens
DENSE, MIXTURE, HEAD = 3 * 4 * 6, 3 * 4 * 5 * 3, 4 * 10


def test_by_hand() -> None:
    weights = 2 * (ATTENTION + SCORES) + DENSE + MIXTURE + HEAD
    assert weights == 2 * (78 + 40) + 72 + 180 + 40 == 528
    assert forward_flops_per_token(TOY, 8) == 2 * 528
    assert train_flops_per_token(TOY, 8) == 6 * 528


def test_a_query_latent_and_mtp_by_hand() -> None:
    query = replace(TOY, q_lora_rank=3)  # 4 x 3 + 3 x 8 = 36 instead of 32, in two layers
    assert forward_flops_per_token(query, 8) == 2 * (528 + 2 * 4)
    mtp = replace(TOY, num_mtp_layers=1)  # one more MoE layer, 2 D x D, one more head
    assert forward_flops_per_token(mtp, 8) == 2 * (528 + ATTENTION + SCORES + MIXTURE + 2 * 16 + HEAD)
    dense = replace(TOY, num_mtp_layers=1, first_k_dense=2)
    assert forward_flops_per_token(dense, 8) == 2 * (528 - MIXTURE + 2 * DENSE + ATTENTION + SCORES + 2 * 16 + HEAD)
