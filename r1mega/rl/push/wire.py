"""In which format tensors travel, and how one request's payload is written. The only place that knows SGLang's pickles.

The numbers travel as the server holds them: rounded to its dtype here, by the rounding that its loader would use, or quantised to
FP8 in blocks of 128x128, so that what is sent, what is hashed and what is held are the same bits. Expert biases stay fp32.

A payload is a pickle of ``{"flattened_tensor": bytes, "metadata": [...]}``. Its entries are of a class of SGLang's, and the server
unpickles nothing else; a class of that name stands in while it is pickled, so that the trainer needs no SGLang. A malformed payload
ends the server: nobody else makes one.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from r1mega import device as devices
from r1mega.config.errors import UserError
from r1mega.model.names import SCALE, Part
from r1mega.model.published import block_scales
from r1mega.ops.quantize import BLOCK, quantize_blocks
from r1mega.rl.push.plan import Pair, nbytes

if TYPE_CHECKING:
    from r1mega.rl.engine.sglang.client import Server

DTYPES = {
    "float32": torch.float32, "float": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16,
}  # fmt: skip
BUCKET_MODULE = "sglang.srt.weight_sync.tensor_bucket"
DEVICE_ARGUMENT = 6
"""Place of the device's number among what torch rebuilds a GPU tensor from; servers take its unique id too."""
ALIGNMENT = 16
"""Bytes at which a tensor begins in a bucket whose places are sent along."""
_shim = threading.Lock()


@dataclass(frozen=True)
class Format:
    """``dtype``: of plain tensors; ``fp8``: how linears are stored, None, "float32" (scales) or "ue8m0"."""

    dtype: torch.dtype
    fp8: str | None = None

    @classmethod
    def of(cls, server: Server, wanted: str, hf_config: dict[str, Any]) -> Format:
        """What ``server`` holds. ``wanted``: the knob; ``hf_config``: for what the server does not say."""
        given = str(server.info.get("dtype") or "auto").removeprefix("torch.")
        config = _config_of(server, hf_config)
        if given == "auto":  # SGLang takes fp16 for a model in fp32
            given = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
            given = "float16" if given == "float32" else given
        if given not in DTYPES:
            raise UserError(f"push: {server.url} serves {', '.join(DTYPES)}; got dtype {given}; start it with another --dtype")
        if wanted != "auto":
            return cls(DTYPES[given], {"plain": None, "fp8": "float32", "fp8_ue8m0": "ue8m0"}[wanted])
        scales = block_scales(config, f"push: config.json of {server.url}")
        if scales is None and server.info.get("quantization"):
            raise UserError(
                f"push.format: {server.url} says how its weights are quantised in its config.json; got quantization="
                f"{server.info['quantization']} and none there; serve a checkpoint that is quantised, or give push.format"
            )
        return cls(DTYPES[given], scales)

    def pack(self, part: Part, tensor: torch.Tensor) -> list[Pair]:
        """What travels of one published tensor: itself, rounded; or payload and scales."""
        if part.role == "bias":
            return [(part.name, tensor.float().contiguous())]
        if self.fp8 is None or part.role != "linear":
            return [(part.name, tensor.to(self.dtype).contiguous())]
        source = tensor if tensor.dtype in (torch.float32, torch.bfloat16) else tensor.float()
        made = quantize_blocks(source.contiguous(), power_of_two=self.fp8 == "ue8m0")
        return [(part.name, made.payload), (part.name + SCALE, made.scales)]

    def hashed(self, pairs: list[Pair]) -> torch.Tensor:
        """What a server hashes of :meth:`pack`'s tensors: FP8 as bf16, payload times scale."""
        if len(pairs) == 1:
            return pairs[0][1]
        payload, scales = pairs[0][1], pairs[1][1]
        spread = scales.repeat_interleave(BLOCK, 0)[: payload.shape[0]].repeat_interleave(BLOCK, 1)[:, : payload.shape[1]]
        return (payload.float() * spread).to(torch.bfloat16)

    def hashed_itemsize(self, role: str) -> int:
        """Bytes a number of what a server hashes."""
        if role == "bias":
            return 4
        return 2 if self.fp8 and role == "linear" else self.dtype.itemsize


def _config_of(server: Server, hf_config: dict[str, Any]) -> dict[str, Any]:
    """The server's own config.json where this machine sees it."""
    path = Path(str(server.info.get("model_path") or "")) / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else hf_config


@dataclass
class Bucket:
    """Tensors as they travel: ``pairs`` are views of ``memory``, flat bytes."""

    pairs: list[Pair]
    memory: torch.Tensor

    @property
    def names(self) -> list[str]:
        """In order."""
        return [name for name, _ in self.pairs]

    def starts(self) -> list[int]:
        """Where each tensor's bytes begin in ``memory``."""
        base = self.memory.data_ptr()
        return [tensor.data_ptr() - base for _, tensor in self.pairs]


def fill(memory: torch.Tensor, pairs: list[Pair], *, tight: bool) -> Bucket:
    """Copy ``pairs`` into flat ``memory``, wide numbers first, so that each begins where its dtype may.

    ``tight``: without a gap, as a server that is told names, dtypes and shapes alone cuts it.
    """
    views: list[Pair] = []
    at = 0
    for name, tensor in sorted(pairs, key=lambda pair: -pair[1].element_size()):
        size = nbytes(tensor)
        view = memory[at : at + size].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor, non_blocking=True)
        views.append((name, view))
        at += size if tight else -(-size // ALIGNMENT) * ALIGNMENT
    return Bucket(views, memory[:at])


def room(pairs: list[Pair]) -> int:
    """Bytes that :func:`fill` needs at most."""
    return sum(-(-nbytes(tensor) // ALIGNMENT) * ALIGNMENT for _, tensor in pairs)


@dataclass
class FlattenedTensorMetadata:
    """SGLang's entry of a bucket, field by field."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


def encode(bucket: Bucket) -> str:
    """A bucket as ``/update_weights_from_tensor`` takes it with ``load_format: flattened_bucket``, base64.

    GPU memory goes as a handle, which must live until the server has answered; a CPU's goes inside.
    """
    with _stand_in() as entry:
        metadata = [
            entry(name, tensor.shape, tensor.dtype, start, start + nbytes(tensor), nbytes(tensor))
            for (name, tensor), start in zip(bucket.pairs, bucket.starts(), strict=True)
        ]
        into = io.BytesIO()
        by_handle = devices.is_shared_by_handle(bucket.memory.device)
        pickler = _HandlePickler(into) if by_handle else pickle.Pickler(into, protocol=pickle.HIGHEST_PROTOCOL)
        # a clone has a storage of its own: pickling a view writes all of the storage
        memory = bucket.memory if by_handle else bucket.memory.clone()
        pickler.dump({"flattened_tensor": memory, "metadata": metadata})
    return base64.b64encode(into.getbuffer()).decode("ascii")


class _HandlePickler(ForkingPickler):
    """GPU tensors as handles, their device by its unique id: the server may number its GPUs otherwise."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not devices.is_shared_by_handle(value.device):
            return NotImplemented
        from torch.multiprocessing import reductions

        rebuild, given = reductions.reduce_tensor(value)
        given = list(given)
        if isinstance(given[DEVICE_ARGUMENT], int):
            given[DEVICE_ARGUMENT] = devices.unique_id(value.device)
        return rebuild, tuple(given)


@contextmanager
def _stand_in() -> Iterator[type]:
    """SGLang's class, or one that is pickled under its name while this lasts."""
    with _shim:
        if BUCKET_MODULE in sys.modules:
            yield sys.modules[BUCKET_MODULE].FlattenedTensorMetadata
            return
        parts = BUCKET_MODULE.split(".")
        names = [".".join(parts[: end + 1]) for end in range(len(parts))]
        absent = [name for name in names if name not in sys.modules]
        made = type("FlattenedTensorMetadata", (FlattenedTensorMetadata,), {"__module__": BUCKET_MODULE})
        try:
            sys.modules.update({name: types.ModuleType(name) for name in absent})
            sys.modules[BUCKET_MODULE].FlattenedTensorMetadata = made
            yield made
        finally:
            for name in absent:
                sys.modules.pop(name, None)
