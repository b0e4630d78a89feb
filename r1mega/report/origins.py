"""What differs between runs in data, code and environment, from their ``environment.json``. Pure: runs in, tables out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from r1mega.report.differences import ABSENT, NOT_RECORDED, Pair, Row, Table, filled, home_of, in_home, table
from r1mega.report.readers import Run, StageRun

SHORT = 12
"""Digits of a hash that are shown."""

SAMPLED = "compared by samples"

Record = Mapping[str, Any]


def data_table(runs: Sequence[Run], pairs: Sequence[Pair]) -> Table:
    """Inputs with other content, and those with the same content at another path."""
    if not any(stage and stage.starts for pair in pairs for stage in pair.stages):
        return Table("Data", f"Inputs are {NOT_RECORDED}.", ())
    homes = [home_of(run) for run in runs]
    rows = [row for pair in pairs if sum(stage is not None for stage in pair.stages) > 1 for row in _input_rows(pair, homes)]
    made = table("Data", rows, "Inputs")
    sampled = sum(row.note == SAMPLED and row not in made.rows for row in rows)
    return replace(made, says=f"{made.says} Of those {sampled:,} were compared by samples.") if sampled else made


def _input_rows(pair: Pair, homes: Sequence[str]) -> Iterator[Row]:
    columns = [_inputs(stage, home) for stage, home in zip(pair.stages, homes, strict=True)]
    known = [column for column in columns if column is not None]
    if len(known) < len(columns):
        yield Row(pair.called("inputs"), tuple(NOT_RECORDED if column is None else "recorded" for column in columns))
    if len(known) < 2:
        return
    for key in dict.fromkeys(key for column in known for key in column):
        for group in _matched([list(column.get(key, [])) for column in known]):
            texts, note = _told(group)
            rest = iter(texts)
            values = tuple(NOT_RECORDED if column is None else next(rest) for column in columns)
            yield Row(pair.called(key), filled(values), note)


def _inputs(stage: StageRun | None, home: str) -> dict[str, list[tuple[str, Record]]] | None:
    """Key to (path, identity) of the last start's inputs; None where they are not recorded."""
    inputs = stage.starts[-1].get("inputs") if stage is not None and stage.starts else None
    if not isinstance(inputs, dict):
        return None
    return {
        key: [(in_home(path, home), record) for path, record in found.items() if isinstance(record, dict)]
        for key, found in inputs.items()
        if isinstance(found, dict)
    }


def _matched(left: list[list[tuple[str, Record]]]) -> Iterator[list[tuple[str, Record] | None]]:
    """Inputs of one key side by side: those of equal content first, then of equal name, then what is left in its order.

    ``left``: one list a run, which is used up.
    """
    for mark in (lambda one: _content(one[1]) or None, lambda one: PurePath(one[0]).name, lambda one: ""):
        for one in list(left[0]):
            wanted = mark(one)
            group = [one] + [
                next((other for other in column if wanted is not None and mark(other) == wanted), None) for column in left[1:]
            ]
            if None not in group:
                for other, column in zip(group, left, strict=True):
                    column.remove(other)
                yield group
    for index, column in enumerate(left):
        for one in column:
            yield [one if place == index else None for place in range(len(left))]


def _content(record: Record) -> str:
    """What tells equal content: a checkpoint's tensor files, else the hash; "" where there is none."""
    return str(record.get("weights") or record.get("sha256") or "")


def _told(group: Sequence[tuple[str, Record] | None]) -> tuple[tuple[str, ...], str]:
    """A text for each run, and what the difference is."""
    present = [one for one in group if one is not None]
    contents = [_content(record) for _, record in present]
    texts = tuple(ABSENT if one is None else f"{one[0]} [{_short(one[1])}]" for one in group)
    if len(present) < len(group):
        return texts, "not in all"
    if all(contents) and len(set(contents)) == 1:
        sampled = SAMPLED if any(record.get("how") == "sampled" for _, record in present) else ""
        other = "same content, other path" if len({path for path, _ in present}) > 1 else ""
        return tuple(path for path, _ in present), ", ".join(filter(None, [other, sampled]))
    if not all(contents):
        return texts, "" if len(set(texts)) == 1 else "cannot be told: not every content is recorded"
    return texts, ", ".join(["other content", *_parts_that_differ([record for _, record in present])])


def _short(record: Record) -> str:
    if record.get("kind") == "checkpoint":
        return f"{record.get('name')}, tensors {''.join(dict(record.get('weights') or {}).values())[:SHORT] or 'unknown'}"
    if "sha256" in record:
        size = f", {record['bytes']:,} bytes" if isinstance(record.get("bytes"), int) else ""
        tokens = record.get("meta", {}).get("num_tokens") if isinstance(record.get("meta"), dict) else None
        return f"{str(record['sha256'])[:SHORT]}{size}{f', {tokens:,} tokens' if isinstance(tokens, int) else ''}"
    return str(record.get("unreadable") or record.get("kind") or "unknown")


def _parts_that_differ(records: Sequence[Record]) -> list[str]:
    """Which files of an input differ, and which fields of a token file's own record."""
    found = []
    files = [record.get("files") for record in records]
    if all(isinstance(one, dict) for one in files):
        names = [name for name in dict.fromkeys(name for one in files for name in one) if len({one.get(name) for one in files}) > 1]
        found += [f"files {' '.join(names)}"] if names else []
    if any(record.get("degrees") != records[0].get("degrees") for record in records):
        found.append("or the same in another layout")
    return found


def code_table(runs: Sequence[Run]) -> Table:
    """Version, hash of the sources, commit, modules of one's own."""

    def read(start: Record) -> Iterator[tuple[str, str]]:
        code = start.get("code") or {}
        for key, name in (("version", "version of r1mega"), ("source", "hash of the sources"), ("commit", "commit")):
            if key in code:
                value = str(code[key] or "no git checkout")
                yield name, value[:SHORT] if key != "version" and len(value) >= 40 else value
        if code.get("dirty") is not None:
            yield "uncommitted changes", "yes" if code["dirty"] else "no"
        yield from ((f"own module {name}", str(digest)[:SHORT]) for name, digest in (code.get("own") or {}).items())

    return _over_time("Code", runs, read)


def environment_table(runs: Sequence[Run]) -> Table:
    """Machine, ranks, packages, variables."""

    def read(start: Record) -> Iterator[tuple[str, str]]:
        yield from ((key, _listed(value)) for key, value in (start.get("machine") or {}).items())
        if "ranks" in start:
            yield "ranks", str(start["ranks"])
        yield from ((f"package {name}", str(version)) for name, version in (start.get("packages") or {}).items())
        yield from ((f"${name}", str(value)) for name, value in (start.get("variables") or {}).items())

    return _over_time("Environment", runs, read)


def _listed(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _over_time(title: str, runs: Sequence[Run], read: Callable[[Record], Iterator[tuple[str, str]]]) -> Table:
    """A row an entry that ``read`` finds: its values over all starts of the run and its stages, in their order, arrows between."""
    columns: list[dict[str, str] | None] = []
    for run in runs:
        starts = _starts(run)
        seen: dict[str, list[str]] = {}
        for entries in [dict(read(start)) for start in starts]:
            for key, text in entries.items():
                seen.setdefault(key, []).append(text)
        columns.append({key: " → ".join(dict.fromkeys(texts)) for key, texts in seen.items()} if starts else None)
    if all(column is None for column in columns):
        return Table(title, f"It is {NOT_RECORDED}.", ())
    keys = dict.fromkeys(key for column in columns if column is not None for key in column)
    rows = (
        [Row("environment.json", tuple(NOT_RECORDED if one is None else "recorded" for one in columns))] if None in columns else []
    )
    for key in keys if sum(column is not None for column in columns) > 1 else ():
        rows.append(Row(key, filled(tuple(NOT_RECORDED if one is None else one.get(key, ABSENT) for one in columns))))
    return table(title, rows, "Entries")


def _starts(run: Run) -> list[Record]:
    """All starts of a run and its stages by time; an older recipe kept its machine and a few versions in its summary alone."""
    starts: Iterable[Record] = [
        *run.starts,
        *(start for stage in run.stages if stage.starts != run.starts for start in stage.starts),
    ]
    found = sorted(starts, key=lambda start: str(start.get("time")))
    if not found and run.machine:
        machine = {key: value for key, value in run.machine.items() if key != "versions"}
        versions = run.machine.get("versions") or {}
        packages = {name: version for name, version in versions.items() if name != "r1mega"}
        found = [
            {
                "machine": machine,
                "packages": packages,
                "code": {"version": versions.get("r1mega"), **dict.fromkeys(("source", "commit"), NOT_RECORDED)},
            }
        ]
    return found
