"""The grammar's nouns: which command has which config, and every key of it. Owns the walk over knobs; composes nothing.

In: a config class and the classes of its registered choices. Out: :class:`Key` objects, or what a dotted key is. Imports no torch
and no Hydra.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from r1mega import registry
from r1mega.config.bench import BenchConfig
from r1mega.config.convert import ConvertConfig
from r1mega.config.data import CompareConfig, PrepareConfig, RecipeConfig, ReportConfig
from r1mega.config.errors import UserError, nearest
from r1mega.config.rl import ChatConfig, EvalConfig, ExportConfig, RlConfig
from r1mega.config.tools import CompletionConfig, DoctorConfig, LineageConfig, TimelineConfig, WhyConfig
from r1mega.config.train import PretrainConfig, SftConfig

SCHEMAS: dict[str, type] = {
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "rl": RlConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "convert": ConvertConfig,
    "recipe": RecipeConfig,
    "report": ReportConfig,
    "compare": CompareConfig,
    "chat": ChatConfig,
    "timeline": TimelineConfig,
    "lineage": LineageConfig,
    "why": WhyConfig,
    "bench": BenchConfig,
    "doctor": DoctorConfig,
    "completion": CompletionConfig,
}
"""Command to the dataclass of its config."""

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
    Any: "anything",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One knob of a config: its dotted path, type, default and what its knob says. ``cls``: the section's class, or None.

    ``entry``: the class of a dict's entries where they are sections (``problems.NAME.dataset``).
    """

    path: str
    type: Any
    default: Any
    doc: str
    unit: str
    says: str = ""
    cls: type | None = None
    entry: type | None = None

    @property
    def is_open(self) -> bool:
        """True for a mapping whose keys the user names."""
        return plain_type(self.type)[0] in (dict, Any) and self.cls is None

    @property
    def words(self) -> str:
        """The type in words, for an error."""
        base, optional = plain_type(self.type)
        return WORDS.get(base, "a section") + (" or null" if optional else "")


def schema(command: str) -> type:
    """The config class of ``command``. Raises UserError naming the nearest command."""
    if command not in SCHEMAS:
        raise UserError(f"command: no such command; got {command!r}; {nearest(command, SCHEMAS)}use one of {', '.join(SCHEMAS)}")
    return SCHEMAS[command]


def command_of(config: Any) -> str:
    """The command that ``config`` (an instance) belongs to. Raises UserError for anything else."""
    for command, cls in SCHEMAS.items():
        if type(config) is cls:
            return command
    raise UserError(f"config: a config of a command; got {type(config).__name__}; make it with compose(command, overrides)")


def plain_type(hint: Any) -> tuple[Any, bool]:
    """The class behind a type hint (``dict[str, float]`` is dict) and whether it may be None."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [item for item in typing.get_args(hint) if item is not type(None)]
        return (typing.get_origin(inner[0]) or inner[0]), True
    return (typing.get_origin(hint) or hint), False


def fields(cls: type, prefix: str = "", chosen: Mapping[str, type] | None = None) -> dict[str, Key]:
    """The knobs of one section by name, not those below it. ``chosen``: class of every registered choice by its key."""
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        hint, path = hints[field.name], f"{prefix}{field.name}"
        base, _ = plain_type(hint)
        inside = typing.get_args(hint)[1] if base is dict else None
        found[field.name] = Key(
            path=path,
            type=hint,
            default=field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
            doc=field.metadata.get("doc", ""),
            unit=field.metadata.get("unit", ""),
            says=field.metadata.get("says", ""),
            cls=(chosen or {}).get(path) if hint is Any else base if dataclasses.is_dataclass(base) else None,
            entry=inside if dataclasses.is_dataclass(inside) else None,
        )
    return found


def keys(cls: type, prefix: str = "", chosen: Mapping[str, type] | None = None) -> Iterator[Key]:
    """All knobs below ``cls`` in order of declaration; a section comes before its own knobs."""
    for key in fields(cls, prefix, chosen).values():
        yield key
        if key.cls is not None:
            yield from keys(key.cls, f"{key.path}.", chosen)


def find(cls: type, path: str, chosen: Mapping[str, type] | None = None) -> Key | None:
    """What the dotted ``path`` names: a knob, the open mapping that holds it, or None where there is no such key."""
    first, _, rest = path.partition(".")
    prefix = ""
    while True:
        key = fields(cls, prefix, chosen).get(first)
        if key is None or not rest:
            return key
        if key.entry is not None:
            name, _, rest = rest.partition(".")
            if not rest:
                return Key(f"{key.path}.{name}", key.entry, None, key.doc, key.unit, cls=key.entry)
            cls, prefix = key.entry, f"{key.path}.{name}."
        elif key.cls is not None:
            cls, prefix = key.cls, f"{key.path}."
        else:
            return key if key.is_open else None
        first, _, rest = rest.partition(".")


def kinds(cls: type) -> list[str]:
    """Fields of ``cls`` that hold a registered choice; a field's name is its kind."""
    return [
        field.name for field in dataclasses.fields(cls) if field.metadata.get("unit") == "choice" and field.name in registry.KINDS
    ]


def nearest_key(path: str, cls: type, chosen: Mapping[str, type] | None = None) -> str:
    """``did you mean X? `` for the known key closest to ``path``, or an empty string.

    A key with the same last name wins (``lr`` is ``optim.lr``), then a name alike in the same section, then any key alike.
    """
    known = [key.path for key in keys(cls, chosen=chosen)]
    parent, _, last = path.rpartition(".")
    holder = find(cls, parent, chosen) if parent else None
    if holder is not None and holder.cls is not None:
        siblings = [key.path for key in fields(holder.cls, f"{parent}.", chosen).values()]
    else:
        siblings = [name for name in known if "." not in name]
    by_last: dict[str, str] = {}
    for name in known:
        by_last.setdefault(name.rpartition(".")[2], name)
    same = [name for name in known if name.rpartition(".")[2] == last]
    if same:
        return f"did you mean {max(same, key=lambda name: difflib.SequenceMatcher(None, path, name).ratio())}? "
    for candidates in (siblings, known):
        close = difflib.get_close_matches(path, candidates, n=1, cutoff=0.7)
        if close:
            return f"did you mean {close[0]}? "
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    return f"did you mean {by_last[close[0]]}? " if close else ""
