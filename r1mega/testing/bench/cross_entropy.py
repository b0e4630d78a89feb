"""Benchmarks of ``cross_entropy``: losses from logits and their gradient, over a microbatch and an eighth of V3's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from r1mega.ops.cross_entropy import cross_entropy, cross_entropy_backward_
from r1mega.testing.bench import Bench


def _ours(logits, targets, grad):
    log_sum, target = cross_entropy(logits, targets)
    return log_sum - target


def _plain(logits, targets, grad):
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _ours_both(logits, targets, grad):
    log_sum, _ = cross_entropy(logits, targets)
    made = logits.clone()
    cross_entropy_backward_(made, targets, log_sum, grad)
    return made


def _plain_both(logits, targets, grad):
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(_plain(logits, targets, grad), [logits], grad)[0]


def benches() -> Iterator[Bench]:
    """Forward alone, and with the backward, which for its repetition copies the logits that it would write over."""
    T, V = 4096, 16160

    def make(device: torch.device) -> tuple:
        logits = torch.randn(T, V, device=device, dtype=torch.bfloat16) * 3
        return logits, torch.randint(0, V, (T,), device=device), torch.randn(T, device=device)

    case = f"{T} tokens, {V} words"
    yield Bench("cross_entropy", f"{case}, forward", make, _ours, num_bytes=2 * T * V, peers={"torch": _plain})
    yield Bench(
        "cross_entropy", f"{case}, forward and backward", make, _ours_both, num_bytes=2 * T * V * 5, peers={"torch": _plain_both}
    )
