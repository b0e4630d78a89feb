"""``r1mega timeline``: a pipeline schedule as a picture, the one that ran or a simulated one, and how long each rank idles.

Of a run of ``r1mega rl``: its samples as a trace.

In: a run's recorded events, or a schedule with times. Out: an SVG file with a row a rank, the same in letters on the terminal, and
the bubble shares as :mod:`r1mega.train.pipeline.timeline` defines them; for a run beside what the simulator makes of its mean
times.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from r1mega import registry
from r1mega.config.compose import load_config
from r1mega.config.errors import UserError
from r1mega.config.tools import TimelineConfig
from r1mega.report.page import publish
from r1mega.report.plot import WIDTH, nice_ticks, text_width, tick_texts
from r1mega.report.samples import USED, Seen, history_of, newest, phases, seen
from r1mega.report.tables import table
from r1mega.report.trace import trace
from r1mega.train.pipeline.simulate import Times, mean_seconds, simulate
from r1mega.train.pipeline.timeline import (
    FOLDER,
    IDLE,
    Event,
    EventsByRank,
    bubble_share,
    bubble_shares,
    draw_text,
    read_events,
    span,
)

NAMES = {"F": "forward", "B": "whole backward", "I": "input gradient", "W": "weight gradient"}
MOST_TITLED = 4096
"""Events up to which each box says under the pointer what it is; of more, boxes of one kind are one shape."""

ROW, GAP, TOP, FONT = 22.0, 5.0, 22.0, 12.5
FULL_NUMBER, LEAST_NUMBER = 8.5, 2.7
"""Font sizes of microbatch numbers in view box units; below FULL_NUMBER they are hidden where the picture is narrow."""

CSS = """
.timeline{--paper:#fff;--ink:#1b2330;--muted:#5b6472;--idle:#e3e7ed;--F:#1f6fd0;--B:#9333c9;--I:#c2570c;--W:#15803d;
width:100%;max-width:1400px;height:auto;display:block;background:var(--paper)}
@media (prefers-color-scheme:dark){.timeline{--paper:#1a2029;--ink:#e6eaf0;--muted:#9aa5b4;--idle:#323a46;--F:#6aa9ff;--B:#cf9bff;
--I:#ff9d57;--W:#5fd08a}}
.timeline text{font:12.5px system-ui,sans-serif;fill:var(--ink)}.timeline .tick{fill:var(--muted)}
.timeline .F{fill:var(--F)}.timeline .B{fill:var(--B)}.timeline .I{fill:var(--I)}.timeline .W{fill:var(--W)}
.timeline .idle{fill:var(--idle)}.timeline .box{stroke:var(--paper);stroke-width:.4}.timeline .odd{fill-opacity:.72}
.timeline text.num{fill:var(--paper);font-size:8.5px;text-anchor:middle;pointer-events:none}
.timeline line{stroke:var(--muted);stroke-width:.7}
@media (max-width:900px){.timeline text.small{display:none}}
"""


def timeline(cfg: TimelineConfig) -> dict[str, Any]:
    """Draw what ``cfg.run`` recorded, or the schedule ``cfg.pipeline``, into ``cfg.target``, and print it.

    Returns ``{"svg", "makespan_ms", "bubble_share", "bubble_shares"}``, for a run also ``"step"`` and ``"simulated_bubble_share"``.
    A run with a ledger gets ``timeline.json``, or ``cfg.target``, and has ``{"trace", "samples", "rollouts"}``; the drawing comes
    too where its pipeline was recorded.
    Raises UserError where the run has no events, is no run, or the schedule refuses the numbers.
    """
    if cfg.run is not None:
        run, is_drawn = Path(cfg.run), (Path(cfg.run) / FOLDER).is_dir()
        traced = _traced(cfg, run, run / "timeline.json" if is_drawn or not cfg.target else Path(cfg.target))
        return (traced or {}) | (_recorded(cfg, run) if is_drawn or traced is None else {})
    pipeline = cfg.pipeline.build(cfg.ranks)
    times = Times(
        *(None if given is None else given / 1e3 for given in (cfg.forward, cfg.input_grad, cfg.weight_grad, cfg.backward))
    )
    overlapped = None if cfg.overlapped is None else cfg.overlapped / 1e3
    made = simulate(pipeline, cfg.microbatches, times, overlapped=overlapped, message=cfg.message / 1e3)
    title = (
        f"{registry.name_of('pipeline', cfg.pipeline)}, simulated, {_count(cfg.ranks, 'rank')}, {_microbatches(cfg.microbatches)}"
    )
    return _show(title, made.events_by_rank, Path(cfg.target or Path(cfg.out) / "timeline.svg"))


def _traced(cfg: TimelineConfig, run: Path, target: Path) -> dict[str, Any] | None:
    """The trace of a run with a ledger, and a line a rollout; None of any other."""
    history = history_of(run)
    if history is None:
        return None
    samples = newest(seen(history), cfg.rollouts)
    rollouts = sorted({one.rollout for one in samples if one.rollout is not None})
    if not samples:
        raise UserError(f"run: a run that has judged samples; got {run}, whose ledger has none yet; wait for its first")
    publish(target, json.dumps(trace(samples, phases(history)), ensure_ascii=False))
    heads = ["rollout", "samples", "generated in", "judged in", "waited", "most behind", "trained after"]
    rows = [_rollout_row(number, [one for one in samples if one.rollout == number and one.fate == USED]) for number in rollouts]
    waiting = sum(one.rollout is None for one in samples)
    print(table([heads, *filter(None, rows)]) + "\nmean, longest seconds")
    print(f"\n{_count(waiting, 'sample')} not used yet\ntimeline: {target} (for ui.perfetto.dev or chrome://tracing)", flush=True)
    return {"trace": str(target), "samples": len(samples), "rollouts": rollouts}


def _rollout_row(number: int, samples: Sequence[Seen]) -> list[str]:
    """Of one rollout; empty where it was not trained on."""

    def told(values: Sequence[float]) -> str:
        return f"{sum(values) / len(values):.3g}, {max(values):.3g}"

    if not samples:
        return []
    ends = [one.ended for one in samples if one.ended is not None]
    waits = [one.ended - one.values["judged"] for one in samples if one.ended is not None]
    first = min((one.update for one in samples if one.update is not None), default=1)
    behind = max((first - 1 - span[0] for one in samples for span in one.values["versions"]), default=0)
    return [
        str(number),
        str(len(samples)),
        told([one.values["generated"] - one.values["began"] for one in samples]),
        told([one.values["judged"] - one.values["generated"] for one in samples]),
        told(waits) if waits else "-",
        _count(behind, "update"),
        f"{max(ends) - min(one.values['began'] for one in samples):.3g}" if ends else "-",
    ]


def _recorded(cfg: TimelineConfig, run: Path) -> dict[str, Any]:
    if not run.is_dir():
        raise UserError(f"run: a run's folder; got {cfg.run}, which is none; give the out= of a training")
    found = read_events(run)
    config = load_config(run)
    choice, num_ranks = getattr(config, "pipeline", None), len(found.events_by_rank)
    if choice is None or config.parallel.pipeline != num_ranks:
        held = getattr(getattr(config, "parallel", None), "pipeline", "none")
        raise UserError(
            f"{run}: events of its parallel.pipeline ranks; got events of {num_ranks} with parallel.pipeline={held} in its config; "
            "remove its timeline folder and run it again with profile=true"
        )
    num_microbatches = 1 + max(event.microbatch for events in found.events_by_rank for event in events)
    made = simulate(choice.build(num_ranks), num_microbatches, _measured(found.events_by_rank, run))
    name = registry.name_of("pipeline", choice)
    title = f"{name}, step {found.step} of {run}, {_count(num_ranks, 'rank')}, {_microbatches(num_microbatches)}"
    result = _show(title, found.events_by_rank, Path(cfg.target or run / "timeline.svg"), made.events_by_rank)
    return {"step": found.step, **result, "simulated_bubble_share": made.bubble_share}


def _measured(events_by_rank: EventsByRank, run: Path):
    """The mean times of the events; UserError where the schedule asks for work that they lack."""
    means = mean_seconds(events_by_rank)

    def seconds(action) -> float:
        try:
            return means(action)
        except KeyError:
            raise UserError(
                f"{run}: events of every work of its schedule; got none of {NAMES[action.work]} on stage {action.stage}; "
                "remove its timeline folder and run it again with profile=true"
            ) from None

    return seconds


def _show(title: str, events_by_rank: EventsByRank, target: Path, simulated: EventsByRank | None = None) -> dict[str, Any]:
    publish(target, draw_svg(events_by_rank, title=title))
    first, last = span(events_by_rank)
    shares, whole = bubble_shares(events_by_rank), bubble_share(events_by_rank)
    width = min(shutil.get_terminal_size((110, 24)).columns, 200)
    works = [work for work in NAMES if any(event.work == work for events in events_by_rank for event in events)]
    key = ", ".join([*(f"{work} {NAMES[work]}" for work in works), f"{IDLE} idle"])
    columns = [("idle", [*shares, whole])]
    if simulated is not None:
        columns = [
            ("recorded", columns[0][1]),
            ("simulated from the mean times", [*bubble_shares(simulated), bubble_share(simulated)]),
        ]
    names = [*(f"rank {rank}" for rank in range(len(shares))), "mean"]
    table = ["bubble".ljust(8) + "".join(f"  {name:>9}" for name, _ in columns)]
    for row, name in enumerate(names):
        table.append(name.ljust(8) + "".join(f"  {100 * values[row]:>{max(len(head), 9) - 2}.1f} %" for head, values in columns))
    print(f"{title}\n{draw_text(events_by_rank, width)}\n{key}; {1e3 * (last - first):,.4g} ms\n\n" + "\n".join(table))
    print(f"\ntimeline: {target}", flush=True)
    return {"svg": str(target), "makespan_ms": 1e3 * (last - first), "bubble_share": whole, "bubble_shares": list(shares)}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _microbatches(number: int) -> str:
    return f"{number} microbatch{'' if number == 1 else 'es'}"


def draw_svg(events_by_rank: EventsByRank, *, title: str = "Pipeline timeline") -> str:
    """A row a rank over an axis in ms, as a whole SVG file that also stands inside HTML. Every second stage of a rank is paler.

    A forward and a backward that run at the same time share the height of the row. Raises ValueError without events.
    """
    first, last = span(events_by_rank)
    whole_ms = 1e3 * (last - first) or 1.0
    shares = [f"{100 * share:.0f}%" for share in bubble_shares(events_by_rank)]
    labels = [f"rank {rank}" for rank in range(len(shares))]
    left, right = max(map(text_width, labels)) + 8, WIDTH - max(map(text_width, [*shares, "idle"])) - 8
    bottom = TOP + len(shares) * (ROW + GAP)

    def place(seconds: float) -> float:
        return left + 1e3 * (seconds - first) / whole_ms * (right - left)

    parts = [_text(WIDTH - 2, TOP - 7, "idle", "end", "tick")]
    titled = sum(map(len, events_by_rank)) <= MOST_TITLED
    for rank, events in enumerate(events_by_rank):
        y = TOP + rank * (ROW + GAP)
        parts.append(_text(left - 6, y + ROW / 2 + 4.5, labels[rank], "end"))
        parts.append(f'<rect class="idle" x="{left:.2f}" y="{y:.1f}" width="{right - left:.2f}" height="{ROW:g}"/>')
        boxes = [(event, place(event.begin_seconds), place(event.end_seconds), *lane) for event, *lane in _lanes(events, y)]
        parts += _titled(boxes, events, rank, first) if titled else _merged(boxes, events)
        parts.append(_text(WIDTH - 2, y + ROW / 2 + 4.5, shares[rank], "end"))
    parts.append(f'<line x1="{left:.2f}" y1="{bottom:.1f}" x2="{right:.2f}" y2="{bottom:.1f}"/>')
    ticks = nice_ticks(0.0, whole_ms, 5)
    for tick, text in zip(ticks, tick_texts(ticks), strict=True):
        x = place(first + tick / 1e3)
        parts.append(f'<line x1="{x:.2f}" y1="{bottom:.1f}" x2="{x:.2f}" y2="{bottom + 4:.1f}"/>')
        parts.append(_text(min(x, WIDTH - text_width(text) / 2), bottom + 17, text, "middle", "tick"))
    parts.append(_text((left + right) / 2, bottom + 33, "time since the step began (ms)", "middle"))
    key, height = _legend(events_by_rank, bottom + 50)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="timeline" viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
    return f'{head} aria-label="{escape(title)}"><title>{escape(title)}</title><style>{CSS}</style>{"".join(parts + key)}</svg>\n'


Box = tuple[Event, float, float, float, float]
"""An event, left, right, top, height."""


def _lanes(events: Sequence[Event], y: float) -> list[tuple[Event, float, float]]:
    """Each event's top and height: the row, or half of it where a neighbour runs in more than half of its time."""
    ordered = sorted(events, key=lambda event: (event.begin_seconds, event.end_seconds))
    lower: set[int] = set()
    paired: set[int] = set()
    for index, (one, other) in enumerate(itertools.pairwise(ordered)):
        common = min(one.end_seconds, other.end_seconds) - other.begin_seconds
        shorter = min(one.end_seconds - one.begin_seconds, other.end_seconds - other.begin_seconds)
        if index not in paired and common > 0.5 * shorter:
            paired |= {index, index + 1}
            lower.add(index + 1)
    return [
        (event, y + (ROW / 2 if index in lower else 0.0), ROW / 2 if index in paired else ROW)
        for index, event in enumerate(ordered)
    ]


def _look(event: Event, stages: Sequence[int]) -> str:
    return f"box {event.work}{' odd' if stages.index(event.stage) % 2 else ''}"


def _titled(boxes: Sequence[Box], events: Sequence[Event], rank: int, first: float) -> list[str]:
    """A rectangle an event, with its number where that fits."""
    stages, parts = sorted({event.stage for event in events}), []
    for event, x, end, y, height in boxes:
        begin_ms, lasts_ms = 1e3 * (event.begin_seconds - first), 1e3 * (event.end_seconds - event.begin_seconds)
        what = f"rank {rank}: {NAMES[event.work]} of stage {event.stage}, microbatch {event.microbatch}"
        spot = f'x="{x:.2f}" y="{y:.1f}" width="{max(end - x, 0.05):.2f}" height="{height:g}"'
        says = f"<title>{what}, {lasts_ms:,.4g} ms from {begin_ms:,.4g} ms on</title>"
        parts.append(f'<rect class="{_look(event, stages)}" {spot}>{says}</rect>')
        number = str(event.microbatch)
        font = min((end - x - 1.2) / text_width(number) * FONT, FULL_NUMBER)
        if font >= LEAST_NUMBER:
            small = font < FULL_NUMBER - 1.0
            size = f' style="font-size:{font:.1f}px"' if small else ""
            spot = f'x="{(x + end) / 2:.2f}" y="{y + height / 2 + 0.36 * font:.1f}"'
            parts.append(f'<text class="num{" small" if small else ""}" {spot}{size}>{number}</text>')
    return parts


def _merged(boxes: Sequence[Box], events: Sequence[Event]) -> list[str]:
    """A path a kind of box: a step of thousands of events stays a small file."""
    stages, paths = sorted({event.stage for event in events}), {}
    for event, x, end, y, height in boxes:
        piece = f"M{x:.2f},{y:.1f}h{max(end - x, 0.05):.2f}v{height:g}H{x:.2f}z"
        paths.setdefault(_look(event, stages).removeprefix("box "), []).append(piece)
    return [f'<path class="{look}" d="{"".join(pieces)}"/>' for look, pieces in paths.items()]


def _legend(events_by_rank: EventsByRank, y: float) -> tuple[list[str], float]:
    """The legend's parts from ``y`` on, and the height of the picture."""
    works = [work for work in NAMES if any(event.work == work for events in events_by_rank for event in events)]
    entries = [(work, NAMES[work]) for work in works] + [("idle", "idle")]
    if any(len({event.stage for event in events}) > 1 for events in events_by_rank):
        entries.append((f"{works[0]} odd", "paler: every second stage of a rank"))
    parts, x = [], 4.0
    for look, name in entries:
        wide = 16 + text_width(name) + 14
        if x > 4.0 and x + wide - 14 > WIDTH:
            x, y = 4.0, y + 18
        parts.append(f'<rect class="{look}" x="{x:.1f}" y="{y:.1f}" width="12" height="11"/>')
        parts.append(_text(x + 16, y + 10, name, "start"))
        x += wide
    return parts, y + 18


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'<text{mark} x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{escape(text)}</text>'
