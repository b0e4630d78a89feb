"""Megatron-Core 0.16.1 without Transformer Engine, on any device. Owns the names that its modules use and never define then.

| bend | symptom without it | remove when |
|---|---|---|
| ``multi_latent_attention.TELinear`` and its kin are classes that nothing is an instance of | ``TypeError: isinstance() arg 2 must be a type`` when an MLA layer is built | the check asks HAVE_TE first and means it |
| ``moe_utils.te_general_gemm`` is None | ``NameError: te_general_gemm`` in the router's fp32 gate | the name gets a default beside HAVE_TE |
| warnings of megatron.core, and of torch about its calls, are dropped | a page of "Apex is not installed" and of deprecated collectives before every command | they are logged once, below warning level |

Versions: megatron-core 0.16.1.
"""

from __future__ import annotations

import importlib
import warnings


class Absent:
    """A class of the Transformer Engine, which is not installed; nothing is an instance of it."""


def quiet() -> None:
    """Drop the warnings of megatron.core and of torch about its calls; before its first import."""
    for module in (r"megatron\.core", r"torch\.distributed", r"torch\.autograd"):
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=module)


def apply() -> bool:
    """Import what is bent and define the missing names; False when Transformer Engine is there and nothing was done."""
    quiet()
    attention = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    for name in ("models.gpt", "optimizer", "distributed", "pipeline_parallel.schedules", "dist_checkpointing.strategies.torch"):
        importlib.import_module(f"megatron.core.{name}")  # so that the bends for the CPU find them loaded
    if isinstance(attention.TELinear, type) and attention.TELinear is not Absent:
        return False
    attention.TELinear = attention.TEColumnParallelLinear = attention.Linear = Absent
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    return True
