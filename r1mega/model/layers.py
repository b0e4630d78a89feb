"""RMSNorm in Megatron-Core's slots, on ``[..., hidden_size]``; and a slot for modules that are subclasses of Megatron's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from r1mega.model.recompute import remade
from r1mega.ops.rms_norm import rms_norm

LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms on the query and key/value latents: fixed in DeepSeek's and transformers' code, whatever the model's own."""


@dataclass(frozen=True)
class Slot:
    """What Megatron's ``build_module`` reads of a ``ModuleSpec``, and none.

    ``TransformerLayer`` asks a ModuleSpec for its class: groups go to Megatron's own classes only, and each subclass is warned of.
    """

    module: type
    submodules: Any
    params: dict[str, Any]


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (arXiv 1910.07467): ``x / sqrt(mean(x^2) + eps) * weight`` in fp32, rounded once.

    ``[..., hidden_size]`` to the same shape and dtype, by our op. Under sequence parallelism the weight is marked, so that its
    gradient is summed over the tensor axis.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.eps = eps
        device = "meta" if config.init_model_with_meta_device else None
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return remade("norms", lambda x: rms_norm(x, self.weight, self.eps).y, x)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The weight, the same on every tensor rank."""
        return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, {}, sharded_offsets)


class LatentRMSNorm(RMSNorm):
    """RMSNorm of a latent: its epsilon is fixed."""

    def __init__(self, config, hidden_size: int, eps: float = LATENT_NORM_EPS, **kwargs):
        super().__init__(config, hidden_size, LATENT_NORM_EPS, **kwargs)
