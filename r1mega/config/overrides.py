"""``group=choice`` and ``key=value``: checks each argument against the schema before Hydra sees it, and words Hydra's refusals.

In: a command and its arguments. Out: :class:`Request`, or one UserError that names every bad argument, a line each. Imports no
torch; a dotted choice is imported here, so that Hydra can compose it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from r1mega import registry
from r1mega.config.errors import UserError, nearest, shown
from r1mega.config.groups import default_groups, options, overridden
from r1mega.config.schema import WORDS, Key, find, kinds, nearest_key, plain_type, schema

SEARCH_PATH = "hydra.searchpath"
REPEATED = {"compare": "run"}
"""Command to the key that may be given several times; its values become one list."""

MOST_JOBS = 1000
"""Jobs that one sweep may have: all of them are composed and checked before the first one starts."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Arguments that fit the schema. ``groups``: group to option; ``chosen``: kind to the class of its choice;

    ``entries``: (mapping's path, entry's name) of entries that the arguments create (``problems.NAME.dataset=...``);
    ``folders``: where groups' YAML files lie.
    """

    command: str
    cls: type
    arguments: tuple[str, ...]
    groups: dict[str, str]
    chosen: dict[str, type]
    entries: tuple[tuple[str, str], ...]
    folders: tuple[Path, ...] = ()


def read(command: str, arguments: Iterable[str], config_dir: Path) -> Request:
    """Check all arguments of ``command``. Raises UserError with one line a bad argument."""
    cls = schema(command)
    arguments = _gathered(command, tuple(arguments))
    parsed, problems = [], []
    for argument in arguments:
        try:
            parsed.append(_parse(argument))
        except UserError as error:
            problems.append(str(error))
    folders = [config_dir, *search_folders(parsed)]
    groups = default_groups(command, config_dir)
    for override in parsed:
        if override.key_or_group in groups:
            try:
                groups[override.key_or_group] = _option(cls, override, folders)
            except UserError as error:
                groups[override.key_or_group] = ""
                problems.append(str(error))
    groups = overridden(groups, {override.key_or_group for override in parsed}, folders)
    for group, option in groups.items():
        if option == "???":
            known = options(cls, group, folders)
            problems.append(
                f"{group}: a choice is needed; got none; give {group}=NAME, one of {', '.join(known) or '(none is there)'}"
            )
    if problems:
        raise UserError("\n".join(problems))
    chosen = {kind: _class(kind, groups[kind]) for kind in kinds(cls) if kind in groups}
    entries = []
    for override in parsed:
        if override.key_or_group in groups or override.key_or_group == SEARCH_PATH:
            continue
        try:
            entries += _check_key(command, cls, override, chosen)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return Request(command, cls, arguments, groups, chosen, tuple(entries), tuple(folders))


def _gathered(command: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """``run=A run=B`` as ``run=[A,B]`` for the key that :data:`REPEATED` names: Hydra alone would keep the last one."""
    if command not in REPEATED:
        return arguments
    start = f"{REPEATED[command]}="
    given = [text.removeprefix(start) for text in arguments if isinstance(text, str) and text.startswith(start)]
    if not any(given):
        return arguments
    items = ",".join(value[1:-1] if value.startswith("[") and value.endswith("]") else value for value in given if value)
    return (*(text for text in arguments if not isinstance(text, str) or not text.startswith(start)), f"{start}[{items}]")


@dataclasses.dataclass(frozen=True)
class Job:
    """One command line of a sweep. ``swept``: those of ``arguments`` that differ between the jobs."""

    arguments: tuple[str, ...]
    swept: tuple[str, ...]


def expand(command: str, arguments: Iterable[str], config_dir: Path) -> list[Job]:
    """The jobs of a sweep (``-m``) in Hydra's grammar: ``a,b``, ``choice(a,b)``, ``range(1,5)``, ``glob(*)`` of a group's options.

    Every combination once, the last swept key fastest. Raises UserError with one line a bad argument, and above MOST_JOBS jobs.
    """
    cls = schema(command)
    parsed, values, problems = [], [], []
    for argument in arguments:
        try:
            parsed.append(_parse(argument, may_sweep=True))
        except UserError as error:
            problems.append(str(error))
    folders = [config_dir, *search_folders(parsed)]
    for override in parsed:
        try:
            values.append(_values(cls, override, folders) if override.is_sweep_override() else [override.input_line])
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    count = math.prod(map(len, values))
    if count > MOST_JOBS:
        raise UserError(f"-m: at most {MOST_JOBS} jobs a sweep; got {count} or more; take fewer values or several sweeps")
    is_swept = [override.is_sweep_override() for override in parsed]
    return [Job(line, tuple(itertools.compress(line, is_swept))) for line in itertools.product(*values)]


def _values(cls: type, override: Override, folders: Sequence[Path]) -> list[str]:
    """``key=value`` for every value of a sweeping override; one more than MOST_JOBS where there are more."""
    key, value = override.key_or_group, override.value()
    given = override.input_line.partition("=")[2]
    if not override.is_discrete_sweep():
        raise UserError(f"{key}: values that can be counted; got {given}; write {key}=a,b or {key}=range(START,STOP,STEP)")
    if isinstance(value, Glob):
        texts = value.filter(options(cls, key, folders))
    else:
        try:
            texts = list(itertools.islice(override.sweep_string_iterator(), MOST_JOBS + 1))
        except ValueError as error:
            raise UserError(f"{key}: values of a sweep; got {given} ({error}); write {key}=a,b") from error
    if not texts:
        raise UserError(f"{key}: at least one value of a sweep; got {given}, which has none; write {key}=a,b")
    return [f"{override.get_key_element()}={text}" for text in texts]


def search_folders(parsed: Iterable[Override]) -> list[Path]:
    """Folders that ``hydra.searchpath`` adds to the package's own configs."""
    found = []
    for override in parsed:
        if override.key_or_group == SEARCH_PATH:
            value = override.value()
            folders = [Path(str(item).removeprefix("file://")) for item in value] if isinstance(value, list) else [Path()]
            if not isinstance(value, list) or not all(folder.is_dir() for folder in folders):
                got = override.input_line.partition("=")[2]
                raise UserError(f"{SEARCH_PATH}: a list of folders; got {got}; leave it out and give --config-dir DIR")
            found += folders
    return found


_KEY = re.compile(r"[A-Za-z_][\w-]*([./][\w-]+)*([@:].*)?", re.ASCII)
"""A key, or a group with Hydra's package behind it, in Hydra's grammar."""

_WAYS = {
    "": "{key}=VALUE, a text with signs as {key}='\"...\"'",
    "[": "{key}=[A,B], texts with signs in quotes",
    "{": "{key}={A: 1}, texts with signs in quotes, names without",
}
"""First sign of a value to how such a value is written."""


def _parse(argument: Any, *, may_sweep: bool = False) -> Override:
    """One argument through Hydra's grammar; refuses what is no single assignment, unless it ``may_sweep``."""
    if not isinstance(argument, str) or argument.startswith("-"):
        raise UserError(
            f"arguments: group=choice or key=value; got {argument!r}; the only flags are --help, --config-dir DIR, --cfg job, -m"
        )
    if "=" not in argument and not argument.startswith("~"):
        raise UserError(
            f"arguments: group=choice or key=value, nothing positional; got {shown(repr(argument))}; write key={shown(argument)}"
        )
    key = argument.partition("=")[0].lstrip("+~")
    if not _KEY.fullmatch(key):
        raise UserError(f"arguments: a key of letters, digits, _ and dots; got {shown(repr(argument))}; write KEY=VALUE")
    try:
        override = OverridesParser.create().parse_override(argument)
    except (HydraException, ValueError) as error:  # ValueError: a number of some thousand digits
        said = str(error).splitlines()[0].partition(" expecting ")[0]
        way = _WAYS.get(argument.partition("=")[2][:1], _WAYS[""]).replace("{key}", key)
        raise UserError(f"{key}: a value in Hydra's grammar; got {shown(repr(argument))} ({shown(said)}); write {way}") from error
    if override.is_sweep_override() and not may_sweep:
        way = f"for a list write {key}=[a,b], for text with a comma quote it, for a run with each value add -m"
        raise UserError(f"{key}: one value; got {argument.partition('=')[2]!r}; {way}")
    if override.package is not None or (override.key_or_group.startswith("hydra") and override.key_or_group != SEARCH_PATH):
        raise UserError(f"{key}: a key of the command; got one of Hydra's own; leave it out (runs write to out=FOLDER)")
    return override


def _option(cls: type, override: Override, folders: Sequence[Path]) -> str:
    """The option that ``group=NAME`` chooses."""
    group, name = override.key_or_group, override.value()
    known = options(cls, group, folders)
    if override.is_delete() or not isinstance(name, str | int) or isinstance(name, bool):
        raise UserError(f"{group}: a choice is a name; got {override.input_line!r}; use one of {', '.join(known)}")
    name = str(name)
    if "." in name and group in kinds(cls):
        return name
    if name not in known:
        raise UserError(f"{group}: no such choice; got {name!r}; {nearest(name, known)}use one of {', '.join(known)}")
    return name


def _class(kind: str, name: str) -> type:
    """The class of a registered or dotted choice."""
    try:
        cls = registry.lookup(kind, name)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise UserError(f"{kind}: a choice is a frozen dataclass; got {name}, a {type(cls).__name__}; add @dataclass(frozen=True)")
    return cls


def _check_key(command: str, cls: type, override: Override, chosen: Mapping[str, type]) -> list[tuple[str, str]]:
    """Refuse an unknown key. Returns the mapping entries that the argument creates."""
    path = override.key_or_group
    key = find(cls, path, chosen)
    if key is None:
        hint = nearest_key(path, cls, chosen)
        raise UserError(f"{path}: no such key of {command}; got {override.input_line!r}; {hint}see r1mega {command} --help")
    if (
        key.path == path
        and (key.is_open or key.cls is not None)
        and not override.is_delete()
        and not isinstance(override.value(), dict)
    ):
        raise UserError(_type_line(path, key, repr(override.get_value_element_as_str())))
    inside_open = key.is_open and path != key.path
    if override.is_delete() and not inside_open:
        raise UserError(f"{path}: a fixed key; got {override.input_line!r}; give it a value instead, {path}=...")
    found, parts = [], path.split(".")
    for end in range(1, len(parts)):
        holder = find(cls, ".".join(parts[:end]), chosen)
        if holder is not None and holder.entry is not None and holder.path == ".".join(parts[:end]):
            found.append((holder.path, parts[end]))
    return found


def type_problem(path: str, request: Request, detail: str) -> str:
    """One line for a value of the wrong type at ``path``; ``detail``: what Hydra says, used where no argument gave the value."""
    key = find(request.cls, path, request.chosen)
    given = [argument.partition("=")[2] for argument in request.arguments if _covers(argument, path, request.groups)]
    got = shown(repr(given[-1])) if given else detail
    if key is None:
        return f"{path}: a value of the right type; got {got}; see r1mega {request.command} --help"
    return _type_line(path, key, got)


def _type_line(path: str, key: Key, got: str) -> str:
    words = key.words
    if plain_type(key.type)[0] is dict and path != key.path:
        words = WORDS.get(typing.get_args(key.type)[1], "another value")
    unit = f" ({key.unit})" if plain_type(key.type)[0] in (int, float) and key.unit != "1" else ""
    return f"{path}: {words}{unit}; got {got}; {_example(path, key)}"


def _covers(argument: str, path: str, groups: Mapping[str, str]) -> bool:
    """True where ``argument`` gives the value at ``path``; a group's file gives its own."""
    name = argument.partition("=")[0].lstrip("+")
    return name not in groups and (path == name or path.startswith(name + "."))


def _example(path: str, key: Key) -> str:
    """A value that fits, as a way out."""
    base, _ = plain_type(key.type)
    if key.cls is not None:
        return f"give its keys, {path}.KEY=value"
    if base is dict:
        return (
            f"write {key.path}={{name:value}}"
            if path == key.path
            else f"write {key.path}={{{path.removeprefix(key.path + '.')}: 1}}"
        )
    if base is list:
        return f"write {path}=[a,b]"
    if isinstance(key.default, bool):
        return f"write {path}=true or {path}=false"
    if key.default is None or key.default == "???" or base is str:
        return f"write {path}=" + {int: "10", float: "0.1"}.get(base, "PATH" if key.unit == "path" else "text")
    return f"for example {path}={key.default}"
