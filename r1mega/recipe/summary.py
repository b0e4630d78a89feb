"""``summary.json`` and the table of a recipe: one row a stage, an evaluation's figures in the row of the stage that it measured.

In: stages and the records of their results. Out: plain dicts and text. Also describes the machine. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from r1mega import __version__, provenance
from r1mega.recipe.graph import Stage

EVAL_FIELDS = ("pass_at_1", "standard_error", "format_rate", "response_length", "truncated", "num_problems")
"""What a stage's row takes from the evaluation ``eval_<stage>``."""

EVAL_PREFIX = "eval_"


def summary_rows(stages: Sequence[Stage], records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of ``stages``, of those that have a record (:func:`r1mega.recipe.store.finish`)."""
    rows = []
    for stage in stages:
        if stage.name not in records:
            continue
        record = records[stage.name]
        result = record.get("result") or {}
        row = {"name": stage.name, "command": stage.command, "seconds": record.get("seconds"), "tokens": result.get("tokens")}
        measured = (records.get(EVAL_PREFIX + stage.name) or {}).get("result") or {}
        source = result if stage.command == "eval" else measured
        row |= {field: source[field] for field in EVAL_FIELDS if field in source}
        if "peak_gib" in result:
            row["peak_gib"] = result["peak_gib"]
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as aligned text: stage, command, time, tokens, pass@1 with its standard error, format rate, response length."""
    lines = [("stage", "command", "seconds", "tokens", "pass@1 %", "s.e.", "format %", "length")]
    for row in rows:
        lines.append(
            (
                str(row["name"]),
                str(row["command"]),
                _number(row.get("seconds"), "{:.1f}"),
                _number(row.get("tokens"), "{:,.0f}"),
                _number(row.get("pass_at_1"), "{:.1f}", 100),
                _number(row.get("standard_error"), "{:.1f}", 100),
                _number(row.get("format_rate"), "{:.1f}", 100),
                _number(row.get("response_length"), "{:.1f}"),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for line in lines:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        text.append("  ".join(left + right).rstrip())
    return "\n".join(text)


def _number(value: Any, form: str, factor: float = 1.0) -> str:
    return form.format(value * factor) if isinstance(value, int | float) else "-"


def machine() -> dict[str, Any]:
    """What the run ran on, and the versions of what matters. Names no person and no place."""
    return {**provenance.machine(), "versions": {"r1mega": __version__, **provenance.versions()}}
