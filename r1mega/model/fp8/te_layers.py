"""Layers of Transformer Engine in the slots of ours: Megatron's wrappers of them, with the state that our own layers have.

Keys, shapes and logical order of a checkpoint say nothing of who multiplies: runs go on from each other's. Importing this module
needs Transformer Engine; :func:`r1mega.model.fp8.te.require` is asked first.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP

from r1mega.model.experts import GroupedExperts


class _AsMegatrons:
    """Megatron's plain layers save an extra state of None; so do these: blockwise scales are made anew from what they scale."""

    def get_extra_state(self) -> None:
        """Nothing."""

    def set_extra_state(self, state: Any) -> None:
        """Whatever another layer has left there is not for this one."""


class TeColumnLinear(_AsMegatrons, TEColumnParallelLinear):
    """``[S, B, in]`` to ``[S, B, out / tensor]``, as :class:`r1mega.model.linear.ColumnLinear`."""


class TeRowLinear(_AsMegatrons, TERowParallelLinear):
    """``[S, B, in / tensor]`` to ``[S, B, out]``, as :class:`r1mega.model.linear.RowLinear`."""


def sum_in_place(model: torch.nn.Module) -> None:
    """Let every linear layer of Transformer Engine in a Megatron model be one of these, its gradients added to ``main_grad``.

    After it is built: Megatron takes its own classes alone in some slots, and its config's key for this is its plain layers' too,
    which want Apex for it.
    """
    ours = {TEColumnParallelLinear: TeColumnLinear, TERowParallelLinear: TeRowLinear}
    for module in model.modules():
        if type(module) in ours:
            module.__class__ = ours[type(module)]
            module.fuse_wgrad_accumulation = True


class TeExperts(GroupedExperts):
    """:class:`GroupedExperts` whose rows go through Megatron's ``TEGroupedMLP``: padded to 16 an expert, two grouped products, and
    Megatron's fused SwiGLU with probabilities between them.

    The two stacks stay the parameters; Transformer Engine, which knows a weight an expert, is lent views of them and of their
    ``main_grad``. Waits for the device: the numbers of rows are a list on the host.
    """

    def __init__(self, num_local_experts: int, config, submodules=None, pg_collection=None):
        super().__init__(num_local_experts, config, submodules, pg_collection)
        own = copy.copy(config)
        own.init_model_with_meta_device, own.bias_activation_fusion = True, True
        linears = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
        mlp = TEGroupedMLP(num_local_experts, own, linears, pg_collection)
        for linear in (mlp.linear_fc1, mlp.linear_fc2):
            linear.fuse_wgrad_accumulation = True
            for expert in range(num_local_experts):
                del linear._parameters[f"weight{expert}"]
        self._engine = (mlp,)  # in a tuple it is no submodule: it has no state of its own
        self._lent: tuple[int, ...] = ()

    @property
    def is_first_microbatch(self) -> bool:
        """Megatron's mark that weights may have changed; see :func:`r1mega.model.fp8.te.start_step`."""
        return self._engine[0].linear_fc1.is_first_microbatch

    @is_first_microbatch.setter
    def is_first_microbatch(self, value: bool) -> None:
        for linear in (self._engine[0].linear_fc1, self._engine[0].linear_fc2):
            linear.is_first_microbatch = value

    def forward(self, rows_RD: torch.Tensor, tokens_per_expert: torch.Tensor, probs_R: torch.Tensor):
        """As :meth:`GroupedExperts.forward`; a backward pass needs ``main_grad``."""
        if not len(rows_RD):  # nothing for the kernels; the answers still lead back to the rows and their probabilities
            return rows_RD + 0 * probs_R.sum().to(rows_RD.dtype), None
        self._lend()
        return self._engine[0](rows_RD, tokens_per_expert, probs_R)

    def _lend(self) -> None:
        """Give Transformer Engine its views anew where storage has moved, to a device or into DDP's buffers."""
        stacks = (self.weight1, self.weight2)
        grads = [getattr(stack, "main_grad", None) for stack in stacks]
        lent = tuple(tensor.data_ptr() for tensor in (*stacks, *grads) if tensor is not None)
        if lent == self._lent:
            return
        for linear, stack, grad in zip((self._engine[0].linear_fc1, self._engine[0].linear_fc2), stacks, grads, strict=True):
            nothing = torch.empty(0, dtype=stack.dtype, device=stack.device)
            for expert in range(self.num_local_experts):
                view = stack.detach()[expert].requires_grad_(stack.requires_grad)
                if grad is not None:
                    view.main_grad = grad[expert]
                setattr(linear, f"weight{expert}", view)
                setattr(linear, f"bias{expert}", nothing)  # there is none; it was made on the meta device
        self._lent = lent
