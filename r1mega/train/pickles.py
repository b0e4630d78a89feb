"""Is a pickle only data? Torch reads a distributed checkpoint's ``.metadata`` with pickle, which runs whatever the file names.

A checkpoint may come from a hub or a bucket, so its metadata is read here first with nothing real behind the names: only plain
classes of torch may be named. Refuses functions, dotted names and everything else.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import torch

from r1mega.config.errors import UserError

MODULES = ("torch.distributed.checkpoint.", "torch.distributed._shard.")
FUNCTIONS = {("torch.serialization", "_get_layout")}
"""What torch's own metadata calls: a name to a memory layout."""


class _Refused(Exception):
    """The name that a pickle must not have."""


class _Stub:
    """Stands in for every class of the pickle: takes anything, does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __hash__(self):
        return id(self)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if not _is_plain(module, name):
            raise _Refused(f"{module}.{name}")
        return _Stub

    def persistent_load(self, pid):
        raise _Refused("a persistent id")


def _is_plain(module: str, name: str) -> bool:
    if (module, name) in FUNCTIONS:
        return True
    if "." in name or not (module == "torch" or module.startswith(MODULES)):
        return False
    found = getattr(importlib.import_module(module), name, None)
    if module == "torch":
        return isinstance(found, torch.dtype | torch.layout) or found is torch.Size
    return isinstance(found, type) and found.__module__.startswith(MODULES)


def check(path: Path, where: str) -> None:
    """Raise UserError, naming what it asks for, when unpickling ``path`` could run anything; ``where`` starts the message."""
    try:
        with path.open("rb") as file:
            _Reader(file).load()
    except _Refused as error:
        raise UserError(
            f"{where}: {path.name} names classes of torch alone; got {error}, which could run a program of somebody's; use another"
        ) from error
    except Exception as error:  # noqa: BLE001 - anything may come out of a pickle that is no pickle
        raise UserError(f"{where}: {path.name} is a pickle; got {type(error).__name__} {error}; use an older checkpoint") from error
