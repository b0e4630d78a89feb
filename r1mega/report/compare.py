"""``r1mega compare``: what differs between runs, on the terminal and on one HTML page with their curves over the same axes.

In: folders of two or more runs. Out: text, and the page, written aside and published by rename. Different runs are no error.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from r1mega.config.data import CompareConfig
from r1mega.config.errors import UserError
from r1mega.report import differences, origins
from r1mega.report.charts import marks
from r1mega.report.curves import EVERY, STAGE, STEP, UPDATE, Curve
from r1mega.report.differences import PLACE, Pair, Row, Table
from r1mega.report.page import html_page, publish, section
from r1mega.report.plot import NUM_COLOURS, Bar, Series, bar_plot, line_plot
from r1mega.report.readers import Run, number, read_run

WIDEST = 160
"""Columns of the terminal that a table takes at most."""


def compare(cfg: CompareConfig) -> dict[str, Any]:
    """Print what differs and write ``cfg.target``; returns ``{"page", "plots", "differences"}`` (rows by table).

    Raises UserError for fewer than two runs, the same run twice, or a folder without a run.
    """
    if len({Path(folder).resolve() for folder in cfg.run}) < max(len(cfg.run), 2):
        raise UserError(f"run: two different runs or more; got {', '.join(cfg.run) or 'none'}; give run=A run=B")
    runs = [read_run(Path(folder)) for folder in cfg.run]
    pairs = differences.pairs_of(runs)
    names = differences.names_of(runs)
    tables = tables_of(runs, pairs)
    page = _page(names, tables, curves(names, pairs))
    publish(Path(cfg.target), page)
    plots = page.count('role="img"')
    print("\n\n".join(_text(table, names) for table in tables))
    print(f"\ncompare: {cfg.target} ({len(page.encode()) / 1e6:.2f} MB, {plots} plots)", flush=True)
    return {"page": cfg.target, "plots": plots, "differences": {table.title: len(table.rows) for table in tables}}


def tables_of(runs: Sequence[Run], pairs: Sequence[Pair]) -> list[Table]:
    """All tables in reading order."""
    return [
        differences.runs_table(runs),
        differences.config_table(runs, pairs),
        origins.data_table(runs, pairs),
        origins.code_table(runs),
        origins.environment_table(runs),
        differences.results_table(pairs),
        differences.agreement_table(pairs),
        differences.weights_table(pairs),
    ]


def curves(names: Sequence[str], pairs: Sequence[Pair]) -> list[tuple[str, list[str]]]:
    """Title and plots of each section: results by stage, then the curves of each stage, a line a run."""
    found = [("Held-out problems", [_bars(names, pairs)])]
    for pair in pairs:
        found.append(
            (f"Curves: {pair.name}" if pair.name else "Curves", [_overlay(names, pair, curve) for curve in _curves_of(pair)])
        )
    return [(title, kept) for title, figures in found if (kept := [figure for figure in figures if figure])]


def _curves_of(pair: Pair) -> list[Curve]:
    """The curves that have a name, then every other number of the metric lines (a reward of one's own) under its key."""
    lines = [line for stage in pair.stages if stage is not None for line in stage.metrics]
    keys = dict.fromkeys(key for line in lines for key, value in line.items() if number(value) is not None)
    named = {curve.key for curve in EVERY}
    others = [key for key in keys if key not in named and key not in PLACE and not key.startswith("seconds_")]
    return [curve for curve in EVERY if curve.key in keys] + [Curve(key, key, f"{key} (as logged)") for key in others]


def _overlay(names: Sequence[str], pair: Pair, curve: Curve) -> str:
    stages = [(index, stage) for index, stage in enumerate(pair.stages) if stage is not None]
    series = [Series(names[index], stage.points(curve.key, curve.factor), index, dashed=index % 2 == 1) for index, stage in stages]
    happened = [mark for index, stage in stages for mark in marks((f"{names[index]}, ", event) for event in stage.events)]
    x_label = UPDATE if any(stage.is_rl for _, stage in stages) else STEP
    return line_plot(series, x_label, curve.y_label, title=curve.title, marks=happened, **curve.more)


def _bars(names: Sequence[str], pairs: Sequence[Pair]) -> str:
    bars = []
    for pair in pairs:
        for index, stage in enumerate(pair.stages):
            figures = stage.figures if stage is not None else {}
            if "pass_at_1" in figures and not (pair.name and stage.command == "eval"):  # an evaluation is in its stage's row
                error = figures.get("standard_error")
                label = pair.name or names[index]
                bars.append(Bar(label, 100 * figures["pass_at_1"], None if error is None else 100 * error, index))
    legend = [(names[index], index % NUM_COLOURS, False) for index in sorted({bar.colour for bar in bars})]
    return bar_plot(bars, "pass@1 (% of problems)", STAGE, title="pass@1", note="Error bars: one standard error.", legend=legend)


def _text(table: Table, names: Sequence[str]) -> str:
    """A table for the terminal: as wide as that is, long values shortened in the middle."""
    lines = [table.title.upper()] + ([table.says] if table.says else [])
    if not table.rows:
        return "\n".join(lines if table.says else [*lines, "Nothing to compare."])
    cells = [("", *names, ""), *((row.what, *row.values, row.note) for row in table.rows)]
    room = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST) - 2 * len(cells[0])
    widest = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    while sum(widest) > room and max(widest) > 12:
        widest[widest.index(max(widest))] -= 1
    lines += ["  ".join(_cut(cell, wide).ljust(wide) for cell, wide in zip(line, widest, strict=True)).rstrip() for line in cells]
    if table.more:
        lines.append(f"and {len(table.more):,} more on the page")
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    return f"{text[: width // 2]}…{text[len(text) - (width - width // 2 - 1) :]}"


def _page(names: Sequence[str], tables: Sequence[Table], figures: Sequence[tuple[str, list[str]]]) -> str:
    keys = "".join(
        f'<li class="c{index % NUM_COLOURS}"><span class="swatch"></span>{escape(name)}</li>' for index, name in enumerate(names)
    )
    body = [f'<header><p class="kind">Comparison of {len(names)} runs</p><h1>{escape(", ".join(names))}</h1>']
    body.append(f'<ul class="legend runs">{keys}</ul></header>')
    body += [section(table.title, _table(table, names)) for table in tables]
    cards = [(title, "".join(f'<div class="card">{plot}</div>' for plot in plots)) for title, plots in figures]
    body += [section(title, f'<div class="plots">{inner}</div>') for title, inner in cards]
    return html_page(f"{', '.join(names)}: r1mega compare", "".join(body))


def _table(table: Table, names: Sequence[str]) -> str:
    says = f'<p class="says">{escape(table.says)}</p>' if table.says else ""
    shown = _rows(table.rows, names) if table.rows else ('<p class="card">Nothing differs.</p>' if "the same" in table.says else "")
    more = f"<details><summary>{len(table.more):,} more</summary>{_rows(table.more, names)}</details>" if table.more else ""
    return says + shown + more


def _rows(rows: Sequence[Row], names: Sequence[str]) -> str:
    noted = any(row.note for row in rows)
    heads = ["", *names, *(["note"] if noted else [])]
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = ""
    for row in rows:
        cells = [(name, "", cell) for name, cell in zip(heads, [row.what, *row.values], strict=False)]
        cells += [("note", "note", row.note)] if noted else []
        line = "".join(f'<td data-head="{escape(name)}" class="{kind}">{escape(cell)}</td>' for name, kind, cell in cells)
        body += f"<tr>{line}</tr>"
    return f'<div class="card"><table class="stack diff"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
