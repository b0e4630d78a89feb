"""What a conversion writes: which tensor goes into which file, and as what. Plans, and writes one file at a time.

In: an opened source and the wanted dtype. Out: :class:`Unit` objects, a file each, whose items are written in order by a thread.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from r1mega.config.errors import UserError
from r1mega.model.names import SCALE, Part, native_shapes, parts
from r1mega.train.convert import fp8
from r1mega.train.convert.native import NativeFile
from r1mega.train.convert.shards import NAMES, TORCH, ShardWriter, file_name, shard_names
from r1mega.train.convert.sources import NativeSource, Piece, PublishedSource, region_name, sha256

Source = PublishedSource | NativeSource
F8 = "F8_E4M3"
WANTED = {"bf16": "BF16", "fp32": "F32"}
"""``dtype=`` to safetensors' names."""


@dataclass(frozen=True)
class Item:
    """One tensor of a file. ``kind``: weight, scale (of an FP8 weight), derived, copy (only read and compared), padding (zeros)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    part: Part | None = None

    @property
    def num_bytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape) * TORCH[self.dtype].itemsize


@dataclass
class Unit:
    """One file and what is in it."""

    file: str
    items: list[Item] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Of what is written."""
        return sum(item.num_bytes for item in self.items if item.kind != "copy")


Watch = Callable[[list[Item]], AbstractContextManager[None]]
"""What surrounds the work on items: it waits for memory, tells the progress, and ends the work where another file has failed."""


def cast(piece: Piece, dtype: str) -> tuple[torch.Tensor, str]:
    """A part's numbers in another dtype than FP8, and how they came to be."""
    wanted = TORCH[dtype]
    if piece.scale is not None:
        return fp8.dequantise(piece.value, piece.scale, wanted), "dequantised"
    return (piece.value, "same") if piece.value.dtype == wanted else (piece.value.to(wanted), "cast")


class PublishedTarget:
    """Hugging Face's format. ``dtype``: as ``ConvertConfig.dtype``; ``ue8m0``: scales that are made anew are powers of two."""

    format = "hf"

    def __init__(self, source: Source, dtype: str, shard_bytes: int, *, ue8m0: bool, keep_scales: bool):
        self.source, self.wanted, self.ue8m0, self.keep_scales = source, dtype, ue8m0, keep_scales
        items = list(self._items())
        places = self._layout(items, shard_bytes)
        self.units = [Unit(file, [item for item in items if places[item.name] == file]) for file in dict.fromkeys(places.values())]

    @property
    def fp8(self) -> bool:
        """True where some tensor is FP8."""
        return any(item.dtype == F8 for unit in self.units for item in unit.items)

    @property
    def stated(self) -> str:
        """What its config says of all that is neither FP8 nor a bias."""
        return self.dtype_of(next(part for part in self.source.parts if part.role == "plain"))

    def dtype_of(self, part: Part) -> str:
        """What a part is written as."""
        stored = self.source.dtype(part)
        if part.role == "bias":
            return self.source.bias_dtype(part)
        if self.wanted == "fp8":
            return F8 if part.role == "linear" else "BF16"
        return WANTED.get(self.wanted, stored)

    def _items(self) -> Iterator[Item]:
        for part in self.source.parts:
            dtype = self.dtype_of(part)
            yield Item(part.name, dtype, part.shape, "weight", part)
            if dtype == F8:
                yield Item(part.name + SCALE, "F32", tuple(-(-size // fp8.BLOCK) for size in part.shape), "scale", part)
        for name in self.source.derived:
            value, _ = self.source.read_derived(name)
            yield Item(name, NAMES[value.dtype], tuple(value.shape), "derived")

    def _layout(self, items: list[Item], shard_bytes: int) -> dict[str, str]:
        """Tensor to file, in the order of the files: the source's own where it has these tensors and they fit, else filled up."""
        theirs = self.source.layout
        if theirs.keys() == {item.name for item in items}:
            sizes = Counter()
            for item in items:
                sizes[theirs[item.name]] += item.num_bytes
            if max(sizes.values()) <= shard_bytes:
                rank = {name: at for at, name in enumerate(theirs)}
                items.sort(key=lambda item: rank[item.name])
                return {item.name: theirs[item.name] for item in items}
        groups = _filled(items, shard_bytes)
        return {item.name: file_name(at, len(groups)) for at, group in enumerate(groups, 1) for item in group}

    @property
    def tensor_names(self) -> set[str]:
        """All that is written."""
        return {item.name for unit in self.units for item in unit.items}

    def write(self, unit: Unit, folder: Path, watched: Watch) -> dict[str, Any]:
        """Write one file; returns what the journal keeps of it."""
        entry: dict[str, Any] = {"file": unit.file, "read": {}, "written": {}}
        with ShardWriter(folder / unit.file, [(item.name, item.dtype, item.shape) for item in unit.items]) as writer:
            for _, group in groupby(unit.items, key=lambda item: item.part or item.name):
                items = list(group)
                with watched(items):
                    self._put(writer, items, entry)
            entry["bytes"], entry["sha256"] = writer.close()
        return entry

    def _put(self, writer: ShardWriter, items: list[Item], entry: dict[str, Any]) -> None:
        """One part's tensor, its scales, or both; what was made of it is gone when this returns."""
        if items[0].kind == "derived":
            weight, records = self.source.read_derived(items[0].name)
            scale, how = None, "same"
        else:
            weight, scale, how, records = self._make(items[0].part)
        entry["read"] |= records
        for item in items:
            value = scale if item.kind == "scale" else weight
            writer.write(item.name, value)
            entry["written"][item.name] = _record(item, value, entry["file"], how, records)

    def working_bytes(self, item: Item) -> int:
        """Memory that an item takes while it is made."""
        if item.kind == "scale" or item.part is None:
            return item.num_bytes
        return _working_bytes(item, self.source.dtype(item.part))

    def _make(self, part: Part) -> tuple[torch.Tensor, torch.Tensor | None, str, dict[str, Any]]:
        """A part's tensor and scales as written, how they were made, and the records of what was read."""
        piece, dtype = self.source.read(part), self.dtype_of(part)
        if dtype != F8:
            value, how = cast(piece, dtype)
            return value, None, how, piece.records
        if piece.scale is not None and self.keep_scales:
            return piece.value, piece.scale, "same", piece.records
        kept = self.source.kept_scale(part) if self.keep_scales else None
        value, _ = cast(piece, "F32")
        if kept is not None:
            return fp8.quantise_with(value, kept), kept, "quantised with the source's scales", piece.records
        payload, scale = fp8.quantise(value, power_of_two=self.ue8m0)
        return payload, scale, "quantised", piece.records


class NativeTarget:
    """Megatron's torch_dist format, a chunk for each published tensor."""

    format = "native"

    def __init__(self, source: PublishedSource, dtype: str, shard_bytes: int, vocab_multiple: int):
        if source.format == "native":
            raise UserError(
                "format: hf for a native source, which every layout loads as it is; got native; use format=hf, or init= with it"
            )
        self.source = source
        if dtype == "as_is":
            stored = {source.dtype(part) for part in source.parts if part.role != "bias"} - {F8}
            if len(stored) > 1:
                raise UserError(
                    f"dtype: one for all tensors of a native checkpoint; got {' and '.join(sorted(stored))} in {source.path}; "
                    "use dtype=fp32, or dtype=bf16 to round"
                )
            dtype = "bf16" if stored == {"BF16"} else "fp32"  # fp32 holds every number of fp16
        self.dtype = WANTED[dtype]
        tokens = source.model.vocab_size
        self.model = replace(source.model, vocab_size=tokens + -tokens % vocab_multiple, vocab_padding=-tokens % vocab_multiple)
        self.shapes = native_shapes(self.model)
        self.regions = {part.name: part for part in parts(self.model)}
        groups = _filled(list(self._items()), shard_bytes)
        self.units = [Unit(f"__{at}_0.distcp", group) for at, group in enumerate(groups)]

    def _items(self) -> Iterator[Item]:
        order = {name: at for at, name in enumerate(self.source.layout)}
        for part in sorted(self.source.parts, key=lambda part: order[part.name]):
            if part.copy:
                yield Item(part.name, self.source.dtype(part), part.shape, "copy", part)
            else:
                yield Item(part.name, "F32" if part.role == "bias" else self.dtype, part.shape, "weight", self.regions[part.name])
        if self.model.vocab_padding:
            for key in sorted({part.key for part in self.regions.values() if part.role == "plain" and self._is_padded(part)}):
                width = self.shapes[key][1]
                yield Item(key, self.dtype, (self.model.vocab_padding, width), "padding")

    def _is_padded(self, part: Part) -> bool:
        return (
            self.shapes[part.key][0] == self.model.vocab_size and part.extent[0] == self.model.vocab_size - self.model.vocab_padding
        )

    def _named(self, item: Item) -> tuple[str, tuple[int, ...], str]:
        """Key, offset, and name in the ledger of what an item becomes."""
        if item.kind == "padding":
            start = (self.model.vocab_size - self.model.vocab_padding, 0)
            return item.name, start, f"{item.name}@{','.join(map(str, start))}"
        return item.part.key, item.part.start, region_name(item.part, self.shapes[item.part.key])

    @property
    def tensor_names(self) -> set[str]:
        """All that is written, as the ledger names it."""
        return {self._named(item)[2] for unit in self.units for item in unit.items if item.kind != "copy"}

    def write(self, unit: Unit, folder: Path, watched: Watch) -> dict[str, Any]:
        """Write one file; returns what the journal keeps of it."""
        entry: dict[str, Any] = {"file": unit.file, "read": {}, "written": {}, "chunks": []}
        with NativeFile(folder / unit.file) as writer:
            for item in unit.items:
                with watched([item]):
                    self._put(writer, item, entry)
            entry["bytes"], entry["sha256"] = writer.close()
        return entry

    def _put(self, writer: NativeFile, item: Item, entry: dict[str, Any]) -> None:
        """One region; what was made of it is gone when this returns."""
        if item.kind == "padding":
            value, how, records = torch.zeros(item.shape, dtype=TORCH[item.dtype]), "padding", {}
        else:
            piece = self.source.read(item.part)
            entry["read"] |= piece.records
            if item.kind == "copy":
                return
            value, how = cast(piece, item.dtype)
            records = piece.records
        key, start, name = self._named(item)
        entry["chunks"].append(asdict(writer.add(key, start, value.reshape(item.part.extent if item.part else value.shape))))
        entry["written"][name] = _record(item, value, entry["file"], how, records)

    def working_bytes(self, item: Item) -> int:
        """Memory that an item takes while it is made."""
        return item.num_bytes if item.part is None else _working_bytes(item, self.source.dtype(item.part))


def _working_bytes(item: Item, stored: str) -> int:
    """As read, as written where that is another tensor, and fp32 between where FP8 is involved."""
    numbers, same = math.prod(item.shape), item.dtype == stored
    between = 0 if same or F8 not in (item.dtype, stored) else 8
    return numbers * (TORCH[stored].itemsize + (0 if same else TORCH[item.dtype].itemsize) + between)


def _filled(items: list[Item], shard_bytes: int) -> list[list[Item]]:
    """Items in their order, as many a file as fit."""
    by_name = {item.name: item for item in items}
    groups = shard_names({item.name: item.num_bytes for item in items}, shard_bytes)
    return [[by_name[name] for name in group] for group in groups]


def _record(item: Item, value: torch.Tensor, file: str, how: str, records: dict[str, Any]) -> dict[str, Any]:
    """What the ledger says of a tensor that is written. Numbers that are the source's were hashed when they were read."""
    alike = [record for record in records.values() if record["dtype"] == item.dtype] if how == "same" else []
    digest = alike[0]["sha256"] if len(alike) == 1 else sha256(value)
    stored = {"dtype": item.dtype, "shape": list(item.shape), "sha256": digest, "file": file}
    return stored | {"how": how, "from": sorted(records)}


def open_target(source: Source, config) -> PublishedTarget | NativeTarget:
    """The target that a ``ConvertConfig`` asks for. Raises UserError for FP8 in native."""
    wanted = {"native": "hf", "hf": "native"}[source.format] if config.format == "other" else config.format
    if wanted == "native":
        if config.dtype == "fp8":
            raise UserError("dtype: bf16, fp32 or as_is with format=native, whose masters are exact; got fp8; use dtype=bf16")
        return NativeTarget(source, config.dtype, config.shard_bytes, config.convert.vocab_multiple)
    given = config.convert.scale_format
    theirs = "ue8m0" if (source.quantization or {}).get("scale_fmt") == "ue8m0" else "fp32"
    keep = given in ("as_is", theirs)
    return PublishedTarget(
        source, config.dtype, config.shard_bytes, ue8m0=(theirs if given == "as_is" else given) == "ue8m0", keep_scales=keep
    )
