"""Linear layers, padding and the FP8 context."""

from transformer_engine.pytorch import distributed, fp8, ops, router, tensor
from transformer_engine.pytorch.fp8 import fp8_autocast
from transformer_engine.pytorch.layers import (
    DotProductAttention,
    Fp8Padding,
    Fp8Unpadding,
    GroupedLinear,
    LayerNormLinear,
    Linear,
)

__all__ = [
    "DotProductAttention",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNormLinear",
    "Linear",
    "distributed",
    "fp8",
    "fp8_autocast",
    "ops",
    "router",
    "tensor",
]
