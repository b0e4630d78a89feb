"""Groups and their options: which groups a command has, which names each takes, where the YAML files lie.

Imports no torch and no Hydra, so that help and completion are quick.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import yaml

from r1mega import registry
from r1mega.config.schema import kinds


def config_dir() -> Path:
    """The folder of the YAML files: ``r1mega/configs`` in an installed package, ``configs`` beside the package in a checkout."""
    package = Path(registry.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def default_groups(command: str, config_dir: Path) -> dict[str, str]:
    """Group to option as the defaults list of ``configs/COMMAND.yaml`` has it ("???" where the user must choose)."""
    body = yaml.safe_load((config_dir / f"{command}.yaml").read_text(encoding="utf-8"))
    return {group: str(option) for item in body["defaults"] if isinstance(item, dict) for group, option in item.items()}


def overridden(groups: Mapping[str, str], given: Container[str], folders: Sequence[Path]) -> dict[str, str]:
    """``groups`` with the options that chosen presets bring along (``override /GROUP: OPTION`` in a preset's defaults list).

    A group in ``given`` was chosen by the user and stays. A file that cannot be read brings nothing: Hydra says why.
    """
    found = dict(groups)
    for group, option in groups.items():
        path = next((path for folder in folders if (path := folder / group / f"{option}.yaml").is_file()), None)
        for item in _defaults(path) if path else []:
            for name, value in item.items() if isinstance(item, dict) else ():
                target = str(name).removeprefix("override ").strip().removeprefix("/")
                if str(name).startswith("override ") and target in groups and target not in given:
                    found[target] = str(value)
    return found


def _defaults(path: Path) -> list:
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    held = body.get("defaults") if isinstance(body, dict) else None
    return held if isinstance(held, list) else []


def options(cls: type, group: str, folders: Sequence[Path]) -> list[str]:
    """Names that ``group=NAME`` takes: registered choices, or the YAML files of the group in ``folders``."""
    names = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
    if group in kinds(cls):
        names |= set(registry.choices(group))
    return sorted(names)
