"""Megatron-Core 0.16.1's sequence-wise balance loss beside a loss that is a sum, on any device. Owns the weight of its gradient.

| bend | symptom without it | remove when |
|---|---|---|
| a microbatch's balance loss weighs as many items as its main loss is a sum of | it weighs S tokens (S / tensor ranks with sequence parallelism) whatever the microbatch's rows and learnt tokens: after the division by all items the coefficient is off by 1 / micro_batch_size in pretraining, by tokens / learnt tokens in SFT, by S in RL | ``_apply_seq_aux_loss`` scales by what the gradients are divided by |

Versions: megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_items: float = 1


@contextlib.contextmanager
def items(count: float) -> Iterator[None]:
    """Inside, forward passes belong to a microbatch whose balance loss weighs ``count`` items of the main loss."""
    global _items
    before, _items = _items, count
    try:
        yield
    finally:
        _items = before


def apply() -> None:
    """Bend the router; safe to call again."""
    from megatron.core.transformer.moe.router import TopKRouter

    if hasattr(TopKRouter, "_r1mega_bent"):
        return
    attach = TopKRouter.attach_and_log_load_balancing_loss

    def attach_by_items(self, *args, **kwargs):
        return attach(self, *args, **{**kwargs, "valid_token_count": _items})

    TopKRouter.attach_and_log_load_balancing_loss = attach_by_items
    TopKRouter._r1mega_bent = True
