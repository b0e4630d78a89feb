"""``r1mega --help`` and ``r1mega COMMAND --help`` as text, from knobs and YAML files. Composes nothing, imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from r1mega import registry
from r1mega.config.groups import default_groups, options, overridden
from r1mega.config.knob import REQUIRED
from r1mega.config.schema import Key, keys, kinds, schema

_GRAMMAR = "r1mega COMMAND [group=choice] [key=value] ..."


def overview(about: Mapping[str, str]) -> str:
    """All commands. ``about``: command to one line."""
    lines = [f"usage: {_GRAMMAR}", "", *(f"  {name:<11}{text}" for name, text in about.items()), ""]
    lines += ["r1mega COMMAND --help lists the command's groups and keys with default, unit and meaning.", ""]
    lines += [
        "flags of Hydra: --help, --version, --config-dir DIR (more choices as YAML), --cfg job (print the config, run nothing),",
        "-m (a sweep: key=a,b runs the command with each value, each in a process of its own)",
    ]
    return "\n".join(lines)


def command_help(command: str, about: str, config_dir: Path, arguments: Iterable[str] = ()) -> str:
    """Groups and keys of ``command``; a group chosen in ``arguments`` shows that choice's keys and defaults."""
    cls = schema(command)
    groups = default_groups(command, config_dir)
    given = {group: name for group, _, name in (argument.partition("=") for argument in arguments) if group in groups}
    groups = overridden(groups | given, given, [config_dir])
    lines = [f"r1mega {command}: {about}", "", inspect.cleandoc(cls.__doc__ or "").replace("``", ""), ""]
    lines.append(f"usage: {_GRAMMAR.replace('COMMAND', command)}")
    if groups:
        lines += ["", "groups"]
        for group, name in groups.items():
            names = options(cls, group, [config_dir])
            state = "to be chosen" if name == "???" else f"now {name}"
            lines.append(f"  {group}={' | '.join(names) or 'NAME'} ({state})")
    chosen = {kind: registry.lookup(kind, groups[kind]) for kind in kinds(cls)}
    given = yaml_defaults(command, groups, config_dir)
    lines += ["", "keys"]
    rows = [(f"  {key.path}={value_text(given.get(key.path, key.default))}", key) for key in leaves(cls, chosen)]
    wide = min(max(len(left) for left, _ in rows), 52)
    for left, key in rows:
        rule = f" ({key.says})" if key.says else ""
        lines.append(f"{left:<{wide}}  {key.doc}{rule} [{key.unit}]")
    return "\n".join(lines)


def leaves(cls: type, chosen: Mapping[str, type], prefix: str = "") -> Iterator[Key]:
    """Every key that takes a value; the keys of a named entry with NAME in the place of its name."""
    for key in keys(cls, prefix, chosen):
        if key.entry is not None:
            yield from leaves(key.entry, {}, f"{key.path}.NAME.")
        elif key.cls is None:
            yield key


def yaml_defaults(command: str, groups: Mapping[str, str], config_dir: Path) -> dict[str, Any]:
    """Dotted key to value as the groups' files and the command's file set them, in that order."""
    found: dict[str, Any] = {}
    for group, name in groups.items():
        path = config_dir / group / f"{name}.yaml"
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            body = {name: value for name, value in (yaml.safe_load(text) or {}).items() if name != "defaults"}
            # a phase sets keys of the whole config, as Hydra's own comment in it says
            found |= _flat(body, "" if "@package _global_" in text else f"{group}.")
    body = yaml.safe_load((config_dir / f"{command}.yaml").read_text(encoding="utf-8"))
    return found | _flat({name: value for name, value in body.items() if name != "defaults"}, "")


def _flat(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        found[f"{prefix}{name}"] = value
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
    return found


def value_text(value: Any) -> str:
    """A default as it would be written on the command line."""
    if value is None or value == REQUIRED:
        return "null" if value is None else "(required)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{value_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(value_text, value)) + "]"
    return str(value)
