"""prepare, end to end on small input: the folder it writes, its determinism, its errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from r1mega.config.data import PrepareConfig, ProblemSourceConfig, TokenizerConfig
from r1mega.config.errors import UserError
from r1mega.data.loader import PretrainLoader, SftLoader, validation_batches
from r1mega.data.prepare import prepare
from r1mega.data.problems import load_problems
from r1mega.data.split import normal_text
from r1mega.data.tokenfile import TokenFile, check_tokenizer
from r1mega.data.tokenizer import ASSISTANT, BOS, EOS, USER, load_tokenizer, make_response

TEXT = "The quick brown fox jumps over the lazy dog, then rests.\n"


def sums(**numbers):
    return {"sums": ProblemSourceConfig(options={"max_terms": 3, "max_digits": 1}, **numbers)}


def config(tmp_path, name="out", **changes):
    folder = tmp_path / "texts"
    folder.mkdir(exist_ok=True)
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(f"{i} {TEXT}" * 3)
    fields = {
        "text": [str(folder)], "valid_share": 0.2, "tokenizer": TokenizerConfig(vocab_size=400), "worked": 60, "sft": 30,
        "problems": sums(num_train=80, num_valid=10, num_test=20), "worked_careful_share": 0.75, "sft_careful_share": 0.5,
    }  # fmt: skip
    return PrepareConfig(out=str(tmp_path / name), **{**fields, **changes})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    base = tmp_path_factory.mktemp("prepare")
    cfg = config(base)
    return base, cfg, prepare(cfg)


def test_everything_is_written_and_fits_together(prepared):
    base, _, result = prepared
    out = base / "out"
    assert result["problems"] == {"train": 80, "valid": 10, "test": 20} and result["skipped"] == 0
    tokenizer = load_tokenizer(out / "tokenizer")
    assert result["vocab_size"] == tokenizer.vocab_size <= 400 and result["tokenizer_hash"] == tokenizer.hash
    for name, docs in (("text", 16), ("text_valid", 4), ("worked", 60), ("worked_valid", 10), ("sft", 30), ("sft_valid", 10)):
        file = TokenFile(out / name)
        file.verify()
        check_tokenizer(file.meta, tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size)
        assert len(file) == docs == result[name]["docs"] and file.meta["num_tokens"] == result[name]["tokens"]
    assert not list(out.rglob("*.tmp"))


def test_documents_are_the_texts_and_solutions(prepared):
    base, _, _ = prepared
    out = base / "out"
    tokenizer = load_tokenizer(out / "tokenizer")
    texts = [
        tokenizer.decode(TokenFile(out / name).document(i))
        for name in ("text", "text_valid")
        for i in range(len(TokenFile(out / name)))
    ]
    assert sorted(texts) == sorted((base / "texts" / f"{i:02}.txt").read_text() for i in range(20))
    train = load_problems(out / "problems" / "train.jsonl")
    worked = TokenFile(out / "worked")
    for i in (0, 59):
        text = tokenizer.decode(worked.document(i), skip_special=False).removesuffix("<｜end▁of▁sentence｜>")
        assert text.startswith(f"Question: {train[i].question}\nReasoning: ") and text.endswith(f"\nAnswer: {train[i].answer}")
        assert "<" not in text
    careful = sum(" = " in tokenizer.decode(worked.document(i)).split("Reasoning")[1] for i in range(60))
    assert 35 <= careful <= 55  # three quarters of 60 are 45
    sft = TokenFile(out / "sft")
    learnt = sft.document(0)[sft.document_mask(0) == 1]
    assert tokenizer.decode(learnt).endswith(f"</think><answer>{train[-1].answer}</answer>") and learnt[-1] == tokenizer.eos_id


def test_held_out_problems_are_nowhere_in_the_training_files(prepared):
    base, _, _ = prepared
    out = base / "out"
    tokenizer = load_tokenizer(out / "tokenizer")
    held = {normal_text(p.question) for p in load_problems(out / "problems" / "test.jsonl")}
    for name in ("worked", "sft"):
        for i in range(len(TokenFile(out / name))):
            text = normal_text(tokenizer.decode(TokenFile(out / name).document(i)))
            assert not any(f"{question} " in text for question in held)


def test_loaders_read_it(prepared):
    base, _, _ = prepared
    out = base / "out"
    batch = PretrainLoader({f"{out}/text": 1.0, f"{out}/worked": 1.0}, 32, 4, seed=0).next()
    assert batch.tokens_BS.shape == (4, 32)
    assert SftLoader({f"{out}/sft": 1.0}, 128, 2, seed=0).next().loss_mask_BS.sum() > 0
    assert len(validation_batches(f"{out}/text_valid", 16, 2, 2)) == 2


def test_the_same_config_writes_the_same_bytes(prepared):
    base, cfg, _ = prepared
    prepare(config(base, "again"))
    files = sorted(path.relative_to(cfg.out) for path in (base / "out").rglob("*") if path.is_file())
    assert len(files) == 2 + 4 * 3 + 2 * 4 + 3
    for file in files:
        assert (base / "out" / file).read_bytes() == (base / "again" / file).read_bytes(), file
    prepare(config(base, "other", seed=2))
    assert (base / "other/problems/test.jsonl").read_bytes() != (base / "out/problems/test.jsonl").read_bytes()


def test_rejection_sampled_responses_with_an_existing_tokenizer(prepared):
    base, cfg, _ = prepared
    lines = [
        {"question": f"What is {n}?", "answer": str(n), "source": "s", "id": str(n), "response": make_response("thus", str(n))}
        for n in range(5)
    ]
    (base / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    existing = TokenizerConfig(path=f"{cfg.out}/tokenizer")
    result = prepare(PrepareConfig(out=str(base / "round2"), tokenizer=existing, sft_from=str(base / "kept.jsonl")))
    tokenizer = load_tokenizer(base / "round2" / "tokenizer")
    assert tokenizer.hash == load_tokenizer(f"{cfg.out}/tokenizer").hash and result["sft"]["docs"] == 5
    file = TokenFile(base / "round2" / "sft")
    assert tokenizer.decode(file.document(4)) == "What is 4?<think>thus</think><answer>4</answer>"
    assert sorted(path.name for path in (base / "round2").iterdir()) == ["sft.bin", "sft.idx", "sft.json", "sft.mask", "tokenizer"]
    few = prepare(PrepareConfig(out=str(base / "round3"), tokenizer=existing, sft_from=str(base / "kept.jsonl"), sft=2))
    assert few["sft"]["docs"] == 2


def test_turns_with_a_tool_are_read_and_the_tools_are_not_learnt(prepared):
    base, cfg, _ = prepared
    turns = ["<tool>1 + 1</tool>", "<result>2<｜Assistant｜></result>", "so 2</think><answer>2</answer>"]
    line = {"question": "1 + 1?", "answer": "2", "source": "s", "id": "0"}
    (base / "turns.jsonl").write_text(
        json.dumps({**line, "turns": turns}) + "\n" + json.dumps({**line, "response": turns[2]}) + "\n"
    )
    existing = TokenizerConfig(path=f"{cfg.out}/tokenizer")
    prepare(PrepareConfig(out=str(base / "turned"), tokenizer=existing, sft_from=str(base / "turns.jsonl")))
    tokenizer, file = load_tokenizer(base / "turned" / "tokenizer"), TokenFile(base / "turned" / "sft")
    ids = file.document(0)
    mask = file.mask[: len(ids)]
    learnt = tokenizer.decode([token for token, own in zip(ids, mask, strict=True) if own], skip_special=False)
    assert learnt == f"{turns[0]}{EOS}{turns[2]}{EOS}"
    whole = tokenizer.decode(ids, skip_special=False)
    assert whole == f"{BOS}{USER}1 + 1?{ASSISTANT}<think>{turns[0]}{EOS}{USER}{turns[1]}{ASSISTANT}{turns[2]}{EOS}"
    assert list(ids).count(tokenizer.token_id(ASSISTANT)) == 2, "what a tool wrote out is text"
    assert tokenizer.decode(file.document(1)) == "1 + 1?<think>so 2</think><answer>2</answer>"


@pytest.mark.parametrize("turns, says", [
    (["a", "b"], "turns are the model's and the tool's in turn, the model's last; got 2 turns"),
    ([], "got 0 turns"),
    ("text", "got 'text'"),
    (["a", 3, "b</think>"], "a sample has a response with </think>; got 'b</think>'"),
    (["a", "</think>", "b"], "a sample has a response with </think>; got 'b'"),
])  # fmt: skip
def test_turns_that_are_none_are_refused_by_line(prepared, tmp_path, turns, says):
    _, cfg, _ = prepared
    (tmp_path / "bad.jsonl").write_text(json.dumps({"question": "q", "turns": turns}) + "\n")
    with pytest.raises(UserError, match=re.escape(says)):
        prepare(
            PrepareConfig(
                out=str(tmp_path / "o"),
                tokenizer=TokenizerConfig(path=f"{cfg.out}/tokenizer"),
                sft_from=str(tmp_path / "bad.jsonl"),
            )
        )


def test_importing_it_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'tokenizers', 'reasoning_gym', 'megatron'}"
    code = f"import sys, r1mega.data.prepare, r1mega.data.loader, r1mega.data.prompts; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_one_document_gives_its_end_for_validation(tmp_path):
    (tmp_path / "book.txt").write_text("0123456789" * 40)
    prepare(
        PrepareConfig(
            out=str(tmp_path / "out"),
            text=[str(tmp_path / "book.txt")],
            valid_share=0.25,
            tokenizer=TokenizerConfig(vocab_size=300),
        )
    )
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    parts = [tokenizer.decode(TokenFile(tmp_path / "out" / name).document(0)) for name in ("text", "text_valid")]
    assert [len(part) for part in parts] == [300, 100] and "".join(parts) == "0123456789" * 40


def test_without_a_valid_share_all_text_is_for_training(tmp_path):
    result = prepare(config(tmp_path, valid_share=0.0, problems={}, worked=0, sft=0))
    assert result["text"]["docs"] == 20 and "text_valid" not in result and "problems" not in result
    assert np.unique(TokenFile(tmp_path / "out" / "text").tokens).size > 10


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text": [], "problems": {}, "worked": 0, "sft": 0}, "text, problems or sft_from to prepare; got none"),
        ({"text": [], "text_bytes": 5}, "text_bytes: limits the sources of text"),
        ({"worked": 81}, "worked: a number of training problems; got 81 of 80"),
        ({"sft": 81}, "sft: a number of training problems; got 81 of 80"),
        ({"text": [], "worked": 0, "sft": 0}, "tokenizer.path: training a tokenizer takes text"),
        ({"tokenizer": TokenizerConfig(path="nowhere")}, "nowhere: a tokenizer folder has a tokenizer.json"),
        (
            {"problems": {"a": ProblemSourceConfig(dataset="rush_hour", num_train=3)}, "worked": 3, "sft": 0},
            "got none for reasoning_gym:rush_hour",
        ),
    ],
)
def test_bad_configs_are_refused(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        prepare(config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "at least one; got an empty file"),
        ("{", "line 1: each line is one JSON object"),
        ('{"response": "a</think>b"}', "line 1: a sample has a question"),
        ('{"question": "q", "response": "no end"}', "line 1: a sample has a response with </think>; got 'no end'"),
        ('{"question": "q"}', "line 1: a sample has a response with </think>; got columns question"),
    ],
)
def test_bad_samples_are_refused(tmp_path, text, says):
    (tmp_path / "kept.jsonl").write_text(text)
    with pytest.raises(UserError, match=says):
        prepare(config(tmp_path, problems={}, worked=0, sft=0, sft_from=str(tmp_path / "kept.jsonl")))
