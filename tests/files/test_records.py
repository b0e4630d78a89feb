"""Files of records: formats and compressions by suffix, one row at a time, damage named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path

import pytest

from r1mega.config.errors import UserError
from r1mega.files import records

LINES = b"".join(b'{"n": %d}\n' % n for n in range(2000))
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_lines_of_every_compression(tmp_path: Path, suffix: str) -> None:
    pack = PACK.get(suffix, zstd if suffix else bytes)
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(pack(LINES) + pack(b'{"n": "last"}\n'))  # two streams one after another are one file
    rows = list(records.read_rows(path))
    assert [row.values["n"] for row in rows] == [*range(2000), "last"]
    assert rows[4].where == f"{path} line 5" and rows[4].key == "5"


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    kind, packed = records.COMPRESSED[suffix], PACK.get(suffix, zstd)(LINES)
    path = tmp_path / f"x.jsonl{suffix}"
    for data in (packed[:-6], packed[: len(packed) // 2], b"no such format", packed[:40] + bytes(40) + packed[80:]):
        path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            list(records.read_rows(path))
        text = str(caught.value)
        assert text.startswith(f"{path}: a whole {kind} file; got ") and text.endswith("; copy or compress it again")
        assert "\n" not in text


def test_absent_packages_are_named(tmp_path: Path, monkeypatch) -> None:
    for name in ("zstandard", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, way in (("x.jsonl.zst", r"pip install 'r1mega\[zstd\]'"), ("x.parquet", r"pip install 'r1mega\[parquet\]'")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=f"{name}: .* reads .*; got no such package; {way}"):
            list(records.read_rows(tmp_path / name))


def test_names() -> None:
    assert [records.suffix(name) for name in ("a/x.JSONL.GZ", "x.parquet", "x.txt.zst", "x", "x.gz")] == [
        ".jsonl",
        ".parquet",
        ".txt",
        "",
        "",
    ]
    assert [records.stem(name) for name in ("a/x.y.jsonl.gz", "x.parquet", "x")] == ["x.y", "x", "x"]
    assert records.is_rows("a.b/x.jsonl.bz2") and not records.is_rows("jsonl") and not records.is_rows("x.txt")


@pytest.mark.parametrize("line", [b'{"text": ', b"[1, 2]", b"7", b"\xff\xfe", b'{"a": ' + b"[" * 99999, b"1" * 5000])
def test_a_line_that_is_no_object_is_named_by_number(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=r"x\.jsonl line 3: each line is one JSON object"):
        list(records.read_rows(tmp_path / "x.jsonl"))


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("sub/b.jsonl", "a.jsonl", ".hidden/c.jsonl", "d.txt"):
        (tmp_path / name).write_text('{"n": 1}\n')
    assert [row.key for row in records.read_rows(tmp_path)] == ["a.jsonl:1", "sub/b.jsonl:1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds .jsonl or .parquet files; got none"):
        list(records.read_rows(tmp_path / "empty"))
    with pytest.raises(UserError, match="got no such file"):
        list(records.read_rows(tmp_path / "none.jsonl"))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"n": n, "nested": {"a": [n, n + 1]}, "turns": [{"role": "user", "content": str(n)}]} for n in range(3000)]
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=500)
    found = list(records.read_rows(path))
    assert [row.values for row in found] == rows and found[1234].where == f"{path} row 1235"
    assert [row.values for row in records.read_rows(path, ["n"])] == [{"n": n} for n in range(3000)]
    assert list(next(records.read_rows(path, ["n", "m"])).values) == ["n", "nested", "turns"]

    whole = path.read_bytes()
    for data in (whole[:-100], whole[: len(whole) // 2], b"PAR1", b""):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.parquet: a whole Parquet file; got [^\n]*; copy or write it again$"):
            list(records.read_rows(path))
    path.write_bytes(whole[:3000] + bytes(3000) + whole[6000:])
    with pytest.raises(UserError, match="a whole Parquet file; got "):
        list(records.read_rows(path))
    (tmp_path / "x.parquet.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match="Parquet is compressed inside; got .gz around it; decompress the file"):
        list(records.read_rows(tmp_path / "x.parquet.gz"))


def test_memory_does_not_grow_with_a_parquet_file(tmp_path: Path) -> None:
    """Arrow's own counter: the most that it held while one row group of eight was read at a time."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    with parquet.ParquetWriter(path, pyarrow.schema([("text", pyarrow.string())]), compression="none", use_dictionary=False) as out:
        for group in range(8):
            out.write_table(pyarrow.table({"text": [f"{group} {n} " + "x" * 1000 for n in range(2000)]}))
    pool = pyarrow.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    for row in records.read_rows(path, ["text"]):
        most = max(most, pool.bytes_allocated() - before) if row.key.endswith("00") else most
    assert path.stat().st_size > 16e6 and most < 8e6


def test_a_row_of_json_survives_as_it_is(tmp_path: Path) -> None:
    value = {"é": [1, 2.5, None, {"x": True}], "big": 10**30}
    (tmp_path / "x.jsonl").write_text(json.dumps(value), encoding="utf-8")
    assert [row.values for row in records.read_rows(tmp_path / "x.jsonl")] == [value]
