"""Arguments to a typed config and back: Hydra's composition, the config saved with a run, presets. Imports no torch.

In: a command, ``group=choice`` and ``key=value``. Out: the command's dataclass with every section and choice as its dataclass.
Hydra composes and nothing else: it makes no folder, changes no directory, takes over no logging.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError, OmegaConfBaseException

from r1mega import registry
from r1mega.config import rules
from r1mega.config.errors import UserError, nearest
from r1mega.config.groups import config_dir
from r1mega.config.model import ModelConfig
from r1mega.config.overrides import Request, read, type_problem
from r1mega.config.rl import RewardConfig, RuntimeConfig
from r1mega.config.run import DeviceConfig, LaunchConfig, ParallelConfig, PrecisionConfig
from r1mega.config.schema import command_of, find, kinds, nearest_key, schema
from r1mega.config.train import OptimConfig

PRESETS: dict[str, type] = {
    "model": ModelConfig,
    "device": DeviceConfig,
    "precision": PrecisionConfig,
    "launch": LaunchConfig,
    "optim": OptimConfig,
    "parallel": ParallelConfig,
    "reward": RewardConfig,
    "runtime": RuntimeConfig,
}
"""Groups whose options are YAML files of one dataclass."""

FILE_NAME = "config.yaml"


@dataclasses.dataclass(frozen=True)
class Composition:
    """A composed config and where it came from. ``choices``: group to option, for the groups of the command."""

    command: str
    config: Any
    overrides: tuple[str, ...]
    choices: dict[str, str]


def compose(command: str, overrides: Iterable[str] = ()) -> Any:
    """The typed config of ``command``, with every rule checked (input files are not looked at: :func:`rules.check_paths`).

    Raises UserError, one line a problem: an unknown command, key or choice (the nearest one named), a value of the wrong type, a
    missing value, a broken rule.
    """
    config = composition(command, overrides).config
    rules.check(config)
    return config


def composition(command: str, overrides: Iterable[str] = ()) -> Composition:
    """As :func:`compose`, with the provenance and without the rules."""
    folder = config_dir()
    request = read(command, overrides, folder)
    _store(request)
    with _wording(request):
        with initialize_config_dir(str(folder.resolve()), job_name="r1mega", version_base="1.3"):
            node = hydra_compose(command, list(request.arguments), return_hydra_config=True)
        with open_dict(node):  # of Hydra's own section only the choices may be named by an interpolation
            node.hydra = {"runtime": {"choices": dict(request.groups)}}
        _name_missing(node, request)
        config = OmegaConf.to_object(node)
        del config.hydra  # a key that is no field of the dataclass becomes an attribute
    return Composition(command, config, request.arguments, request.groups)


def resolved(config: Any) -> Any:
    """A config made in Python as composition would give it: types checked, ``${...}`` of the defaults (``out``) filled in.

    Raises UserError for a value of the wrong type, a value that is still missing, or an interpolation of no key.
    """
    command = command_of(config)
    try:
        node = OmegaConf.structured(config)
        missing = sorted(_missing(node))
        if missing:
            raise UserError(f"{missing[0]}: a value is needed; got none; set it in the {type(config).__name__}")
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        detail = str(error).splitlines()[0]
        raise UserError(
            f"{error.full_key or command}: a value of the key's type; got {detail}; see r1mega {command} --help"
        ) from error


_stored: dict[tuple[str | None, str], type | None] = {}
"""What Hydra's store holds under a group and a name: the dataclass as it is, None where entries were added to it."""


def _store(request: Request) -> None:
    """Put the command's schema and every choice that it may name into Hydra's store, which hands out copies."""
    _put(None, f"{request.command}_schema", request.cls, request.entries)
    for kind in kinds(request.cls):
        for name, cls in {
            **registry.choices(kind),
            **({request.groups[kind]: request.chosen[kind]} if kind in request.chosen else {}),
        }.items():
            _put(kind, name, cls)


def _put(group: str | None, name: str, cls: type, entries: Sequence[tuple[str, str]] = ()) -> None:
    """``entries``: (mapping's path, entry's name) of sections that arguments create."""
    if _stored.get((group, name)) is cls and not entries:
        return
    node = structured(cls)
    for mapping, entry in entries:
        holder = OmegaConf.select(node, mapping)
        if entry not in holder:
            holder[entry] = structured(find(cls, mapping).entry)
    ConfigStore.instance().store(group=group, name=name, node=node)
    _stored[group, name] = None if entries else cls


def structured(cls: type) -> DictConfig:
    """``cls`` as an OmegaConf node whose sections refuse unknown keys and whose mappings take any.

    A frozen dataclass comes read-only out of OmegaConf and could not be overridden: that flag is cleared.
    """
    node = OmegaConf.structured(cls)
    OmegaConf.set_readonly(node, None)
    _open(node)
    return node


def _open(node: DictConfig) -> None:
    for name in node:
        child = node._get_node(name)
        if not isinstance(child, DictConfig) or child._is_none() or child._is_missing() or child._is_interpolation():
            continue
        OmegaConf.set_readonly(child, None)
        if dataclasses.is_dataclass(OmegaConf.get_type(child)):
            _open(child)
        else:
            OmegaConf.set_struct(child, False)


def _name_missing(node: DictConfig, request: Request) -> None:
    lines = []
    for path in sorted(_missing(node)):
        key = find(request.cls, path, request.chosen)
        what = f"{key.doc}, unit {key.unit}" if key else "required"
        lines.append(f"{path}: a value is needed ({what}); got none; give {path}=VALUE")
    if lines:
        raise UserError("\n".join(lines))


def _missing(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Keys without a value. OmegaConf's own search follows interpolations and stops at one that leads to such a key."""
    for name in node:
        child, path = node._get_node(name), f"{prefix}{name}"
        if child._is_missing() and not child._is_interpolation():
            yield path
        elif isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            yield from _missing(child, f"{path}.")


@contextlib.contextmanager
def _wording(request: Request) -> Iterator[None]:
    """Turn Hydra's and OmegaConf's errors into one UserError of our grammar."""
    try:
        yield
    except (InterpolationKeyError, InterpolationResolutionError) as error:
        raise UserError(
            f"{error.full_key or 'config'}: an interpolation names a key; got {str(error).splitlines()[0]}; check ${{...}}"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UserError(
            f"{mark.name if mark else 'config'}: YAML; got {error.problem} in line {mark.line + 1 if mark else 0}; correct it"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
        said = [line.strip() for line in str(cause or error).splitlines()]
        named = [line.removeprefix("full_key: ") for line in said if line.startswith("full_key: ")]
        path = re.sub(r"\[\d+\]", "", getattr(cause, "full_key", None) or (named[0] if named else ""))
        detail = said[1] if named and said[0].endswith("composing config:") else said[0]
        if taken := _TAKEN.search(detail):
            raise UserError(f"{taken[1]}: a key that is there; got it with +; write {taken[1]}=VALUE, without +") from error
        if not path and (file := _FILE.search(detail)):
            got = " ".join(filter(None, said[:2])).removeprefix(file[0])
            raise UserError(f"{file[1]}.yaml: a mapping of its group's keys; got {got}; correct that file") from error
        if not path:
            raise UserError(f"config: Hydra composes it; got {detail}; check the YAML files, debug=true shows where") from error
        if find(request.cls, path, request.chosen) is None:
            hint = nearest_key(path, request.cls, request.chosen)
            raise UserError(
                f"{path}: no such key of {request.command}; got {detail}; {hint}see r1mega {request.command} --help"
            ) from error
        if "is not in struct" in detail:
            raise UserError(f"{path}: a key that is there; got no such one; write +{path}=VALUE to add it") from error
        raise UserError(type_problem(path, request, detail)) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{_undecodable(request)}: YAML files are UTF-8; got {error.reason}; save it as UTF-8") from error


_TAKEN = re.compile(r"An item is already at '([^']+)'")
_FILE = re.compile(r"In '([^']+)': ")


def _undecodable(request: Request) -> str:
    """The file of a chosen option that is not UTF-8."""
    for group, option in request.groups.items():
        for folder in request.folders:
            path = folder / group / f"{option}.yaml"
            try:
                path.is_file() and path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return str(path)
    return "config"


def save_config(
    config: Any, folder: str | Path, *, overrides: Iterable[str] = (), choices: Mapping[str, str] | None = None
) -> Path:
    """Write ``folder/config.yaml``: command, overrides, group choices and the resolved config. Returns its path.

    The file is written aside and renamed. :func:`load_config` gives an equal config back.
    """
    command = command_of(config)
    named = {kind: registry.name_of(kind, choice) for kind in kinds(type(config)) if (choice := getattr(config, kind)) is not None}
    body = {
        "command": command,
        "overrides": list(overrides),
        "choices": {**(choices or {}), **named},
        "config": dataclasses.asdict(config),
    }
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{FILE_NAME}.{os.getpid()}.tmp")
    aside.write_text(yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
    os.replace(aside, path)
    return path


def load_config(folder: str | Path) -> Any:
    """The config that :func:`save_config` wrote into ``folder``. Raises UserError for no file, other keys or other types."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path}: a run's folder holds its config; got no such file; give the folder of a run")
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: YAML; got {str(error).splitlines()[0]}; start the run again") from error
    if not isinstance(body, dict) or not {"command", "choices", "config"} <= set(body):
        raise UserError(f"{path}: command, choices and config; got {body!r:.60}; give the folder of a run")
    cls = schema(body["command"])
    node = structured(cls)
    for kind in kinds(cls):
        if kind in body["choices"]:
            node[kind] = structured(registry.lookup(kind, body["choices"][kind]))
    return _merged(node, body["config"], str(path))


def model_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """A model config from plain values, as a checkpoint keeps it. Raises UserError for an unknown key or a wrong type."""
    return _merged(structured(ModelConfig), values, "model")


def preset(group: str, name: str) -> Any:
    """The dataclass of ``group=name`` (model, device, precision, optim, reward) without a command around it.

    Raises UserError for an unknown group or name, the nearest one named.
    """
    if group not in PRESETS:
        raise UserError(f"preset: a group of YAML files; got {group!r}; {nearest(group, PRESETS)}use one of {', '.join(PRESETS)}")
    known = sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
    if name not in known:
        raise UserError(f"{group}: no such choice; got {name!r}; {nearest(name, known)}use one of {', '.join(known)}")
    values = yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8"))
    return _merged(structured(PRESETS[group]), OmegaConf.to_container(OmegaConf.create(values)), f"{group}={name}")


def _merged(node: DictConfig, values: Mapping[str, Any], where: str) -> Any:
    """``values`` over the typed ``node``, as objects."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(node, _literal(values)))
    except OmegaConfBaseException as error:
        detail = str(error).splitlines()[0]
        raise UserError(
            f"{where}: keys and types of this version; got {error.full_key or '?'}: {detail}; correct or remove it"
        ) from error


def _literal(value: Any) -> Any:
    """Resolved text may hold ``${``: escaped, so that it is not resolved a second time."""
    if isinstance(value, Mapping):
        return {name: _literal(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
