"""A small DeepSeek-V3 and two sets of its published weights."""

from __future__ import annotations

import torch

from r1mega.config.model import ModelConfig, YarnConfig
from r1mega.model.names import parts
from r1mega.model.published import published_config

MODEL = ModelConfig(
    vocab_size=500,
    max_position_embeddings=512,
    hidden_size=128,
    num_layers=3,
    num_heads=4,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    yarn=YarnConfig(factor=4.0, original_max_position_embeddings=128),
    ffn_size=256,
    moe_ffn_size=64,
    num_experts=8,
    top_k=4,
    num_groups=4,
    topk_groups=2,
    num_mtp_layers=1,
)
CONFIG = published_config(MODEL, bos_id=0, eos_id=1, pad_id=2, dtype="float32")


def weights(seed: int, model: ModelConfig = MODEL) -> list[tuple[str, torch.Tensor]]:
    """Every published tensor of ``model`` in fp32; copies repeat their owner's numbers."""
    torch.manual_seed(seed)
    owners: dict[tuple, torch.Tensor] = {}
    made = []
    for part in parts(model):
        near = 1.0 if len(part.shape) == 1 and part.role != "bias" else 0.0
        tensor = owners.setdefault((part.key, part.start), near + 0.05 * torch.randn(part.shape))
        made.append((part.name, tensor))
    return made


SETS = weights(0), weights(1)
