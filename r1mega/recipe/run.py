"""Runs a recipe: composes every stage first, then runs what has no kept result, in order, on all ranks together.

In: :class:`RecipeConfig`. Out: the summary (also ``summary.json``, rewritten after every stage). Rank 0 alone decides and writes;
its decisions are broadcast, and what fails on it fails on every rank. Refuses everything wrong before the first stage starts.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1mega import __version__
from r1mega.config.data import RecipeConfig
from r1mega.config.errors import UserError
from r1mega.config.run import ComputeConfig, RunConfig
from r1mega.recipe import store
from r1mega.recipe.graph import Stage, fill, plan, read_stages, stage_folder
from r1mega.recipe.keys import normalise, outside_inputs, plain, stage_key
from r1mega.recipe.summary import machine, summary_rows, table

SINGLE_RANK_COMMANDS = frozenset({"prepare", "export", "convert", "report"})
"""Commands on files alone: they run on rank 0 while the others wait."""

Composer = Callable[[str, list[str]], Any]
Runner = Callable[[str, Any], Any]


@dataclasses.dataclass(frozen=True)
class Crew:
    """The ranks that walk one graph. ``broadcast``: rank 0's value on every rank; None for a single process."""

    is_first: bool = True
    broadcast: Callable[[Any], Any] | None = None

    def first(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` on rank 0 and return its value on every rank; its error is raised on every rank."""
        if self.broadcast is None:
            return action()
        value, error = None, None
        if self.is_first:
            try:
                value = action()
            except Exception as caught:  # noqa: BLE001 - whatever it is, the others must hear of it instead of waiting
                error = caught
        kind = "" if error is None else "user" if isinstance(error, UserError) else "other"
        value, kind, text = self.broadcast((value, kind, "" if error is None else str(error)))
        if error is not None:
            raise error
        if kind:
            raise UserError(text) if kind == "user" else RuntimeError(f"rank 0: {text}")
        return value


def recipe(cfg: RecipeConfig, runner: Runner | None = None) -> dict[str, Any]:
    """Run the recipe of ``cfg`` and return its summary.

    ``runner(command, config)``: runs one command; None: the table of commands. Under several ranks (RANK, WORLD_SIZE) each rank
    calls this. Raises UserError for a bad recipe or stage, before anything runs; a stage's own error ends the recipe and the
    next call goes on with that stage.
    """
    from r1mega.config.compose import compose

    if runner is None:
        # The table of commands is the top of the package and holds this function too: looked up when called, never imported.
        runner = importlib.import_module("r1mega.api").run
    _, stages = read_stages(cfg.recipe)
    overrides = compute_overrides(cfg)
    plan(stages, cfg.only)  # a wrong graph is told before the ranks meet, which imports torch
    return run_stages(
        stages, Path(cfg.out), cfg.seed, compose, runner, name=cfg.name, only=cfg.only, compute=overrides, crew=_crew(cfg)
    )


def _crew(cfg: RecipeConfig) -> Crew:
    """The ranks of this run; a single process stays without torch."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Crew()
    from r1mega.compat import megatron_jit

    megatron_jit.apply()
    from r1mega.device import open_device
    from r1mega.mesh import open_mesh

    mesh = open_mesh(open_device(cfg.device), cfg.parallel, cfg.launch, cfg.seed)
    return Crew(mesh.is_first, mesh.broadcast_object)


def compute_overrides(cfg: RecipeConfig) -> dict[str, list[str]]:
    """Field of ComputeConfig (device, launch, ..., profile) to the overrides that give a stage the recipe's own values."""
    own = {field.name for field in dataclasses.fields(RunConfig)}
    overrides: dict[str, list[str]] = {}
    for name in (field.name for field in dataclasses.fields(ComputeConfig) if field.name not in own):
        value = getattr(cfg, name)
        inner = (
            {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            if dataclasses.is_dataclass(value)
            else None
        )
        single = {name: value} if inner is None else {f"{name}.{key}": item for key, item in inner.items()}
        overrides[name] = [f"{key}={_hydra(item)}" for key, item in single.items()]
    return overrides


def _hydra(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z0-9_./+-]+", text) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    seed: int,
    composer: Composer,
    runner: Runner,
    *,
    name: str = "run",
    only: Sequence[str] = (),
    compute: Mapping[str, list[str]] | None = None,
    single_rank: frozenset[str] = SINGLE_RANK_COMMANDS,
    version: str = __version__,
    crew: Crew | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run ``stages`` in ``folder`` and return the summary ``{"recipe", "seed", "seconds", "machine", "stages": [row, ...]}``.

    ``composer(command, overrides)`` gives a stage's typed config; ``runner(command, config)`` runs it and returns a dict (or a
    dataclass, or None). ``compute``: overrides by section for every command outside ``single_rank``; a stage that chooses a
    section itself keeps its choice. ``say`` gets one line a stage and the table, on rank 0. Raises UserError before the first
    stage for anything wrong with the graph or a stage's config.
    """
    if not re.fullmatch(r"[A-Za-z0-9_./+@%-]+", str(folder)):
        raise UserError(f"out: a recipe's folder is written into overrides; got {str(folder)!r}; use letters, digits, / . _ - only")
    crew = crew or Crew()
    order, every = plan(stages, only), plan(stages)
    configs, used = {}, {}
    for stage in every:
        used[stage.name] = _overrides(stage, folder, seed, {} if stage.command in single_rank else compute or {})
        try:
            configs[stage.name] = composer(stage.command, used[stage.name])
        except UserError as error:
            raise UserError("\n".join(f"stage {stage.name}: {line}" for line in str(error).splitlines())) from error
    keys = crew.first(lambda: _keys(every, configs, folder, version))
    records: dict[str, dict[str, Any]] = {}
    stamps: dict[str, dict[str, Any]] = {}

    def stamp_of(stage: Stage) -> dict[str, Any]:
        # A report shows the whole run: any stage made anew makes it anew.
        reads = [other.name for other in order if other != stage] if stage.command == "report" else stage.needs
        return {"key": keys[stage.name], "made_from": {need: records[need]["made"] for need in reads if need in records}}

    def decide(stage: Stage) -> tuple[str, dict[str, Any]]:
        """On rank 0: ("kept", record), or the folder made ready and ("again" or "new", {})."""
        stamps[stage.name] = stamp = stamp_of(stage)
        record = store.finished(folder, stage.name, stamp)
        if record and _page_is_there(stage, record):
            if stage.copy_to and not (folder / stage.copy_to).exists():
                store.place_copy(folder, stage, record.get("result") or {})
            return "kept", record
        return "again" if store.begin(folder, stage.name, stamp) else "new", {}

    def finish(stage: Stage, result: Any, seconds: float) -> dict[str, Any]:
        outcome = plain(result) if result is not None else {}
        outcome = outcome if isinstance(outcome, dict) else {"value": outcome}
        body = {"name": stage.name, "command": stage.command, "seconds": seconds, "finished": time.time()}
        return store.finish(folder, stage, stamps[stage.name], {**body, "overrides": used[stage.name], "result": outcome})

    def summary() -> dict[str, Any]:
        known: dict[str, dict[str, Any]] = {}
        for stage in every:  # a stage that is not run now, or not yet, counts where its kept result is of the same key and needs
            record = records.get(stage.name) or store.finished(folder, stage.name, {"key": keys[stage.name]})
            sources = (record or {}).get("made_from", {})
            if record and all(known.get(need, {}).get("made") == made for need, made in sources.items()):
                known[stage.name] = record
        rows = summary_rows(every, known)
        total = sum(row["seconds"] or 0.0 for row in rows)
        whole = {"recipe": name, "seed": seed, "seconds": round(total, 3), "machine": machine(), "stages": rows}
        store.write_json(folder / "summary.json", whole)
        return whole

    def tell(text: str) -> None:
        if crew.is_first:
            say(text)

    whole: dict[str, Any] = {}
    for index, stage in enumerate(order, start=1):
        head = f"[{index}/{len(order)}] {stage.name}"
        verdict, record = crew.first(lambda stage=stage: decide(stage))
        if verdict == "kept":
            records[stage.name] = record
            tell(f"{head}: kept ({record.get('seconds', 0.0):.1f} s when it ran)")
        else:
            tell(f"{head}: {stage.command} {'goes on' if verdict == 'again' else 'starts'}")
            start = time.monotonic()
            config = configs[stage.name]
            if stage.command in single_rank:
                result = crew.first(lambda stage=stage, config=config: runner(stage.command, config))
            else:
                result = runner(stage.command, config)
            seconds = round(time.monotonic() - start, 3)
            records[stage.name] = crew.first(lambda *args, work=(stage, result, seconds): finish(*work))
            tell(f"{head}: done in {seconds:.1f} s")
        whole = crew.first(summary)
    tell(table(whole["stages"]))
    return whole


def _keys(every: Sequence[Stage], configs: Mapping[str, Any], folder: Path, version: str) -> dict[str, str]:
    """Key of every stage by name; a report's covers all stages before it. Ranks draw their own samples: their number counts."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    keys: dict[str, str] = {}
    for stage in every:
        config = configs[stage.name]
        needs = {need: keys[need] for need in stage.needs}
        made_by = f"{version} on {ranks} ranks" if isinstance(config, ComputeConfig) else version
        keys[stage.name] = stage_key(stage, normalise(plain(config), folder), needs, made_by, outside_inputs(config, folder))
    return keys


def _overrides(stage: Stage, folder: Path, seed: int, compute: Mapping[str, list[str]]) -> list[str]:
    """Everything that the stage is composed from: the run's values first, so that the stage's own overrides win."""
    own = fill(stage, folder, seed)
    chosen = {override.partition("=")[0].lstrip("+~") for override in own}
    shared = [override for section, values in compute.items() if section not in chosen for override in values]
    return [f"name={stage.name}", f"out={stage_folder(folder, stage.name)}", f"seed={seed}", *shared, *own]


def _page_is_there(stage: Stage, record: Mapping[str, Any]) -> bool:
    """False for a report whose page was deleted: it is cheap to write again and the reason for the stage."""
    page = (record.get("result") or {}).get("page")
    return stage.command != "report" or page is None or Path(page).exists()
