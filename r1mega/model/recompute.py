"""Activations that a backward pass makes again instead of keeping them (V3 3.2.3): which tensors, and how autograd is told.

Inside :func:`recomputing` a module hands the making of such a tensor to :func:`remade`. Whoever saves the tensor for its backward
pass, autograd's own nodes and ours alike, then keeps how it is made and not its numbers; the first backward node that asks has it
made, once for all who ask, and it is gone with the last of them. The same code on the same input: the same bits.

What each kind frees, in bytes of a token, a layer and a rank; ``e`` bytes a number, ``t`` tensor ranks, ``H`` heads of the rank:

- ``norms``: ``(2 D + q_lora + kv_lora) e / t``, what linear layers, router and FP8 experts behind a norm keep; for the final norm
  ``D e / t`` once. An FP8 linear layer keeps ``1 + 4/128`` bytes a number instead, which are freed as well.
- ``mla_up``: ``H (2 (nope + rope) + v) e``, query, key and value behind their rotary positions; key and value are the whole
  sequence's with ``parallel.context_exchange=allgather``. What they are made of is kept: under sequence parallelism ``rope e`` more
  than without, and in FP8, but for ``norms``, ``(q_lora + kv_lora) e / t``.
- ``swiglu``: ``F e / t`` (FP8: ``F (1 + 4/128) / t``), the activation of a dense FFN and of shared experts. Routed experts on a GPU
  never keep theirs in bf16 and FP8.

MTP joins the outputs of its two norms before anyone keeps them, which frees nothing. A weight gradient that is put off
(:mod:`r1mega.model.gradients`) holds its input, made again, until it is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

Compute = Callable[..., Any]
"""Tensors to a tensor or a tuple of them, which share no memory with the arguments; the same bits each time."""


class _Making:
    """A computation that is done a second time when one of its outputs is asked for."""

    def __init__(self, compute: Compute, inputs: list[Any]):
        self._compute, self._inputs = compute, inputs
        self._made: tuple[torch.Tensor, ...] | None = None

    def output(self, idx: int) -> torch.Tensor:
        if self._made is None:
            with torch.no_grad():
                self._made = _as_tuple(self._compute(*map(_unpack, self._inputs)))
            self._compute, self._inputs = None, []
        return self._made[idx]


class _Kept(NamedTuple):
    """What autograd keeps in place of a tensor: a view of an output, with the place in its storage."""

    making: _Making
    idx: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Known(NamedTuple):
    """An output in a forward pass. ``storage``: holds the address, so that no other tensor takes it, and not the numbers."""

    storage: StorageWeakRef
    making: _Making
    idx: int
    dtype: torch.dtype
    version: int


class _Pass:
    """What is made again of one forward pass."""

    def __init__(self, kinds: Collection[str]):
        self.kinds = kinds
        self._known: dict[int, _Known] = {}

    def note(self, compute: Compute, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        making = _Making(compute, [self.pack(tensor) for tensor in inputs])
        for idx, tensor in enumerate(outputs):
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = _Known(StorageWeakRef(storage), making, idx, tensor.dtype, tensor._version)

    def find(self, tensor: torch.Tensor) -> _Known | None:
        """The output that ``tensor`` is or is a view of; None also where somebody has written to it since."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known if known and (known.dtype, known.version) == (tensor.dtype, tensor._version) else None

    def pack(self, tensor: torch.Tensor) -> Any:
        """For autograd. Without its history: a node that kept its own output whole would keep itself."""
        known = self.find(tensor)
        if known is None:
            return tensor.detach()
        return _Kept(known.making, known.idx, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())


def _unpack(kept: Any) -> torch.Tensor:
    if not isinstance(kept, _Kept):
        return kept
    return kept.making.output(kept.idx).as_strided(kept.size, kept.stride, kept.offset)


def _as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


# A module's name: a forward pass is one thread's, and a backward pass reads what its own nodes keep.
_pass: _Pass | None = None


@contextlib.contextmanager
def recomputing(kinds: Collection[str]) -> Iterator[None]:
    """Around one forward pass: what belongs to ``kinds`` is not kept for the backward pass. Nothing changes without gradients.

    Autograd's check that a tensor is as it was when it was kept is off inside: what is saved here must not be written to.
    """
    global _pass
    if not kinds or not torch.is_grad_enabled():
        yield
        return
    before, _pass = _pass, _Pass(kinds)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pass.pack, _unpack):
            yield
    finally:
        _pass = before


def is_remade(kind: str) -> bool:
    """True where :func:`remade` of this kind has an effect."""
    return _pass is not None and kind in _pass.kinds


def remade(kind: str, compute: Compute, *inputs: torch.Tensor) -> Any:
    """``compute(*inputs)``; where ``kind`` is made again, ``inputs`` are what is kept of it.

    ``compute`` runs again without gradients, so it may use parameters and communicate as it does in the forward pass, and must
    count or draw nothing.
    """
    outputs = compute(*inputs)
    if is_remade(kind):
        _pass.note(compute, inputs, _as_tuple(outputs))
    return outputs


def following(compute: Compute, tensor: torch.Tensor) -> Any:
    """``compute(tensor)``, made again where ``tensor`` is: another form of it, which would be kept in its place."""
    outputs = compute(tensor)
    if _pass is not None and _pass.find(tensor) is not None:
        _pass.note(compute, (tensor,), _as_tuple(outputs))
    return outputs
