"""Megatron-Core 0.16.1 without torch's compiler, where nothing compiles. Owns how it is imported on a machine without accelerator.

| bend | symptom without it | remove when |
|---|---|---|
| ``torch.compile`` hands functions back while Megatron is imported, and its ``jit_fuser`` is off | each process imports the compiler, 1.2 s of 3 s at its start, for wrappers that :mod:`r1mega.compat.megatron_cpu` takes off again | ``jit.py`` decides at call time |

Versions: megatron-core 0.16.1, torch 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import torch

CORE = "megatron.core"


def apply() -> None:
    """When Megatron-Core is imported, it comes without the compiler.

    Nothing where it is there already, or where there is an accelerator to compile for.
    """
    waits = any(isinstance(finder, _Finder) for finder in sys.meta_path)
    if not (waits or CORE in sys.modules or torch.accelerator.is_available()):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds ``megatron.core`` where it is, once, and surrounds the running of its body."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != CORE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_plain(module: types.ModuleType) -> None:
                with _plain_compile():
                    run(module)
                    from megatron.core import jit
                jit.disable_jit_fuser()

            spec.loader.exec_module = run_plain
        return spec


@contextlib.contextmanager
def _plain_compile() -> Iterator[None]:
    real = torch.compile

    def plain(model: Any = None, **options: Any) -> Any:
        return model if model is not None else lambda function: function

    torch.compile = plain
    try:
        yield
    finally:
        torch.compile = real
