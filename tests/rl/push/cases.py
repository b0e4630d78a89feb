"""The quickstart's model and two sets of its published weights."""

from __future__ import annotations

import torch

from r1mega.config.compose import preset
from r1mega.config.model import ModelConfig
from r1mega.model.names import parts
from r1mega.model.published import published_config

MODEL = preset("model", "tiny")
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
