"""Kept results: which stage folder is complete, which is to go on, which is of another key. Owns ``{started,stage}.json``.

``started.json`` is written before a stage's first step, ``stage.json`` after its last one; both hold the stage's stamp (its key
and which making of every needed stage it reads). A folder with the right ``stage.json`` is complete; one with the right
``started.json`` alone was interrupted and goes on in place; any other folder is moved aside to ``replaced/``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError
from r1mega.recipe.graph import Stage, stage_folder

STARTED, FINISHED = "started.json", "stage.json"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` aside and publish it by rename; a file that already says the same is left alone."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(aside, 0o644)  # mkstemp makes it readable for its owner alone
    os.replace(aside, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty when the file is absent or no JSON object (then the stage counts as not done)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def finished(folder: Path, name: str, stamp: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of the stage's complete result with this stamp, or None; also None when what it names is gone."""
    record = read_json(stage_folder(folder, name) / FINISHED)
    if not record or any(record.get(part) != value for part, value in stamp.items()):
        return None
    result = record.get("result")
    named = [result.get(part) for part in ("checkpoint", "target")] if isinstance(result, dict) else []
    home, mark = stage_folder(folder, name), f"{os.sep}stages{os.sep}{name}{os.sep}"
    own = [path.partition(mark)[2] for path in named if isinstance(path, str) and mark in path]  # wherever the run lies by now
    return record if all((home / path).exists() for path in own) else None


def begin(folder: Path, name: str, stamp: Mapping[str, Any]) -> bool:
    """Make the stage's folder ready to run in. True when an interrupted run with the same stamp goes on there."""
    home = stage_folder(folder, name)
    started = read_json(home / STARTED)
    goes_on = started == dict(stamp) and not (home / FINISHED).exists()
    if home.exists() and not goes_on and any(home.iterdir()):
        aside = folder / "replaced" / name
        if aside.exists():  # one older result a stage is kept: large checkpoints would fill the disk otherwise
            shutil.rmtree(aside)
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.replace(home, aside)
    home.mkdir(parents=True, exist_ok=True)
    write_json(home / STARTED, dict(stamp))
    return goes_on


def finish(folder: Path, stage: Stage, stamp: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Place the copy, then write ``stage.json``: the last thing that happens to a stage. Returns the whole record."""
    place_copy(folder, stage, record.get("result") or {})
    whole = {**record, **stamp, "made": uuid.uuid4().hex}
    write_json(stage_folder(folder, stage.name) / FINISHED, whole)
    return whole


def place_copy(folder: Path, stage: Stage, result: Mapping[str, Any]) -> None:
    """Put the stage's result at ``copy_to``: hard links where the file system can, copies elsewhere.

    The result is the folder or file that the stage's function names as ``target``, when it lies in the stage's folder; else the
    whole folder without the records of this module.
    """
    if stage.copy_to is None:
        return
    home, goal = stage_folder(folder, stage.name), folder / stage.copy_to
    stages = home.parent.resolve()
    if goal.resolve().is_relative_to(stages) or stages.is_relative_to(goal.resolve()):
        raise UserError(
            f"recipe.stages.{stage.name}.copy_to: a place outside the stages; got {stage.copy_to!r}; use for example export"
        )
    source = home
    target = result.get("target")
    if isinstance(target, str) and Path(target).exists() and Path(target).resolve().is_relative_to(home.resolve()):
        source = Path(target)
    aside = goal.with_name(goal.name + ".partial")
    _remove(aside)
    aside.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, aside, copy_function=_link, ignore=shutil.ignore_patterns(STARTED, FINISHED))
    else:
        _link(str(source), str(aside))
    _remove(goal)
    os.replace(aside, goal)


def _link(source: str, goal: str) -> None:
    try:
        os.link(source, goal)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, goal)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
