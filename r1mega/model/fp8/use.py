"""Turn a built model's matrix products into FP8: which layers, and which stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from r1mega.config.errors import UserError
from r1mega.config.model import ModelConfig
from r1mega.config.precision_rules import dtype_violations, expert_violations_of_te, width_violations
from r1mega.config.run import ParallelConfig, PrecisionConfig
from r1mega.model.experts import GroupedExperts
from r1mega.model.fp8.linear import fits
from r1mega.model.fp8.products import deep_gemm
from r1mega.model.fp8.weights import Recipe
from r1mega.model.linear import ColumnLinear, RowLinear

KEPT = ("output_layer", "eh_proj")
"""Linear layers that stay in their own format: the head (V3 3.3) and MTP's projection, which published checkpoints have in BF16."""


def use_products(
    stages: Sequence[torch.nn.Module], precision: PrecisionConfig, model: ModelConfig, parallel: ParallelConfig
) -> None:
    """Set the recipe of every layer that ``precision`` means; a linear layer that is not made of whole blocks keeps its format.

    With ``te`` the layers that are built are Transformer Engine's already, and there is nothing to set. Raises UserError for
    another dtype than bf16, for widths or a layout that the products do not have, and with ``fp8`` on a GPU without DeepGEMM.
    """
    if precision.products == "plain":
        return
    faults = [*dtype_violations(precision), *width_violations(precision, model, parallel)]
    faults += expert_violations_of_te(parallel) if precision.products == "te" else []
    if faults:
        raise UserError("\n".join(map(str, faults)))
    if precision.products == "te":
        return
    if any(parameter.is_cuda for stage in stages for parameter in stage.parameters()):
        deep_gemm()  # on every rank, those without experts too: weight gradients of linear layers are its work as well
    recipe = Recipe(precision.power_of_two_scales, precision.expert_weight_gradients)
    for stage in stages:
        for name, module in stage.named_modules():
            if isinstance(module, ColumnLinear | RowLinear):
                # a layer that shares the embedding's weight has none of its own
                own = module.weight is not None and name.rpartition(".")[2] not in KEPT and fits(module.weight.shape)
                module.fp8 = recipe if own else None
            elif isinstance(module, GroupedExperts):
                module.fp8 = recipe
