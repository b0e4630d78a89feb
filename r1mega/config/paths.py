"""Input files of a command, looked at before anything heavy is imported: do they exist, are they whole, do they fit each other.

In: a command's dataclass. Out: nothing, or one UserError with a line a fault. Reads metas, sizes and a tokenizer's JSON, never the
tokens: the rooms that read a file check its content.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1mega.config.bench import BenchConfig
from r1mega.config.convert import ConvertConfig
from r1mega.config.data import CompareConfig, PrepareConfig, ReportConfig
from r1mega.config.errors import UserError, Violation
from r1mega.config.rl import ChatConfig, EvalConfig, ExportConfig, RlConfig
from r1mega.config.run import ComputeConfig
from r1mega.config.tools import AutopsyConfig, LineageConfig, WhyConfig
from r1mega.config.train import PretrainConfig, SftConfig
from r1mega.files.records import rows_below

LONGEST_NAME = 255
"""Bytes of one part of a path, on the file systems that there are."""

ITEM_BYTES = {"uint16": 2, "uint32": 4}


def check_paths(config: Any) -> None:
    """Raise UserError, a line each, for every input that is missing, empty, cut short or does not fit the model's vocabulary."""
    lines = [str(found) for found in violations(config)]
    if lines:
        raise UserError("\n".join(lines))


def violations(config: Any) -> Iterator[Violation]:
    """Faults of the inputs that ``config`` names."""
    if isinstance(config, PretrainConfig | SftConfig):
        is_sft = isinstance(config, SftConfig)
        vocab, kind = None if is_sft else config.model.vocab_size, "samples" if is_sft else "text"
        for name in config.data.train:
            yield from _token_file("data.train", name, vocab, kind)
        if config.data.valid is not None:
            yield from _token_file("data.valid", config.data.valid, vocab)
    if isinstance(config, PretrainConfig):
        yield from _tokenizer("tokenizer", config.tokenizer, config.model.vocab_size)
    if isinstance(config, PretrainConfig | SftConfig | RlConfig) and config.init is not None:
        yield from _folder("init", config.init, "a checkpoint's folder")
    if isinstance(config, RlConfig) and config.teacher is not None:
        yield from _folder("teacher", config.teacher, "a checkpoint's folder")
    if isinstance(config, EvalConfig | ExportConfig | ChatConfig | LineageConfig):
        yield from _folder("checkpoint", config.checkpoint, "a checkpoint's folder")
    if isinstance(config, RlConfig | EvalConfig):
        yield from _file("data.problems", config.data.problems)
    if isinstance(config, RlConfig) and config.rl.valid.problems is not None:
        yield from _file("rl.valid.problems", config.rl.valid.problems)
    if isinstance(config, PrepareConfig):
        yield from _prepare(config)
    if isinstance(config, ReportConfig | WhyConfig | AutopsyConfig):
        yield from _folder("run", config.run, "a run's folder")
    if isinstance(config, CompareConfig):
        yield from _compared(config.run)
    if isinstance(config, ConvertConfig):
        yield from _folder("source", config.source, "a checkpoint's folder")
    if isinstance(config, BenchConfig) and config.baseline is not None:
        if config.check and not Path(config.baseline).is_file():
            yield _absent("baseline", "a file of figures", config.baseline)
        if config.write_baseline:
            yield from _written("baseline", config.baseline)
    if isinstance(config, ComputeConfig | PrepareConfig | BenchConfig) and not isinstance(config, ChatConfig):
        yield from _written("out", config.out, folder=True)
    if isinstance(config, ExportConfig | ConvertConfig):
        yield from _written("target", config.target, folder=True)
        yield from _conversion_target(Path(config.target))
    if isinstance(config, ReportConfig | CompareConfig):
        yield from _written("target", config.target)
    if isinstance(config, EvalConfig) and config.keep is not None:
        yield from _written("keep", config.keep)


def _written(where: str, name: str, *, folder: bool = False) -> Iterator[Violation]:
    """Can ``name`` be made, or written again? Nothing is made."""
    path, what = Path(name).absolute(), "a folder" if folder else "a file"
    way = f"give another {where}={'FOLDER' if folder else 'FILE'}"
    longest = max(len(os.fsencode(part)) for part in (path.name, *path.parts))
    if longest > LONGEST_NAME:
        yield Violation(where, f"{what} whose names have at most {LONGEST_NAME} bytes", f"one of {longest}", hint=way)
        return
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if there.is_dir() if there != path or folder else there.is_file():
        if not os.access(there, os.W_OK):
            yield Violation(where, f"{what} that can be written", f"{there}, which cannot", hint=way)
    else:
        kind = "a folder" if there.is_dir() else "a file"
        yield Violation(
            where, f"{what} that can be written", f"{kind} {there}" + (f" in the way of {name}" if there != path else ""), hint=way
        )


def _conversion_target(target: Path) -> Iterator[Violation]:
    """Only an earlier conversion is replaced: it has its ledger."""
    if (
        target.is_dir()
        and any(target.iterdir())
        and not any((target / name).is_file() for name in ("ledger.json", "source/ledger.json"))
    ):
        yield Violation("target", "a new folder or an earlier conversion", f"{target} with other files", hint="use another target=")


def _compared(runs: list[str]) -> Iterator[Violation]:
    places = [Path(run).resolve() for run in runs]
    if len(runs) < 2:
        yield Violation("run", "two runs or more", ", ".join(runs) or "none", hint="give run=A run=B")
    elif twice := [run for index, run in enumerate(runs) if places[index] in places[:index]]:
        yield Violation("run", "different runs", f"{twice[0]} twice", hint="give another folder")
    for run in dict.fromkeys(runs):
        yield from _folder("run", run, "a run's folder")


def _prepare(config: PrepareConfig) -> Iterator[Violation]:
    for name in config.text:
        if name != "stdlib" and not Path(name).exists():
            yield _absent("text", "a file, a folder, or stdlib", name)
    yield from _tokenizer("tokenizer.path", config.tokenizer.path, None)
    for name, source in config.problems.items():
        where = f"problems.{name}.path"
        if source.kind == "reasoning_gym" and source.path is not None:
            key = f"problems.{name}.kind"
            yield Violation(key, f"file, since {where} is {source.path}", source.kind, ((key, ("file",)),), f"or {where}=null")
        elif source.kind != "reasoning_gym" and source.path is None:
            yield Violation(where, "a source of kind file has a file", "null", hint=f"give {where}=FILE")
        elif source.kind != "reasoning_gym":
            yield from _file(where, source.path)
    if config.sft_from is not None:
        yield from _file("sft_from", config.sft_from)


def _absent(where: str, rule: str, name: str) -> Violation:
    """No such path; the way out is the most alike name that does exist."""
    parent = Path(name).parent
    while not parent.is_dir():
        parent = parent.parent
    there = sorted(os.listdir(parent))
    part = Path(name).relative_to(parent).parts[:1] if Path(name) != parent else ()
    close = difflib.get_close_matches(part[0], there, n=1) if part else []
    hint = f"did you mean {parent / close[0]}? " if close and close[0] != part[0] else ""
    return Violation(where, rule, f"no such path {name}", hint=f"{hint}check the path or make it first")


def _folder(where: str, name: str, rule: str) -> Iterator[Violation]:
    path = Path(name)
    if not path.is_dir():
        yield Violation(where, rule, f"a file {name}", hint="give its folder") if path.is_file() else _absent(where, rule, name)
    elif not any(path.iterdir()):
        yield Violation(where, rule, f"an empty folder {name}", hint="give a folder that a finished run wrote")


def _file(where: str, name: str) -> Iterator[Violation]:
    path, rule = Path(name), "a JSONL or Parquet file"
    if path.is_dir():
        if not rows_below(path):
            yield Violation(where, f"{rule}, or a folder with some", f"a folder {name} without one", hint="give the file")
    elif not path.is_file():
        yield _absent(where, rule, name)
    elif path.stat().st_size == 0:
        yield Violation(where, f"{rule} with at least one record", f"an empty file {name}", hint="write it again")


def _token_file(where: str, name: str, vocab_size: int | None, kind: str | None = None) -> Iterator[Violation]:
    """NAME.json with NAME.bin, NAME.idx and, for samples, NAME.mask, of the sizes that the meta says."""
    meta_path = Path(f"{name}.json")
    if not meta_path.is_file():
        base = Path(name).with_suffix("") if Path(name).suffix in (".bin", ".idx", ".json", ".mask") else None
        if base is not None and Path(f"{base}.json").is_file():
            yield Violation(where, "a token file is named without suffix", name, hint=f"use {base}")
        else:
            yield _absent(where, "a token file: NAME.json with NAME.bin and NAME.idx", str(meta_path))
        return
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        num_tokens, vocab = int(meta["num_tokens"]), int(meta["vocab_size"])
        sizes = {"bin": num_tokens * ITEM_BYTES[meta["dtype"]], "idx": 8 * (int(meta["num_docs"]) + 1)}
        sizes |= {"text": {}, "samples": {"mask": num_tokens}}[meta["kind"]]
    except (ValueError, KeyError, TypeError) as error:
        yield Violation(
            where, f"{meta_path} is the meta of a token file", f"{type(error).__name__} {error}", hint="prepare it again"
        )
        return
    if num_tokens < 1:
        yield Violation(where, "at least one token", f"an empty token file {name}", hint="prepare it from more text")
        return
    for suffix, size in sizes.items():
        part = Path(f"{name}.{suffix}")
        actual = part.stat().st_size if part.is_file() else None
        if actual != size:
            yield Violation(
                where,
                f"{part} has {size} bytes",
                "no file" if actual is None else f"{actual} bytes",
                hint="copy or prepare it again",
            )
    if kind is not None and meta["kind"] != kind:
        way = "pretrain reads text files (text, worked), sft reads sample files (sft)"
        yield Violation(where, f"a token file of kind {kind}", f"{name} of kind {meta['kind']}", hint=way)
    if vocab_size is not None and vocab > vocab_size:
        yield Violation(
            "model.vocab_size",
            f"at least the {vocab} entries of the tokenizer of {name}",
            vocab_size,
            (("model.vocab_size", (vocab,)),),
        )


def _tokenizer(where: str, name: str | None, vocab_size: int | None) -> Iterator[Violation]:
    if name is None:
        return
    path = Path(name) / "tokenizer.json"
    if not path.is_file():
        yield _absent(where, "a folder with tokenizer.json", str(path))
        return
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        ids = [*body["model"]["vocab"].values(), *(token["id"] for token in body.get("added_tokens", []))]
        entries = max(ids) + 1
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield Violation(where, f"{path} is a BPE tokenizer", f"{type(error).__name__} {error}", hint="prepare it again")
        return
    if vocab_size is not None and entries > vocab_size:
        yield Violation(
            "model.vocab_size",
            f"at least the {entries} entries of the tokenizer {name}",
            vocab_size,
            (("model.vocab_size", (entries,)),),
        )
