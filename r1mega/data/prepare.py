"""``r1mega prepare``: text and problems to the folder that pretraining, SFT and RL read.

Owns the order of the work and the names of the files; the parts are its neighbours'. All follows from the config and its seed.
In: :class:`~r1mega.config.data.PrepareConfig`; out: files, and a dict of counts and paths.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from r1mega.config.data import PrepareConfig
from r1mega.config.errors import UserError
from r1mega.data.problems import Problem, write_problems
from r1mega.data.split import make_split
from r1mega.data.text import documents
from r1mega.data.tokenfile import TokenFileWriter
from r1mega.data.tokenizer import END_THINK, Tokenizer, copy_tokenizer, encode_turns, load_tokenizer, train_tokenizer
from r1mega.data.worked import Worked, worked_solution
from r1mega.files.records import read_rows

_BATCH_DOCS = 64  # documents tokenized at once
_TRAIN_BYTES = 8 << 20  # text, and worked problems, that the tokenizer is trained on; more changes few merges


def prepare(cfg: PrepareConfig) -> dict[str, Any]:
    """Write the folder ``cfg.out`` as PrepareConfig describes it.

    Returns {"tokenizer": path, "vocab_size", "tokenizer_hash", "seconds", and for each token file written NAME: {"path", "tokens",
    "docs"}, for the problems "problems": {"train", "valid", "test": number}, "skipped": problems without a worked solution}. Raises
    UserError for input that is missing, empty or damaged, and when there is nothing to do.
    """
    begun = time.monotonic()
    if not (cfg.text or cfg.problems or cfg.sft_from):
        raise UserError("prepare: text, problems or sft_from to prepare; got none; set text=[stdlib] or problems=...")
    if cfg.text_bytes and not cfg.text:
        raise UserError(
            f"text_bytes: limits the sources of text; got {cfg.text_bytes} and no source; set text=[stdlib] or leave it 0"
        )
    out = Path(cfg.out)
    result: dict[str, Any] = {"skipped": 0}

    split = make_split(cfg.problems, cfg.seed)
    if cfg.problems:
        result["problems"] = {
            part: write_problems(out / "problems" / f"{part}.jsonl", problems) for part, problems in split.items()
        }
        _say(f"problems: {', '.join(f'{num} {part}' for part, num in result['problems'].items())}")
    train, valid = split["train"], split["valid"]
    worked_problems = _first(train, cfg.worked, "worked")
    # From the end: pretraining takes its worked problems from the start, so that the two share as few as they can.
    sft_problems = [] if cfg.sft_from else _first(train[::-1], cfg.sft, "sft")
    worked = {
        "worked": _work_out(worked_problems, cfg.worked_careful_share, cfg.seed, "worked"),
        "worked_valid": _work_out(valid if cfg.worked else [], cfg.worked_careful_share, cfg.seed, "worked_valid"),
        "sft": _work_out(sft_problems, cfg.sft_careful_share, cfg.seed, "sft"),
        "sft_valid": _work_out(valid if cfg.sft else [], cfg.sft_careful_share, cfg.seed, "sft_valid"),
    }
    result["skipped"] = len(worked_problems) - len(worked["worked"]) + len(sft_problems) - len(worked["sft"])
    for name, wanted in (("worked", worked_problems), ("sft", sft_problems)):
        if wanted and not worked[name]:
            raise UserError(
                f"{name}: problems with worked solutions; got none for {wanted[0].source}; add a solver with "
                f"r1mega.data.worked.careful, use problems with a solution, or set {name}_careful_share=0"
            )
    texts = {name: [w.document(p.question) for p, w in worked[name]] for name in ("worked", "worked_valid")}
    samples = {name: [(p.question, [w.response]) for p, w in worked[name]] for name in ("sft", "sft_valid")}
    to_train_on = texts["worked"] or [w.document(p.question) for p, w in worked["sft"]]
    if cfg.sft_from:
        samples["sft"] = _read_responses(cfg.sft_from, max(cfg.sft, 0))

    tokenizer = _tokenizer(cfg, out / "tokenizer", to_train_on)
    result |= {"tokenizer": str(out / "tokenizer"), "vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.hash}
    _say(f"tokenizer: {tokenizer.vocab_size} tokens in {out / 'tokenizer'}")
    if cfg.text:
        result |= _write_text(cfg, tokenizer, out)
    result |= {name: _write(out / name, tokenizer, docs) for name, docs in texts.items() if docs}
    result |= {name: _write_samples(out / name, tokenizer, pairs) for name, pairs in samples.items() if pairs}
    result["seconds"] = round(time.monotonic() - begun, 3)
    return result


def _tokenizer(cfg: PrepareConfig, target: Path, worked_docs: Sequence[str]) -> Tokenizer:
    """The run's tokenizer in ``target``: a copy of an existing one, or one trained on text and worked problems."""
    if cfg.tokenizer.path:
        load_tokenizer(cfg.tokenizer.path)
        copy_tokenizer(cfg.tokenizer.path, target)
        return load_tokenizer(target)
    if not cfg.text and not worked_docs:
        raise UserError(
            "tokenizer.path: training a tokenizer takes text or worked problems; got neither; set tokenizer.path, text or worked"
        )
    limit = min(cfg.text_bytes or _TRAIN_BYTES, _TRAIN_BYTES)
    text = documents(cfg.text, text_column=cfg.text_column, limit_bytes=limit)
    texts = itertools.chain(text, _limited(worked_docs, _TRAIN_BYTES))
    return train_tokenizer(texts, target, vocab_size=cfg.tokenizer.vocab_size, split_digits=cfg.tokenizer.split_digits)


def _write_text(cfg: PrepareConfig, tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """text.* and, with a valid_share above 0, text_valid.*."""
    held: list[str] = []
    docs = documents(cfg.text, text_column=cfg.text_column, limit_bytes=cfg.text_bytes)
    result = {"text": _write(out / "text", tokenizer, _hold_out(docs, cfg.valid_share, cfg.seed, held))}
    if held:
        result["text_valid"] = _write(out / "text_valid", tokenizer, held)
    return result


def _hold_out(docs: Iterable[str], share: float, seed: int, held: list[str]) -> Iterator[str]:
    """Yield documents to train on and put each of the others, drawn with probability ``share``, into ``held``. If none was drawn,
    the last document gives its end: ``share`` of all text, at most half of the document.
    """
    rng = random.Random(f"{seed}/valid")
    total = 0
    docs = iter(docs)
    doc = next(docs, None)
    while doc is not None:
        after = next(docs, None)
        total += len(doc)
        drawn = rng.random() < share
        if share > 0 and after is None and not held:
            cut = len(doc) - max(1, round(min(share * total, len(doc) / 2)))
            held.append(doc[cut:])
            if cut:
                yield doc[:cut]
        elif drawn and after is not None:
            held.append(doc)
        else:
            yield doc
        doc = after


def _write(path: Path, tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """Write a text file, tokenizing some documents at a time."""
    texts = iter(texts)
    with _writer(path, tokenizer, "text") as writer:
        while batch := list(itertools.islice(texts, _BATCH_DOCS)):
            for ids in tokenizer.encode_batch(batch):
                if ids:
                    writer.add(ids)
    return _written(writer)


def _write_samples(path: Path, tokenizer: Tokenizer, pairs: Iterable[tuple[str, list[str]]]) -> dict[str, Any]:
    """Write a sample file of (question, turns)."""
    with _writer(path, tokenizer, "samples") as writer:
        for question, turns in pairs:
            writer.add(*encode_turns(tokenizer, question, turns))
    return _written(writer)


def _writer(path: Path, tokenizer: Tokenizer, kind: str) -> TokenFileWriter:
    return TokenFileWriter(path, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, tokenizer_hash=tokenizer.hash, kind=kind)


def _written(writer: TokenFileWriter) -> dict[str, Any]:
    _say(f"{writer.path.name}: {writer.num_tokens:,} tokens in {writer.num_docs:,} documents")
    return {"path": str(writer.path), "tokens": writer.num_tokens, "docs": writer.num_docs}


def _first(problems: Sequence[Problem], num: int, where: str) -> Sequence[Problem]:
    if num > len(problems):
        raise UserError(
            f"{where}: a number of training problems; got {num} of {len(problems)}; raise problems.NAME.num_train or use -1: all"
        )
    return problems if num < 0 else problems[:num]


def _work_out(problems: Iterable[Problem], careful_share: float, seed: int, name: str) -> list[tuple[Problem, Worked]]:
    """Each problem with its worked solution, in a style that is drawn by share; problems without one are left out."""
    rng = random.Random(f"{seed}/{name}")
    pairs = []
    for problem in problems:
        style = "careful" if rng.random() < careful_share else "terse"
        worked = worked_solution(problem, style, rng)
        if worked is not None:
            pairs.append((problem, worked))
    return pairs


def _read_responses(path: str, limit: int) -> list[tuple[str, list[str]]]:
    """(question, turns) of records {question, answer, source, id, response} or, with a tool, {..., turns}, in file order; limit 0:
    all.

    ``turns``: what the model writes and what it reads, in turn. Of them as of a response the model's own part has </think>.
    """
    pairs: list[tuple[str, list[str]]] = []
    for where, _, record in read_rows(path):
        if limit and len(pairs) == limit:
            break
        question, turns = record.get("question"), record.get("turns")
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{where}: a sample has a question; got columns {', '.join(record)}; add it or drop the line")
        turns = [record.get("response")] if turns is None else turns
        if not isinstance(turns, list) or len(turns) % 2 == 0:
            got = f"{len(turns)} turns" if isinstance(turns, list) else repr(turns)[:40]
            raise UserError(f"{where}: turns are the model's and the tool's in turn, the model's last; got {got}; correct the line")
        if not all(isinstance(turn, str) for turn in turns) or END_THINK not in "".join(turns[::2]):
            got = repr(turns[-1][:40]) if isinstance(turns[-1], str) else f"columns {', '.join(record)}"
            raise UserError(f"{where}: a sample has a response with {END_THINK}; got {got}; add it or drop the line")
        pairs.append((question, turns))
    if not pairs:
        raise UserError(f"{path}: a file of samples holds at least one; got an empty file; check the stage that wrote it")
    return pairs


def _limited(texts: Iterable[str], limit_bytes: int) -> Iterator[str]:
    total = 0
    for text in texts:
        total += len(text.encode())
        if total > limit_bytes:
            return
        yield text


def _say(line: str) -> None:
    print(f"prepare: {line}", flush=True)
