"""Megatron-Core 0.16.1 without torch's compiler, where nothing compiles. Owns how it is imported on a machine without accelerator.

| bend | symptom without it | remove when |
|---|---|---|
| ``torch.compile`` hands functions back while Megatron is imported, and its ``jit_fuser`` is off | each process imports the compiler, 1.2 s of 3 s at its start, for wrappers that :mod:`r1mega.compat.megatron_cpu` takes off again | ``jit.py`` decides at call time |

Versions: megatron-core 0.16.1, torch 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch


def apply() -> None:
    """Import Megatron-Core; nothing where it is there already, or where there is an accelerator to compile for."""
    if "megatron.core" in sys.modules or torch.accelerator.is_available():
        return
    with _plain_compile():
        from megatron.core import jit
    jit.disable_jit_fuser()


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
