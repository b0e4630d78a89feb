"""Where a weight's gradient goes: to autograd, into Megatron's fp32 buffer, or to whoever adds it later (zero-bubble schedules).

Inside :meth:`WeightGradients.collect` a backward pass leaves out the weights (arXiv 2401.10241, section 2);
:meth:`WeightGradients.run` makes up for them. A weight that :func:`forget` was told of has last step's numbers in its buffer: its
first gradient of a step overwrites them, so that nobody zeroes the buffer and nobody reads it for that one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch

from r1mega.ops.library import FP32_BF16


class WeightGradients:
    """Weight gradients that are still to be computed, by a key (stage and microbatch)."""

    def __init__(self):
        self._waiting: dict[Hashable, list[Callable[[], None]]] = {}
        self._key: Hashable = None

    @contextlib.contextmanager
    def collect(self, key: Hashable) -> Iterator[None]:
        """Inside, backward passes leave their weight gradients here under ``key``."""
        global _collecting
        self._key, before, _collecting = key, _collecting, self
        self._waiting.setdefault(key, [])
        try:
            yield
        finally:
            _collecting = before

    def add(self, compute: Callable[[], None]) -> None:
        """Keep ``compute``, which adds one weight's gradient where it belongs (:func:`accumulate`)."""
        self._waiting[self._key].append(compute)

    def run(self, key: Hashable) -> None:
        """Compute what waits under ``key``, in the order of the backward pass. Raises KeyError for a key that never collected."""
        with torch.no_grad():
            for compute in self._waiting.pop(key):
                compute()

    def __len__(self) -> int:
        return len(self._waiting)


# A module's name and no thread's own: autograd runs the backward pass of a GPU in a thread of its own.
_collecting: WeightGradients | None = None


def deferred() -> WeightGradients | None:
    """Who collects weight gradients now; None: they are computed in the backward pass."""
    return _collecting


Add = Callable[[torch.Tensor, bool], None]
"""``add(out, overwrite)``: adds a weight's gradient to a float32 tensor in place, or sets the tensor to it and does not read it."""


def forget(weights: Iterable[torch.nn.Parameter]) -> None:
    """A step begins: what the weights' ``main_grad`` hold counts no longer. All their gradients go through this module."""
    for weight in weights:
        weight.main_grad_is_old = True


def clear_forgotten(weights: Iterable[torch.nn.Parameter]) -> None:
    """A step's passes are over: the gradient of a weight that none of them used is 0."""
    for weight in weights:
        if _take_mark(weight):
            weight.main_grad.zero_()


def _take_mark(weight: torch.nn.Parameter) -> bool:
    """True where the numbers in ``main_grad`` do not count. The caller overwrites them now: the mark is gone with this."""
    was, weight.main_grad_is_old = getattr(weight, "main_grad_is_old", False), False
    return was


def accumulate(weight: torch.nn.Parameter, grad: torch.Tensor) -> None:
    """Add ``grad`` to the weight's ``main_grad`` (Megatron's fp32 buffer) or, without one, to its ``grad``."""
    if hasattr(weight, "main_grad"):
        if _take_mark(weight):
            weight.main_grad.copy_(grad)
        else:
            weight.main_grad.add_(grad)
    elif weight.grad is None:
        weight.grad = grad
    else:
        weight.grad.add_(grad)


def weight_gradient(weight: torch.nn.Parameter, compute: Callable[[], torch.Tensor], add: Add) -> torch.Tensor | None:
    """What a backward pass returns for ``weight``: ``compute()``, or None where the gradient is added to its place, now or later.

    ``add`` serves weights with Megatron's ``main_grad``, which so never have a gradient as a tensor of its own. None and not
    Megatron's mark ``grad_added_to_main_grad``: under the mark its hook drops all of ``weight.grad``, and with it what another user
    of a shared weight (a tied embedding) has returned; without it the hook adds that, and nothing for us. The hook has to find a
    tensor only where DDP overlaps its sums with the backward pass, which ours does not.
    """
    main_grad = getattr(weight, "main_grad", None)
    in_place = main_grad is not None and main_grad.dtype == torch.float32 and weight.dtype in FP32_BF16

    def put() -> None:
        if in_place:
            add(main_grad, _take_mark(weight))
        else:
            accumulate(weight, compute())

    later = deferred()
    if later is not None:
        later.add(put)
        return None
    if in_place:
        put()
        return None
    return compute()
