"""What differs between runs, as tables of texts: config, data, code, environment, results, weights. Pure; draws and writes nothing.

In: runs as :mod:`r1mega.report.readers` gives them. Out: :class:`Table`, one column a run. Recipes are compared stage by stage.
What a run did not record (older versions) is "not recorded", never taken for a difference of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from r1mega import provenance
from r1mega.report.curves import EVERY
from r1mega.report.readers import Run, StageRun, number, step_of

NOT_RECORDED, ABSENT = "not recorded", "-"
NEVER_EQUAL = ("name", "out")
"""Config keys that every run has to itself."""

CLOCK = ("seconds", "per_second", "mfu", "peak_")
"""Parts of metric names that measure the machine and differ between equal runs."""

PLACE = ("step", "update", "rollout")
RESULTS = {
    "pass_at_1": ("pass@1 (% of problems)", 100.0),
    "format_rate": ("Right format on held-out problems (% of responses)", 100.0),
    **{curve.key: (f"{curve.title} {curve.unit}", curve.factor) for curve in EVERY},
    "seconds": ("Time (seconds)", 1.0),
}
"""Key to what it is called and the factor to its unit, in reading order."""

MAIN_RESULTS = ("pass_at_1", "lm_loss", "valid_loss", "reward", "accuracy", "response_length", "tokens", "seconds")
"""What a terminal shows; the page has all."""


@dataclass(frozen=True)
class Row:
    """One thing that differs. ``values``: one text a run."""

    what: str
    values: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """``says``: a sentence on what the rows leave out; ``more``: rows for the page that would be too many for a terminal."""

    title: str
    says: str
    rows: tuple[Row, ...]
    more: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Pair:
    """What is compared with each other: one stage a run, or None where a run has none. ``name`` is "" where runs are single."""

    name: str
    stages: tuple[StageRun | Run | None, ...]

    def called(self, what: str) -> str:
        """``what`` with the stage's name before it."""
        return f"{self.name}: {what}" if self.name else what


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run that tells it from the others: its folder's, with as much of the path as that takes."""
    parts = [run.folder.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]).replace("//", "/") for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def pairs_of(runs: Sequence[Run]) -> list[Pair]:
    """Single runs with each other; stages of recipes by name; a single run with the first stage of its command, or with none."""
    recipes = [run for run in runs if run.kind == "recipe"]
    if not recipes:
        return [Pair("", tuple(run.stages[0] for run in runs))]
    names = list(dict.fromkeys(stage.name for run in recipes for stage in run.stages))
    columns = []
    for run in runs:
        if run.kind == "recipe":
            columns.append({stage.name: stage for stage in run.stages})
        else:
            one = run.stages[0]
            same = (stage.name for recipe in recipes for stage in recipe.stages if stage.command == one.command)
            columns.append({(one.name if one.name in names else next(same, one.name)): one})
    names += [name for column in columns for name in column if name not in names]
    return [Pair(name, tuple(column.get(name) for column in columns)) for name in names]


def table(title: str, rows: Iterable[Row], same: str) -> Table:
    """Rows whose values are all alike are counted and left out. ``same``: what they are ("keys")."""
    rows = list(rows)
    kept = tuple(row for row in rows if len(set(row.values)) > 1 or NOT_RECORDED in row.values)
    return Table(title, f"{same} the same: {len(rows) - len(kept):,}." if rows else "", kept)


def filled(values: tuple[str, ...]) -> tuple[str, ...]:
    """Where those that recorded a value agree, theirs for all: what is not recorded is no difference."""
    known = set(values) - {NOT_RECORDED}
    return (known.pop(),) * len(values) if len(known) == 1 and values.count(NOT_RECORDED) < len(values) - 1 else values


def runs_table(runs: Sequence[Run]) -> Table:
    """Which runs: command, starts, folder, events."""

    def started(run: Run) -> str:
        return f"{run.starts[0].get('time')}, {len(run.starts)} start(s)" if run.starts else NOT_RECORDED

    def line(run: Run) -> str:
        return str(run.starts[-1].get("command_line")) if run.starts else NOT_RECORDED

    commands = tuple(_command(run) for run in runs)
    note = "" if len(set(commands)) == 1 else "different commands: only what both have is compared"
    rows = [
        Row("command", commands, note),
        Row("started", tuple(map(started, runs))),
        Row("last command line", tuple(map(line, runs))),
    ]
    rows += [Row("folder", tuple(str(run.folder) for run in runs))]
    stages = tuple(", ".join(f"{len(one.events)} in {one.name}" for one in run.stages if one.events) or "none" for run in runs)
    rows += [Row("events", stages)] if len(set(stages)) > 1 else []
    return Table("Runs", "", tuple(rows))


def _command(run: Run) -> str:
    return "recipe" if run.kind == "recipe" else run.stages[0].command


def config_table(runs: Sequence[Run], pairs: Sequence[Pair]) -> Table:
    """Keys with different values, and where those came from."""
    homes = [home_of(run) for run in runs]
    found: dict[tuple[str, tuple[str, ...], str], list[str]] = {}
    recipes = Pair("recipe", tuple(run if run.kind == "recipe" else None for run in runs))
    for pair in [recipes, *pairs]:
        for row in _config_rows(pair.stages, homes):
            found.setdefault((row.what, row.values, row.note), []).append(pair.name)
    rows = []
    for (key, values, note), names in found.items():  # the same difference in many stages is one row
        where = ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} stages more"
        rows.append(Row(f"{where}: {key}" if any(names) else key, values, note))
    return table("Config", rows, "Keys")


@dataclass(frozen=True)
class _Saved:
    """A saved config. ``values``: dotted key to text; ``named``: keys that were given; ``choices``: group to option."""

    values: Mapping[str, str]
    named: frozenset[str]
    choices: Mapping[str, str]

    def origin(self, key: str) -> str:
        """``given``, ``GROUP=OPTION``, ``default``, or "" where the run does not say what it was given."""
        parents = {key[:end] for end, letter in enumerate(key) if letter == "."} | {key}
        group = key.partition(".")[0]
        if parents & (self.named - set(self.choices)):
            return "given"
        if group in self.choices:
            return f"{group}={self.choices[group]}"
        return "default" if self.named else ""


def _saved(one: Run | StageRun | None, home: str) -> _Saved | None:
    """The config of a run or stage; None where it has none."""
    settings = one.settings if one is not None else {}
    if not isinstance(settings.get("config"), dict):
        return None
    own = one.overrides if isinstance(one, StageRun) else ()
    given = [text.lstrip("+~").partition("=") for text in own or settings.get("overrides") or [] if isinstance(text, str)]
    values = {key: text for key, text in _flat(settings["config"], home) if key.partition(".")[0] not in NEVER_EQUAL}
    values = {key: text for key, text in values.items() if not (key.startswith("recipe.stages.") and key.endswith(".overrides"))}
    groups = {name: option for name, _, option in given if any(key.startswith(f"{name}.") for key in values)}
    choices = {**(settings.get("choices") or {}), **{name: option for name, option in groups.items() if "." not in name}}
    return _Saved(values, frozenset(name for name, _, _ in given), choices)


def home_of(run: Run) -> str:
    """The run's folder as its own config spells it; "" where that is not known."""
    config = run.settings.get("config")
    return str(config.get("out", "")) if isinstance(config, dict) else ""


def _flat(value: Any, home: str, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every value; ``{out}`` for the run's own folder."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, home, f"{key}.{in_home(str(name), home)}" if key else str(name))
    else:
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
        yield key, in_home(value, home) if isinstance(value, str) else text.removesuffix("\n...\n").strip()


def in_home(text: str, home: str) -> str:
    """A path with ``{out}`` for the run's own folder."""
    return "{out}" + text[len(home) :] if home and (text == home or text.startswith(f"{home}/")) else text


def _config_rows(owners: Sequence[Run | StageRun | None], homes: Sequence[str]) -> Iterator[Row]:
    if sum(owner is not None for owner in owners) < 2:
        return
    saved = [_saved(owner, home) for owner, home in zip(owners, homes, strict=True)]
    known = [one for one in saved if one is not None]
    if len(known) < len(saved):
        yield Row("config.yaml", tuple(NOT_RECORDED if one is None else "recorded" for one in saved))
    if len(known) < 2:
        return
    commands = {owner.settings.get("command") for owner in owners if owner is not None}
    for key in dict.fromkeys(key for one in known for key in one.values):
        if len(commands) > 1 and not all(key in one.values for one in known):  # of another command: no difference of the runs
            continue
        values = filled(tuple(NOT_RECORDED if one is None else one.values.get(key, ABSENT) for one in saved))
        yield Row(key, values, _origin_note(key, known) if len(set(values)) > 1 else "")


def _origin_note(key: str, saved: Sequence[_Saved]) -> str:
    if any(key not in one.values for one in saved):
        return "not a key of all"
    origins = [one.origin(key) for one in saved]
    if all(origin == "default" for origin in origins):
        return "given by none: another default"
    return " | ".join(origin or "?" for origin in origins) if len(set(origins)) > 1 or "=" in origins[0] else ""


def results_table(pairs: Sequence[Pair]) -> Table:
    """Last value of every number, with its difference from the first run's."""
    rows, more = [], []
    names = {pair.name for pair in pairs}
    for pair in pairs:
        if pair.name.removeprefix("eval_") in names - {pair.name}:  # its figures are those of the stage that it measured
            continue
        finals = [_finals(stage) if stage is not None else {} for stage in pair.stages]
        known = [key for key in RESULTS if any(key in final for final in finals)]
        others = [key for key in dict.fromkeys(key for final in finals for key in final) if key not in RESULTS]
        for key in known + others:
            row = Row(pair.called(RESULTS.get(key, (f"{key} (as logged)", 1.0))[0]), _with_differences(key, finals))
            (rows if key in MAIN_RESULTS else more).append(row)
    return Table("Results", "Final values; in brackets the difference from the first run.", tuple(rows), tuple(more))


def _finals(stage: StageRun) -> dict[str, tuple[float, float | None]]:
    """Key to (last value, standard error or None)."""
    keys = dict.fromkeys(key for line in stage.metrics for key, value in line.items() if number(value) is not None)
    found = {key: (stage.points(key)[-1][1], None) for key in keys if key not in PLACE}
    found |= {key: (value, None) for key, value in stage.figures.items() if key not in ("standard_error", "samples")}
    if "pass_at_1" in stage.figures:
        found["pass_at_1"] = (stage.figures["pass_at_1"], stage.figures.get("standard_error"))
    if stage.seconds is not None:
        found["seconds"] = (stage.seconds, None)
    return found


def _with_differences(key: str, finals: Sequence[Mapping[str, tuple[float, float | None]]]) -> tuple[str, ...]:
    """``86.4 ± 1.3 (+2.1 ± 1.9)``: the error of a difference is that of two independent measurements."""
    factor, texts = RESULTS.get(key, ("", 1.0))[1], []
    for index, final in enumerate(finals):
        if key not in final:
            texts.append(ABSENT)
            continue
        value, error = final[key]
        text = _figure(value * factor) + (f" ± {error * factor:.2g}" if error is not None else "")
        if index and key in finals[0]:
            first, first_error = finals[0][key]
            both = f" ± {math.hypot(error, first_error) * factor:.2g}" if None not in (error, first_error) else ""
            sign = "+" if value > first else ""
            text += f" ({sign}{_figure((value - first) * factor, 3)}{both})" if value != first else " (=)"
        texts.append(text)
    return tuple(texts)


def _figure(value: float, digits: int = 5) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.{digits}g}"


def agreement_table(pairs: Sequence[Pair]) -> Table:
    """Up to which step the metric lines are equal, numbers that measure the machine left out."""
    rows = []
    for pair in pairs:
        lines = [_by_place(stage) if stage is not None else {} for stage in pair.stages]
        if lines[0] and any(lines[1:]):
            texts = ["-"] + [_agree(lines[0], other) if other else ABSENT for other in lines[1:]]
            rows.append(Row(pair.called("metric lines"), tuple(texts)))
    return Table("Agreement", "Lines of the same step compared with the first run's, clocks and memory left out.", tuple(rows))


def _by_place(stage: StageRun) -> dict[float, Mapping[str, Any]]:
    return {step_of(line, index): line for index, line in enumerate(stage.metrics)}


def _agree(first: Mapping[float, Mapping[str, Any]], other: Mapping[float, Mapping[str, Any]]) -> str:
    common = [place for place in first if place in other]
    for count, place in enumerate(common):
        left, right = first[place], other[place]
        for key in left:
            if key in right and not any(part in key for part in CLOCK) and left[key] != right[key]:
                shown = f"{left[key]:.6g} and {right[key]:.6g}" if number(left[key]) and number(right[key]) else "other values"
                return f"{count:,} of {len(common):,} common lines, then {key} at {place:g}: {shown}"
    return f"all {len(common):,} common lines" if common else "no line of a common step"


def weights_table(pairs: Sequence[Pair]) -> Table:
    """Are the final checkpoints' tensors the same bits? Told by the hashes in their manifests."""
    rows = []
    for pair in pairs:
        found = [provenance.checkpoint_of(stage.folder) if stage is not None else None for stage in pair.stages]
        if sum(one is not None for one in found) > 1:
            first = next(one for one in found if one is not None)
            texts = [
                ABSENT if one is None else one["name"] + ("" if one is first else f", {_same_weights(first, one)}") for one in found
            ]
            rows.append(Row(pair.called("final weights and optimizer state"), tuple(texts)))
    says = "Compared by the hashes of their files, which hold weights and optimizer state together and depend on the ranks' layout."
    return Table("Final checkpoints", says if rows else "", tuple(rows))


def _same_weights(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    if not (first["weights"] and other["weights"]):
        return "cannot be told: a manifest names no tensor file"
    if first["weights"] == other["weights"]:
        return "bit-equal"
    if first.get("step") != other.get("step"):
        return "another step"
    if first.get("degrees") != other.get("degrees"):
        return "cannot be told: other ranks write other files of the same tensors"
    return "not bit-equal"
