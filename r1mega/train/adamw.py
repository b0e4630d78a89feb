"""AdamW on our op: all of a group's weights in one launch, moments in fp32 or bf16 (DeepSeek-V3, arXiv 2412.19437, section 3.3.3).

State by weight, under torch's names: ``step`` (float32, on the CPU), ``exp_avg``, ``exp_avg_sq``. Checkpoints hold moments in fp32
whatever they are here, so that runs of either kind go on from each other's, in any layout; bf16 moments come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from r1mega.config.errors import UserError
from r1mega.ops.adamw import adamw_


class AdamW(torch.optim.AdamW):
    """torch's AdamW, its moments of ``moment_dtype``; weights and gradients float32 or bfloat16, contiguous.

    A subclass, since Megatron's distributed optimizer takes torch's Adam or a subclass alone. Knobs of torch's that change the
    formula or its launch (amsgrad, maximize, capturable, differentiable) are refused: ValueError.
    """

    def __init__(self, params: Iterable[Any], *, moment_dtype: torch.dtype = torch.float32, **options: Any):
        """``options``: torch's lr, betas, eps, weight_decay."""
        self.moment_dtype = moment_dtype
        super().__init__(params, **options)
        for group in self.param_groups:
            given = [name for name in ("amsgrad", "maximize", "capturable", "differentiable") if group.get(name)]
            if given:
                raise ValueError(f"AdamW: expected none of torch's other variants, got {', '.join(given)}")

    def allocate(self, weight: torch.Tensor) -> None:
        """Zero moments for a weight that has no state."""
        if not self.state[weight]:
            zero = {name: torch.zeros_like(weight, dtype=self.moment_dtype) for name in ("exp_avg", "exp_avg_sq")}
            self.state[weight] = {"step": torch.tensor(0.0), **zero}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step for every weight with a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            together: dict[tuple, list[torch.Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                self.allocate(weight)
                self.state[weight]["step"] += 1
                kind = weight.device, weight.dtype, weight.grad.dtype, float(self.state[weight]["step"])
                together.setdefault(kind, []).append(weight)
            for weights in together.values():
                states = [self.state[weight] for weight in weights]
                adamw_(
                    weights,
                    [weight.grad for weight in weights],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    states[0]["step"],
                    lr=float(group["lr"]),
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, which gives moments their weight's dtype; then ours again."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name] = state[name].to(self.moment_dtype)


def use_moments(optimizer: Any, moment_dtype: torch.dtype) -> None:
    """Let a Megatron optimizer, or each of a chain, step as our :class:`AdamW` in the place of torch's; before its first step.

    The object stays the same one: Megatron holds it, its groups and their weights in several places. Another optimizer inside
    (Transformer Engine's, Apex's, which Megatron takes where they are installed) stays with fp32 moments; for others UserError.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is None:  # a rank without weights of this kind
            continue
        if type(inner) is not torch.optim.AdamW and moment_dtype == torch.float32:
            continue
        if type(inner) is not torch.optim.AdamW:
            raise UserError(
                "optim.moment_dtype: bf16 needs torch's AdamW inside Megatron's optimizer; got "
                f"{type(inner).__module__}.{type(inner).__name__}; use optim.moment_dtype=fp32"
            )
        if inner.state:
            raise ValueError(f"use_moments: expected an optimizer before its first step, got one with {len(inner.state)} states")
        inner.__class__, inner.moment_dtype = AdamW, moment_dtype
