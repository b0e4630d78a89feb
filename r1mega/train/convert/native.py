"""Megatron's distributed checkpoint (``torch_dist``: torch's DCP files), a region of a tensor at a time, without a process group.

    weights/.metadata       a pickle: each key's shape, dtype and chunks, and each chunk's file, offset and length
    weights/__R_0.distcp    chunks one after the other, each what ``torch.save`` makes of its tensor
    weights/common.pt, metadata.json   Megatron's own

In: a key and a region (``start``, ``extent`` per axis of the whole tensor), whatever layout cut the chunks. Out: its numbers.
Writing goes the same way: chunks of any cut, then the metadata that names them. Chunks that overlap or leave a gap are refused,
by key. What stands for a module without numbers (Megatron's ``_extra_state``) is an *object*, not a tensor.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from r1mega.config.errors import UserError
from r1mega.train import pickles
from r1mega.train.convert.disk import Sink, fill, octets, opened
from r1mega.train.convert.records import View, numbers_of

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
"""``metadata.json`` as Megatron-Core 0.16.1 writes it."""
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,  # moments are named after their weights, whichever part of the optimizer holds them
}
"""``content_metadata`` of ``common.pt``, the trainer's checkpoints' too: how an optimizer's part, if any, is laid out."""
OBJECT = "object"
"""``Chunk.dtype`` of an object."""
AGAIN = "use an older checkpoint"


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor in a file. ``asdict`` of it is JSON, and ``Chunk(**record)`` makes it again. Of an object: no axes."""

    key: str
    start: tuple[int, ...]
    extent: tuple[int, ...]
    dtype: str
    offset: int
    length: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", tuple(self.start))  # JSON has lists
        object.__setattr__(self, "extent", tuple(self.extent))


class _Place(NamedTuple):
    """Where ``torch.save``'s archive of a chunk is."""

    file: str
    offset: int
    length: int


Region = tuple[tuple[int, ...], tuple[int, ...]]
"""Start and extent."""


class NativeFolder:
    """The tensors of a ``weights`` folder. ``entries``: key to (shape, dtype), moments included; ``objects``: keys of the rest.

    Safe for many threads. Memory: the region that is asked for and one chunk. Raises UserError, naming key and file.
    """

    def __init__(self, path: str | Path):
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.path = Path(path)
        metadata = self._metadata()
        self.entries: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._chunks: dict[str, dict[Region, _Place]] = {}
        places = {(index.fqn, index.offset): place for index, place in metadata.storage_data.items()}
        self.objects = sorted(
            key for key, entry in metadata.state_dict_metadata.items() if not isinstance(entry, TensorStorageMetadata)
        )
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            self.entries[key] = (tuple(entry.size), entry.properties.dtype)
            self._chunks[key] = {}
            for chunk in entry.chunks:
                place = places.get((key, chunk.offsets))
                if place is None:
                    raise UserError(f"{self.path}: .metadata says where each chunk is; got {key} without a place; {AGAIN}")
                named = Path(place.relative_path)
                if named.is_absolute() or ".." in named.parts:
                    raise UserError(f"{self.path}: its files lie in it; got {named} for {key}; {AGAIN}")
                self._chunks[key][tuple(chunk.offsets), tuple(chunk.sizes)] = _Place(str(named), place.offset, place.length)
        self._places = places
        self._whole: set[str] = set()
        self._numbers: dict[_Place, int | None] = {}

    def read(self, key: str, start: tuple[int, ...] | None = None, extent: tuple[int, ...] | None = None) -> torch.Tensor:
        """A region's numbers, contiguous and in memory of their own; the whole tensor without ``start`` and ``extent``."""
        if key not in self.entries:
            raise UserError(f"{self.path}: has {key}; got {len(self.entries)} other tensors; check the model")
        shape, dtype = self.entries[key]
        start = tuple(start or (0,) * len(shape))
        extent = tuple(shape if extent is None else extent)
        inside = len(start) == len(extent) == len(shape)
        if not inside or any(at < 0 or size < 0 or at + size > full for at, size, full in zip(start, extent, shape, strict=True)):
            raise ValueError(f"{key}: a region lies in {list(shape)}; got {list(extent)} from {list(start)}; ask for less")
        if key not in self._whole:
            fault = tiling_fault(shape, list(self._chunks[key]))
            if fault:
                raise UserError(f"{self.path}: chunks make the whole of {key}; got {fault}; {AGAIN}")
            self._whole.add(key)
        region = torch.empty(extent, dtype=dtype)
        if not region.numel():
            return region
        exact = self._chunks[key].get((start, extent))  # of many chunks, the right one at once
        for chunk, place in [((start, extent), exact)] if exact else self._overlapping(key, start, extent):
            self._copy(key, region, start, chunk, place)
        return region

    def read_object(self, key: str) -> bytes:
        """What was stored for an object: a ``torch.save`` of a list with it."""
        if key not in self.objects:
            raise UserError(f"{self.path}: has the object {key}; got {len(self.objects)} others; {AGAIN}")
        place = self._places[key, None]
        path = self.path / place.relative_path
        with opened(path) as descriptor:
            buffer = bytearray(place.length)
            if fill(descriptor, place.offset, memoryview(buffer)) < place.length:
                raise UserError(f"{path}: has {key} whole; got a file that is cut; {AGAIN}")
        return bytes(buffer)

    def _metadata(self) -> Any:
        path = self.path / ".metadata"
        if not path.is_file():
            raise UserError(f"{self.path}: a folder of torch_dist weights with .metadata; got none; check the path")
        pickles.check(path, f"checkpoint {self.path}")
        try:
            metadata = pickle.loads(path.read_bytes())
            metadata.storage_data.items(), metadata.state_dict_metadata.items()  # noqa: B018 - are they there?
        except Exception as error:  # whatever comes out of a damaged pickle
            raise UserError(f"{path}: describes tensors; got {type(error).__name__} {error}; {AGAIN}") from error
        return metadata

    def _overlapping(self, key: str, start: tuple[int, ...], extent: tuple[int, ...]) -> Iterator[tuple[Region, _Place]]:
        for chunk, place in self._chunks[key].items():
            if all(a < s + e and s < a + n for a, n, s, e in zip(*chunk, start, extent, strict=True)):
                yield chunk, place

    def _copy(self, key: str, region: torch.Tensor, start: tuple[int, ...], chunk: Region, place: _Place) -> None:
        """Put what ``chunk`` has of ``region``, which starts at ``start``, into it."""
        at, size = chunk
        low = [max(s, a) for s, a in zip(start, at, strict=True)]
        high = [min(s + e, a + n) for s, e, a, n in zip(start, region.shape, at, size, strict=True)]
        shape = [upper - lower for lower, upper in zip(low, high, strict=True)]
        target = _within(region, [lower - s for lower, s in zip(low, start, strict=True)], shape)
        first = [lower - a for lower, a in zip(low, at, strict=True)]
        path = self.path / place.file
        with opened(path) as descriptor:
            if place not in self._numbers:
                view = View(descriptor, place.offset, place.length)
                if view.is_cut():
                    raise UserError(
                        f"{path}: has {place.length} bytes of {key} from byte {place.offset} on; got a file that is cut; {AGAIN}"
                    )
                self._numbers[place] = numbers_of(view, size, region.dtype)
            numbers = self._numbers[place]
            if numbers is None:
                target.copy_(_within(self._load(descriptor, key, size, place), first, shape))
                return
            strides = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
            begin = sum(f * stride for f, stride in zip(first, strides, strict=True))
            span = 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
            if span == target.numel() and target.is_contiguous():
                into = target
            else:  # what is wanted lies apart in the file, or will: read all from its first number to its last
                into = torch.empty(span, dtype=region.dtype)
            got = fill(descriptor, place.offset + numbers + begin * region.itemsize, octets(into))
            if got < into.nbytes:
                raise UserError(f"{path}: has the chunk of {key} at {list(at)} whole; got a file that is cut; {AGAIN}")
            if into is not target:
                target.copy_(into.as_strided(shape, strides))

    def _load(self, descriptor: int, key: str, size: tuple[int, ...], place: _Place) -> torch.Tensor:
        """A whole chunk, by torch itself."""
        path, dtype = self.path / place.file, self.entries[key][1]
        try:
            tensor = torch.load(View(descriptor, place.offset, place.length), map_location="cpu", weights_only=True)
        except Exception as error:  # torch says it in many ways
            told = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
            raise UserError(f"{path}: has a tensor of {key} at byte {place.offset}; got {told}; {AGAIN}") from error
        got = (tensor.dtype, list(tensor.shape)) if isinstance(tensor, torch.Tensor) else (type(tensor).__name__, "")
        if got != (dtype, list(size)):
            raise UserError(f"{path}: has {key} at byte {place.offset} as {dtype} {list(size)}; got {got[0]} {got[1]}; {AGAIN}")
        return tensor


def _within(tensor: torch.Tensor, start: list[int], extent: list[int]) -> torch.Tensor:
    """A view of a region."""
    for axis, (at, size) in enumerate(zip(start, extent, strict=True)):
        tensor = tensor.narrow(axis, at, size)
    return tensor


class NativeFile:
    """One ``__R_0.distcp``, written chunk by chunk. A context that removes the unfinished file, as :class:`Sink` is."""

    def __init__(self, path: str | Path):
        self._sink = Sink(path)

    def add(self, key: str, start: tuple[int, ...], tensor: torch.Tensor) -> Chunk:
        """Append the region of ``key`` from ``start`` on. ``tensor``: as many axes as the whole has, on the CPU."""
        plain = tensor.detach().contiguous()
        if plain.untyped_storage().nbytes() != plain.nbytes:
            plain = plain.clone()  # torch saves a view's whole storage
        offset, length = self._append(plain)
        return Chunk(key, tuple(start), tuple(plain.shape), str(plain.dtype).removeprefix("torch."), offset, length)

    def add_object(self, key: str, value: Any = None) -> Chunk:
        """Append an object under ``key``, which ends with Megatron's ``/shard_0_1``. A module without extra state has None."""
        offset, length = self._append([value])
        return Chunk(key, (), (), OBJECT, offset, length)

    def close(self) -> tuple[int, str]:
        """Sync and give the file its name; returns its bytes and sha256."""
        return self._sink.close()

    def discard(self) -> None:
        """Give up: what was written goes."""
        self._sink.discard()

    def __enter__(self) -> NativeFile:
        return self

    def __exit__(self, kind, value, trace) -> None:
        self.discard()

    def _append(self, value: Any) -> tuple[int, int]:
        offset = self._sink.tell()
        with without_crc():
            torch.save(value, self._sink)
        return offset, self._sink.tell() - offset


_crc = threading.Lock()
_crc_off: list[bool] = []


@contextmanager
def without_crc() -> Iterator[None]:
    """Torch saves without checksums, which no torch reads: they cost more than the hash that each file has anyway.

    The switch is the process's: it is off while any thread is in here, and as it was when the last one leaves.
    """
    with _crc:
        _crc_off.append(torch.serialization.get_crc32_options() if not _crc_off else _crc_off[0])
        torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        with _crc:
            before = _crc_off.pop()
            if not _crc_off:
                torch.serialization.set_crc32_options(before)


def write_metadata(
    folder: str | Path,
    shapes: dict[str, tuple[int, ...]],
    chunks: list[tuple[str, Chunk]],
    common: dict[str, Any] | None = None,
    objects: list[str] | None = None,
) -> dict[str, tuple[int, str]]:
    """Write what makes the files of ``chunks`` (file name, chunk) a checkpoint of ``shapes``; returns each file's bytes and sha256.

    ``common``: what ``common.pt`` has besides the note on the content. ``objects``: keys that stand for nothing (None:
    :func:`extra_states`), for which one more file is written. The bytes are the same for the same chunks: no path is in
    them. Raises UserError, naming the key, for chunks that overlap, leave a gap, differ in dtype or belong to no key.
    """
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    written = {}
    objects = extra_states(shapes) if objects is None else objects
    if objects:
        ranks = [int(file[2:].partition("_")[0]) for file, _ in chunks if re.fullmatch(r"__\d+_\d+\.distcp", file)]
        name = f"__{max(ranks, default=-1) + 1}_0.distcp"
        with NativeFile(Path(folder) / name) as out:
            chunks = [*((name, out.add_object(key)) for key in objects), *chunks]
            written[name] = out.close()
    of: dict[str, list[tuple[str, Chunk]]] = {key: [] for key in shapes}
    described: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    for file, chunk in chunks:
        if chunk.dtype == OBJECT:
            described[chunk.key] = BytesStorageMetadata()
            stored[MetadataIndex(chunk.key)] = _StorageInfo(file, chunk.offset, chunk.length)
        elif chunk.key in of:
            of[chunk.key].append((file, chunk))
        else:
            raise UserError(f"{folder}: every chunk is of one of the model's tensors; got {chunk.key} in {file}; convert again")
    for key, found in of.items():
        dtypes = sorted({chunk.dtype for _, chunk in found})
        fault = tiling_fault(shapes[key], [(chunk.start, chunk.extent) for _, chunk in found])
        fault = fault or (f"dtypes {', '.join(dtypes)}" if len(dtypes) > 1 else "")
        if fault:
            raise UserError(f"{folder}: chunks make the whole of {key} in one dtype; got {fault}; convert again")
        described[key] = TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, dtypes[0])),
            torch.Size(shapes[key]),
            [ChunkStorageMetadata(torch.Size(chunk.start), torch.Size(chunk.extent)) for _, chunk in found],
        )
        for number, (file, chunk) in enumerate(found):
            stored[MetadataIndex(key, chunk.start, number)] = _StorageInfo(file, chunk.offset, chunk.length)
    metadata = Metadata(described, storage_data=stored, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    texts = {".metadata": pickle.dumps(metadata), "metadata.json": json.dumps(FORMAT).encode()}
    with Sink(Path(folder) / "common.pt") as sink:
        torch.save({"content_metadata": CONTENT, **(common or {})}, sink)
        written["common.pt"] = sink.close()
    for name, text in texts.items():
        with Sink(Path(folder) / name) as sink:
            sink.write(text)
            written[name] = sink.close()
    return written


def extra_states(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The objects that plain Megatron-Core asks for besides ``shapes``: its parallel linear layers have an extra state of None."""
    modules = [key.removesuffix(".weight") for key in shapes if key.endswith(".weight")]
    parallel = [name for name in modules if re.search(r"(^|\.)(linear_[^.]*|eh_proj)$", name)]
    return [f"{name}._extra_state/shard_0_1" for name in parallel]


def tiling_fault(shape: tuple[int, ...], regions: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    """Why ``regions`` (start, extent) are not ``shape`` in pieces, or ""."""
    if not regions:
        return "none"
    for start, extent in regions:
        if len(start) != len(shape) or len(extent) != len(shape):
            return f"one of {len(extent)} axes in {list(shape)}"
        if any(at < 0 or at + size > full for at, size, full in zip(start, extent, shape, strict=True)):
            return f"one of {list(extent)} from {list(start)} on in {list(shape)}"
    if len(regions) > 1 and shape:
        low = numpy.array([start for start, _ in regions])
        high = low + numpy.array([extent for _, extent in regions])
        for row in range(len(regions) - 1):
            both = (low[row + 1 :] < high[row]) & (low[row] < high[row + 1 :])
            hit = numpy.flatnonzero(both.all(axis=1))
            if len(hit):
                return f"two that overlap, at {low[row].tolist()} and at {low[row + 1 + hit[0]].tolist()}"
    have, whole = sum(math.prod(extent) for _, extent in regions), math.prod(shape)
    return "" if have == whole else f"{have} of {whole} numbers"
