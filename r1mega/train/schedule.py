"""Learning rate and batch size as pure functions of the step. No state, no torch."""

from __future__ import annotations

import math

from r1mega.config.train import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Rate of optimizer step ``step`` (0-based) of ``steps``: linear warm-up from 0, constant, cosine to ``min_lr`` (V3 4.2).

    The first step already has ``lr / warmup_steps``; with ``decay=constant`` the peak is held to the end.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    start = optim.warmup_steps + optim.constant_steps
    if optim.decay == "constant" or step < start:
        return optim.lr
    progress = min(1.0, (step - start) / max(1, steps - start))
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def batch_size(optim: OptimConfig, step: int, full: int, multiple: int) -> int:
    """Sequences of step ``step``: linear from ``batch_ramp_start`` to ``full`` over ``batch_ramp_steps`` (V3: 3,072 to 15,360).

    Rounded down to ``multiple`` (micro batch times data ranks), never below it.
    """
    if not optim.batch_ramp_start or step >= optim.batch_ramp_steps:
        return full
    size = optim.batch_ramp_start + (full - optim.batch_ramp_start) * step / optim.batch_ramp_steps
    return max(multiple, int(size) // multiple * multiple)
