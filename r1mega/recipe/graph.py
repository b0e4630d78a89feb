"""Stages as a graph: reads and checks a recipe's section, orders it, fills placeholders.

In: the ``recipe`` section (description, stages by name). Out: :class:`Stage` objects in an order in which every stage follows
what it needs. Refuses cycles, unknown names and placeholders of stages that are not needed. Touches no file, runs nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1mega.config.data import StageConfig
from r1mega.config.errors import UserError, nearest

STAGE_COMMANDS = ("prepare", "pretrain", "sft", "rl", "eval", "export", "convert", "report")
"""Commands that a stage may run; a recipe in a recipe or a chat has no result to keep."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_PLACEHOLDER = re.compile(r"(?<!\$)\{([A-Za-z0-9_-]+)\}")  # ${name} is Hydra's interpolation


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage. ``needs``: names of stages whose results it reads; ``overrides``: Hydra overrides with placeholders unfilled."""

    name: str
    command: str
    needs: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    copy_to: str | None = None


def read_stages(section: Any) -> tuple[str, list[Stage]]:
    """The description and the stages (in the file's order) of a ``recipe`` section.

    Raises UserError for no section, an unknown key or command, a field of the wrong type, or a name that cannot be a folder.
    """
    if not isinstance(section, Mapping) or not isinstance(section.get("stages"), Mapping) or not section["stages"]:
        raise UserError(f"recipe: a recipe has stages; got {section!r:.80}; choose one, for example recipe=quickstart")
    for key in section:
        if key not in ("description", "stages"):
            raise UserError(
                f"recipe.{key}: unknown key; got {key!r}; {nearest(str(key), ('description', 'stages'))}use description, stages"
            )
    stages = [_read_stage(str(name), body) for name, body in section["stages"].items()]
    return str(section.get("description") or ""), stages


def _read_stage(name: str, body: Any) -> Stage:
    where = f"recipe.stages.{name}"
    if not _NAME.fullmatch(name) or name in ("recipe", "seed"):
        raise UserError(f"{where}: a stage's name is a folder and no placeholder; got {name!r}; use letters, digits, _ and -")
    if dataclasses.is_dataclass(body):
        body = dataclasses.asdict(body)
    if not isinstance(body, Mapping):
        raise UserError(f"{where}: a stage is a section; got {body!r:.60}; give command, needs, overrides, copy_to")
    known = tuple(field.name for field in dataclasses.fields(StageConfig))
    for key in body:
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key; got {key!r}; {nearest(str(key), known)}use one of {', '.join(known)}")
    command = body.get("command")
    if command not in STAGE_COMMANDS:
        hint = nearest(str(command), STAGE_COMMANDS)
        raise UserError(
            f"{where}.command: a command that leaves a result; got {command!r}; {hint}use one of {', '.join(STAGE_COMMANDS)}"
        )
    lists = {}
    for key in ("needs", "overrides"):
        value = body.get(key) or []
        if isinstance(value, str | Mapping) or not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{where}.{key}: a list of text; got {value!r:.60}; write {key}: [...]")
        lists[key] = tuple(value)
    copy_to = body.get("copy_to")
    if copy_to is not None and (
        not isinstance(copy_to, str)
        or not copy_to
        or Path(copy_to).is_absolute()
        or ".." in Path(copy_to).parts
        or copy_to == "stages"
    ):
        raise UserError(f"{where}.copy_to: a path below the run's folder; got {copy_to!r}; use for example export")
    return Stage(name, command, lists["needs"], lists["overrides"], copy_to)


def plan(stages: Sequence[Stage], only: Sequence[str] = ()) -> list[Stage]:
    """The stages in running order: each after what it needs, otherwise as given; reports as late as they can be.

    ``only``: names to run, with all that they need; empty: all. Raises UserError for a name given twice, an unknown name in
    ``needs`` or ``only`` (the nearest one named) and a cycle (its stages named).
    """
    by_name = {stage.name: stage for stage in stages}
    if len(by_name) != len(stages):
        twice = next(stage.name for stage in stages if sum(other.name == stage.name for other in stages) > 1)
        raise UserError(f"recipe.stages.{twice}: names differ; got it twice; rename one")
    for stage in stages:
        for need in stage.needs:
            _known(f"recipe.stages.{stage.name}.needs", need, by_name)
    wanted: set[str] = set()
    todo = list(only) or list(by_name)
    for name in only:
        _known("only", name, by_name)
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo.extend(by_name[name].needs)
    places = [stage.copy_to for stage in stages if stage.copy_to]
    for stage in stages:
        if places.count(stage.copy_to) > 1:
            raise UserError(f"recipe.stages.{stage.name}.copy_to: each stage its own place; got {stage.copy_to} twice; change one")
    order: list[Stage] = []
    done: set[str] = set()
    waiting = [stage for stage in stages if stage.name in wanted]
    while waiting:
        ready = [stage for stage in waiting if done.issuperset(stage.needs)]
        if not ready:
            cycle = " -> ".join(_cycle(waiting, done))
            raise UserError(f"recipe.stages: no stage needs itself; got {cycle}; remove one of these needs")
        chosen = min(ready, key=lambda stage: stage.command == "report")  # min keeps the first of equals
        order.append(chosen)
        done.add(chosen.name)
        waiting.remove(chosen)
    return order


def _known(where: str, name: str, by_name: Mapping[str, Stage]) -> None:
    if name not in by_name:
        raise UserError(f"{where}: no such stage; got {name!r}; {nearest(name, by_name)}use one of {', '.join(by_name)}")


def _cycle(waiting: Sequence[Stage], done: set[str]) -> list[str]:
    """Names along one cycle, its first name again at the end. ``waiting``: stages of which none is ready."""
    by_name = {stage.name: stage for stage in waiting}
    path = [waiting[0].name]
    while path.count(path[-1]) < 2:
        path.append(next(need for need in by_name[path[-1]].needs if need not in done))
    return path[path.index(path[-1]) :]


def fill(stage: Stage, folder: Path, seed: int) -> list[str]:
    """The stage's overrides with ``{NAME}`` (folder of a needed stage), ``{recipe}`` (the run's folder) and ``{seed}`` filled in.

    Other braces are Hydra's own (``{key: value}``) and stay. Raises UserError for a placeholder of a stage that is not needed:
    it would be read without being part of the key.
    """
    values = {"recipe": str(folder), "seed": str(seed), **{need: str(stage_folder(folder, need)) for need in stage.needs}}

    def value(match: re.Match) -> str:
        name = match[1]
        if name not in values:
            where = f"recipe.stages.{stage.name}.overrides"
            way = f"{nearest(name, values)}write {{STAGE}} of a stage in needs, or add {name} to needs"
            raise UserError(f"{where}: a placeholder is recipe, seed or a needed stage; got {{{name}}}; {way}")
        return values[name]

    return [_PLACEHOLDER.sub(value, override) for override in stage.overrides]


def stage_folder(folder: Path, name: str) -> Path:
    """Where the stage ``name`` of the run in ``folder`` keeps its files."""
    return folder / "stages" / name
