"""The roofline of a device: operations a byte against operations a second, with what its own copy and products reach as the roof.

In: rows that know both their bytes and their operations, ceilings. Out: one SVG text. Both axes are logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from r1mega.testing.measure.results import Row

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 20, 50
COLOURS = ("#1f6fd0", "#c2570c", "#15803d", "#9333c9", "#b4235a", "#0f7c86", "#8a6d00", "#5b6472")
CSS = (
    "text{font:12px system-ui,sans-serif;fill:#1b2330}.t{fill:#5b6472}.g{stroke:#e3e7ed}"
    ".r{stroke:#1b2330;stroke-width:1.6;fill:none}"
)


def roofline(rows: Sequence[Row], ceilings: Mapping[str, float], title: str) -> str:
    """The SVG; "" where no row has bytes, operations and a time, or there is no copy's rate. A point says its case."""
    points = [(row, row.flops / row.num_bytes, row.flops / row.microseconds / 1e6) for row in rows if _is_point(row)]
    if not points or "copy" not in ceilings:
        return ""
    roofs = {name: rate / 1e12 for name, rate in ceilings.items() if name != "copy"}
    slope = ceilings["copy"] / 1e12  # TFLOP/s at one operation a byte
    ridge = max([rate / slope for rate in roofs.values()], default=1.0)
    low_x, high_x = _decades([x for _, x, _ in points] + [1.0, 2 * ridge])
    low_y, high_y = _decades([y for _, _, y in points] + [*roofs.values(), slope * max(low_x, min(x for _, x, _ in points))])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - math.log10(low_x)) / (math.log10(high_x) - math.log10(low_x))
        up = (math.log10(max(y, low_y)) - math.log10(low_y)) / (math.log10(high_y) - math.log10(low_y))
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>']
    for x in _ticks(low_x, high_x):
        at = place(x, low_y)
        parts += [_line(at, place(x, high_y)), _text(at[0], at[1] + 16, f"{x:g}", "middle", "t")]
    for y in _ticks(low_y, high_y):
        at = place(low_x, y)
        parts += [_line(at, place(high_x, y)), _text(at[0] - 6, at[1] + 4, f"{y:g}", "end", "t")]
    for name, rate in sorted(roofs.items()):
        start = max(low_x, low_y / slope)
        corners = [place(start, slope * start), place(rate / slope, rate), place(high_x, rate)]
        parts.append('<polyline class="r" points="' + " ".join(f"{x:.1f},{y:.1f}" for x, y in corners) + '"/>')
        parts.append(_text(corners[-1][0], corners[-1][1] - 5, f"{name} {rate:,.3g} TFLOP/s", "end", "t"))
    parts.append(_text(LEFT + 6, TOP + 12, f"copy {ceilings['copy'] / 1e9:,.0f} GB/s", "start", "t"))
    ops = list(dict.fromkeys(row.op for row, _, _ in points))
    for row, x, y in points:
        at = place(x, y)
        colour = COLOURS[ops.index(row.op) % len(COLOURS)]
        says = escape(f"{row.name}: {row.microseconds:.1f} us, {x:.3g} operations/byte, {y:.3g} TFLOP/s")
        parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4" fill="{colour}"><title>{says}</title></circle>')
    for number, op in enumerate(ops):
        y = TOP + 30 + 16 * number
        parts.append(f'<circle cx="{LEFT + 12}" cy="{y - 4}" r="4" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(_text(LEFT + 22, y, op, "start"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "operations a byte (FLOP/byte)", "middle"))
    parts.append(f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">reached (TFLOP/s)</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    return f"{head}<title>{escape(title)}</title><style>{CSS}</style>{''.join(parts)}</svg>\n"


def _is_point(row: Row) -> bool:
    return bool(row.num_bytes and row.flops and row.microseconds)


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten around all values."""
    return 10.0 ** math.floor(math.log10(min(values))), 10.0 ** math.ceil(math.log10(max(values) * 1.01))


def _ticks(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(round(math.log10(low)), round(math.log10(high)) + 1)]


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    return f'<line class="g" x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
