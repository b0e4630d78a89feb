"""Text sources: the same documents in the same order every time, and clear errors for what cannot be read."""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import sysconfig
from pathlib import Path

import pytest

from r1mega.config.errors import UserError
from r1mega.data.text import docstrings, documents, stdlib_documents


def test_docstrings_by_hand():
    source = '"""Module."""\nclass A:\n    "Class."\n    def f(self):\n'
    source += '        """Method.\n\n        More."""\n\ndef g():\n    return "no"\n'
    assert docstrings(source) == "Module.\n\nA: Class.\n\nf: Method.\n\nMore."
    assert docstrings("x = 1\n") == "" and docstrings("def (:\n") == ""


def test_stdlib_is_a_repeatable_cross_section():
    first = list(itertools.islice(stdlib_documents(), 20))
    assert first == list(itertools.islice(stdlib_documents(), 20))
    assert sum("import " in doc for doc in first) >= 10 and all(doc.strip() for doc in first)
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in root.rglob("*.py") if "test" not in path.parts]
    with_prose = next(doc for doc in first if doc.count('"""') > 2 and "\n\n\n" in doc)
    source = next(text for path in modules if with_prose.endswith("\n\n\n" + (text := path.read_text(errors="replace"))) and text)
    assert with_prose == f"{docstrings(source)}\n\n\n{source}"


def test_files_and_folders_in_order(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("bee")
    (folder / "a.md").write_text("ay")
    (folder / "sub" / "c.jsonl").write_text('{"text": "sea"}\n\n{"text": "see"}\n')
    (folder / ".hidden").write_text("no")
    (folder / "empty.txt").write_text(" \n")
    (folder / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "d.jsonl").write_text('{"body": "dee"}\n')
    assert list(documents([str(folder)])) == ["ay", "bee", "sea", "see"]
    assert list(documents([str(tmp_path / "d.jsonl"), str(folder / "b.txt")], text_column="body")) == ["dee", "bee"]


def test_byte_limit_cuts_the_last_document_between_characters(tmp_path):
    (tmp_path / "a.txt").write_text("aaaa", encoding="utf-8")
    (tmp_path / "b.txt").write_text("éé", encoding="utf-8")  # 4 bytes
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert list(documents(sources, limit_bytes=3)) == ["aaa"]
    assert list(documents(sources, limit_bytes=4)) == ["aaaa"]
    assert list(documents(sources, limit_bytes=7)) == ["aaaa", "é"]
    assert list(documents(sources, limit_bytes=100)) == ["aaaa", "éé"]


def test_bad_sources_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "column.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "hollow").mkdir()
    for source, says in (
        ("missing.txt", "which does not exist"),
        ("empty.txt", "got an empty file"),
        ("latin.txt", "text is UTF-8; got .* at byte 3"),
        ("empty.jsonl", "got an empty file"),
        ("column.jsonl", "line 2: the column text holds text; got columns body"),
        ("hollow", "holds UTF-8 files; got none"),
    ):
        with pytest.raises(UserError, match=says):
            list(documents([str(tmp_path / source)]))


def test_compressed_text_and_records_in_a_folder(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("ay é".encode()))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(b'{"text": "bee"}\n{"text": "be"}\n'))
    (tmp_path / "c.md.bz2").write_bytes(bz2.compress(b"sea"))
    (tmp_path / "d.tar.gz").write_bytes(gzip.compress(b"name\0\0\0and binary"))
    assert list(documents([str(tmp_path)])) == ["ay é", "bee", "be", "sea"]
    with pytest.raises(UserError, match="d.tar.gz: text is UTF-8; got a zero byte, as archives have them; unpack it"):
        list(documents([str(tmp_path / "d.tar.gz")]))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"cut short" * 99)[:-9])
    with pytest.raises(UserError, match="e.txt.gz: a whole gzip file; got .*; copy or compress it again"):
        list(documents([str(tmp_path)]))


def test_parquet_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "texts").mkdir()
    table = pyarrow.table({"text": [f"document {n}" for n in range(2500)], "other": range(2500)})
    parquet.write_table(table, tmp_path / "texts" / "a.parquet", row_group_size=1000)
    (tmp_path / "texts" / "b.txt").write_text("bee")
    assert list(documents([str(tmp_path / "texts")])) == [*(f"document {n}" for n in range(2500)), "bee"]
    with pytest.raises(UserError) as caught:
        list(documents([str(tmp_path / "texts")], text_column="texts"))
    assert str(caught.value) == (
        f"{tmp_path}/texts/a.parquet row 1: the column texts holds text; got columns text, other; did you mean text? set text_column"
    )
