"""Pretraining text as a stream of documents: Python's standard library, text files, folders of text, records with a text column.

Owns where text comes from and its order, which is the same on every run. Refuses what is missing, empty or not UTF-8, and a record
without text, by its line or row. How files are decompressed and decoded is :mod:`r1mega.files.records`'. In: names and local paths;
out: one str a document.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from r1mega.config.errors import UserError, nearest
from r1mega.files.records import is_hidden, is_rows, read_rows, read_text

STDLIB = "stdlib"
# Tests and installed packages differ between distributions; codec tables are numbers, not text.
_NOT_STDLIB = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib-dynload",
    "encodings",
    "__pycache__",
    "ensurepip",
}


def documents(sources: Sequence[str], *, text_column: str = "text", limit_bytes: int = 0) -> Iterator[str]:
    """All documents of ``sources`` in order: ``"stdlib"``, text, JSONL and Parquet files, folders of these, compressed or not.

    limit_bytes: UTF-8 bytes at most, the last document is cut; 0: all. Raises UserError for a source that cannot be read, when the
    stream reaches it.
    """
    left = limit_bytes
    for source in sources:
        for text in _source(source, text_column):
            if limit_bytes:
                data = text.encode()
                if len(data) >= left:
                    cut = data[:left].decode(errors="ignore")
                    if cut:
                        yield cut
                    return
                left -= len(data)
            yield text


def stdlib_documents() -> Iterator[str]:
    """For each module of the running Python's library one document: its docstrings, when it has some, then its source.

    Both in one, so that what is held out for validation is not trained on in its other form. Modules come in the order of their
    paths' hashes: the same everywhere, and a byte limit takes a cross-section.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in root.rglob("*.py") if not _NOT_STDLIB.intersection(path.relative_to(root).parts)]
    for path in sorted(modules, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()):
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if source.strip():
            prose = docstrings(source)
            yield f"{prose}\n\n\n{source}" if prose else source


def docstrings(source: str) -> str:
    """A module's docstrings, outermost first, each under the name that it describes; "" for none, or if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings are not our business
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            found.append(text if isinstance(node, ast.Module) else f"{node.name}: {text}")
    return "\n\n".join(found)


def _source(source: str, text_column: str) -> Iterator[str]:
    if source == STDLIB:
        yield from stdlib_documents()
        return
    path = Path(source)
    if path.is_dir():
        yield from _folder(path, text_column)
    elif not path.is_file():
        raise UserError(f"text: a file, a folder or {STDLIB}; got {source!r}, which does not exist; check the path")
    elif is_rows(path):
        yield from _rows(path, text_column)
    else:
        try:
            text = read_text(path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: text is UTF-8; got {error.reason} at byte {error.start}; convert the file") from None
        if "\0" in text:
            raise UserError(f"{path}: text is UTF-8; got a zero byte, as archives have them; unpack it and give the folder")
        if not text.strip():
            raise UserError(f"{path}: a text file has text; got an empty file; drop it from text=[...]")
        yield text


def _folder(folder: Path, text_column: str) -> Iterator[str]:
    """Every UTF-8 file below ``folder`` by sorted path; hidden, binary and empty files are passed over, damaged ones are not."""
    found = False
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or is_hidden(path, folder):
            continue
        if is_rows(path):
            found = True
            yield from _rows(path, text_column)
            continue
        try:
            text = read_text(path)
        except UnicodeDecodeError:
            continue
        if text.strip() and "\0" not in text:
            found = True
            yield text
    if not found:
        raise UserError(f"{folder}: a folder of text holds UTF-8 files; got none; check the path")


def _rows(path: Path, text_column: str) -> Iterator[str]:
    found = False
    for row in read_rows(path, [text_column]):
        text = row.values.get(text_column)
        if not isinstance(text, str):
            known = ", ".join(row.values)
            way = f"{nearest(text_column, row.values)}set text_column"
            raise UserError(f"{row.where}: the column {text_column} holds text; got columns {known}; {way}")
        if text.strip():
            found = True
            yield text
    if not found:
        raise UserError(f"{path}: a file of texts has text; got an empty file; drop it from text=[...]")
