"""Safetensors folders, a tensor at a time: reading with every lie of a header refused, writing with the file's hash on the way.

Owns the safetensors format: eight bytes with the header's length (little endian), a JSON header ``{name: {dtype, shape,
data_offsets}}``, then the tensors' bytes without a gap. Nothing is mapped into memory and no file is read whole: memory holds the
tensors that the caller holds. What a folder's files and index say of each other must agree, or it is refused by file and tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1mega.config.errors import UserError
from r1mega.train.convert.disk import AGAIN, Sink, fill, octets, opened

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's word to torch's dtype."""
NAMES = {dtype: word for word, dtype in TORCH.items()}
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors package. A longer one is a damaged length."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a folder. ``dtype``: the format's word; ``file``: its path; ``offset`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


class PublishedFolder:
    """The tensors of a folder with ``model.safetensors``, or with shards and their index. No tensor is read at first.

    ``entries``: name to :class:`Entry`, file by file and in each file's order. ``files``: name to bytes. ``metadata``: file to the
    free texts of its header. Raises UserError for what is missing, damaged or contradicts itself. Safe for many threads.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        self.files: dict[str, int] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        where = self._index()
        for file in [SINGLE] if where is None else sorted(set(where.values())):
            self._add(file)
        if where is not None:
            self._compare(where)

    @property
    def largest_file_bytes(self) -> int:
        """Size of the largest file of weights."""
        return max(self.files.values())

    def read(self, name: str) -> torch.Tensor:
        """One tensor in memory of its own. Raises UserError for an unknown name and for a file that is no longer whole."""
        entry = self._entry(name)
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        with opened(Path(entry.file)) as descriptor:
            got = fill(descriptor, entry.offset, octets(buffer))
        if got < entry.nbytes:
            raise UserError(f"{entry.file}: {name} has {entry.nbytes} bytes from byte {entry.offset} on; got {got}; {AGAIN}")
        return buffer.view(TORCH[entry.dtype]).view(entry.shape)

    def raw(self, name: str) -> memoryview:
        """One tensor's bytes as the file has them."""
        return octets(self.read(name))

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise UserError(f"checkpoint {self.path}: has {name}; got {len(self.entries)} other tensors; check its config.json")
        return self.entries[name]

    def _index(self) -> dict[str, str] | None:
        """The index's map of tensors to files; None where one file holds all."""
        path, single = self.path / INDEX, (self.path / SINGLE).is_file()
        if not path.is_file():
            if single:
                return None
            there = sorted(file.name for file in self.path.glob("*.*")) if self.path.is_dir() else []
            got = f"{', '.join(there[:4])}{' and so on' if len(there) > 4 else ''}" if there else "no file at all"
            raise UserError(
                f"checkpoint {self.path}: a folder with {SINGLE} or {INDEX}; got {got}; check the path, and save "
                "weights of another kind as safetensors"
            )
        try:
            where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is JSON with a weight_map; got {type(error).__name__} {error}; {AGAIN}") from error
        if not isinstance(where, dict) or not where:
            raise UserError(f"{path}: weight_map gives each tensor its file; got {type(where).__name__} without entries; {AGAIN}")
        for name, file in where.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise UserError(f"{path}: a tensor's file lies in the same folder; got {file!r} for {name}; {AGAIN}")
            if not (self.path / file).is_file():
                raise UserError(f"{path}: every file that it names is there; {file} with {name} is missing; {AGAIN}")
        if single and SINGLE not in where.values():
            raise UserError(
                f"checkpoint {self.path}: one set of weights; got {SINGLE} besides the files of {INDEX}; take away what is not it"
            )
        return where

    def _add(self, file: str) -> None:
        path = self.path / file
        size = path.stat().st_size
        header, start = _header(path, size)
        metadata = header.pop("__metadata__", {})
        end = start
        found = [_entry_of(path, name, value, start) for name, value in header.items()]
        for entry in sorted(found, key=lambda entry: (entry.offset, entry.nbytes)):
            if entry.name in self.entries:
                other = Path(self.entries[entry.name].file).name
                raise UserError(f"{path}: each tensor is in one file; got {entry.name} in {other} too; take one of them away")
            if entry.offset != end:
                word = "inside the tensor before it" if entry.offset < end else "after a gap"
                raise UserError(f"{path}: tensors follow one another; got {entry.name} {word}; {AGAIN}")
            end = entry.offset + entry.nbytes
            if end > size:
                raise UserError(f"{path}: {entry.name} ends at byte {end}; got a file of {size} bytes, it is cut; {AGAIN}")
            self.entries[entry.name] = entry
        if end != size:
            raise UserError(f"{path}: ends with its last tensor at byte {end}; got a file of {size} bytes; {AGAIN}")
        self.files[file], self.metadata[file] = size, metadata

    def _compare(self, where: dict[str, str]) -> None:
        """Raise UserError for a tensor that only one side has, or that lies in another file than the index says."""
        for name, file in where.items():
            if name not in self.entries:
                raise UserError(f"{self.path / file}: holds what {INDEX} says; got no {name}; {AGAIN}")
            found = Path(self.entries[name].file).name
            if found != file:
                raise UserError(f"{self.path / file}: holds what {INDEX} says; got {name} in {found}; {AGAIN}")
        for name, entry in self.entries.items():
            if name not in where:
                raise UserError(
                    f"{entry.file}: {INDEX} names every tensor; got {name}, which it has not; fetch the index again, "
                    "or take the tensor away"
                )


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """A file's header and the offset at which its tensors start."""
    with opened(path) as descriptor:
        word = bytearray(8)
        if fill(descriptor, 0, memoryview(word)) < 8:
            raise UserError(f"{path}: starts with the length of its header; got a file of {size} bytes; {AGAIN}")
        length = int.from_bytes(word, "little")
        if length > LONGEST_HEADER:
            raise UserError(f"{path}: its header has at most {LONGEST_HEADER} bytes; got {length}, this is no safetensors; {AGAIN}")
        text = bytearray(length)
        if fill(descriptor, 8, memoryview(text)) < length:
            raise UserError(f"{path}: has a header of {length} bytes; got a file of {size} bytes, it is cut; {AGAIN}")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except ValueError as error:
        raise UserError(f"{path}: its header is JSON; got {error}; {AGAIN}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header gives tensors by name; got {type(header).__name__}; {AGAIN}")
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} twice")
    return found


def _entry_of(path: Path, name: str, value: Any, start: int) -> Entry:
    try:
        word, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sound = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise UserError(f"{path}: a tensor has dtype, shape and two data_offsets; got {value} for {name}; {AGAIN}")
    if word not in TORCH:
        raise UserError(f"{path}: dtypes are {', '.join(TORCH)}; got {word} for {name}; convert the tensor first")
    nbytes = math.prod(shape) * TORCH[word].itemsize
    if end - begin != nbytes:
        raise UserError(f"{path}: {name} of {word} {list(shape)} has {nbytes} bytes; got {end - begin}; {AGAIN}")
    return Entry(name, word, shape, str(path), start + begin, nbytes)


class ShardWriter:
    """One safetensors file: its tensors are announced at first and then written in that order. A context, as :class:`Sink` is."""

    def __init__(
        self,
        path: str | Path,
        entries: list[tuple[str, str, tuple[int, ...]]],
        metadata: dict[str, str] | None = None,
    ):
        """``entries``: name, the format's word for the dtype, shape.

        ``metadata``: the header's free texts; None for ``{"format": "pt"}``, which transformers asks for.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
        if not header["__metadata__"]:
            header.clear()
        end = 0
        for name, dtype, shape in entries:
            if name in header:
                raise ValueError(f"{path}: each tensor comes once; got {name} twice; announce it once")
            start, end = end, end + math.prod(shape) * TORCH[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight bytes
        self._due = list(reversed(entries))
        self._sink = Sink(path)
        self._sink.write(len(text).to_bytes(8, "little"))
        self._sink.write(text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the tensor that is due. Raises ValueError for another name, dtype or shape: the caller's plan is wrong."""
        due = self._due[-1] if self._due else ("nothing", "", ())
        dtype = NAMES.get(tensor.dtype, str(tensor.dtype))
        if (name, dtype, tuple(tensor.shape)) != (due[0], due[1], tuple(due[2])):
            raise ValueError(
                f"{self._sink.path}: next comes {due[0]} {due[1]} {list(due[2])}; got {name} {dtype} {list(tensor.shape)}; "
                "write in the announced order"
            )
        self._sink.write(octets(tensor.contiguous()))
        self._due.pop()

    def close(self) -> tuple[int, str]:
        """Sync and give the file its name; returns its bytes and sha256. Raises ValueError while tensors are due."""
        if self._due:
            raise ValueError(f"{self._sink.path}: holds all that was announced; got no {self._due[-1][0]}; write it first")
        return self._sink.close()

    def discard(self) -> None:
        """Give up: what was written goes."""
        self._sink.discard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, value, trace) -> None:
        self.discard()


def shard_names(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Tensors file by file, in order. ``sizes``: name to bytes; a file has at most ``shard_bytes`` of them, or a single tensor."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def file_name(index: int, count: int) -> str:
    """The name of file ``index`` (from 1) of ``count``."""
    return SINGLE if count == 1 else f"model-{index:05d}-of-{count:05d}.safetensors"


def write_index(folder: str | Path, where: dict[str, str], total_size: int) -> tuple[int, str]:
    """Write the index: ``where`` gives each tensor its file, ``total_size`` is the tensors' bytes. Returns its bytes and sha256."""
    text = json.dumps({"metadata": {"total_size": total_size}, "weight_map": where}, indent=2, sort_keys=True)
    with Sink(Path(folder) / INDEX) as sink:
        sink.write(f"{text}\n".encode())
        return sink.close()
