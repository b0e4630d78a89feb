"""Quantised weights: made from the parameter when a product needs them, kept for the microbatches of one optimizer step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from r1mega.model.gradients import Add
from r1mega.ops.quantize import Quantized, quantize_blocks


@dataclass(frozen=True)
class Recipe:
    """How numbers become FP8. ``power_of_two``: scales that are powers of two, as DeepSeek-V3.1 trains with.

    ``expert_weight_gradients``: fp8 or bf16, what the products of routed experts' weight gradients are of.
    """

    power_of_two: bool = False
    expert_weight_gradients: str = "fp8"


Ways = tuple[Quantized, Quantized]
"""A weight as it is, for the forward product, and its transpose, for the gradient of the input."""

_kept: dict[int, tuple[torch.Tensor, Ways]] | None = None
"""By the parameter's identity; the parameter beside it, so that no other takes its place while it is kept."""


@contextlib.contextmanager
def kept_weights() -> Iterator[None]:
    """Inside, weights do not change: each is quantised once. Behind it the copies are gone. Does nothing inside itself."""
    global _kept
    if _kept is not None:
        yield
        return
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def quantized(weight: torch.Tensor, recipe: Recipe) -> Ways:
    """``[N, K]`` or stacked ``[e, N, K]`` in 128x128 blocks, and the same transposed."""
    if _kept is not None and id(weight) in _kept:
        return _kept[id(weight)][1]
    both = quantize_blocks(weight.detach(), recipe.power_of_two, transposed=True)
    made = Quantized(both.payload, both.scales), Quantized(both.payload_t, both.scales_t)
    if _kept is not None:
        _kept[id(weight)] = weight, made
    return made


def as_tensor(weight: torch.Tensor, add: Add) -> Callable[[], torch.Tensor]:
    """What ``add`` adds, as a tensor in the weight's dtype: for weights without ``main_grad``."""

    def compute() -> torch.Tensor:
        total = torch.empty_like(weight, dtype=torch.float32)
        add(total, True)
        return total.to(weight.dtype)

    return compute
