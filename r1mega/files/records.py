"""Files of records and of text, by suffix: JSONL and Parquet, compressed or not. Local paths only; one record at a time.

Owns decompression (.gz, .bz2, .xz, and .zst where ``zstandard`` is installed) and the two formats of rows. Refuses, by line or row,
what is no object, and by file what is cut short or damaged. In: a path; out: bytes, text, or rows. A Parquet file is read a row
group at a time, so that memory does not grow with the file.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from r1mega.config.errors import UserError

COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Suffix to compression."""

ROWS = (".jsonl", ".parquet")
"""Suffixes of files of records, a compression's suffix left out."""

_BATCH_ROWS = 1024


class Row(NamedTuple):
    """One record. ``where``: its file and line or row, for errors; ``key``: its number from 1, in a folder after a file's name."""

    where: str
    key: str
    values: dict[str, Any]


def suffix(path: str | Path) -> str:
    """The suffix that says the format, in lower case: ``.jsonl`` for ``x.jsonl.gz``."""
    return Path(_plain(path)).suffix.lower()


def stem(path: str | Path) -> str:
    """The file's name without its format and compression: ``x`` for ``x.jsonl.gz``."""
    return Path(_plain(path)).stem


def is_rows(path: str | Path) -> bool:
    """True for a file of records by its name."""
    return suffix(path) in ROWS


def rows_below(folder: str | Path) -> list[Path]:
    """The files of records below ``folder`` by sorted path, hidden ones left out."""
    root = Path(folder)
    found = [path for path in sorted(root.rglob("*")) if is_rows(path) and path.is_file()]
    return [path for path in found if not is_hidden(path, root)]


def is_hidden(path: Path, root: Path) -> bool:
    """True where a part of ``path`` below ``root`` starts with a dot."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed by its suffix. UserError where it is damaged, or the package for its compression is absent."""
    kind = COMPRESSED.get(Path(path).suffix.lower())
    try:
        with _open(Path(path), kind) as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
        # What is wrong with the content comes as an OSError without a number; a UserError is the reader's own.
        if kind is None or isinstance(error, UserError | UnicodeError) or getattr(error, "errno", None) is not None:
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: a whole {kind} file; got {said}; copy or compress it again") from None


def read_text(path: str | Path) -> str:
    """The file's text. Raises UnicodeDecodeError for what is not UTF-8, else as :func:`opened`."""
    with opened(path) as file:
        return file.read().decode("utf-8")


def read_rows(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The records of a JSONL or Parquet file (any other suffix counts as JSONL), or of all such files below a folder, in order.

    columns: the only ones that matter, where the file has them all; None: all. Raises UserError for a missing or damaged file, and
    for a line that is no object.
    """
    given = Path(path)
    if given.is_dir():
        files = rows_below(given)
        if not files:
            raise UserError(f"{path}: a folder of records holds .jsonl or .parquet files; got none; check the path")
        for file in files:
            name = file.relative_to(given).as_posix()
            yield from (row._replace(key=f"{name}:{row.key}") for row in read_rows(file, columns))
    elif not given.is_file():
        raise UserError(f"{path}: a JSONL or Parquet file; got no such file; check the path")
    elif suffix(given) == ".parquet":
        yield from _parquet(given, columns)
    else:
        yield from _jsonl(given)


def _jsonl(path: Path) -> Iterator[Row]:
    with opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                start = line[:40].decode(errors="replace").strip()
                raise UserError(f"{where}: each line is one JSON object; got {start!r} ({error}); mend or drop the line") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: each line is one JSON object; got {type(record).__name__}; mend or drop the line")
            yield Row(where, str(number), record)


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    if path.suffix.lower() in COMPRESSED:
        raise UserError(f"{path}: Parquet is compressed inside; got {path.suffix} around it; decompress the file")
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: pyarrow reads Parquet; got no such package; pip install 'r1mega[parquet]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            known = set(file.schema_arrow.names)
            wanted = list(columns) if columns and known.issuperset(columns) else None
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=wanted):
                    for record in batch.to_pylist():
                        number += 1
                        yield Row(f"{path} row {number}", str(number), record)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        said = str(error).splitlines()[0].rstrip(".")
        after = f" after row {number}" if number else ""
        raise UserError(f"{path}: a whole Parquet file; got {said}{after}; copy or write it again") from None


def _plain(path: str | Path) -> str:
    name = Path(path).name
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in COMPRESSED else name


def _open(path: Path, kind: str | None) -> BinaryIO:
    if kind == "gzip":
        return gzip.open(path, "rb")
    if kind == "bzip2":
        return bz2.open(path, "rb")
    if kind == "xz":
        return lzma.open(path, "rb")
    if kind == "zstd":
        return _zstd(path)
    return path.open("rb")


def _zstd(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path}: zstandard reads .zst; got no such package; pip install 'r1mega[zstd]'") from None
    return io.BufferedReader(_ZstdFrames(path, zstandard))


class _ZstdFrames(io.RawIOBase):
    """A .zst file of one or more frames. zstandard's own reader takes a file's end for a frame's end; this one does not."""

    def __init__(self, path: Path, zstandard: Any):
        self._zstandard, self._file = zstandard, path.open("rb")
        self._frame: Any = None
        self._packed, self._plain = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            packed = self._packed or self._file.read(1 << 16)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the end of the file inside a frame")
                return 0
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._plain = memoryview(self._frame.decompress(packed))
            except self._zstandard.ZstdError as error:
                raise ValueError(str(error)) from None
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
