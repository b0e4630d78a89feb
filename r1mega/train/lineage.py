"""Where checkpoints come from: each names the one before it by hash, back to fresh weights or to a published checkpoint.

:class:`Lineage` is what a run writes into ``state.json``, whose fields :mod:`r1mega.train.manifest` explains. Ancestors may be
gone, as ``keep_last`` has it: every checkpoint carries its chain in short form. :func:`lineage` is the command. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError
from r1mega.config.tools import LineageConfig
from r1mega.train import manifest

RECORD = "r1mega.json"
"""An export's record, beside its ``config.json``."""
KEPT_SAVES = 32
"""A run's own earlier checkpoints that each of its checkpoints lists."""


@dataclass
class Lineage:
    """One run's ancestors, kept up by whoever writes its checkpoints. ``tip``: digest of what the next one comes from.

    Entries of ``runs`` and ``tip_path`` hold absolute paths here, relative ones in a record.
    """

    command: str
    name: str = ""
    tip: str | None = None
    tip_path: Path | None = None
    init: dict[str, Any] | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)
    saves: list[list[Any]] = field(default_factory=list)
    num_saves: int = 0

    @classmethod
    def begin(cls, command: str, name: str, init: Path | None) -> Lineage:
        """Of a run from the checkpoint ``init``, or from fresh weights."""
        if init is None:
            return cls(command, name)
        digest, place = manifest.digest(init), init.resolve()
        return cls(command, name, digest, place, {"digest": digest, "path": str(place)}, [*_runs(place), entry(place)])

    def go_on(self, held: Path) -> None:
        """The run goes on from ``held``, one of its own checkpoints."""
        state = manifest.read_state(held)
        if "saves" in state:  # earlier versions wrote none
            self.runs, self.init = _runs(held.resolve()), _absolute(state["init"], held.resolve())
            self.saves, self.num_saves = list(state["saves"]), state["num_saves"]
        self.advance(held, state["step"])

    def advance(self, saved: Path, step: int) -> None:
        """``saved``, of ``step``, is the run's newest checkpoint now."""
        self.tip, self.tip_path = manifest.digest(saved), saved.resolve()
        self.saves, self.num_saves = [*self.saves, [step, self.tip]][-KEPT_SAVES:], self.num_saves + 1

    def record(self, final: Path) -> dict[str, Any]:
        """The fields of ``state.json`` for a checkpoint that will lie at ``final``."""
        here = final.parent.resolve() / final.name
        return {
            "command": self.command,
            "name": self.name,
            "parent": self.tip,
            "parent_path": _relative(self.tip_path, here),
            "init": _moved(self.init, here),
            "lineage": [_moved(run, here) for run in self.runs],
            "saves": self.saves,
            "num_saves": self.num_saves,
        }


def entry(checkpoint: Path) -> dict[str, Any]:
    """A native checkpoint as a line of another one's ``lineage``, with its absolute path."""
    state, place = manifest.read_state(checkpoint), checkpoint.resolve()
    about = {key: state.get(key) for key in ("command", "name", "step", "tokens")}
    return {**about, "digest": manifest.digest(place), "path": str(place), "saves": state.get("num_saves", 0)}


def exported(checkpoint: Path, target: Path, dtype: str, digest: str) -> dict[str, Any]:
    """``r1mega.json`` of an export of ``checkpoint`` that will lie at ``target``.

    ``digest``: :func:`r1mega.train.manifest.published_digest` of what was written, or ``tensors_digest`` of its tensors.
    """
    here, own = target.parent.resolve() / target.name, entry(checkpoint)
    state = manifest.read_state(checkpoint)
    chain = [*_runs(checkpoint.resolve()), own]
    return {
        "command": "export",
        "name": own["name"],
        "step": own["step"],
        "tokens": own["tokens"],
        "dtype": dtype,
        "digest": digest,
        "parent": own["digest"],
        "parent_path": _relative(checkpoint.resolve(), here),
        "lineage": [_moved(run, here) for run in chain],
        "saves": [],
        "num_saves": 0,
        "parent_saves": state.get("saves", []),
    }


def converted(source: Path, target: Path, name: str, digest: str) -> dict[str, Any]:
    """The fields of ``state.json`` of a native checkpoint, made of the published one in ``source``, that will lie at ``target``.

    ``digest``: as of :func:`exported`, of the source. One that is an export of ours brings its own ancestors along.
    """
    here, place = target.parent.resolve() / target.name, source.resolve()
    about = {"kind": "published", "command": "published", "name": place.name, "digest": digest, "path": str(place)}
    chain = [*(_runs(place) if (place / RECORD).is_file() else []), about]
    return {
        "command": "convert",
        "name": name,
        "parent": {"kind": "published", "path": _relative(place, here), "digest": digest},
        "parent_path": _relative(place, here),
        "init": None,
        "lineage": [_moved(run, here) for run in chain],
        "saves": [],
        "num_saves": 0,
    }


def recoded(source: Path, target: Path, dtype: str, source_digest: str, digest: str) -> dict[str, Any]:
    """``r1mega.json`` of a published checkpoint made of the published one in ``source``, in another dtype or other files."""
    record = converted(source, target, target.name, source_digest)
    return {**record, "step": None, "tokens": None, "dtype": dtype, "digest": digest, "parent_saves": []}


# The command.


@dataclass
class Ancestor:
    """One line of a chain. ``status``: verified, changed, gone, or present (there, and not read); ``fault``: what has changed."""

    command: str | None
    name: str | None
    step: int | None
    tokens: int | None
    digest: str
    path: str
    status: str
    fault: str = ""


def lineage(cfg: LineageConfig) -> dict[str, Any]:
    """Print the chain of ``cfg.checkpoint``, the newest first. Raises UserError at the end where one has changed."""
    place = _place(Path(cfg.checkpoint))
    found = list(chain(place, read=cfg.hashes))
    if cfg.json:
        print(json.dumps({"checkpoint": str(place), "chain": [asdict(one) for one in found]}, indent=1, ensure_ascii=False))
    else:
        print(_table(found))
    changed = [f"{one.path} ({one.fault})" for one in found if one.status == "changed"]
    if changed:
        raise UserError(
            f"checkpoint {place}: every ancestor on disk is what its descendant names; got changed {', '.join(changed)}; "
            "do not go on from these, and look at who wrote there"
        )
    return {"checkpoint": str(place), "chain": [asdict(one) for one in found]}


def chain(place: Path, *, read: bool = True) -> Iterator[Ancestor]:
    """From the checkpoint or export at ``place`` back to the first ancestor. ``read``: check every file that is there."""
    record = _record(place)
    is_export = (place / RECORD).is_file()
    digest = record.get("digest", "") if is_export else manifest.digest(place)
    yield _looked_at({**record, "digest": digest, "path": str(place)}, place, read=read, is_published=is_export)
    yield from _siblings(record.get("saves", ()), record, place, read=read)
    runs = record.get("lineage")
    if runs is None and record.get("parent"):  # an earlier version's: it names its parent and no more
        yield Ancestor(None, None, None, None, record["parent"], "", "gone")
    for number, run in enumerate(reversed(runs or [])):
        there = Path(os.path.normpath(place / run["path"]))
        one = _looked_at(run, there, read=read, is_published=run.get("kind") == "published")
        yield one
        own = record.get("parent_saves", ()) if number == 0 else ()
        if one.status in ("verified", "present") and (there / manifest.MANIFEST).is_file():
            own = manifest.read_state(there).get("saves", own)
        yield from _siblings(own, run, there, read=read)


def _siblings(saves: Any, run: dict[str, Any], place: Path, *, read: bool) -> Iterator[Ancestor]:
    """The checkpoints of one run before the one at ``place``."""
    for step, digest in reversed(saves):
        there = place.with_name(f"step-{step:08d}")
        about = {"command": run.get("command"), "name": run.get("name"), "step": step, "digest": digest, "tokens": None}
        with_tokens = _told(there, digest)
        yield _looked_at({**about, **with_tokens, "path": str(there)}, there, read=read)


def _told(place: Path, digest: str) -> dict[str, Any]:
    """A sibling's tokens, where it is there and what it was."""
    try:
        return {"tokens": manifest.read_state(place)["tokens"]} if manifest.digest(place) == digest else {}
    except (UserError, KeyError):
        return {}


def _looked_at(about: dict[str, Any], place: Path, *, read: bool, is_published: bool = False) -> Ancestor:
    """``about`` with what is found at ``place``."""
    status, fault = "gone", ""
    if place.is_dir() and (is_published or (place / manifest.MANIFEST).is_file()):
        status = "verified" if read else "present"
        try:
            if is_published:
                actual = manifest.published_digest(place) if read else about["digest"]
            else:
                actual, fault = manifest.digest(place), manifest.fault_of(place) if read else ""
            if actual != about["digest"]:
                fault = f"its digest is {actual[:12]}, not {about['digest'][:12]}"
        except UserError as error:
            fault = str(error)
    fields = {key: about.get(key) for key in ("command", "name", "step", "tokens")}
    return Ancestor(**fields, digest=about["digest"], path=str(place), status="changed" if fault else status, fault=fault)


def _place(given: Path) -> Path:
    """The folder of a checkpoint or an export; of a run its newest checkpoint."""
    return given if (given / RECORD).is_file() else manifest.resolve(given)


def _record(place: Path) -> dict[str, Any]:
    """What says where the checkpoint or export at ``place`` comes from."""
    path = place / RECORD
    if not path.is_file():
        return manifest.read_state(place)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {**record, "digest": str(record["digest"]), "lineage": list(record["lineage"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"export {place}: {RECORD} is one of r1mega's; got {type(error).__name__}; export it again") from error


def _runs(place: Path) -> list[dict[str, Any]]:
    """The ``lineage`` of the checkpoint or export at ``place``, with absolute paths."""
    return [_absolute(run, place) for run in _record(place).get("lineage", [])]


def _absolute(about: dict[str, Any] | None, place: Path) -> dict[str, Any] | None:
    return about and {**about, "path": os.path.normpath(place / about["path"])}


def _moved(about: dict[str, Any] | None, here: Path) -> dict[str, Any] | None:
    return about and {**about, "path": _relative(Path(about["path"]), here)}


def _relative(path: Path | None, here: Path) -> str | None:
    return None if path is None else os.path.relpath(path, here)


def _table(found: list[Ancestor]) -> str:
    rows = [
        (
            one.command or "?",
            "-" if one.step is None else f"step {one.step}",
            "-" if one.tokens is None else f"{one.tokens} tokens",
            one.digest[:12],
            one.status,
            one.path or "-",
        )
        for one in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]) for row in rows)
