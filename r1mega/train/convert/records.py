"""Where the numbers of a tensor lie inside what ``torch.save`` wrote, so that a part of them can be read alone.

``torch.save`` makes a zip archive without compression: ``data.pkl`` says how the tensor lies on its storage, ``data/0`` is the
storage. Only the plain case is taken: one CPU tensor that is its whole storage, contiguous, in this machine's byte order. All else
is left to ``torch.load``.
"""

from __future__ import annotations

import io
import pickle
import sys
import zipfile

import torch

from r1mega.train.convert.disk import fill

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LOCAL_HEADER = 30
"""Bytes of a zip record's own header, before its name and extra field, whose lengths are its last two numbers of two bytes."""


class View(io.RawIOBase):
    """A file of ``length`` bytes inside another one. Reads by position: threads share the descriptor."""

    def __init__(self, descriptor: int, offset: int, length: int):
        self._descriptor, self._offset, self._length, self._at = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._at, 0)]
        got = fill(self._descriptor, self._offset + self._at, view)
        self._at += got
        return got

    def is_cut(self) -> bool:
        """True where the file ends before the view does."""
        return self._length > 0 and fill(self._descriptor, self._offset + self._length - 1, memoryview(bytearray(1))) < 1


def numbers_of(view: View, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Where in ``view`` the numbers of a tensor of ``shape`` and ``dtype`` start; None where it is another one or not plain."""
    try:
        with zipfile.ZipFile(view) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            data = records["data/0"]
            order = _content(view, records["byteorder"]).decode() if "byteorder" in records else "little"
            recipe = _Recipe(io.BytesIO(_content(view, records["data.pkl"]))).load()
            position = _start(view, data)
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, EOFError, IndexError, AttributeError, pickle.UnpicklingError):
        return None
    if not isinstance(recipe, _Tensor) or order != sys.byteorder or data.compress_type != zipfile.ZIP_STORED:
        return None
    count, nbytes = 1, dtype.itemsize
    for size in shape:
        count *= size
    expected = ("storage", dtype, "0", "cpu", count)
    plain = recipe.storage == expected and recipe.offset == 0 and recipe.size == tuple(shape) and _contiguous(shape, recipe.stride)
    return position if plain and data.file_size == count * nbytes else None


def _start(view: View, info: zipfile.ZipInfo) -> int:
    view.seek(info.header_offset)
    header = view.read(LOCAL_HEADER)
    if len(header) < LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile("no record where the directory has one")
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return info.header_offset + LOCAL_HEADER + name + extra


def _content(view: View, info: zipfile.ZipInfo) -> bytes:
    """A small record. zipfile's own reading would stop at a checksum that was not written."""
    view.seek(_start(view, info))
    return view.read(info.file_size)


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for size, got in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and got != step:
            return False
        step *= size
    return True


class _Tensor:
    """What ``data.pkl`` says of a tensor."""

    def __init__(self, storage, offset, size, stride, *rest):
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)


class _Recipe(pickle.Unpickler):
    """Reads ``data.pkl`` of a plain tensor; runs nothing."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid):
        return pid
