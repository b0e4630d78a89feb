"""Plots as inline SVG in an HTML ``figure``: lines, bars, stacked bars, heat map. Knows no run, uses no library, no script.

In: numbers and labels (any text; escaped here). Out: HTML text. Title and legend are HTML, so that they wrap on a narrow page;
colours are CSS variables of :data:`PLOT_CSS`, so that one page serves light and dark. Values that are not finite are left out.
Every plot has a label with a unit on both axes and a legend (a heat map: its scale of colours).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 420  # view box units; near the width of a column, so that text keeps its size
HEIGHT = 250
NUM_COLOURS = 8
MAX_POINTS = 400
MAX_RULES = 40
"""Marks of one plot that are lines from top to bottom; of more, the flags alone."""

PLOT_CSS = """
:root{--s0:#1f6fd0;--s1:#c2570c;--s2:#15803d;--s3:#9333c9;--s4:#b4235a;
--s5:#0f7c86;--s6:#8a6d00;--s7:#5b6472;--low:#1f6fd0;--high:#c2570c}
@media (prefers-color-scheme:dark){:root{--s0:#6aa9ff;--s1:#ff9d57;--s2:#5fd08a;--s3:#cf9bff;--s4:#ff85ae;
--s5:#4fd0dc;--s6:#e3c04b;--s7:#a8b2c1;--low:#6aa9ff;--high:#ff9d57}}
.c0{--c:var(--s0)}.c1{--c:var(--s1)}.c2{--c:var(--s2)}.c3{--c:var(--s3)}
.c4{--c:var(--s4)}.c5{--c:var(--s5)}.c6{--c:var(--s6)}.c7{--c:var(--s7)}
figure{margin:0;min-width:0}figcaption{font-weight:600;margin:0 0 .25rem;overflow-wrap:anywhere}
figure .note{color:var(--muted);font-size:.8rem;margin:.25rem 0 0}
figure svg{display:block;width:100%;height:auto;max-width:640px}
svg text{font:12.5px system-ui,sans-serif;fill:var(--ink)}svg text.tick{fill:var(--muted)}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--muted);stroke-width:1}.ref{stroke:var(--muted);stroke-dasharray:2 3}
.band{fill:var(--c);fill-opacity:.2;stroke:var(--c);stroke-opacity:.35;stroke-width:.8}
.mark{stroke:var(--c);stroke-width:1.3;stroke-dasharray:3 2}.flag{fill:var(--c)}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}.dashed{stroke-dasharray:6 4}.dot,.bar{fill:var(--c)}
.bar.hollow{fill-opacity:.2;stroke:var(--c);stroke-dasharray:4 3}.err{stroke:var(--ink);stroke-width:1.4;fill:none}
.cell{stroke:var(--rule);stroke-width:.5}.cell.low{fill:var(--low)}.cell.high{fill:var(--high)}
.legend{display:flex;flex-wrap:wrap;gap:.1rem .9rem;list-style:none;margin:0 0 .3rem;padding:0;font-size:.82rem}
.legend li{display:flex;align-items:center;gap:.35rem;min-width:0;overflow-wrap:anywhere}
.legend svg{width:22px;height:10px;flex:none}
"""


@dataclass(frozen=True)
class Series:
    """One line: ``points`` (x, y) with x rising. ``dots``: single values, not joined."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at ``x``: a vertical line. ``kind``: its name in the legend; ``says``: shown under the pointer."""

    x: float
    kind: str
    colour: int = 7
    says: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar. ``error``: half-width of the error bar in the unit of ``value``, or None; ``hollow``: drawn as an outline."""

    label: str
    value: float
    error: float | None = None
    colour: int = 0
    hollow: bool = False


def line_plot(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    title: str = "",
    note: str = "",
    y_range: tuple[float, float] | None = None,
    reference: float | None = None,
    reference_name: str = "reference",
    marks: Sequence[Mark] = (),
) -> str:
    """Lines over one x axis of whole numbers. ``y_range``: at least this much is shown; ``reference``: a dotted level.

    "" without values.
    ``log_y`` leaves out values of 0 (to within 1e-290) and below. A line of more than :data:`MAX_POINTS` points is drawn as
    means of equal groups, with a band from the smallest to the largest value of each. ``marks``: vertical lines.
    """
    kept = [(one, _thin([(x, y) for x, y in one.points if math.isfinite(y) and (y > 1e-290 or not log_y)])) for one in series]
    kept = [(one, groups) for one, groups in kept if groups]
    if not kept:
        return ""
    xs = [x for _, groups in kept for x, *_ in groups] + [mark.x for mark in marks]
    ys = [y for _, groups in kept for _, *three in groups for y in three]
    ys += [*(y_range or ())] + ([reference] if reference is not None else [])
    low_x, high_x = _spread(0.0 if 0 < min(xs) < 0.1 * max(xs) else min(xs), max(xs))
    x_ticks = nice_ticks(low_x, high_x, 5, whole=True) if len(set(xs)) > 1 else [xs[0]]
    x_texts = tick_texts(x_ticks)
    if log_y:
        y_ticks = _log_ticks(min(ys), max(ys))
        low_y, high_y = math.log10(min(min(ys), y_ticks[0])), math.log10(max(max(ys), y_ticks[-1]))
    else:
        low_y, high_y = _spread(min(ys), max(ys))
        pad = 0.0 if y_range and min(ys) >= y_range[0] and max(ys) <= y_range[1] else 0.04 * (high_y - low_y)
        low_y, high_y = (low_y if low_y == 0 else low_y - pad), high_y + pad
        y_ticks = nice_ticks(low_y, high_y)
    y_texts = [f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e") for tick in y_ticks] if log_y else tick_texts(y_ticks)
    left, right = 30 + max(map(text_width, y_texts)), WIDTH - max(text_width(x_texts[-1]) / 2, 10)
    top, bottom = (18 if marks else 10), HEIGHT - 44

    def place_x(x: float) -> float:
        return left + (x - low_x) / (high_x - low_x) * (right - left)

    def place_y(y: float) -> float:
        y = math.log10(y) if log_y else y
        return bottom - (y - low_y) / (high_y - low_y) * (bottom - top)

    parts = []
    for tick, text in zip(y_ticks, y_texts, strict=True):
        parts.append(rule_svg(left, place_y(tick), right, place_y(tick)))
        parts.append(text_svg(left - 6, place_y(tick) + 4, text, "end", "tick"))
    for tick, text in zip(x_ticks, x_texts, strict=True):
        parts.append(rule_svg(place_x(tick), bottom, place_x(tick), bottom + 4, "axis"))
        parts.append(text_svg(place_x(tick), bottom + 18, text, "middle", "tick"))
    if reference is not None:
        parts.append(rule_svg(left, place_y(reference), right, place_y(reference), "ref"))
    parts.append(rule_svg(left, bottom, right, bottom, "axis"))
    keys = []
    for one, groups in sorted(kept, key=lambda pair: not pair[0].dots):  # lines lie over dots
        spots = [(place_x(x), place_y(mean)) for x, mean, _, _ in groups]
        colour = f"c{one.colour % NUM_COLOURS}"
        if one.dots or len(spots) == 1:
            size = 3 if len(spots) <= 60 else 1.5
            parts += [f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>' for x, y in spots]
        else:
            if len(one.points) > MAX_POINTS:
                edge = [(place_x(x), place_y(high)) for x, _, _, high in groups]
                edge += [(place_x(x), place_y(low)) for x, _, low, _ in reversed(groups)]
                parts.append(f'<path class="band {colour}" d="M{_path(edge)}Z"/>')
            parts.append(f'<path class="line {colour}{" dashed" if one.dashed else ""}" d="M{_path(spots)}"/>')
        keys.append((one.name, one.colour, "dots" if one.dots or len(spots) == 1 else "dashed" if one.dashed else "line"))
    spots = {(mark.kind, round(place_x(mark.x))): mark for mark in marks}  # one a pixel: a run may have thousands
    for mark in spots.values():
        x, colour = place_x(mark.x), f"c{mark.colour % NUM_COLOURS}"
        flag = f'<path class="flag" d="M{x - 4:.1f},{top - 8}h8l-4,7z"/>'
        line = f'<path class="mark" d="M{x:.1f},{top}V{bottom}"/>' if len(spots) <= MAX_RULES else ""
        parts.append(f'<g class="{colour}"><title>{escape(mark.says or mark.kind)}</title>{line}{flag}</g>')
    keys += list({mark.kind: (mark.kind, mark.colour, "mark") for mark in marks}.values())
    if reference is not None:
        keys.append((reference_name, 7, "ref"))
    parts += axis_labels(x_label, y_label, left, right, top, bottom, HEIGHT)
    longest = max(len(one.points) for one, _ in kept)
    if longest > MAX_POINTS:
        note = f"{note} Means of {math.ceil(longest / MAX_POINTS)} lines each; the band is from smallest to largest.".strip()
    return whole_figure(title, keys, whole_svg(parts, HEIGHT, title or y_label), note)


def bar_plot(
    bars: Sequence[Bar],
    x_label: str,
    y_label: str,
    *,
    title: str = "",
    note: str = "",
    legend: Sequence[tuple[str, int, bool]] = (),
    form: str = "{:.1f}",
) -> str:
    """Horizontal bars from 0 with the value written beside; "" without bars. ``legend``: (name, colour, hollow) of each kind."""
    bars = [bar for bar in bars if math.isfinite(bar.value)]
    if not bars:
        return ""
    texts = [form.format(bar.value) + (f" ± {form.format(bar.error)}" if bar.error is not None else "") for bar in bars]
    ends = [bar.value + (bar.error or 0.0) for bar in bars]
    rows = [(bar.label, [(bar.value, bar.colour, bar.hollow, "")], bar.error, text) for bar, text in zip(bars, texts, strict=True)]
    keys = [(name, colour, "hollow" if hollow else "bar") for name, colour, hollow in legend]
    return _rows_of_bars(rows, max(ends), x_label, y_label, title, note, keys or [(title or x_label, bars[0].colour, "bar")])


def stacked_bars(
    labels: Sequence[str], parts: Mapping[str, Sequence[float]], x_label: str, y_label: str, *, title: str = "", note: str = ""
) -> str:
    """Horizontal bars, one a label, each cut into ``parts`` (name to one value a label) with the sum beside. "" when all are 0."""
    names = [name for name, values in parts.items() if any(values)]
    totals = [sum(parts[name][index] for name in names) for index in range(len(labels))]
    if not names or max(totals) <= 0:
        return ""
    rows = []
    for index, label in enumerate(labels):
        pieces = [(parts[name][index], colour, False, name) for colour, name in enumerate(names)]
        rows.append((label, pieces, None, f"{totals[index]:,.0f}" if totals[index] >= 10 else f"{totals[index]:.1f}"))
    keys = [(name, colour, "bar") for colour, name in enumerate(names)]
    return _rows_of_bars(rows, max(totals), x_label, y_label, title, note, keys)


def _rows_of_bars(rows, highest: float, x_label: str, y_label: str, title: str, note: str, keys) -> str:
    """``rows``: (label, pieces (value, colour, hollow, name), half error or None, text at the end)."""
    row_height, top = max(26.0, (text_width(y_label) + 8) / len(rows)), 8
    shorts = [shorten(label, 160.0) for label, *_ in rows]
    left = 28 + max(map(text_width, shorts))
    right = WIDTH - 12 - max(text_width(text) for *_, text in rows)
    bottom = top + row_height * len(rows)
    height = bottom + 44
    high = highest or 1.0
    ticks = nice_ticks(0.0, high, 4)

    def place(value: float) -> float:
        return left + value / high * (right - left)

    parts = []
    for tick, text in zip(ticks, tick_texts(ticks), strict=True):
        parts.append(rule_svg(place(tick), top, place(tick), bottom))
        parts.append(text_svg(place(tick), bottom + 17, text, "middle", "tick"))
    for index, (label, pieces, error, text) in enumerate(rows):
        middle = top + row_height * (index + 0.5)
        parts.append(text_svg(left - 7, middle + 4, shorts[index], "end", "", label))
        start = 0.0
        for value, colour, hollow, name in pieces:
            width = max(place(start + value) - place(start), 0.0)
            says = escape(f"{label}{', ' + name if name else ''}: {value:,.4g}")
            parts.append(
                f'<rect class="bar c{colour % NUM_COLOURS}{" hollow" if hollow else ""}" '
                f'x="{place(start):.1f}" y="{middle - 8:.1f}" '
                f'width="{width:.1f}" height="16"><title>{says}</title></rect>'
            )
            start += value
        end = place(start)
        if error is not None:
            low, end = place(max(start - error, 0.0)), place(start + error)
            cap = f"M{low:.1f},{middle - 4:.1f}v8M{low:.1f},{middle:.1f}H{end:.1f}M{end:.1f},{middle - 4:.1f}v8"
            parts.append(f'<path class="err" d="{cap}"/>')
        parts.append(text_svg(end + 6, middle + 4, text, "start"))
    parts.append(rule_svg(left, top, left, bottom, "axis"))
    parts += axis_labels(x_label, y_label, left, right, top, bottom, height)
    return whole_figure(title, keys, whole_svg(parts, height, title or x_label), note)


def heat_map(
    values: Sequence[Sequence[float]],
    x_label: str,
    y_label: str,
    value_label: str,
    *,
    centre: float = 1.0,
    row_names: Sequence[str] = (),
    title: str = "",
    note: str = "",
) -> str:
    """Rows of cells, coloured by how far they are above or below ``centre``, with the scale below. "" without cells."""
    if not values or not values[0]:
        return ""
    num_rows, num_columns = len(values), len(values[0])
    names = list(row_names) or [str(index) for index in range(num_rows)]
    left, right, top = 28 + max(map(text_width, names)), WIDTH - 12, 6
    cell_width = (right - left) / num_columns
    cell_height = max(min(cell_width, 24.0, 420.0 / num_rows), (text_width(y_label) + 8) / num_rows, 3.0)
    bottom = top + cell_height * num_rows
    height = bottom + 96
    flat = [value for row in values for value in row]
    low, high = min(*flat, centre), max(*flat, centre)

    def cell(x: float, y: float, width: float, tall: float, value: float, says: str = "") -> str:
        side, reach = ("high", high - centre) if value >= centre else ("low", centre - low)
        strength = abs(value - centre) / reach if reach else 0.0
        spot = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{tall:.2f}" fill-opacity="{strength:.2f}"'
        return f'<rect class="cell {side}" {spot}>{f"<title>{escape(says)}</title>" if says else ""}</rect>'

    parts = []
    row_every = max(math.ceil(15 / cell_height), 1)
    for row_idx, row in enumerate(values):
        y = top + cell_height * row_idx
        for column, value in enumerate(row):
            says = f"{y_label} {names[row_idx]}, {x_label} {column}: {value:.2f}" if len(flat) <= 4096 else ""
            parts.append(cell(left + cell_width * column, y, cell_width, cell_height, value, says))
        if row_idx % row_every == 0:
            parts.append(text_svg(left - 6, y + cell_height / 2 + 4, names[row_idx], "end", "tick"))
    column_every = max(math.ceil((text_width(str(num_columns)) + 8) / cell_width), 1)
    for column in range(0, num_columns, column_every):
        parts.append(text_svg(left + cell_width * (column + 0.5), bottom + 16, str(column), "middle", "tick"))
    parts += axis_labels(x_label, y_label, left, right, top, bottom, bottom + 44)
    steps, scale_top = 21, bottom + 56
    piece = (right - left) / steps
    for index in range(steps):
        parts.append(cell(left + piece * index, scale_top, piece, 8, low + (high - low) * index / (steps - 1)))
    for value, anchor in ((low, "start"), (high, "end")):
        parts.append(text_svg(left if anchor == "start" else right, scale_top + 22, f"{value:.2f}", anchor, "tick"))
    parts.append(text_svg((left + right) / 2, scale_top + 36, value_label, "middle", "scale"))
    return whole_figure(title, [], whole_svg(parts, height, title or value_label), note)


def text_width(text: str) -> float:
    """Width of a text of 12.5 px in DejaVu Sans, the widest of the usual fonts."""
    return sum(_WIDTHS.get(one, 9.8 if one.isupper() else 8.0 if one.isascii() else 12.5) for one in text)


def shorten(text: str, width: float) -> str:
    """``text``, or its beginning and its end with … between where it is wider than ``width``."""
    if text_width(text) <= width:
        return text
    kept = len(text) - 1
    while kept > 1 and text_width(text) - text_width(text[(kept + 1) // 2 : len(text) - kept // 2]) + 12.5 > width:
        kept -= 1
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"


def nice_ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``, rising; ``whole`` ones."""
    rough = (high - low) / max(count, 1)
    rough = max(rough, 1.0) if whole and high - low >= 1 else rough
    if not rough > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)] or [low]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around the values, at most about seven, at least two; within one or two decades also 2 and 5 times those."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    if last - first <= 2:
        fine = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in (1, 2, 5)]
        below, above = max(tick for tick in fine if tick <= low), min(tick for tick in fine if tick >= high)
        if below < above:
            return [tick for tick in fine if below <= tick <= above]
    return [10.0**power for power in range(first, last + 1, math.ceil((last - first) / 6))]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """One notation for all ticks: k, M or G above ten thousand, else as many decimals as tell neighbours apart."""
    top = max(abs(tick) for tick in ticks)
    unit, sign = next(((unit, sign) for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if top >= 10 * unit), (1.0, ""))
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else top
    if 0 < top < 1e-3 or top >= 1e13:
        return [f"{tick:.1e}" if tick else "0" for tick in ticks]
    decimals = min(max(-math.floor(math.log10(step / unit) + 1e-9), 0), 6) if step > 0 else 0
    return [f"{tick / unit:.{decimals}f}{sign if tick else ''}" for tick in ticks]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """At most :data:`MAX_POINTS` groups of neighbours: mean x, and mean, smallest and largest y."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if points else []
    return [
        (sum(x for x, _ in group) / len(group), sum(ys) / len(ys), min(ys), max(ys))
        for group in groups
        for ys in [[y for _, y in group]]
    ]


def _path(spots: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f},{y:.1f}" for x, y in spots)


def _spread(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    return (low, high) if high > low else (low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5)


def rule_svg(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    """A line of the class ``kind``."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text_svg(x: float, y: float, text: str, anchor: str, kind: str = "", title: str = "") -> str:
    """A text at ``anchor`` (start, middle, end), of the class ``kind``; ``title``: shown under the pointer."""
    full = f"<title>{escape(title)}</title>" if title and title != text else ""
    mark = f' class="{kind}"' if kind else ""
    return f'<text{mark} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{full}{escape(text)}</text>'


def axis_labels(x_label: str, y_label: str, left: float, right: float, top: float, bottom: float, height: float) -> list[str]:
    """Both labels of an area, cut where they are longer than the picture."""
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    x_label, y_label = shorten(x_label, 2 * min(middle_x, WIDTH - middle_x)), shorten(y_label, 2 * min(middle_y, height - middle_y))
    turn = f"translate(13 {middle_y:.1f}) rotate(-90)"
    return [
        text_svg(middle_x, height - 8, x_label, "middle", "axis-x"),
        f'<text class="axis-y" x="0" y="0" text-anchor="middle" transform="{turn}">{escape(y_label)}</text>',
    ]


def whole_svg(parts: Iterable[str], height: float, label: str) -> str:
    """The picture."""
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


_WIDTHS = {
    letter: width
    for letters, width in (
        ("'ijlIJ ,.", 4.0),
        ("/:;\\|f-", 4.5),
        ("()[]t!r", 5.1),
        ('"*_`s?zc', 6.9),
        ("w#+<=>^~M±×→Ω", 10.8),
        ("%mW@…", 12.5),
    )
    for letter in letters
}

_KEYS = {
    "line": '<path class="line" d="M0,5H22"/>',
    "dashed": '<path class="line dashed" d="M0,5H22"/>',
    "dots": '<circle class="dot" cx="11" cy="5" r="3"/>',
    "mark": '<path class="flag" d="M7,0h8l-4,7z"/>',
    "ref": '<path class="ref" d="M0,5H22"/>',
    "bar": '<rect class="bar" x="4" width="14" height="10"/>',
    "hollow": '<rect class="bar hollow" x="4" width="14" height="10"/>',
}


def whole_figure(title: str, keys: Sequence[tuple[str, int, str]], svg: str, note: str) -> str:
    """Picture, title, legend and note. ``keys``: (name, colour, look) of each legend entry."""
    entries = "".join(
        f'<li class="c{colour % NUM_COLOURS}"><svg viewBox="0 0 22 10" aria-hidden="true">{_KEYS[look]}</svg>{escape(name)}</li>'
        for name, colour, look in keys
    )
    head = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    legend = f'<ul class="legend">{entries}</ul>' if entries else ""
    tail = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<figure>{head}{legend}{svg}{tail}</figure>"
