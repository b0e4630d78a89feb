"""Which plots a run has: from :class:`Run` to sections of figures. Owns titles, labels and units; draws through ``plot``.

Every stage keeps one colour through the whole page; a control is dashed (lines) or hollow (bars). A plot without values is left
out, a section without plots too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from r1mega.report.plot import NUM_COLOURS, Bar, Series, bar_plot, heat_map, line_plot, stacked_bars
from r1mega.report.readers import Run, StageRun

CONTROL = 4  # the colour of a control in every plot

Section = tuple[str, str, list[str]]
"""Title, one sentence on how to read it, figures as HTML."""

PHASES = {"rollout": "generation", "reward": "reward", "score": "rescoring", "train": "training", "push": "weight push"}
"""``seconds_<key>`` of a metric line to the phase's name."""


def sections(run: Run) -> list[Section]:
    """All sections of plots that the run has values for, in reading order."""
    return [(title, says, found) for title, says, figures in _all(run) if (found := [figure for figure in figures if figure])]


def _all(run: Run) -> list[Section]:
    learnt = [stage for stage in run.stages if stage.metrics and not stage.is_rl]
    reinforced = [stage for stage in run.stages if stage.is_rl]
    colours = {**_colours(learnt), **_colours(reinforced)}  # the two kinds never share a plot

    def lines(stages: Sequence[StageRun], key: str, factor: float = 1.0) -> list[Series]:
        return [Series(stage.name, stage.points(key, factor), colours[stage.name], dashed=stage.is_control) for stage in stages]

    def over_updates(key: str, y_label: str, title: str, factor: float = 1.0, **more) -> str:
        return line_plot(lines(reinforced, key, factor), "update", y_label, title=title, **more)

    share = {"factor": 100.0, "y_range": (0.0, 100.0)}
    rare = {"factor": 100.0, "y_range": (0.0, 5.0)}
    gap = "Trainer's against generator's log probability of the same token; logarithmic axis."
    return [
        ("Result", "Share of held-out problems solved at the first try, stage by stage.", [_pass_at_1(run), _format(run)]),
        ("Learning from text", "Cross-entropy per predicted token; lower is better.", _losses(learnt, colours, lines)),
        (
            "Reinforcement",
            "What the policy was rewarded for, over the optimizer's updates.",
            [
                over_updates("reward", "mean reward", "Reward"),
                over_updates("accuracy", "correct (% of responses)", "Accuracy on training problems", **share),
                over_updates("format", "in the right format (%)", "Format", **share),
                over_updates("response_length", "tokens a response", "Response length", y_range=(0.0, 1.0)),
                over_updates("truncated", "cut at the limit (%)", "Truncated responses", **rare),
                over_updates("flat_groups", "equal rewards (% of groups)", "Groups without a signal", **rare),
            ],
        ),
        (
            "Health of the updates",
            "How far the policy moves, and whether trainer and generator agree on its probabilities.",
            [
                over_updates("kl", "KL (nats per token)", "KL to the reference"),
                over_updates("entropy", "entropy (nats per token)", "Entropy", y_range=(0.0, 0.0)),
                over_updates("clip_share", "clipped (% of tokens)", "Clipped ratios", factor=100.0, y_range=(0.0, 1.0)),
                over_updates(
                    "rollout_diff_max", "|log p difference| (nats)", "Train / rollout difference, largest", log_y=True, note=gap
                ),
                over_updates(
                    "rollout_diff_mean", "|log p difference| (nats)", "Train / rollout difference, mean", log_y=True, note=gap
                ),
                over_updates("grad_norm", "gradient norm", "Gradient norm", y_range=(0.0, 0.0)),
            ],
        ),
        ("Experts", "How evenly tokens spread over the routed experts; 1 is an equal share.", _experts(run, colours)),
        ("Time", "Where the wall clock went.", [_stage_seconds(run), _phases(reinforced)]),
    ]


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
    legend = (
        [("run", 0, False), ("control (shuffled rewards)", CONTROL, True)] if any(stage.is_control for stage in measured) else []
    )
    count = {int(value) for stage in measured if (value := stage.figures.get("num_problems"))}
    note = "Error bars: one standard error." + (f" {count.pop():,} held-out problems." if len(count) == 1 else "")
    return bar_plot(bars, "pass@1 (% of problems)", "stage", title="pass@1", note=note, legend=legend)


def _format(run: Run) -> str:
    bars = [
        Bar(stage.name, 100 * stage.figures["format_rate"], None, CONTROL if stage.is_control else 2, stage.is_control)
        for stage in run.evaluated()
        if "format_rate" in stage.figures
    ]
    legend = [("run", 2, False), ("control (shuffled rewards)", CONTROL, True)] if any(bar.hollow for bar in bars) else []
    return bar_plot(
        bars, "in the right format (% of responses)", "stage", title="Answer format on held-out problems", legend=legend
    )


def _percent(stage: StageRun, key: str) -> float | None:
    return 100 * stage.figures[key] if key in stage.figures else None


def _losses(stages: Sequence[StageRun], colours: dict[str, int], lines: Callable[..., list[Series]]) -> list[str]:
    """One loss plot a stage (their steps and levels differ), then what all of them share."""
    figures = []
    for stage in stages:
        key = "lm_loss" if stage.points("lm_loss") else "loss"
        series = [
            Series("training", stage.points(key), colours[stage.name]),
            Series("held out", stage.points("valid_loss"), colours[stage.name] + 1, dots=True),
        ]
        figures.append(line_plot(series, "step", "loss (nats per token)", title=f"Loss: {stage.name}"))
    figures.append(line_plot(lines(stages, "mtp_loss"), "step", "loss (nats per token)", title="Multi-token prediction loss"))
    figures.append(
        line_plot(lines(stages, "tokens_per_second"), "step", "tokens per second", title="Throughput", y_range=(0.0, 1.0))
    )
    figures.append(line_plot(lines(stages, "lr"), "step", "learning rate", title="Learning rate", y_range=(0.0, 0.0)))
    return figures


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
                "expert",
                "MoE layer",
                "load / equal share",
                title=f"Expert load: {stage.name}",
                note=f"Last logged line ({'update' if stage.is_rl else 'step'} {step:,.0f}).",
            )
        )
    for kind, x_label in ((False, "step"), (True, "update")):
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
        note = "The worst layer's busiest expert; dotted: an equal share."
        figures.append(line_plot(series, x_label, "largest load / mean load", title=title, note=note, reference=1.0))
    return figures


def _relative(value: float, row: Sequence[float]) -> float:
    mean = sum(row) / len(row)
    return value / mean if mean else 0.0


def _stage_seconds(run: Run) -> str:
    done = [stage for stage in run.stages if stage.seconds is not None]
    bars = [Bar(stage.name, stage.seconds, None, 7 if stage.command == "eval" else 0) for stage in done]
    legend = [("stage", 0, False), ("evaluation", 7, False)] if {bar.colour for bar in bars} == {0, 7} else []
    return bar_plot(bars, "time (seconds)", "stage", title="Time per stage", legend=legend) if len(bars) > 1 else ""


def _phases(stages: Sequence[StageRun]) -> str:
    parts = {name: [stage.total(f"seconds_{key}") for stage in stages] for key, name in PHASES.items()}
    labels = [stage.name for stage in stages]
    return stacked_bars(
        labels, parts, "time (seconds)", "stage", title="Time per phase of reinforcement", note="Sum over the logged lines."
    )
