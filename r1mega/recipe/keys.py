"""The key of a stage: a hash of everything that its result depends on, and of nothing else.

In: a stage, its typed config, the keys of what it needs, the package's version. Out: 64 hex digits. The run's own folder, its
name and knobs that change no result (who starts processes, threads, debug) are left out, so that a moved run keeps its results.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1mega.provenance import files_below, input_paths, parts_of
from r1mega.recipe.graph import Stage

NOT_IN_KEY = ("name", "debug", "profile", "nvtx", "log", "launch", "runtime", "device.threads", "parallel.recompute")
"""Fields that change where or how fast a stage runs, not what comes out."""

HASHED_BYTES = 64 << 20
"""Up to this size a file counts by its content; above it by size and time of change."""


def plain(value: Any) -> Any:
    """``value`` as JSON has it: dataclasses become objects that name their class (two choices with equal knobs differ)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"_class": type(value).__qualname__, **fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if not isinstance(value, str) and hasattr(value, "__iter__"):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def normalise(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A resolved config without :data:`NOT_IN_KEY`, with ``{recipe}`` for the run's folder at the start of any text."""
    spellings = sorted({str(folder), str(folder.absolute()), str(folder.resolve())}, key=len, reverse=True)

    def text(value: str) -> str:
        for spelling in spellings:
            if value == spelling or value.startswith(spelling + os.sep):
                return "{recipe}" + value[len(spelling) :]
        return value

    def walk(value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            paths = {key: f"{where}.{key}" if where else str(key) for key in value}
            return {text(str(key)): walk(item, paths[key]) for key, item in value.items() if paths[key] not in NOT_IN_KEY}
        if isinstance(value, list):
            return [walk(item, where) for item in value]
        return text(value) if isinstance(value, str) else value

    return walk(config, "")


def stage_key(
    stage: Stage, config: Mapping[str, Any], need_keys: Mapping[str, str], version: str, inputs: Mapping[str, str] | None = None
) -> str:
    """sha256 over command, normalised config, keys of the needed stages, outside input files and version; 64 hex digits."""
    parts = {
        "command": stage.command,
        "config": config,
        "needs": dict(need_keys),
        "inputs": dict(inputs or {}),
        "copy_to": stage.copy_to,
        "version": version,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def outside_inputs(config: Any, folder: Path) -> dict[str, str]:
    """Path to fingerprint of every file or folder that the config names as input (knobs of unit ``path``) outside ``folder``.

    A path without a file of that name stands for all files NAME.* (token files are named without suffix); what does not exist
    has no entry: the command itself reports it.
    """
    found: dict[str, str] = {}
    inside = folder.resolve()
    for _, text in input_paths(config):
        for part in parts_of(text):
            if not part.resolve().is_relative_to(inside):
                found[str(part)] = fingerprint(part)
    return found


def fingerprint(path: Path) -> str:
    """Hash of a file, or of all files below a folder with their names (hidden ones and byte code left out)."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in files_below(path):
            digest.update(f"{file.relative_to(path)}\0{fingerprint(file)}\0".encode())
        return digest.hexdigest()
    stat = path.stat()
    if stat.st_size > HASHED_BYTES:
        return f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()
