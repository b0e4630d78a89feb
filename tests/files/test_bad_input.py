"""What a user may get wrong about files, from the command line: one line, status 2, no traceback."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from r1mega import cli

GOOD = json.dumps({"question": "What is 1 plus 1?", "answer": "2"}) + "\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Files with one fault each; commands write below it."""
    packed = gzip.compress(GOOD.encode() * 500)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-9])
    (tmp_path / "corrupt.jsonl.gz").write_bytes(packed[:30] + b"\xff" * 9 + packed[39:])
    (tmp_path / "plain.jsonl.gz").write_text(GOOD)
    (tmp_path / "x.jsonl.zst").write_bytes(b"(\xb5/\xfd")
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"\x89PNG\xff\xfe")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    return tmp_path


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("text=[file://{folder}/god.jsonl]", ["text", "no such file://", "did you mean file://{folder}/good.jsonl?"]),
        ("text=[flie://{folder}/good.jsonl]", ["text", "flie://", "did you mean file?"]),
        ("problems={{m: {{kind: file, path: file://{folder}/cut.jsonl.gz}}}}", ["file://{folder}/cut.jsonl.gz: a whole gzip file", "end-of-stream", "compress it again"]),
        ("text=[{folder}/corrupt.jsonl.gz]", ["{folder}/corrupt.jsonl.gz: a whole gzip file", "copy or compress it again"]),
        ("problems={{m: {{kind: file, path: {folder}/plain.jsonl.gz}}}}", ["plain.jsonl.gz", "Not a gzipped file"]),
        ("problems={{m: {{kind: file, path: {folder}/x.jsonl.zst}}}}", ["x.jsonl.zst: zstandard reads .zst", "pip install 'r1mega[zstd]'"]),
        ("problems={{m: {{kind: file, path: file://{folder}/good.jsonl, answer_column: anser}}}}", ["good.jsonl line 1", "anser", "did you mean answer?"]),
        ("problems={{m: {{kind: fil, path: {folder}/good.jsonl}}}}", ["problems.m.kind", "one of reasoning_gym, file, jsonl", "fil"]),
        ("problems.m.path={folder}/good.jsonl", ["problems.m.kind", "use problems.m.kind=file"]),
        ("text=[file://{folder}/images]", ["file://{folder}/images: a folder of text holds UTF-8 files; got none"]),
        ("text=[hf:gsm8k]", ["text: hf:OWNER/NAME", "'hf:gsm8k'"]),
        ("tokenizer.path=hf:o/n/m", ["tokenizer.path: hf:OWNER/NAME", "'hf:o/n/m'"]),
        ("out=hf:o/n", ["out: a path or a URL to write to; got hf:o/n"]),
        ("out=zip://x::file://{folder}/x.zip", ["out: one URL to write to", "chain"]),
    ],
)  # fmt: skip
def test_one_line_for_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture, argument: str, says: list[str]) -> None:
    others = [
        item for item in ("out={folder}/out", "text=[stdlib]", "text_bytes=2000") if not argument.startswith(item.partition("=")[0])
    ]
    arguments = [item.format(folder=folder) for item in ("prepare", *others, argument)]
    if argument.startswith("text="):
        arguments.remove("text_bytes=2000")
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    for text in says:
        assert text.format(folder=folder) in error
    assert len(error.strip().splitlines()) == 1 and error.count("; ") >= 2 and "got" in error and "Traceback" not in error


def test_parquet_that_is_cut_short_or_lacks_the_column(folder: Path, capsys: pytest.CaptureFixture) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"question": ["q"], "reply": ["1"]}), folder / "x.parquet")
    mine = "problems={{m: {{kind: file, path: {folder}/x.parquet, answer_column: {column}, num_train: 1}}}}"
    assert cli.main(["prepare", f"out={folder}/out", mine.format(folder=folder, column="repli")]) == 2
    assert (
        "x.parquet row 1: a problem has an answer in repli; got columns question, reply; did you mean reply?"
        in capsys.readouterr().err
    )
    whole = (folder / "x.parquet").read_bytes()
    (folder / "x.parquet").write_bytes(whole[:-20])
    assert cli.main(["prepare", f"out={folder}/out", mine.format(folder=folder, column="reply")]) == 2
    assert f"{folder}/x.parquet: a whole Parquet file; got " in capsys.readouterr().err


def test_a_key_that_is_a_url_reaches_its_knob(folder: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [
        f"out={folder}/out",
        f"data.train={{file://{folder}/none: 1}}",
        "trainer.steps=1",
        "optim.warmup_steps=0",
        "data.sequence_length=64",
    ]
    assert cli.main(["pretrain", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"data.train: a file or folder at a URL; got no such file://{folder}/none; ")
