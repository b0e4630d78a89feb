"""FP8 products by Transformer Engine, its blockwise recipe: is it here, what Megatron's config says of it, whose layers it has.

Blocks are as in DeepSeek-V3 (1x128 activations, 128x128 weights, E4M3 both ways); kernels, scales and the grouped product are its
own, and so is the fused sum of weight gradients into the fp32 buffers, without which a backward pass is an error. Layers are in
:mod:`r1mega.model.fp8.te_layers`, which only a process that has Transformer Engine imports.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context

from r1mega import device
from r1mega.config.errors import UserError

OPTIONS = {"fp8": "e4m3", "fp8_recipe": "blockwise"}
"""What Megatron's config says where products are Transformer Engine's; without it they are ours."""
OLDEST_CHIP = (9, 0)
"""Compute capability from which on the recipe has kernels."""


@functools.cache
def require() -> None:
    """Raise UserError where Transformer Engine, or a GPU that its recipe runs on, is missing."""
    instead = "use precision=bf16, or precision=fp8 on a Hopper GPU"
    chip = device.gpu_capability()
    if chip is not None and tuple(map(int, chip.split("."))) < OLDEST_CHIP:
        raise UserError(
            f"precision.products: te is for Hopper GPUs and later, compute capability 9.0 and above; got {chip}; use precision=bf16"
        )
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # it loads libraries: whatever it raises, the package is not usable here
        told = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"precision.products: te takes products from Transformer Engine; got {type(error).__name__}: {told}; "
            f"pip install --no-build-isolation 'r1mega[te]', or {instead}"
        ) from None


def entered(config: Any) -> contextlib.AbstractContextManager:
    """Inside, layers of Transformer Engine compute in FP8 where ``config``, Megatron's, says so. Its own block enters it by itself;
    this is for a layer alone."""
    return get_fp8_context(config) if config.fp8 else contextlib.nullcontext()


def start_step(stages: Sequence[torch.nn.Module]) -> None:
    """Weights may have changed: each is quantised once more, at its next product, and its first gradient overwrites its buffer."""
    for stage in stages:
        stage.set_is_first_microbatch()  # Megatron's own; nothing where ``fp8`` is not in its config
