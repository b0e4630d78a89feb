"""Which plots a run has: from :class:`Run` to sections of figures. Names come from ``curves``; draws through ``plot``.

Every stage keeps one colour through the whole page; a control is dashed (lines) or hollow (bars). A plot without values is left
out, a section without plots too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from r1mega.report.curves import (
    GRAD_NORM,
    HEALTH,
    LOSS,
    MTP_LOSS,
    PACE,
    RATE,
    REWARD,
    REWARDS,
    SPEED,
    STAGE,
    STEP,
    UPDATE,
    VALID_LOSS,
    Curve,
)
from r1mega.report.plot import NUM_COLOURS, Bar, Mark, Series, bar_plot, heat_map, line_plot, stacked_bars
from r1mega.report.readers import Event, Run, StageRun
from r1mega.report.samples import newest
from r1mega.report.spans import sample_plot

CONTROL = 4  # the colour of a control in every plot

MARKED = (REWARD, GRAD_NORM)
"""Curves of several stages that show events; each stage's loss does too."""

KINDS_OF_EVENT = (("skip", "step skipped", 6), ("roll", "rolled back", 4))
"""What an event's text holds, its name in a legend, its colour."""

Section = tuple[str, str, list[str]]
"""Title, one sentence on how to read it, figures as HTML."""

PHASES = {
    "rollout": "generation",
    "reward": "reward",
    "value": "advantages",
    "score": "rescoring",
    "train": "training",
    "push": "weight push",
    "valid": "held-out problems",
}
"""``seconds_<key>`` of a metric line to the phase's name. Only runs of earlier versions have a phase of rewards."""

SHOWN_ROLLOUTS = 4
"""Newest rollouts of which the page shows every sample."""


def sections(run: Run) -> list[Section]:
    """All sections of plots that the run has values for, in reading order."""
    return [(title, says, found) for title, says, figures in _all(run) if (found := [figure for figure in figures if figure])]


def _all(run: Run) -> list[Section]:
    learnt = [stage for stage in run.stages if stage.metrics and not stage.is_rl]
    reinforced = [stage for stage in run.stages if stage.is_rl]
    colours = {**_colours(learnt), **_colours(reinforced)}  # the two kinds never share a plot
    return [
        ("Result", "Share of held-out problems solved at the first try, stage by stage.", [_pass_at_1(run), _format(run)]),
        ("Learning from text", "Cross-entropy per predicted token; lower is better.", _losses(learnt, colours)),
        (
            "Reinforcement",
            "What the policy was rewarded for, over the optimizer's updates.",
            [
                *(_lines(curve, reinforced, colours, UPDATE) for curve in REWARDS),
                *(_by_source(stage) for stage in reinforced),
                *(_by_reward(stage) for stage in reinforced),
            ],
        ),
        (
            "Health of the updates",
            "How far the policy moves, and whether trainer and generator agree on its probabilities.",
            [_lines(curve, reinforced, colours, UPDATE) for curve in HEALTH],
        ),
        ("Experts", "How evenly tokens spread over the routed experts; 1 is an equal share.", _experts(run, colours)),
        (
            "Pace of reinforcement",
            "How fast responses are made and trained on, and who waits for whom.",
            [_lines(curve, reinforced, colours, UPDATE) for curve in PACE],
        ),
        (
            "Samples",
            "Each row is a response, from the first begun to the last: generated, judged, waiting until its rollout was trained "
            "on. Above them what the trainer did.",
            [_samples(stage) for stage in reinforced],
        ),
        ("Time", "Where the wall clock went.", [_stage_seconds(run), _phases(reinforced)]),
    ]


def _lines(curve: Curve, stages: Sequence[StageRun], colours: Mapping[str, int], x_label: str) -> str:
    """One line a stage."""
    series = [Series(one.name, one.points(curve.key, curve.factor), colours[one.name], one.is_control) for one in stages]
    happened = marks((f"{one.name}, ", event) for one in stages for event in one.events) if curve in MARKED else []
    return line_plot(series, x_label, curve.y_label, title=curve.title, marks=happened, **curve.more)


def _by_source(stage: StageRun) -> str:
    """Reward of the problems of each source; of more sources than colours those that came up most often."""
    keys = dict.fromkeys(key for line in stage.metrics for key in line if key.startswith("reward/"))
    found = sorted(((key, stage.points(key)) for key in keys), key=lambda pair: (-len(pair[1]), pair[0]))
    series = [Series(key.partition("/")[2], points, colour) for colour, (key, points) in enumerate(found[:NUM_COLOURS])]
    note = f"{NUM_COLOURS} of {len(found)} sources; metrics.jsonl has all." if len(found) > NUM_COLOURS else ""
    return line_plot(series, UPDATE, REWARD.y_label, title=f"Reward by source: {stage.name}", note=note)


def _by_reward(stage: StageRun) -> str:
    """The mean of each reward before its weight."""
    settings = stage.settings.get("config")
    reward = settings.get("reward") if isinstance(settings, dict) else None
    if not isinstance(reward, dict):
        return ""
    parts = [reward.get("weights"), *(reward.get("by_source") or {}).values()]
    names = list(dict.fromkeys(name for part in parts if isinstance(part, dict) for name in part))
    series = [Series(name, stage.points(name), colour) for colour, name in enumerate(names[:NUM_COLOURS])]
    return line_plot(series, UPDATE, "mean value (points)", title=f"Reward by name: {stage.name}", note="Before weights.")


def _samples(stage: StageRun) -> str:
    return sample_plot(newest(stage.samples, SHOWN_ROLLOUTS), stage.phases, title=f"Samples: {stage.name}")


def _colours(stages: Sequence[StageRun]) -> dict[str, int]:
    """Stage name to colour; a control has one of its own."""
    others = [stage.name for stage in stages if not stage.is_control]
    free = [index for index in range(NUM_COLOURS) if index != CONTROL]
    return {stage.name: CONTROL if stage.is_control else free[others.index(stage.name) % len(free)] for stage in stages}


def _pass_at_1(run: Run) -> str:
    measured = run.evaluated()
    if not measured:
        return ""
    bars = [
        Bar(
            stage.name,
            100 * stage.figures["pass_at_1"],
            _percent(stage, "standard_error"),
            CONTROL if stage.is_control else 0,
            stage.is_control,
        )
        for stage in measured
    ]
    legend = _legend(bars, "pass@1")
    count = {int(value) for stage in measured if (value := stage.figures.get("num_problems"))}
    note = "Error bars: one standard error." + (f" {count.pop():,} held-out problems." if len(count) == 1 else "")
    return bar_plot(bars, "pass@1 (% of problems)", STAGE, title="pass@1", note=note, legend=legend)


def _format(run: Run) -> str:
    bars = [
        Bar(stage.name, 100 * stage.figures["format_rate"], None, CONTROL if stage.is_control else 2, stage.is_control)
        for stage in run.evaluated()
        if "format_rate" in stage.figures
    ]
    legend = _legend(bars, "right format")
    return bar_plot(bars, "in the right format (% of responses)", STAGE, title="Answer format on held-out problems", legend=legend)


def _legend(bars: Sequence[Bar], name: str) -> list[tuple[str, int, bool]]:
    """Entries for the bars of a run and, where there is one, of its control."""
    kinds = {bar.hollow: (f"{name}, control (shuffled rewards)" if bar.hollow else name, bar.colour, bar.hollow) for bar in bars}
    return [kinds[hollow] for hollow in sorted(kinds)]


def _percent(stage: StageRun, key: str) -> float | None:
    return 100 * stage.figures[key] if key in stage.figures else None


def _losses(stages: Sequence[StageRun], colours: Mapping[str, int]) -> list[str]:
    """One loss plot a stage (their steps and levels differ), then what all of them share."""
    figures = []
    for stage in stages:
        series = [
            Series("training", stage.points(LOSS.key) or stage.points("loss"), colours[stage.name]),
            Series("held out", stage.points(VALID_LOSS.key), colours[stage.name] + 1, dots=True),
        ]
        happened = marks(("", event) for event in stage.events)
        figures.append(line_plot(series, STEP, LOSS.y_label, title=f"{LOSS.title}: {stage.name}", marks=happened))
    return figures + [_lines(curve, stages, colours, STEP) for curve in (MTP_LOSS, GRAD_NORM, SPEED, RATE)]


def marks(events: Iterable[tuple[str, Event]]) -> list[Mark]:
    """Events as marks of a plot; each comes with what its text starts with."""
    return [Mark(place, *_kind(line), f"{before}{event_text(line)}") for before, (place, line) in events]


def event_text(line: Mapping[str, Any]) -> str:
    """An event in words: ``step 120: step skipped, loss 9.1 is ...``."""
    place = next((f"{key} {line[key]}: " for key in ("update", "step", "rollout") if key in line), "")
    reason = line.get("reason")
    return f"{place}{line.get('event')}{f', {reason}' if reason else ''}"


def _kind(line: Mapping[str, Any]) -> tuple[str, int]:
    text = str(line.get("event"))
    return next(((name, colour) for part, name, colour in KINDS_OF_EVENT if part in text.lower()), (text, 7))


def _experts(run: Run, colours: dict[str, int]) -> list[str]:
    loaded = [(stage, loads) for stage in run.stages if (loads := stage.loads())]
    if not loaded:
        return []
    figures = []
    first, last = loaded[0], next((pair for pair in reversed(loaded) if not pair[0].is_control), loaded[-1])
    for stage, loads in [first] if first[0] is last[0] else [first, last]:
        step, shares = loads[-1]
        relative = [[_relative(value, row) for value in row] for row in shares]
        figures.append(
            heat_map(
                relative,
                "expert (index)",
                "MoE layer (index)",
                "load / equal share (ratio)",
                title=f"Expert load: {stage.name}",
                note=f"Last logged line ({'update' if stage.is_rl else 'step'} {step:,.0f}).",
            )
        )
    for kind, x_label in ((False, STEP), (True, UPDATE)):
        series = [
            Series(
                stage.name,
                [(step, max(_relative(max(row), row) for row in rows)) for step, rows in loads],
                colours[stage.name],
                stage.is_control,
            )
            for stage, loads in loaded
            if stage.is_rl is kind
        ]
        title = "Busiest expert, " + ("reinforcement" if kind else "training")
        note = "The worst layer's busiest expert."
        level = {"reference": 1.0, "reference_name": "equal share"}
        figures.append(line_plot(series, x_label, "largest / mean load (ratio)", title=title, note=note, **level))
    return figures


def _relative(value: float, row: Sequence[float]) -> float:
    mean = sum(row) / len(row)
    return value / mean if mean else 0.0


def _stage_seconds(run: Run) -> str:
    done = [stage for stage in run.stages if stage.seconds is not None]
    bars = [Bar(stage.name, stage.seconds, None, 7 if stage.command == "eval" else 0) for stage in done]
    names = {0: "stage", 7: "evaluation"}
    legend = [(names[colour], colour, False) for colour in sorted({bar.colour for bar in bars})]
    return bar_plot(bars, "time (seconds)", STAGE, title="Time per stage", legend=legend) if len(bars) > 1 else ""


def _phases(stages: Sequence[StageRun]) -> str:
    parts = {name: [stage.total(f"seconds_{key}") for stage in stages] for key, name in PHASES.items()}
    labels = [stage.name for stage in stages]
    return stacked_bars(
        labels, parts, "time (seconds)", STAGE, title="Time per phase of reinforcement", note="Sum over the logged lines."
    )
