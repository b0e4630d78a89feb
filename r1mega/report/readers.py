"""Reads a run folder into dataclasses. Knows the files' names and fields; draws nothing and writes nothing.

In: the folder of a recipe, of one training run (``metrics.jsonl``) or of one evaluation (``eval.json``). Out: :class:`Run`.
What is damaged in part is read in part: a half-written last line is left out, a broken line inside is counted. Lines with ``event``
(a step skipped, a rollback) are no metrics and are kept apart.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from r1mega import provenance
from r1mega.config.errors import UserError
from r1mega.report.samples import Phase, Seen, history_of, phases, seen

Point = tuple[float, float]
Event = tuple[float, dict[str, Any]]


@dataclass(frozen=True)
class StageRun:
    """One stage as its files show it.

    ``metrics``: one dict a line, in order of step; ``events``: (where on the x axis, the line) in the file's order; ``evaluation``:
    its own ``eval.json``; ``figures``: pass@1 and the like of this stage (recipe: measured by ``eval_<name>``); ``tested``: the
    ``eval.json`` behind ``figures``; ``config``: the resolved config as text; ``starts``: see :mod:`r1mega.provenance`;
    ``is_control``: rewards carry no signal; ``bad_lines``: broken lines left out; ``seconds`` None: not finished.
    """

    name: str
    command: str
    folder: Path
    seconds: float | None = None
    tokens: float | None = None
    metrics: tuple[dict[str, Any], ...] = ()
    events: tuple[Event, ...] = ()
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    tested: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    config: str = ""
    starts: tuple[dict[str, Any], ...] = ()
    is_control: bool = False
    bad_lines: int = 0

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The saved config file as an object (command, overrides, choices, config); empty when it is absent or damaged."""
        return _settings(self.config)

    @property
    def samples(self) -> list[Seen]:
        """What became of every sample; empty where the stage has no ledger."""
        return self._ledger[0]

    @property
    def phases(self) -> list[Phase]:
        """What the trainers of a stage with a ledger did when."""
        return self._ledger[1]

    @cached_property
    def _ledger(self) -> tuple[list[Seen], list[Phase]]:
        history = history_of(self.folder)
        return ([], []) if history is None else (seen(history), phases(history))

    @property
    def is_rl(self) -> bool:
        """True where lines have rewards."""
        return any("reward" in line for line in self.metrics)

    def points(self, key: str, factor: float = 1.0) -> list[Point]:
        """(step or update, value x factor) of every line with a finite number under ``key``."""
        found = []
        for index, line in enumerate(self.metrics):
            value = number(line.get(key))
            if value is not None:
                found.append((step_of(line, index), value * factor))
        return found

    def not_finite(self) -> dict[str, int]:
        """Key to how many of its values are NaN or infinite, which no plot can show."""
        return dict(
            Counter(
                key for line in self.metrics for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)
            )
        )

    def total(self, key: str) -> float:
        """Sum of ``key`` over all lines; 0 where no line has it."""
        return sum(value for _, value in self.points(key))

    def loads(self) -> list[tuple[float, list[list[float]]]]:
        """(step, share of assignments by MoE layer and expert) of every line with a proper ``expert_load``."""
        found = []
        for index, line in enumerate(self.metrics):
            load = line.get("expert_load")
            if isinstance(load, list) and load and all(isinstance(row, list) and row for row in load):
                rows = [[number(value) or 0.0 for value in row] for row in load]
                if len({len(row) for row in rows}) == 1:
                    found.append((step_of(line, index), rows))
        return found


@dataclass(frozen=True)
class Run:
    """A run: its stages in order, and what is known about it as a whole. ``kind``: recipe, training or evaluation."""

    name: str
    kind: str
    folder: Path
    stages: tuple[StageRun, ...]
    seed: int | None = None
    seconds: float | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    starts: tuple[dict[str, Any], ...] = ()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The saved config file of the run as an object; empty when it is absent or damaged."""
        return _settings(self.config)

    def evaluated(self) -> list[StageRun]:
        """Stages with a pass@1 on held-out problems, in order; evaluations themselves only where nothing else has one."""
        found = [stage for stage in self.stages if "pass_at_1" in stage.figures]
        return [stage for stage in found if stage.command != "eval"] or found

    def before_and_after(self) -> tuple[StageRun, StageRun] | None:
        """The last evaluated stage before any RL (else the first), and the last evaluated one; controls left out."""
        measured = [stage for stage in self.evaluated() if not stage.is_control]
        if len(measured) < 2:
            return None
        first_rl = next((index for index, stage in enumerate(measured) if stage.command == "rl"), 1)
        return measured[max(first_rl - 1, 0)], measured[-1]


def number(value: Any) -> float | None:
    """``value`` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def step_of(line: Mapping[str, Any], index: int) -> float:
    """Where a line is on the x axis: its update, else step, else rollout, else its place in the file."""
    return next((value for key in ("update", "step", "rollout") if (value := number(line.get(key))) is not None), float(index))


def read_metrics(path: Path) -> tuple[tuple[dict[str, Any], ...], tuple[Event, ...], int]:
    """Lines of a ``metrics.jsonl`` in order of step, its events, and how many broken lines were left out.

    The last line may be half written (no line end): left out and not counted. Of lines for the same step the last one counts: a
    run that went on from a checkpoint wrote those steps again. An absent file has no lines.
    """
    if not path.is_file():
        return (), (), 0
    text = path.read_text(encoding="utf-8", errors="replace")
    lines, events, bad = {}, [], 0
    rows = text.split("\n")
    for index, row in enumerate(rows):
        if not row.strip():
            continue
        try:
            line = json.loads(row)
        except ValueError:
            line = None
        if isinstance(line, dict) and "event" in line:
            events.append(line)
        elif isinstance(line, dict):
            lines[step_of(line, index)] = line
        elif index < len(rows) - 1:
            bad += 1
    metrics = tuple(lines[step] for step in sorted(lines))
    return metrics, tuple(_placed(events, metrics)), bad


def _placed(events: Sequence[dict[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
    """Each event with its place on the x axis of the lines: RL's lines lie at updates, its events name rollouts."""
    pairs = ((number(line.get("rollout")), number(line.get("update"))) for line in metrics)
    update_of = {rollout: update for rollout, update in pairs if rollout and update}
    each = next((update / rollout for rollout, update in update_of.items()), 1.0)
    for line in events:
        rollout = number(line.get("rollout"))
        if rollout is not None and "update" not in line:
            yield update_of.get(rollout, rollout * each), line
        else:
            yield step_of(line, 0), line


def read_run(folder: Path) -> Run:
    """The run in ``folder``. Raises UserError when there is no such folder, or nothing in it that a run writes."""
    if not folder.is_dir():
        raise UserError(f"run: the folder of a run; got {str(folder)!r}, which does not exist; use for example run=runs/quickstart")
    summary = _object(folder / "summary.json")
    config = _text(folder / "config.yaml")
    if summary or (folder / "stages").is_dir():
        stages = _recipe_stages(folder, summary, _mapping(_settings(config).get("config")))
        if not stages:
            raise UserError(f"run: a run with at least one stage; got {str(folder)!r} without any; run the recipe first")
        starts = tuple(provenance.starts(folder))
        return Run(
            name=str(summary.get("recipe") or folder.resolve().name),
            kind="recipe",
            folder=folder,
            stages=tuple(stages),
            seed=summary.get("seed", _seed(config)),
            seconds=number(summary.get("seconds")),
            machine=_mapping(summary.get("machine")) or _machine(starts),
            config=config,
            starts=starts,
        )
    metrics, events, bad = read_metrics(folder / "metrics.jsonl")
    evaluation = _object(folder / "eval.json")
    if not metrics and not evaluation:
        raise UserError(
            f"run: a folder with summary.json, eval.json, or lines in metrics.jsonl; got {str(folder)!r} without a readable one; "
            "check the path"
        )
    name = folder.resolve().name
    guess = "eval" if not metrics else "rl" if any("reward" in line for line in metrics) else "training"
    command = str(_settings(config).get("command") or guess)
    stage = StageRun(
        name=name,
        command=command,
        folder=folder,
        seconds=_seconds_of(metrics) if metrics else number(evaluation.get("seconds")),
        tokens=_tokens_of(metrics) if metrics else number(evaluation.get("tokens")),
        metrics=metrics,
        events=events,
        evaluation=evaluation,
        figures=_figures(evaluation),
        tested=evaluation,
        config=config,
        starts=tuple(provenance.starts(folder)),
        bad_lines=bad,
    )
    kind = "training" if metrics else "evaluation"
    machine = _machine(stage.starts)
    return Run(name, kind, folder, (stage,), _seed(config), stage.seconds, machine, config, stage.starts)


def _machine(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The machine of the last recorded start; empty without one."""
    return _mapping(starts[-1].get("machine")) if starts else {}


def _recipe_stages(folder: Path, summary: Mapping[str, Any], settings: Mapping[str, Any]) -> list[StageRun]:
    """Stages of the summary in its order, then folders that it does not have yet (running or interrupted stages).

    Stages that write a report are left out: the page is not its own subject.
    """
    planned = _mapping(_mapping(settings.get("recipe")).get("stages"))
    rows = [row for row in summary.get("stages") or [] if isinstance(row, dict) and isinstance(row.get("name"), str)]
    names = [row["name"] for row in rows]
    home = folder / "stages"
    extra = [path for path in home.iterdir() if path.is_dir() and path.name not in names] if home.is_dir() else []
    for path in sorted(extra, key=lambda path: path.stat().st_mtime):
        rows.append({"name": path.name, "command": _mapping(planned.get(path.name)).get("command")})
    stages = []
    for row in rows:
        if row.get("command") == "report":
            continue
        place = home / row["name"]
        record = _object(place / "stage.json")
        overrides = tuple(text for text in record.get("overrides") or [] if isinstance(text, str))
        metrics, events, bad = read_metrics(place / "metrics.jsonl")
        tested = _object(home / f"eval_{row['name']}" / "eval.json")
        own = _object(place / "eval.json")
        stages.append(
            StageRun(
                name=row["name"],
                command=str(
                    row.get("command") or record.get("command") or ("rl" if any("reward" in line for line in metrics) else "-")
                ),
                folder=place,
                seconds=number(row.get("seconds")) if row.get("seconds") is not None else number(record.get("seconds")),
                tokens=number(row.get("tokens")) if row.get("tokens") is not None else _tokens_of(metrics),
                metrics=metrics,
                events=events,
                evaluation=own,
                figures={**_figures(tested or own), **_figures(row)},
                tested=tested or own,
                overrides=overrides,
                config=_text(place / "config.yaml"),
                starts=tuple(provenance.starts(place)),
                is_control="control" in row["name"] or any(text.lower().endswith("shuffle_rewards=true") for text in overrides),
                bad_lines=bad,
            )
        )
    return stages


def _figures(source: Mapping[str, Any]) -> dict[str, float]:
    keys = ("pass_at_1", "standard_error", "format_rate", "response_length", "truncated", "num_problems", "samples")
    return {key: value for key in keys if (value := number(source.get(key))) is not None}


def _tokens_of(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens of a whole run: the counter's last value."""
    values = [value for line in metrics if (value := number(line.get("tokens"))) is not None]
    return values[-1] if values else None


def _seconds_of(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    phases = sum(
        value for line in metrics for key in line if key.startswith("seconds_") and (value := number(line[key])) is not None
    )
    return phases or None


def _settings(config: str) -> dict[str, Any]:
    """The resolved config (command, choices, config) that was saved with the run; empty when it is absent or damaged."""
    try:
        return _mapping(yaml.safe_load(config))
    except yaml.YAMLError:
        return {}


def _seed(config: str) -> int | None:
    value = _mapping(_settings(config).get("config")).get("seed")
    return value if isinstance(value, int) else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty when it is absent or damaged."""
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
