"""One field of a config: default, doc string, unit. Owns the field grammar; knows no config and imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

REQUIRED = "???"  # OmegaConf's mark for a value that the user must give


def knob(default: Any = REQUIRED, doc: str = "", unit: str = "", *, rule: Callable[[Any], bool] | None = None, says: str = ""):
    """Declare a dataclass field with a doc string and a unit.

    ``unit`` is a physical or counting unit ("tokens", "seconds", "bytes", "1" for a pure number, "name", "path", "bool").
    ``rule`` is a predicate over one value, checked by :func:`r1mega.config.rules.check_fields`; ``says`` is that rule in words
    ("at least 1"). Mutable defaults are copied for every instance.
    """
    if not doc or not unit:
        raise TypeError("knob: every field has a doc string and a unit")
    metadata = {"doc": doc, "unit": unit, "rule": rule, "says": says}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if dataclasses.is_dataclass(default) and isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def at_least(low: float) -> dict[str, Any]:
    """``rule`` and ``says`` for values of at least ``low``."""
    return {"rule": lambda value: value >= low, "says": f"at least {low}"}


def above(low: float) -> dict[str, Any]:
    """``rule`` and ``says`` for values above ``low``."""
    return {"rule": lambda value: value > low, "says": f"above {low}"}


def between(low: float, high: float) -> dict[str, Any]:
    """``rule`` and ``says`` for values from ``low`` to ``high``, both included."""
    return {"rule": lambda value: low <= value <= high, "says": f"from {low} to {high}"}


def one_of(*names: str) -> dict[str, Any]:
    """``rule`` and ``says`` for one of a few names."""
    return {"rule": lambda value: value in names, "says": "one of " + ", ".join(names)}
