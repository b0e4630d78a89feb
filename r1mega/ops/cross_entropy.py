"""Ops ``cross_entropy`` and ``cross_entropy_backward_``: a token's loss from its logits, and their gradient in their place.

With ``z`` a token's logits: ``loss = log sum_j e^z[j] - z[target]``, ``dL/dz[j] = g (softmax(z)[j] - 1[j = target])``. Both
work on a part of the vocabulary (a piece, a tensor rank's columns); :func:`combine_log_sums` joins the parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1mega.ops.library import Case, Op


class LogSum(NamedTuple):
    """``log sum_j e^z[j]`` over the columns given, and the target's logit, 0 where it is not among them; ``[T]``."""

    log_sum_T: torch.Tensor
    target_T: torch.Tensor


def cross_entropy(logits_TV: torch.Tensor, targets_T: torch.Tensor, first: int = 0) -> LogSum:
    """What a token's loss is made of: ``loss = log_sum - target``. No gradient: :func:`cross_entropy_backward_`.

    ``logits_TV``: bfloat16, float32 or float64, a token's side by side (any stride between tokens), columns ``first`` to ``first +
    V - 1`` of the vocabulary, V of 1 or more, T of 0 or more. ``targets_T``: int64, ids of the whole vocabulary. Results are
    float32 (float64 for float64). Sums are relative to the largest logit, so that none is too large. A logit of -inf adds 0, all of
    them -inf give -inf; NaN or +inf gives NaN. Nothing waits for the device. The same input gives the same bits.
    Raises ValueError for other shapes, dtypes or devices.
    """
    return LogSum(*CROSS_ENTROPY.packet(logits_TV, targets_T, first))


def cross_entropy_backward_(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, log_sum_T: torch.Tensor, grad_T: torch.Tensor, first: int = 0
) -> None:
    """Writes ``grad (e^(z - log_sum) - 1[j = target])`` over the logits, rounded once to their dtype.

    As in :func:`cross_entropy`; ``log_sum_T`` is that of the whole vocabulary, ``grad_T`` the loss's gradient, both float32
    (float64 for float64).
    """
    CROSS_ENTROPY_BACKWARD.packet(logits_TV, targets_T, log_sum_T, grad_T, first)


def combine_log_sums(parts_PT: torch.Tensor) -> torch.Tensor:
    """``log sum_j e^z[j]`` of a vocabulary whose parts have these; the order of the parts does not matter to 1e-7."""
    return torch.logsumexp(parts_PT, dim=0)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)


def _inside(logits: torch.Tensor, targets: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    place = targets - first
    inside = (place >= 0) & (place < logits.shape[1])
    return inside, torch.where(inside, place, 0).unsqueeze(1)


def _reference(logits, targets, first):
    wide = _wide(logits)
    inside, place = _inside(logits, targets, first)
    log_sum = torch.logsumexp(wide, dim=1)
    log_sum = torch.where((wide == torch.inf).any(dim=1), torch.nan, log_sum)
    return log_sum, torch.where(inside, wide.gather(1, place).squeeze(1), 0.0)


def _fake(logits, targets, first):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(2))


def _backward_reference(logits, targets, log_sum, grad, first):
    inside, place = _inside(logits, targets, first)
    shares = torch.exp(_wide(logits) - log_sum.unsqueeze(1))
    shares.scatter_add_(1, place, -inside.to(shares.dtype).unsqueeze(1))
    logits.copy_(shares.mul_(grad.unsqueeze(1)))


def _nothing(*args):
    """In place: there is no output to describe."""


def _case(T: int, V: int, *, first: int = 0, ids: int | None = None, strided: bool = False, scale: float = 3.0, marks: str = ""):
    """``ids``: size of the whole vocabulary; ``scale``: of the logits; ``marks``: what stands in some of them."""

    def make(dtype, device):
        draw = torch.Generator().manual_seed(T + 100 * V)
        logits = torch.randn(T, V, generator=draw) * scale
        targets = torch.randint(0, ids or V, (T,), generator=draw)
        if marks == "nan":
            logits[T // 2, V // 2] = torch.nan
        elif marks == "-inf":
            logits[T // 2, V // 2] = -torch.inf
        elif marks == "ties":
            logits = logits[:, : V // 2].repeat(1, 2)
        logits = logits.to(device, dtype)
        if strided:
            logits = torch.cat([logits, logits], dim=1)[:, 1 : V + 1]
        return logits, targets.to(device), first

    return make


def _backward_case(*sizes: int, **how):
    def make(dtype, device):
        logits, targets, first = _case(*sizes, **how)(dtype, device)
        log_sum = _reference(_wide(logits), targets, first)[0]
        grad = torch.randn(len(targets), generator=torch.Generator().manual_seed(3)).to(device, log_sum.dtype)
        return logits, targets, log_sum, grad, first

    return make


_SITUATIONS = (
    ("ordinary", (13, 40), {}),
    ("empty", (0, 24), {}),
    ("one row", (1, 24), {}),
    ("one word", (5, 1), {}),
    ("odd sizes", (7, 37), {}),
    ("part of a vocabulary", (9, 16), {"first": 16, "ids": 64}),
    ("non-contiguous", (9, 21), {"strided": True}),
    ("extreme values", (11, 32), {"scale": 1e3}),
    ("ties", (5, 16), {"marks": "ties"}),
    ("NaN", (5, 16), {"marks": "nan"}),
    ("-inf", (5, 16), {"marks": "-inf"}),
    ("wide", (3, 9000), {}),
    ("many tokens", (3000, 24), {}),
)
CROSS_ENTROPY = Op(
    "cross_entropy(Tensor logits, Tensor targets, SymInt first) -> (Tensor log_sum, Tensor target)",
    _reference,
    _fake,
    cases=tuple(Case(name, _case(*sizes, **how)) for name, sizes, how in _SITUATIONS),
    exact=False,
)
CROSS_ENTROPY_BACKWARD = Op(
    "cross_entropy_backward_(Tensor(a!) logits, Tensor targets, Tensor log_sum, Tensor grad, SymInt first) -> ()",
    _backward_reference,
    _nothing,
    cases=tuple(Case(name, _backward_case(*sizes, **how)) for name, sizes, how in _SITUATIONS),
    exact=False,
)
OPS = (CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD)
