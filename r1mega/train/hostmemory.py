"""Copies of a rank's tensors in host memory, which a background save writes from. In: tensors on any device. Out: on the CPU.

Large buffers are kept from save to save: page-locked where the device is a GPU, so that copies run at the bus's full rate.
They take as much memory as the rank's shards once, RL's reference among them, plus the rests of buffers. A copy's storage is its
own numbers alone, so that ``torch.save`` writes nothing else.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any

import torch

from r1mega.device import Device

ALIGNMENT = 64
BUFFER_BYTES = {True: 256 << 20, False: 8 << 20}
"""Size of one buffer, page-locked or not; a larger tensor has one of its own."""


class HostMemory:
    """``pinned``: page-locked. Copies are good until the next :meth:`reset`."""

    def __init__(self, *, pinned: bool):
        self.pinned = pinned
        self._buffers: list[torch.Tensor] = []
        self._used: list[int] = []

    def reset(self) -> None:
        """Forget all copies; their memory is used again."""
        self._used = [0] * len(self._buffers)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(buffer.numel() for buffer in self._buffers)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor`` with its shape and dtype. From a GPU it is under way: wait for the device before it is read."""
        size = tensor.numel() * tensor.element_size()
        number, start = self._room(size)
        storage = self._buffers[number].untyped_storage()[start : start + size]
        strides = torch.empty_like(tensor, device="meta").stride()  # a clone's: the bytes on disk are those of one
        made = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, strides)
        return made.copy_(tensor.detach(), non_blocking=True)

    def _room(self, size: int) -> tuple[int, int]:
        """Buffer and first byte of ``size`` free bytes."""
        taken = -(-size // ALIGNMENT) * ALIGNMENT
        for number, (buffer, used) in enumerate(zip(self._buffers, self._used, strict=True)):
            if used + taken <= buffer.numel():
                self._used[number] += taken
                return number, used
        length = max(taken, BUFFER_BYTES[self.pinned])
        self._buffers.append(torch.empty(length, dtype=torch.uint8, pin_memory=self.pinned))
        self._used.append(taken)
        return len(self._buffers) - 1, 0


def is_exhausted(error: BaseException | None, device: Device) -> bool:
    """True where ``error`` says that host memory has run out, page-locked or not; False for a GPU's own."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return device.is_out_of_memory(error) and not isinstance(error, torch.OutOfMemoryError)


def without_room(error: BaseException, values: Iterable[Any], switch: str) -> str:
    """``rule; got value; way out`` of a save of ``values`` that met ``error``. ``switch``: key of the knob for copies, or ""."""
    told = f"{type(error).__name__} {' '.join(str(error).split())[:160]}".strip()
    way_out = f"use {switch}=false, which copies nothing but RL's reference," if switch else "start fewer ranks on a host"
    return (
        f"host memory takes a copy of what this rank saves, {num_bytes(values) / 2**30:.2f} GiB; got {told}; {way_out} or give the "
        "host more"
    )


def num_bytes(values: Iterable[Any]) -> int:
    """Of the tensors among ``values``."""
    return sum(getattr(one, "nbytes", 0) for one in values)
