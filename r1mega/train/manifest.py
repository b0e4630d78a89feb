"""A checkpoint's folder without its tensors: which is the newest, whole or damaged, of which model and command. Imports no torch.

    checkpoints/step-00000100/
      weights/         Megatron-Core's distributed checkpoint: parameters, expert biases, optimizer (layout-free)
      reference/       RL's reference policy in the same format: parameters and expert biases
      tokenizer/       a copy of the run's tokenizer, when it has one
      state.json       step, position in the data, model config, command, and where the checkpoint comes from
      rng.pt           the generators
      manifest.json    sha256 and size of every other file; written last

Where it comes from, in ``state.json`` (paths are relative to the checkpoint's folder; digests are :func:`digest`'s):

    command, name      whose checkpoint it is: pretrain, sft, rl, convert, and the run's name
    parent             digest of the checkpoint before it: the run's last one, or what the run started from; null: fresh weights;
                       of a converted one {"kind": "published", "path", "digest": of published_digest}
    parent_path        where that lay
    init               {"digest", "path"} of the checkpoint that the run started from, or null
    lineage            what the run started from, what that run started from and so on, the oldest first, one entry a run:
                       {"command", "name", "step", "tokens", "digest", "path", "saves": checkpoints before it in its run}; a
                       published checkpoint has {"kind": "published", "command": "published", "name", "digest", "path"}
    saves, num_saves   [step, digest] of the run's own checkpoints before this one, the newest few, and how many there were

An export, a Hugging Face folder, has the same in its ``r1mega.json`` (:func:`r1mega.train.lineage.exported`).

The folder gets its name when all is in it: one without a manifest is damaged. Names that start with a dot are on their way in or
out; ``damaged-step-*`` is what a run found spoilt and passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from r1mega.config.errors import UserError, nearest
from r1mega.config.model import ModelConfig, YarnConfig
from r1mega.config.train import TUNABLE_MODEL_FIELDS

MANIFEST = "manifest.json"


def finished(folder: str | Path) -> list[Path]:
    """The finished checkpoints in a run's ``checkpoints`` folder, whole or damaged, the oldest first."""
    found = [path for path in Path(folder).glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def surplus(folder: str | Path, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Finished checkpoints that may go: neither of the newest ``keep_last`` nor of a step that ``keep_every`` (0: none) divides."""
    old = finished(folder)[:-keep_last]
    return [path for path in old if not keep_every or int(path.name.removeprefix("step-")) % keep_every]


def latest(folder: str | Path) -> Path | None:
    """The newest finished checkpoint in a run's ``checkpoints`` folder; None without one."""
    found = finished(folder)
    return found[-1] if found else None


def latest_readable(folder: str | Path) -> Path | None:
    """The newest finished checkpoint whose ``state.json`` can be read; None without one. Looks at no tensor."""
    for path in reversed(finished(folder)):
        try:
            read_state(path)
            return path
        except UserError:
            continue
    return None


def resolve(path: str | Path) -> Path:
    """A checkpoint's folder from itself, a run's folder, or its ``checkpoints`` folder. Raises UserError when there is none."""
    given = Path(path)
    for candidate in (given, latest(given), latest(given / "checkpoints")):
        if candidate is not None and (candidate / MANIFEST).is_file():
            return candidate
        if candidate is not None and candidate != given:
            raise UserError(f"checkpoint {candidate}: every finished checkpoint has its {MANIFEST}; got none; {_older(candidate)}")
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
            f"checkpoint {folder}: state.json describes a model of this version; got {_missing(error)}; "
            "use one that this version wrote"
        ) from error


def _missing(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def digest(path: str | Path) -> str:
    """A checkpoint's identity: sha256 of its manifest."""
    return hashlib.sha256((resolve(path) / MANIFEST).read_bytes()).hexdigest()


def published_digest(folder: str | Path) -> str:
    """Identity of a published checkpoint: :func:`tensors_digest` of all tensors in its safetensors files. Reads all of them."""
    found = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                for name, about in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])):
                    if name != "__metadata__":
                        start, stop = about["data_offsets"]
                        file.seek(8 + length + start)
                        found.append((name, about["dtype"], about["shape"], _sha256_of(file, stop - start)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(
                f"checkpoint {folder}: {path.name} is a safetensors file; got {type(error).__name__}; copy it again"
            ) from error
    if not found:
        raise UserError(f"checkpoint {folder}: a published one has *.safetensors files; got none; check the path")
    return tensors_digest(found)


def tensors_digest(tensors: Iterable[tuple[str, str, Iterable[int], str]]) -> str:
    """sha256 over a line ``name dtype [shape] sha256`` for each tensor, sorted by name, whatever the split into files.

    ``dtype``: as safetensors writes it (BF16, F8_E4M3); ``sha256``: of the tensor's bytes in its file.
    """
    lines = sorted(f"{name} {dtype} {list(shape)} {sha256}\n" for name, dtype, shape, sha256 in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def verify(path: Path, *, weights: bool = True) -> None:
    """Check every file of a checkpoint against its manifest. Raises UserError that names the first damaged or missing file.

    ``weights``: as of :func:`fault_of`.
    """
    fault = fault_of(path, weights=weights)
    if fault:
        raise UserError(f"checkpoint {path}: {fault}; {_older(path)}")


def fault_of(path: Path, part: int = 0, parts: int = 1, *, weights: bool = True) -> str:
    """``rule; got value`` of the first file that is not as the manifest has it, or "". Reads every ``parts``-th file.

    ``weights``: those too, and not only what lies beside them.
    """
    if not (path / MANIFEST).is_file():
        return f"a finished checkpoint has its {MANIFEST}; got none"
    try:
        files = _read(path / MANIFEST).get("files")
        if not isinstance(files, dict):
            return f"{MANIFEST} lists files; got none"
        names = sorted(name for name in files if weights or not name.endswith(".distcp"))
        for name in names[part::parts]:
            entry = files[name]
            file = path / name
            if not file.is_file():
                return f"every file of the manifest is there; {name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {entry['bytes']} bytes; got {file.stat().st_size}"
            if _sha256(file) != entry["sha256"]:
                return f"{name} matches its hash; got other content"
    except UserError:
        return f"{MANIFEST} is readable JSON; got something else"
    except (OSError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} and what it names can be read; got {type(error).__name__} {error}"
    return ""


def _older(path: Path) -> str:
    """The way out of a damaged checkpoint: the newest whole one before it, where there is one."""
    for other in reversed(finished(path.parent)):
        if other.name < path.name and not fault_of(other):
            return f"use {other}, the one before"
    return "use an older checkpoint"


def hashes(folder: Path, known: Container[str] = ()) -> dict[str, dict[str, Any]]:
    """Flush every file below ``folder`` to disk but the ``known`` ones; name to size and sha256."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: entry(path) for name, path in sorted(paths.items()) if name not in known}


def entry(path: Path) -> dict[str, Any]:
    """Flush a file to disk; its line of a manifest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def write(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of ``entries`` and flush it."""
    with (folder / MANIFEST).open("w") as file:
        json.dump({"files": dict(sorted(entries.items()))}, file, indent=1)
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


def _sha256_of(file: BinaryIO, size: int) -> str:
    """Of the next ``size`` bytes. Raises ValueError where the file is shorter."""
    digest = hashlib.sha256()
    while size:
        block = file.read(min(size, 1 << 22))
        if not block:
            raise ValueError("the file is shorter than its header says")
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
