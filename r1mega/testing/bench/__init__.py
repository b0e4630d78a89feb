"""Benchmark cases of our ops: what is timed beside what, a module an op. :mod:`r1mega.testing.measure` times them.

Each module here has ``benches() -> Iterator[Bench]`` and is found by itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Bench:
    """One figure: our op and its peers on the same inputs.

    ``make(device)``: fresh inputs; called several times, so that inputs rotate through more than a GPU's cache. ``run(*inputs)``:
    ours. ``num_bytes``: the fewest that must be read and written; ``flops``: operations. ``ceiling``: what the share is of:
    "copy" (device copy, of ``num_bytes``), "bf16" or "fp8" (matrix products, of ``flops``). ``peers``: name to ``run(*inputs)``.
    """

    op: str
    case: str
    make: Callable[[torch.device], tuple]
    run: Callable[..., Any]
    num_bytes: int = 0
    flops: int = 0
    ceiling: str = "copy"
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def all_benches(pattern: str | None = None) -> list[Bench]:
    """The benches of every module here, by module's name; ``pattern``: of ops with such a name, as ``quantize*``."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    found = [bench for module in modules for bench in module.benches()]
    return [bench for bench in found if pattern is None or fnmatchcase(bench.op, pattern)]
