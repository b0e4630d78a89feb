"""Megatron's dense FFN and its shared experts with our activation between the linear layers.

``[S, B, D]`` to the same: ``down(silu(gate x) * up x)``. Refuses Megatron's other activations: bias, clamp and offset, its fusions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from r1mega.model.layers import Slot
from r1mega.model.recompute import remade
from r1mega.ops.swiglu import swiglu

OPTIONS = {
    "activation_func": F.silu,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "bias_activation_fusion": False,
    "use_te_activation_func": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
}
"""What Megatron's config must say for its activation to be the one here."""


class _SwiGLU:
    """``MLP.forward`` computes the activation in its midst; here stand the same three steps."""

    def __init__(self, config, *args, **kwargs):
        for name, wanted in OPTIONS.items():
            if (got := getattr(config, name)) != wanted:
                raise ValueError(f"model.mlp: {name} is {wanted!r}; got {got!r}; leave it so")
        super().__init__(config, *args, **kwargs)

    def _activated(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(remade("swiglu", swiglu, self.linear_fc1(hidden_states)[0]))[0]


class DenseMLP(_SwiGLU, MLP):
    """Takes the slot of Megatron's ``MLP``, through :func:`dense_spec`."""

    def forward(self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **_):
        """``[S, B, D]`` to ``([S, B, D], None)``."""
        if per_token_scale is not None:
            raise ValueError("model.mlp: routed experts are r1mega.model.experts; got per_token_scale; leave it out")
        return self._activated(hidden_states), None


class SharedMLP(_SwiGLU, SharedExpertMLP):
    """Takes the slot of Megatron's ``SharedExpertMLP``."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[S, B, D]`` to the same."""
        output = self._activated(hidden_states)
        if self.use_shared_expert_gate:
            output = output * torch.sigmoid(F.linear(hidden_states, self.gate_weight))
        return output


def dense_spec(submodules: Any, groups: Any, ffn_size: int) -> Slot:
    """The slot ``mlp`` of a dense layer. ``submodules``: Megatron's ``MLPSubmodules``; ``groups``: its process groups."""
    return Slot(DenseMLP, submodules, {"tp_group": groups.tp, "ffn_hidden_size": ffn_size})
