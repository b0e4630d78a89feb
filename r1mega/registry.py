"""The one extension idiom: a choice is a dataclass registered under (kind, name); its fields are its knobs.

Registering makes a choice a Hydra option (``advantage=grpo advantage.scale_by_std=false``). A module outside the package does
the same with :func:`register`; the command line imports it for a dotted name (``advantage=my.package.Mine``). Imports no torch:
a choice imports what it needs inside ``build``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable
from typing import TypeVar

from r1mega.config.errors import UserError

KINDS = {
    "advantage": "r1mega.rl.advantage",
    "balance": "r1mega.model.balance",
    "dispatcher": "r1mega.model.dispatch",
    "engine": "r1mega.rl.engine",
    "environment": "r1mega.rl.environment",
    "pipeline": "r1mega.train.pipeline",
    "policy_loss": "r1mega.rl.loss",
    "push": "r1mega.rl.push",
    "reward": "r1mega.rl.reward",
}
"""Kind to the module that registers the package's own choices of it."""

_choices: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}
T = TypeVar("T", bound=type)


def register(kind: str, name: str) -> Callable[[T], T]:
    """Class decorator: register a frozen dataclass as the choice ``name`` of ``kind``.

    Raises ValueError for an unknown kind or a name that another class holds, TypeError for a class that is no frozen dataclass.
    """
    if kind not in KINDS:
        raise ValueError(f"registry: unknown kind; got {kind!r}; use one of {', '.join(sorted(KINDS))}")

    def add(cls: T) -> T:
        if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:
            raise TypeError(
                f"registry: a choice is a frozen dataclass; got {cls.__qualname__}; add @dataclass(frozen=True) below @register"
            )
        holder = _choices[kind].get(name)
        if holder is not None and (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"registry: {kind}={name} is taken by {holder.__module__}.{holder.__qualname__}; use another name")
        _choices[kind][name] = cls
        return cls

    return add


def choices(kind: str) -> dict[str, type]:
    """All choices of ``kind`` by name; imports the package's own first."""
    importlib.import_module(KINDS[kind])
    return dict(_choices[kind])


def lookup(kind: str, name: str) -> type:
    """The choice ``name`` of ``kind``; a dotted name is imported. Raises UserError that names the nearest choice."""
    if "." in name:
        module, _, attribute = name.rpartition(".")
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"{kind}: a dotted choice is MODULE.CLASS; got {name!r}; write {kind}=MODULE.CLASS")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever a module of somebody else's raises
            said = (str(error).splitlines() or [type(error).__name__])[0]
            said = said if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {said}"
            raise UserError(f"{kind}: a dotted choice is imported; got {name!r} ({said}); check PYTHONPATH and the name") from error
    known = choices(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{kind}: no such choice; got {name!r}; {hint}use one of {', '.join(sorted(known))}")
    return known[name]


def name_of(kind: str, choice: object) -> str:
    """The registered name of a choice, or its dotted class path."""
    cls = choice if isinstance(choice, type) else type(choice)
    for name, held in choices(kind).items():
        if held is cls:
            return name
    return f"{cls.__module__}.{cls.__qualname__}"
