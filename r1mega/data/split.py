"""From problem sources to train, valid and test problems that share no question.

Owns generation through reasoning-gym, the normal form by which two questions count as the same, and the split: the held-out
problems are chosen first, over all sources, so that nothing trained on can equal one of them. Refuses a source with too few
distinct problems.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from r1mega.config.data import ProblemSourceConfig
from r1mega.config.errors import UserError, nearest
from r1mega.data.problems import GENERATED, Problem, load_problems

PARTS = ("test", "valid", "train")
"""The order in which problems are handed out."""

_OPERATORS = "-*/%"  # the others are symbols in Unicode, and symbols are all kept
_PATIENCE = 200  # draws in a row without a new problem after which a generated data set counts as used up
_CHUNK = 1000  # entries of one reasoning-gym data set: entry i comes from seed + i, but some data sets prepare all of them at once


def normal_text(text: str) -> str:
    """``text`` as held-out problems are compared: casefolded, whitespace and punctuation folded to single spaces.

    What changes an arithmetic problem is kept: signs and operators (but not a hyphen between letters) and the point between digits.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    out = []
    for i, char in enumerate(text):
        before, after = text[i - 1 : i], text[i + 1 : i + 2]
        if unicodedata.category(char) == "Pd" or char == "\u2212":
            char = "-"
        if char.isalnum() or unicodedata.category(char).startswith("M") or (char == "." and before.isdigit() and after.isdigit()):
            out.append(char)
        elif unicodedata.category(char).startswith("S") or (char in _OPERATORS and not (before.isalpha() and after.isalpha())):
            out.append(f" {char} ")
        else:
            out.append(" ")
    return re.sub(r"\s+", " ", "".join(out)).strip()


def same_as(problem: Problem) -> list[str]:
    """The marks of a problem: another with any of them is the same problem.

    Its normal text, and for a generated one what it was made from, so that the same sum in other words counts as the same.
    """
    marks = [normal_text(problem.question)]
    if problem.dataset is not None:
        made_from = {k: v for k, v in problem.metadata.items() if k not in ("source_dataset", "source_index", "difficulty")}
        if made_from:
            marks.append(problem.source + json.dumps(made_from, sort_keys=True, ensure_ascii=False))
    return marks


def make_split(sources: Mapping[str, ProblemSourceConfig], seed: int) -> dict[str, list[Problem]]:
    """Problems of all sources as {"train", "valid", "test"}, each in a shuffled order, no problem twice and none in two of them.

    Sources give num_train, num_valid and num_test problems each. Deterministic by ``seed``. Raises UserError when a source has too
    few distinct problems, cannot be read, or is no data set of reasoning-gym.
    """
    streams = {name: _stream(name, source, seed) for name, source in sources.items()}
    split: dict[str, list[Problem]] = {part: [] for part in ("train", "valid", "test")}
    seen: set[str] = set()
    for part in PARTS:
        for name, source in sources.items():
            wanted = getattr(source, f"num_{part}")
            if wanted < 0 and source.kind == "reasoning_gym":
                raise UserError(f"problems.{name}.num_{part}: -1 (all) is for kind file; got {wanted}; give a number of problems")
            got = _take(streams[name], wanted, seen)
            if len(got) < wanted:
                raise UserError(
                    f"problems.{name}.num_{part}: the source has enough problems that no other part holds; got {len(got)} of "
                    f"{wanted}; lower num_test, num_valid or num_train, or widen the source's options"
                )
            split[part] += got
    for part, problems in split.items():
        random.Random(f"{seed}/{part}").shuffle(problems)
    return split


def generate(dataset: str, options: Mapping[str, Any], seed: int, where: str = "problems") -> Iterator[Problem]:
    """Problems of a reasoning-gym data set without end. Raises UserError for an unknown one, or options that it refuses."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        hint = nearest(dataset, DATASETS)
        raise UserError(
            f"{where}.dataset: a data set of reasoning-gym; got {dataset!r}; {hint}reasoning_gym lists {len(DATASETS)} of them"
        )
    reserved = {"seed", "size"}.intersection(options)
    if reserved:
        raise UserError(f"{where}.options: seed and size follow from the run; got {reserved.pop()}; use seed and num_train")
    for index in itertools.count():
        if index % _CHUNK == 0:
            try:
                made = reasoning_gym.create_dataset(dataset, seed=seed + index, size=_CHUNK, **options)
            except Exception as error:  # each data set checks its options in its own way, by assertion mostly
                got = f"{dict(options)} ({error or type(error).__name__})"
                raise UserError(
                    f"{where}.options: options of reasoning-gym's {dataset}; got {got}; see its config class"
                ) from error
        entry = made[index % _CHUNK]
        answer = entry["answer"]
        yield Problem(
            id=f"{dataset}:{seed}:{index}",
            question=entry["question"],
            answer="" if answer is None else str(answer),
            source=GENERATED + dataset,
            metadata=_as_json(entry, made, where, dataset),
        )


def _as_json(entry: dict[str, Any], made: Any, where: str, dataset: str) -> dict[str, Any]:
    """The entry's metadata as JSON gives it back; UserError when the data set's scorer would judge differently by it."""
    try:
        metadata = json.loads(json.dumps(entry["metadata"]))
        answer = None if entry["answer"] is None else str(entry["answer"])
        same = made.score_answer(answer, entry) == made.score_answer(answer, {**entry, "metadata": metadata})
    except Exception as error:  # a scorer that meets a list where it had a tuple fails in any way
        raise UserError(
            f"{where}.dataset: problems are kept as JSON; got {dataset}, which cannot be ({error}); use another data set"
        ) from error
    if not same:
        raise UserError(f"{where}.dataset: problems are kept as JSON; got {dataset}, whose scorer needs more; use another data set")
    return metadata


def _stream(name: str, source: ProblemSourceConfig, seed: int) -> Iterator[Problem]:
    own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1
    if source.kind == "reasoning_gym":
        yield from generate(source.dataset, source.options, own_seed, f"problems.{name}")
        return
    if not source.path:
        raise UserError(f"problems.{name}.path: kind file reads a file; got {source.path}; set the path")
    columns = {"question_column": source.question_column, "answer_column": source.answer_column}
    problems = load_problems(source.path, **columns)
    random.Random(own_seed).shuffle(problems)
    yield from problems


def _take(stream: Iterator[Problem], wanted: int, seen: set[str]) -> list[Problem]:
    """The next ``wanted`` (-1: all) problems of a stream that are not ``seen``; fewer when the stream ends or repeats itself."""
    got: list[Problem] = []
    repeats = 0
    while len(got) != wanted and (problem := next(stream, None)) is not None:
        marks = same_as(problem)
        if not seen.isdisjoint(marks):
            repeats += 1
            if problem.dataset is not None and repeats > _PATIENCE + len(seen) // 10:
                break
            continue
        repeats = 0
        seen.update(marks)
        got.append(problem)
    return got
