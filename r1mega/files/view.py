"""A config as a command sees it: local paths where the user gave URLs and ``hf:`` names.

Every knob whose unit is a path (``path``; ``path: ...`` for the keys of a dict) takes a URL of fsspec or, where it reads a data
set, a tokenizer or a checkpoint, an ``hf:`` name. Inputs are copied into the cache before anything runs; what is written (``out``,
``target``, ``keep``) is made in the cache and sent to its URL. The user's own spelling stays in the saved config, in errors and in
results. Ranks that our launcher starts take over what the first process has decided.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r1mega.config.data import RecipeConfig
from r1mega.config.errors import UserError
from r1mega.files import hub, remote
from r1mega.files.mirror import Mirror, working_path

VARIABLE = "R1MEGA_COPIES"
"""Hands the copies of a process to the ranks that it starts: JSON, ``KIND NAME`` to (path, root)."""

WRITTEN = ("out", "target", "keep")
"""Knobs that name what a command writes."""

_KINDS = {
    "init": "checkpoint",
    "checkpoint": "checkpoint",
    "source": "model",
    "tokenizer": "tokenizer",
    "tokenizer.path": "tokenizer",
    "run": "run",
    "data.train": "tokens",
    "data.valid": "tokens",
}
"""What a path knob names where that is no file or folder of data."""

_sending: list[Mirror] = []


def published(folder: str | Path) -> str:
    """Send ``folder``, a finished checkpoint, to its run's URL, if it has one. Called by rank 0.

    Returns "", or what failed and where, for :meth:`Mesh.agree`: all ranks end together then, and what is finished here stays.
    """
    try:
        for mirror in list(_sending):
            if Path(folder).absolute().is_relative_to(mirror.local):
                mirror.send()
    except UserError as error:
        return str(error)
    return ""


class View:
    """``given``: the user's config; ``config``: the same with local paths; ``env``: what ranks started for it take over.

    As a context it makes :func:`published` send, and speaks of URLs instead of copies in a UserError that passes.
    """

    def __init__(self, given: Any, *, saves: bool = True):
        """Copy every input that is not local. ``saves``: the command writes to ``out``. UserError, a line for each wrong one."""
        self.given, self.mirrors = given, []
        self._copies: dict[str, tuple[str, str]] = {}
        self._inherited = json.loads(os.environ.pop(VARIABLE, "{}"))
        self._names: list[tuple[str, str]] = []
        self._folders: dict[str, Path] = {}
        self._saves, self._faults = saves, []
        self.config = _mapped(given, self._local)
        if self._faults:
            raise UserError("\n".join(self._faults))
        for mirror in self.mirrors:
            mirror.within = [other.local for other in self.mirrors if other is not mirror]

    @property
    def env(self) -> dict[str, str]:
        """Variables for the ranks that this process starts."""
        return {VARIABLE: json.dumps(self._copies)} if self._copies else {}

    def begin(self) -> None:
        """Fetch what a run at a URL goes on from. UserError where one cannot be written. Ranks' launcher has done it for them."""
        for mirror in self.mirrors:
            if f"out {mirror.url}" not in self._inherited:
                mirror.begin()

    def finish(self, result: Any) -> Any:
        """Send what is not sent yet, on rank 0; returns ``result`` with URLs for the paths behind them."""
        for mirror in self.mirrors if _is_first() else ():
            mirror.send()
        return self._spoken(result)

    def __enter__(self) -> View:
        _sending.extend(self.mirrors)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for mirror in self.mirrors:
            _sending.remove(mirror)
        if isinstance(error, UserError) and self._names:
            error.args = (self._spoken(str(error)),)

    def _local(self, where: str, text: str) -> str:
        """The local path for one text of a knob."""
        is_hub = hub.is_hub(text)
        if not is_hub and not remote.is_url(text):
            return text
        try:
            return self._written(where, text, is_hub) if where in WRITTEN else self._read(where, text, is_hub)
        except UserError as error:
            self._faults.append(str(error))
            return text

    def _read(self, where: str, text: str, is_hub: bool) -> str:
        kind = _KINDS.get(where, "data")
        found = self._inherited.get(f"{kind} {text}")
        if found is None:
            path, root = hub.fetch(text, where, kind) if is_hub else remote.fetch(text, where, kind)
            found = (str(path), str(root))
        self._copies[f"{kind} {text}"] = found
        self._names.append((found[1], text.rstrip("/")))
        if kind == "run":
            self._folders[text.rstrip("/")] = Path(found[1])
        return found[0]

    def _written(self, where: str, text: str, is_hub: bool) -> str:
        if where == "out" and not self._saves:
            return text
        if is_hub or isinstance(self.given, RecipeConfig):
            rule = "a path or a URL to write to" if is_hub else "a recipe's folder is on this machine"
            raise UserError(f"{where}: {rule}; got {text}; use a path, {where}=FOLDER, and copy it when it is done")
        url = text.rstrip("/")
        outer = next((folder for folder in self._folders if url.startswith(f"{folder}/")), None)
        local = self._folders[outer] / url.removeprefix(f"{outer}/") if outer else working_path(url)
        if where == "out":
            self._folders[url] = local
        self.mirrors.append(Mirror(where, url, local, whole=where != "out", **_kept(self.given)))
        self._copies[f"out {url}"] = (str(local), str(local))
        self._names.insert(0, (str(local), url))  # before the folder that it lies in
        return str(local)

    def _spoken(self, value: Any) -> Any:
        """``value`` with the user's spelling for copies, in every text of it."""
        if isinstance(value, str):
            for local, name in self._names:
                value = value.replace(local, name)
            return value
        if isinstance(value, Mapping):
            return {key: self._spoken(item) for key, item in value.items()}
        return [self._spoken(item) for item in value] if isinstance(value, list) else value


def _mapped(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """``value`` with every text of its path knobs changed; the same object where none changes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {}
        for field in dataclasses.fields(value):
            item, where = getattr(value, field.name), f"{key}.{field.name}" if key else field.name
            is_path = field.metadata.get("unit", "").partition(":")[0] == "path"
            new = _texts(item, lambda text, where=where: change(where, text)) if is_path else _mapped(item, change, where)
            if new is not item:
                changed[field.name] = new
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, dict):
        new = {name: _mapped(item, change, f"{key}.{name}") for name, item in value.items()}
        return new if any(new[name] is not value[name] for name in new) else value
    return value


def _texts(value: Any, change: Callable[[str], str]) -> Any:
    """The texts of one path knob changed: a text, a list of them, or the keys of a dict."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        new = [_texts(item, change) for item in value]
        return new if any(a is not b for a, b in zip(new, value, strict=True)) else value
    if isinstance(value, dict):
        new = {change(name): item for name, item in value.items()}
        return value if list(new) == list(value) else new
    return value


def _kept(config: Any) -> dict[str, Any]:
    """Which checkpoints a run keeps, in steps: an rl run counts rollouts."""
    sections = [getattr(config, name, None) for name in ("trainer", "rl")]
    section = next((section for section in sections if hasattr(section, "keep_last")), None)
    if section is None:
        return {}
    return {"keep_last": section.keep_last, "keep_every": section.keep_every * getattr(section, "updates_per_rollout", 1)}


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
