"""Input files are looked at before anything heavy starts: absent, empty, cut short, of another vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.config.compose import composition
from r1mega.config.errors import UserError
from r1mega.config.paths import check_paths, violations

META = {"dtype": "uint16", "num_tokens": 10, "num_docs": 2, "vocab_size": 512, "eos_id": 1, "tokenizer_hash": "", "sha256": ""}


def token_file(folder: Path, name: str = "text", *, kind: str = "text", **changes) -> str:
    """A token file of 10 tokens in 2 documents: 20 bytes of tokens, 24 of starts."""
    meta = {**META, "kind": kind, **changes}
    (folder / f"{name}.bin").write_bytes(bytes(20))
    (folder / f"{name}.idx").write_bytes(bytes(24))
    (folder / f"{name}.json").write_text(json.dumps(meta))
    if kind == "samples":
        (folder / f"{name}.mask").write_bytes(bytes(10))
    return str(folder / name)


def tokenizer(folder: Path, entries: int, added: int) -> str:
    folder.mkdir()
    body = {
        "model": {"vocab": {f"t{index}": index for index in range(entries)}},
        "added_tokens": [{"id": entries + index} for index in range(added)],
    }
    (folder / "tokenizer.json").write_text(json.dumps(body))
    return str(folder)


def pretrain(path: str, *more: str) -> list[str]:
    return lines("pretrain", "model.vocab_size=512", "trainer.steps=5", f"data.train={{{path}:1}}", *more)


def lines(command: str, *overrides: str) -> list[str]:
    found = [str(item) for item in violations(composition(command, overrides).config)]
    assert all(line.count("; ") >= 2 and "\n" not in line for line in found)
    return found


def test_whole_inputs_pass(tmp_path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "manifest.json").write_text("{}")
    (tmp_path / "p.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    text, samples = token_file(tmp_path), token_file(tmp_path, "sft", kind="samples")
    init, problems = f"init={tmp_path}/checkpoint", f"data.problems={tmp_path}/p.jsonl"
    assert pretrain(text, f"data.valid={text}", f"tokenizer={tokenizer(tmp_path / 'tok', 500, 12)}") == []
    assert lines("sft", init, f"data.train={{{samples}:1}}", "trainer.steps=5") == []
    assert lines("rl", init, problems, "rl.rollouts=1") == []
    assert lines("rl", init, f"data.problems={tmp_path}", "rl.rollouts=1") == [], "a folder with a file of records"
    assert lines("prepare", f"text=[stdlib,{tmp_path}/p.jsonl,{tmp_path}]") == []
    check_paths(composition("report", [f"run={tmp_path}"]).config)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda folder: (folder / "text.bin").write_bytes(bytes(19)),
            "text.bin has 20 bytes; got 19 bytes; copy or prepare it again",
        ),
        (lambda folder: (folder / "text.bin").write_bytes(b""), "text.bin has 20 bytes; got 0 bytes"),
        (lambda folder: (folder / "text.idx").unlink(), "text.idx has 24 bytes; got no file"),
        (lambda folder: (folder / "text.json").write_text("{"), "is the meta of a token file; got JSONDecodeError"),
        (lambda folder: (folder / "text.json").write_text("{}"), "is the meta of a token file; got KeyError"),
        (lambda folder: (folder / "text.json").unlink(), "a token file: NAME.json with NAME.bin and NAME.idx; got no such path"),
    ],
)
def test_damaged_token_files(tmp_path, damage, expected) -> None:
    path = token_file(tmp_path)
    damage(tmp_path)
    found = pretrain(path)
    assert len(found) == 1 and found[0].startswith("data.train: ") and expected in found[0]


def test_a_sample_file_has_a_mask(tmp_path) -> None:
    path = token_file(tmp_path, "sft", kind="samples")
    (tmp_path / "sft.mask").unlink()
    assert "sft.mask has 10 bytes; got no file" in pretrain(path)[0]


def test_a_token_file_named_with_its_suffix(tmp_path) -> None:
    path = token_file(tmp_path)
    assert pretrain(f"{path}.bin")[0].endswith(f"got {path}.bin; use {path}")


def test_a_vocabulary_smaller_than_the_tokenizer(tmp_path) -> None:
    path = token_file(tmp_path, vocab_size=600)
    found = pretrain(path, f"tokenizer={tokenizer(tmp_path / 'tok', 500, 13)}")
    assert found[0] == f"model.vocab_size: at least the 600 entries of the tokenizer of {path}; got 512; use model.vocab_size=600"
    assert "at least the 513 entries of the tokenizer" in found[1]
    assert pretrain(path, "model.vocab_size=600", f"tokenizer={tmp_path / 'tok'}") == []


def test_a_damaged_tokenizer(tmp_path) -> None:
    path = token_file(tmp_path)
    (tmp_path / "tok").mkdir()
    assert "a folder with tokenizer.json; got no such path" in pretrain(path, f"tokenizer={tmp_path / 'tok'}")[0]
    (tmp_path / "tok" / "tokenizer.json").write_text('{"model": {"vocab": []}}')
    assert "is a BPE tokenizer; got AttributeError" in pretrain(path, f"tokenizer={tmp_path / 'tok'}")[0]


def test_absent_and_empty_inputs_name_what_is_near(tmp_path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "problems.jsonl").write_text("")
    rl = ("rl.rollouts=1", f"data.problems={tmp_path}/problem.jsonl", f"init={tmp_path}/checkpoint")
    init, problems = lines("rl", *rl)
    assert init.endswith(f"did you mean {tmp_path}/checkpoints? check the path or make it first")
    assert f"did you mean {tmp_path}/problems.jsonl?" in problems
    assert "an empty folder" in lines("export", f"checkpoint={tmp_path}/checkpoints")[0]
    assert "got a file" in lines("export", f"checkpoint={tmp_path}/problems.jsonl")[0]
    assert "an empty file" in lines("eval", f"checkpoint={tmp_path}", f"data.problems={tmp_path}/problems.jsonl")[0]
    assert "a folder " in lines("eval", f"checkpoint={tmp_path}", f"data.problems={tmp_path}/checkpoints")[0]
    assert lines("report", "run=no/such/run")[0].startswith("run: a run's folder; got no such path no/such/run; ")


def test_prepare_names_its_sources(tmp_path) -> None:
    found = lines("prepare", f"text=[stdlib,{tmp_path}/no.txt]", "problems.mine.kind=jsonl", f"sft_from={tmp_path}/no.jsonl")
    assert [line.partition(":")[0] for line in found] == ["text", "problems.mine.path", "sft_from"]
    assert lines("prepare", "problems.mine.path=x.jsonl", "problems.mine.num_train=1") == [
        "problems.mine.kind: file, since problems.mine.path is x.jsonl; got reasoning_gym; use problems.mine.kind=file, "
        "or problems.mine.path=null"
    ]


def test_all_faults_come_in_one_error(tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        check_paths(composition("rl", [f"init={tmp_path}/a", f"data.problems={tmp_path}/b", "rl.rollouts=1"]).config)
    assert len(str(caught.value).splitlines()) == 2
