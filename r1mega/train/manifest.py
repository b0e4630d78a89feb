"""A checkpoint's folder without its tensors: which is the newest, whole or damaged, of which model and command. Imports no torch.

    checkpoints/step-00000100/
      weights/         Megatron-Core's distributed checkpoint: parameters, expert biases, optimizer (layout-free)
      tokenizer/       a copy of the run's tokenizer, when it has one
      state.json       step, position in the data, model config, command, parent
      rng.pt           the generators; reference.pt: RL's reference policy
      manifest.json    sha256 and size of every other file; written last

A folder without a manifest was never finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError, nearest
from r1mega.config.model import ModelConfig, YarnConfig
from r1mega.config.train import TUNABLE_MODEL_FIELDS

MANIFEST = "manifest.json"


def latest(folder: str | Path) -> Path | None:
    """The newest finished checkpoint in a run's ``checkpoints`` folder; None without one."""
    finished = [path for path in Path(folder).glob("step-*") if (path / MANIFEST).is_file()]
    return max(finished, key=lambda path: int(path.name.split("-")[1]), default=None)


def resolve(path: str | Path) -> Path:
    """A checkpoint's folder from itself, a run's folder, or its ``checkpoints`` folder. Raises UserError when there is none."""
    given = Path(path)
    for candidate in (given, latest(given), latest(given / "checkpoints")):
        if candidate is not None and (candidate / MANIFEST).is_file():
            return candidate
    raise UserError(f"checkpoint: a folder with {MANIFEST}, or a run's folder with checkpoints/; got {given}; check the path")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {path.parent}: {path.name} is readable JSON; got {type(error).__name__}; use an older checkpoint"
        ) from error


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint. Raises UserError when it is damaged."""
    return _read(path / "state.json")


def read_model(path: str | Path) -> ModelConfig:
    """The architecture of a checkpoint. Raises UserError when its record is damaged or of another version."""
    folder = resolve(path)
    try:
        values = read_state(folder)["model"]
        return ModelConfig(**{**values, "yarn": YarnConfig(**values["yarn"])})
    except (KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint {folder}: state.json describes a model of this version; got {error}; use one that this version wrote"
        ) from error


def digest(path: str | Path) -> str:
    """A checkpoint's identity: sha256 of its manifest."""
    return hashlib.sha256((resolve(path) / MANIFEST).read_bytes()).hexdigest()


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest. Raises UserError that names the first damaged or missing file."""
    files = _read(path / MANIFEST).get("files")
    if not isinstance(files, dict):
        raise UserError(f"checkpoint {path}: {MANIFEST} lists files; got none; use an older checkpoint")
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"checkpoint {path}: every file of the manifest is there; {name} is missing; use an older checkpoint")
        if file.stat().st_size != entry["bytes"]:
            raise UserError(
                f"checkpoint {path}: {name} has {entry['bytes']} bytes; got {file.stat().st_size}; use an older checkpoint"
            )
        if _sha256(file) != entry["sha256"]:
            raise UserError(f"checkpoint {path}: {name} matches its hash; got other content; use an older checkpoint")


def write(folder: Path) -> None:
    """Flush every file below ``folder`` to disk and write the manifest beside them."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    with (folder / MANIFEST).open("w") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def check_same_model(wanted: ModelConfig, source: Path) -> None:
    """Raise UserError, naming the fields, when a checkpoint is of another architecture than ``wanted``."""
    free = {"name", "max_position_embeddings", "init_std", *TUNABLE_MODEL_FIELDS}
    left, right = asdict(wanted), asdict(read_model(source))
    differing = [f"{key} {right[key]} (model.{key}={left[key]})" for key in left if key not in free and left[key] != right[key]]
    if differing:
        raise UserError(
            f"checkpoint {source}: it has the run's architecture; got {', '.join(differing)}; use its model or another run name"
        )


def check_same_command(command: str, source: Path) -> None:
    """Raise UserError when the checkpoint in a run's own folder is another command's."""
    found = read_state(source).get("command", command)
    if found != command:
        raise UserError(f"out: {command} goes on in its own folder; got one that {found} wrote, {source}; use another name=")


def tuned_model(init: str | Path, changes: dict[str, Any]) -> ModelConfig:
    """A checkpoint's architecture with other training fields. Raises UserError for a field that may not change."""
    for name in changes:
        if name not in TUNABLE_MODEL_FIELDS:
            raise UserError(
                f"model.{name}: a run from a checkpoint changes training fields alone; got model.{name}={changes[name]}; "
                f"{nearest(name, TUNABLE_MODEL_FIELDS)}use {', '.join(TUNABLE_MODEL_FIELDS)}"
            )
    return replace(read_model(init), **changes)


def tokenizer_of(init: Path) -> str:
    """The tokenizer folder inside a checkpoint. Raises UserError when it holds none."""
    folder = init / "tokenizer"
    if not folder.is_dir():
        raise UserError(f"checkpoint {init}: it holds the tokenizer it was trained with; got none; pretrain with tokenizer=DIR")
    return str(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
