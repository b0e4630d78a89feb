"""``r1mega report``: one HTML page of a run, complete in itself (inline style and SVG, no script, nothing from a network).

In: the run's folder. Out: the page, written aside and published by rename. All text of the run is escaped.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from r1mega.config.data import ReportConfig
from r1mega.report.charts import event_text, sections
from r1mega.report.plot import PLOT_CSS
from r1mega.report.problems import problems_html
from r1mega.report.readers import Run, StageRun, read_run
from r1mega.report.samples import slowest

MOST_SLOW = 12
"""Slowest calls of rewards of one stage that the page lists."""
MOST_EVENTS = 30
"""Events of one stage that the page lists."""

PAGE_CSS = """
:root{color-scheme:light dark;--paper:#f6f7f9;--card:#fff;--ink:#1b2330;--muted:#5b6472;--rule:#dfe3e9;--good:#15803d;--bad:#b42318}
@media (prefers-color-scheme:dark){:root{--paper:#12161c;--card:#1a2029;--ink:#e6eaf0;--muted:#9aa5b4;
--rule:#303947;--good:#5fd08a;--bad:#ff8a80}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1280px;margin:0 auto;padding:1rem clamp(.75rem,3vw,2rem) 3rem}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2rem 0 .25rem}
a{color:var(--s0)}.says{color:var(--muted);margin:0 0 .75rem;max-width:75ch}
.card{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:.75rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,11rem),1fr));gap:.75rem;margin:1rem 0}
.tiles dt{color:var(--muted);font-size:.82rem}.tiles dd{margin:0;font-size:1.25rem;font-weight:600;overflow-wrap:anywhere}
.tiles dd small{display:block;font-size:.82rem;font-weight:400;color:var(--muted)}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,370px),1fr));gap:.75rem;align-items:start}
.scroll{overflow-x:auto;padding:0}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .7rem;text-align:right;white-space:nowrap;border-top:1px solid var(--rule)}
thead th{border-top:0;color:var(--muted);font-weight:600}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}tr.aside td{color:var(--muted)}
td:first-child,th:first-child{position:sticky;left:0;background:var(--card)}
@media (max-width:700px){.stack thead{display:none}.stack tr{display:block;padding:.4rem .7rem;border-top:1px solid var(--rule)}
.stack tr:first-child{border-top:0}.stack td{display:inline-block;border:0;padding:0 .9rem 0 0;white-space:normal;text-align:left;
overflow-wrap:anywhere;position:static}.stack td:first-child{display:block;font-weight:600}.stack td.none{display:none}
.stack td:nth-child(n+3)::before{content:attr(data-head) " ";color:var(--muted);font-size:.8rem}}
.events{overflow-wrap:anywhere;font-size:.9rem}.events ul{margin:.3rem 0;padding-left:1.2rem;columns:24rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:.82rem/1.45 ui-monospace,monospace;max-height:22rem;overflow-y:auto}
.problem{margin-bottom:.75rem}.problem p{margin:.3rem 0}.problem pre{background:var(--paper);border-radius:6px;padding:.5rem}
.side{overflow-wrap:anywhere}.stack td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:9rem}
.kind{color:var(--muted);font-size:.82rem}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:.75rem}
.pairs td{white-space:normal;overflow-wrap:anywhere;vertical-align:top;text-align:left}
.pairs td:first-child{min-width:8rem;color:var(--muted)}
.diff td,.diff th{text-align:left;white-space:normal;overflow-wrap:anywhere;vertical-align:top;min-width:6rem}
.diff td.note{color:var(--muted)}.diff td:first-child{color:var(--muted);min-width:10rem}
@media (max-width:700px){.stack.diff td:nth-child(2)::before{content:attr(data-head) " ";color:var(--muted);font-size:.8rem}
.stack.diff td.note{display:block}.stack.diff td.note::before{content:""}.stack td:empty{display:none}}
.runs .swatch{width:1rem;height:.6rem;background:var(--c);flex:none}
.good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}.warn{border-left:4px solid var(--bad)}
details{margin:.5rem 0}summary{cursor:pointer;overflow-wrap:anywhere}
ul.links{columns:18rem;font-size:.9rem;padding-left:1.2rem}ul.links li{overflow-wrap:anywhere}
"""


def report(cfg: ReportConfig) -> dict[str, Any]:
    """Write the page of the run ``cfg.run`` to ``cfg.target``; returns ``{"page": path, "bytes", "stages", "plots"}``.

    Raises UserError when there is no such folder or nothing in it to show.
    """
    run = read_run(Path(cfg.run))
    target = Path(cfg.target)
    text = render(run, target)
    publish(target, text)
    plots = text.count('role="img"')
    print(f"report: {target} ({len(text.encode()) / 1e6:.2f} MB, {plots} plots)", flush=True)
    return {"page": str(target), "bytes": len(text.encode()), "stages": len(run.stages), "plots": plots}


def publish(target: Path, text: str) -> None:
    """Write a page aside and put it in its place by rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=target.parent, prefix=target.name + ".")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(aside, 0o644)  # mkstemp makes it readable for its owner alone
    os.replace(aside, target)


def html_page(title: str, body: str) -> str:
    """A whole page with its style inside."""
    head = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{PAGE_CSS}{PLOT_CSS}</style></head>"
    )
    return f"{head}<body><main>{body}</main></body></html>\n"


def render(run: Run, target: Path) -> str:
    """The page as text; links are relative to ``target``'s folder."""
    body = [_headline(run), _warnings(run), _table(run), _events(run)]
    charts = sections(run)
    for index, (title, says, figures) in enumerate(charts):
        cards = "".join(f'<div class="card">{figure}</div>' for figure in figures)
        body.append(section(title, f'<p class="says">{escape(says)}</p><div class="plots">{cards}</div>'))
        if index == 0:
            body.append(_problems(run))
    if not charts:
        body.append(_problems(run))
    body += [_slowest(run), _links(run, target), _environment(run)]
    return html_page(f"{run.name}: r1mega report", "".join(body))


def section(title: str, inner: str) -> str:
    """A heading with what is below it; "" where that is empty."""
    return f"<section><h2>{escape(title)}</h2>{inner}</section>" if inner else ""


def _problems(run: Run) -> str:
    pair = run.before_and_after()
    if pair is None:
        return _single_problems(run)
    return section("Answers before and after", problems_html(*pair))


def _single_problems(run: Run) -> str:
    """A lone evaluation's answers: beside nothing, so each problem with its first response."""
    measured = run.evaluated()
    examples = measured[-1].tested.get("examples") if measured else None
    rows = []
    for one in (examples if isinstance(examples, list) else [])[:6]:
        responses = one.get("responses") if isinstance(one, dict) else None
        if responses and isinstance(responses[0], dict):
            right = bool(responses[0].get("correct"))
            verdict = f'<span class="{"good" if right else "bad"}">{"✓ correct" if right else "✗ wrong"}</span>'
            rows.append(
                f'<article class="card problem"><pre>{escape(str(one.get("question")))}</pre>'
                f"<p>Answer: <b>{escape(str(one.get('answer')))}</b>"
                f" {verdict}</p><pre>{escape(str(responses[0].get('text', '')))}</pre></article>"
            )
    return section("Answers", "".join(rows))


def _headline(run: Run) -> str:
    kinds = {"recipe": f"Recipe of {len(run.stages)} stages", "training": "Training run", "evaluation": "Evaluation"}
    tiles = []
    pair = run.before_and_after()
    if pair:
        before, after = pair
        gain = 100 * (after.figures["pass_at_1"] - before.figures["pass_at_1"])
        control = next((stage for stage in run.evaluated() if stage.is_control), None)
        change = f"{100 * before.figures['pass_at_1']:.1f} → {100 * after.figures['pass_at_1']:.1f} %"
        tiles.append(("pass@1 on held-out problems", change, f"{gain:+.1f} points, {before.name} to {after.name}"))
        control = next((stage for stage in run.evaluated() if stage.is_control), None)
        if control is not None:
            extra = f"{100 * (control.figures['pass_at_1'] - before.figures['pass_at_1']):+.1f} points with shuffled rewards"
            tiles.append(("Control", f"{100 * control.figures['pass_at_1']:.1f} %", extra))
    elif run.evaluated():
        stage = run.evaluated()[-1]
        tiles.append(("pass@1", _share(stage, "pass_at_1") or "-", stage.name))
    tiles.append(("Total time", duration(run.seconds), ""))
    tokens = [stage.tokens for stage in run.stages if stage.tokens is not None]
    tiles.append(("Tokens", f"{sum(tokens):,.0f}" if tokens else "-", "processed in all stages" if len(run.stages) > 1 else ""))
    tiles.append(("Seed", "-" if run.seed is None else str(run.seed), ""))
    if run.machine:
        gpus = run.machine.get("gpus") or []
        extra = f"{run.machine.get('cores', '?')} cores, {run.machine.get('memory_gib', '?')} GiB" + (
            f", {len(gpus)} × {gpus[0]}" if gpus else ""
        )
        tiles.append(("Machine", str(run.machine.get("processor", "-")), extra))
    if run.starts:
        tiles.append(("Code", *_code(run.starts)))
    cells = "".join(
        f'<div class="card"><dt>{escape(name)}</dt>'
        f"<dd>{escape(value)}{f'<small>{escape(extra)}</small>' if extra else ''}</dd></div>"
        for name, value, extra in tiles
    )
    return (
        f'<header><p class="kind">{escape(kinds[run.kind])}</p><h1>{escape(run.name)}</h1><dl class="tiles">{cells}</dl></header>'
    )


def _code(starts: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The last start's version, and in small its commit and how often the run was started."""
    code = starts[-1].get("code") or {}
    commit = str(code.get("commit") or "")[:10]
    changed = len({str((start.get("code") or {}).get("source")) for start in starts}) > 1
    parts = [f"commit {commit}{' with changes' if code.get('dirty') else ''}" if commit else "no git checkout"]
    parts += [f"{len(starts)} starts{', the code changed between them' if changed else ''}"] if len(starts) > 1 else []
    return f"r1mega {code.get('version', '-')}", ", ".join(parts)


def _warnings(run: Run) -> str:
    texts = [
        f"{stage.name}: {stage.bad_lines} damaged line(s) of metrics.jsonl left out" for stage in run.stages if stage.bad_lines
    ]
    if run.kind == "recipe":
        texts += [f"{stage.name}: not finished" for stage in run.stages if stage.seconds is None]
    for stage in run.stages:
        if counts := stage.not_finite():
            what = ", ".join(f"{key} ({count})" for key, count in sorted(counts.items()))
            texts.append(f"{stage.name}: values that are not finite, left out of the plots: {what}")
        if stage.tested.get("num_problems") == 0:
            texts.append(f"{stage.name}: evaluated on no problem")
    return f'<p class="card warn">{"<br>".join(escape(text) for text in texts)}</p>' if texts else ""


def _events(run: Run) -> str:
    """What the training met on its way (steps skipped, rollbacks), stage by stage; "" where nothing happened."""
    lines = []
    for stage in run.stages:
        texts = [event_text(line) for _, line in stage.events]
        rows = "".join(f"<li>{escape(text)}</li>" for text in texts[:MOST_EVENTS])
        rest = f"<li>and {len(texts) - MOST_EVENTS:,} more</li>" if len(texts) > MOST_EVENTS else ""
        if rows:
            lines.append(f"<details open><summary>{escape(stage.name)}: {len(texts):,}</summary><ul>{rows}{rest}</ul></details>")
    says = '<p class="says">Also marked in the plots of loss, reward and gradient norm.</p>'
    return section("Events", f'{says}<div class="card events">{"".join(lines)}</div>' if lines else "")


def _table(run: Run) -> str:
    names = {stage.name for stage in run.stages}
    heads = ("stage", "command", "time", "tokens", "pass@1 (%)", "format (%)", "response (tokens)")
    rows = []
    for stage in run.stages:
        measures_other = stage.name.removeprefix("eval_") != stage.name and stage.name.removeprefix("eval_") in names
        figures = {} if measures_other else stage.figures  # its figures are in the row of the stage that it measured
        length = figures.get("response_length")
        cells = (
            stage.name,
            stage.command,
            duration(stage.seconds),
            f"{stage.tokens:,.0f}" if stage.tokens is not None else "-",
            _share(stage, "pass_at_1", sign="") if figures else "-",
            f"{100 * figures['format_rate']:.1f}" if "format_rate" in figures else "-",
            f"{length:.1f}" if length is not None else "-",
        )
        row = "".join(
            f'<td data-head="{head}" class="{"none" if cell == "-" else ""}">{escape(cell)}</td>'
            for head, cell in zip(heads, cells, strict=True)
        )
        rows.append(_row(row, stage))
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    table = (
        f'<div class="card scroll"><table class="stack"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    return section("Stages", table)


def _slowest(run: Run) -> str:
    """The calls of rewards that took longest, stage by stage; "" where no stage has a ledger."""
    heads = ("reward", "problem", "seconds", "value", "said", "sample", "rollout")
    parts = []
    for stage in run.stages:
        rows = []
        for call in slowest(stage.samples, MOST_SLOW):
            rollout = "-" if call.rollout is None else str(call.rollout)
            cells = (call.reward, call.problem, f"{call.seconds:.4g}", f"{call.value:.4g}", call.said or "-", call.sample, rollout)
            rows.append("".join(f'<td data-head="{head}">{escape(cell)}</td>' for head, cell in zip(heads, cells, strict=True)))
        head = "".join(f"<th>{escape(text)}</th>" for text in heads)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        table = f'<div class="card scroll"><table class="stack"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        if rows:
            parts.append(f"<details open><summary>{escape(stage.name)}</summary>{table}</details>")
    says = f'<p class="says">The {MOST_SLOW} longest calls; <code>r1mega why run=DIR sample=ID</code> shows the response.</p>'
    return section("Slowest rewards", says + "".join(parts) if parts else "")


def _row(cells: str, stage: StageRun) -> str:
    return f'<tr class="aside">{cells}</tr>' if stage.command == "eval" else f"<tr>{cells}</tr>"


def _share(stage: StageRun, key: str, sign: str = " %") -> str:
    """``68.0 ± 1.2 %`` of a share in a stage's figures; "-" without it."""
    if key not in stage.figures:
        return "-"
    error = stage.figures.get("standard_error") if key == "pass_at_1" else None
    return f"{100 * stage.figures[key]:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "") + sign


def duration(seconds: float | None) -> str:
    """``1 h 02 min``, ``3 min 05 s`` or ``8.4 s``; "-" for None."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _links(run: Run, target: Path) -> str:
    """The run's files that a reader opens next, relative to the page."""
    found = [run.folder / name for name in ("summary.json", "export", "metrics.jsonl", "eval.json") if (run.folder / name).exists()]
    if run.kind == "recipe":
        for stage in run.stages:
            found += [path for name in ("metrics.jsonl", "eval.json", "stage.json") if (path := stage.folder / name).exists()]
    base = target.resolve().parent
    items = []
    for path in found:
        link = Path(os.path.relpath(path.resolve(), base)).as_posix()
        items.append(f'<li><a href="{escape(quote(link))}">{escape(path.relative_to(run.folder).as_posix())}</a></li>')
    return section("Files", f'<ul class="links">{"".join(items)}</ul>' if items else "")


def _environment(run: Run) -> str:
    parts = []
    records = [("Environment", run.machine)] if run.machine else []
    records += [(f"Last start: {run.name}", run.starts[-1])] if run.starts else []
    records += [(f"Last start: {one.name}", one.starts[-1]) for one in run.stages if one.starts and one.starts != run.starts]
    for name, values in records:
        rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in _flat(values))
        table = f'<div class="card"><table class="pairs"><tbody>{rows}</tbody></table></div>'
        parts.append(f"<details><summary>{escape(name)}</summary>{table}</details>")
    configs = [(run.name, run.config)] if run.config else []
    configs += [(stage.name, stage.config) for stage in run.stages if stage.config and stage.config != run.config]
    for name, config in configs:
        parts.append(f'<details><summary>Config: {escape(name)}</summary><pre class="card">{escape(config)}</pre></details>')
    return section("Config and environment", "".join(parts))


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key} ")
        else:
            rows.append((f"{prefix}{key}", ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)))
    return rows
