"""Pretraining text as a stream of documents: Python's standard library, text files, folders of text, JSONL with a text column.

Owns where text comes from and its order, which is the same on every run. Refuses what is missing, empty or not UTF-8, and a JSONL
line that is not JSON, by line number. In: names and paths; out: one str a document.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError

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
    """All documents of ``sources`` in order: ``"stdlib"``, text files, folders, files that end in .jsonl.

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


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not blank. UserError for a missing file, or a line that is no object."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: a JSONL file; got no such file; check the path")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                start = line[:40].decode(errors="replace").strip()
                raise UserError(
                    f"{path} line {number}: each line is one JSON object; got {start!r} ({error}); mend or drop the line"
                ) from None
            if not isinstance(record, dict):
                raise UserError(
                    f"{path} line {number}: each line is one JSON object; got {type(record).__name__}; mend or drop the line"
                )
            yield number, record


def _source(source: str, text_column: str) -> Iterator[str]:
    if source == STDLIB:
        yield from stdlib_documents()
        return
    path = Path(source)
    if path.is_dir():
        yield from _folder(path, text_column)
    elif not path.is_file():
        raise UserError(f"text: a file, a folder or {STDLIB}; got {source!r}, which does not exist; check the path")
    elif path.suffix == ".jsonl":
        yield from _jsonl(path, text_column)
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: text is UTF-8; got {error.reason} at byte {error.start}; convert the file") from None
        if not text.strip():
            raise UserError(f"{path}: a text file has text; got an empty file; drop it from text=[...]")
        yield text


def _folder(folder: Path, text_column: str) -> Iterator[str]:
    """Every UTF-8 file below ``folder`` by sorted path; hidden, binary and empty files are passed over."""
    found = False
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix == ".jsonl":
            found = True
            yield from _jsonl(path, text_column)
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and "\0" not in text:
            found = True
            yield text
    if not found:
        raise UserError(f"{folder}: a folder of text holds UTF-8 files; got none; check the path")


def _jsonl(path: Path, text_column: str) -> Iterator[str]:
    found = False
    for number, record in read_jsonl(path):
        text = record.get(text_column)
        if not isinstance(text, str):
            known = ", ".join(record)
            raise UserError(f"{path} line {number}: the column {text_column} holds text; got columns {known}; set text_column")
        if text.strip():
            found = True
            yield text
    if not found:
        raise UserError(f"{path}: a JSONL of text has text; got an empty file; drop it from text=[...]")
