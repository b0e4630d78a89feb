"""The samples of a few rollouts over time, as a plot of a page: a row a sample, and a strip of what the trainer did.

In: :class:`r1mega.report.samples.Seen` and :class:`Phase`. Out: HTML, as :mod:`r1mega.report.plot` makes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from r1mega.report.plot import (
    NUM_COLOURS,
    WIDTH,
    axis_labels,
    nice_ticks,
    rule_svg,
    text_svg,
    text_width,
    tick_texts,
    whole_figure,
    whole_svg,
)
from r1mega.report.samples import DROPPED, USED, Phase, Seen

MOST_ROWS = 500
"""Samples drawn; of more, every second, third and so on."""
STRIP, GAP, TOP = 14.0, 12.0, 10.0

GENERATED, JUDGED, WAITED, LEFT_OUT = ("generated", 0), ("judged", 1), ("waiting until used", 7), ("waiting, then dropped", 4)
OF_PHASE = {"rollout": 7, "value": 6, "score": 5, "train": 2, "push": 3}
"""Colour of each of the trainer's phases."""
NAMES = {"rollout": "trainer waits", "value": "advantages", "score": "rescoring", "train": "training", "push": "weight push"}

Span = tuple[float, float, tuple[str, int]]
"""From, to, and what it is: name and colour."""


def spans_of(one: Seen) -> list[Span]:
    """What a sample went through; what took no time is left out."""
    values = one.values
    spans = [(values["began"], values["generated"], GENERATED), (values["generated"], values["judged"], JUDGED)]
    if one.ended is not None and one.fate in (USED, DROPPED):
        spans.append((values["judged"], one.ended, WAITED if one.fate == USED else LEFT_OUT))
    return [span for span in spans if span[1] > span[0]]


def sample_plot(samples: Sequence[Seen], phases: Iterable[Phase], *, title: str = "") -> str:
    """ "" without samples. The trainer is the first rank that has phases in that time."""
    drawn = sorted((one for one in samples if one.values["began"] > 0), key=lambda one: (one.values["began"], one.frame.id))
    every = math.ceil(len(drawn) / MOST_ROWS)
    rows = [spans for one in drawn[:: max(every, 1)] if (spans := spans_of(one))]
    if not rows:
        return ""
    first, last = min(span[0] for row in rows for span in row), max(span[1] for row in rows for span in row)
    strip = [(max(one.began, first), min(one.ended, last), one) for one in phases if one.ended > first and one.began < last]
    rank = min((phase.rank for *_, phase in strip), default=0)
    strip = [(begin, end, phase) for begin, end, phase in strip if phase.rank == rank]
    head = STRIP + GAP if strip else 0.0
    size = min(max(240.0 / len(rows), 0.5), 12.0)
    top = TOP + head
    bottom = top + max(size * len(rows), 60.0)
    count_ticks = nice_ticks(0, len(drawn), 4, whole=True)
    count_texts = tick_texts(count_ticks)
    left = 30 + max(map(text_width, [*count_texts, *(["trainer"] if strip else [])]))
    ticks = nice_ticks(0.0, last - first, 5)
    texts = tick_texts(ticks)
    right = WIDTH - max(text_width(texts[-1]) / 2, 10)

    def place(seconds: float) -> float:
        return left + (seconds - first) / (last - first) * (right - left)

    def box(begin: float, end: float, y: float, tall: float) -> str:
        return f"M{place(begin):.1f},{y:.1f}h{max(place(end) - place(begin), 0.3):.1f}v{tall:.2f}H{place(begin):.1f}z"

    parts, keys = [], {}
    if strip:
        parts.append(text_svg(left - 6, TOP + STRIP / 2 + 4, "trainer", "end"))
        for begin, end, phase in strip:
            name, colour = NAMES[phase.name], OF_PHASE[phase.name]
            says = f"rollout {phase.rollout}: {name}, {phase.ended - phase.began:.3g} s"
            parts.append(f'<path class="bar c{colour}" d="{box(begin, end, TOP, STRIP)}"><title>{says}</title></path>')
            keys[f"{name} (trainer)"] = colour
    for tick, text in zip(ticks, texts, strict=True):
        x = place(first + tick)
        parts += [rule_svg(x, top, x, bottom), text_svg(x, bottom + 18, text, "middle", "tick")]
    pieces: dict[tuple[str, int], list[str]] = {}
    for place_idx, row in enumerate(rows):
        for begin, end, kind in row:
            pieces.setdefault(kind, []).append(box(begin, end, top + size * place_idx, size * (0.8 if size > 2 else 1.0)))
    parts += [f'<path class="bar c{colour % NUM_COLOURS}" d="{"".join(found)}"/>' for (_, colour), found in pieces.items()]
    for tick, text in zip(count_ticks, count_texts, strict=True):
        y = top + size * len(rows) * tick / len(drawn)
        parts.append(text_svg(left - 6, min(y + 4, bottom), text, "end", "tick"))
    parts.append(rule_svg(left, bottom, right, bottom, "axis"))
    parts += axis_labels("time since the first of them began (seconds)", "samples (count)", left, right, top, bottom, bottom + 44)
    legend = [(name, colour, "bar") for name, colour in [*keys.items(), *pieces]]
    rollouts = sorted({one.rollout for one in drawn if one.rollout is not None})
    said = [f"Rollouts {rollouts[0]} to {rollouts[-1]}." if len(rollouts) > 1 else f"Rollout {rollouts[0]}." if rollouts else ""]
    said += [f"One of {every} samples is drawn." if every > 1 else ""]
    return whole_figure(title, legend, whole_svg(parts, bottom + 44, title or "samples"), " ".join(filter(None, said)))
