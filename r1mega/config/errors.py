"""The error that a user can act on: one line ``where: rule; got value; way out``. Owns the grammar of errors; knows no config."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Wrong input. The message is one line: where, the rule, what was given, the way out; a config's faults come a line each."""


STOPPED = 75
"""Exit status after :class:`Stopped`: EX_TEMPFAIL of sysexits.h."""


class Stopped(Exception):
    """The run was asked to end (SIGTERM) and has saved first; the same command goes on."""


FAILED = 1
"""Exit status after :class:`Failed`."""


class Failed(Exception):
    """A command has done its work, and what it was to check does not hold; one line a fault."""


@dataclasses.dataclass(frozen=True)
class Violation:
    """One broken rule. ``fixes``: keys with the values that mend it, each value alone; ``hint``: the way out where no value is."""

    where: str
    rule: str
    got: Any
    fixes: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    hint: str = ""

    def __str__(self) -> str:
        got = shown(self.got)
        uses = ", or ".join(f"{key}={either(values)}" for key, values in self.fixes if values)
        ways = ", ".join(part for part in (uses and f"use {uses}", self.hint) if part)
        return f"{self.where}: {self.rule}; got {got}; {ways}".replace("\n", "\\n")


LONGEST_VALUE = 300


def shown(value: Any) -> str:
    """``value`` as an error shows it: quoted where it is empty or has more than one line, cut where it is long."""
    text = str(value)
    text = repr(text) if not text.strip() or len(text.splitlines()) > 1 else text
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(text)} characters)"


def either(values: Iterable[Any]) -> str:
    """``a, b or c``, as Hydra spells the values."""
    texts = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean X? `` for the known name closest to ``name``, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""
