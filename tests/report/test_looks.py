"""Every plot of every page: texts that neither overlap nor are cut, axes with units, a legend. The check itself is checked first."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from r1mega.config.data import CompareConfig, ReportConfig
from r1mega.report.compare import compare
from r1mega.report.page import report
from r1mega.report.plot import Bar, Mark, Series, bar_plot, heat_map, line_plot
from tests.report.boxes import faults, figures
from tests.report.conftest import _reinforcement, _training, write_lines, write_recipe

LONG = "a_name_that_nobody_would_write_but_somebody_will_" * 2


def page_of(folder: Path) -> str:
    report(ReportConfig(run=str(folder), target=str(folder / "page.html")))
    return (folder / "page.html").read_text(encoding="utf-8")


def check(page: str, at_least: int) -> None:
    found = figures(page)
    assert len(found) >= at_least and len(found) == page.count('role="img"')
    assert [fault for figure in found for fault in faults(figure)] == []


def test_the_check_sees_what_is_wrong() -> None:
    good = line_plot([Series("a", [(0, 1), (900, 2)])], "step (count)", "loss (nats)")
    assert faults(good) == []
    assert any("axis-y has no label" in fault for fault in faults(good.replace("loss (nats)", "loss")))
    assert any("no legend" in fault for fault in faults(re.sub(r'<ul class="legend">.*?</ul>', "", good)))
    tick = re.search(r'<text class="tick" x="[\d.]+" y="[\d.]+" text-anchor="middle">', good)[0]
    assert any("on '" in fault for fault in faults(good.replace(tick, tick + "wide " * 10)))
    assert any("is cut" in fault for fault in faults(good.replace(tick, tick + "wide " * 60)))
    assert any("no ticks" in fault for fault in faults(good.replace('class="tick"', "")))


def test_a_recipe(recipe_folder) -> None:
    check(page_of(recipe_folder), 20)


@pytest.mark.parametrize(
    "case", ["one step", "many", "not finite", "events", "a thousand events", "huge and tiny", "negative rewards"]
)
def test_unusual_runs(case, tmp_path) -> None:
    rng = random.Random(case)
    rows = _training(rng, 9000 if case == "many" else 10 if case == "one step" else 300, 6.0, 1.0, 1 if case == "many" else 10)
    if case == "not finite":
        rows[3]["lm_loss"], rows[4]["lm_loss"], rows[5]["grad_norm"] = float("nan"), float("inf"), float("-inf")
    elif case == "events":
        rows[5:5] = [{"event": f"rolled back to step {LONG}", "step": 50, "reason": LONG}, {"event": LONG, "step": 60}]
    elif case == "a thousand events":
        rows += [{"event": "step skipped", "step": step, "reason": "loss nan"} for step in range(1000)]
    elif case == "huge and tiny":
        rows = [row | {"lm_loss": 1e30 * row["step"], "lr": 1e-12, "grad_norm": 1e6 + row["step"] / 1e5} for row in rows]
    elif case == "negative rewards":
        rows = _reinforcement(rng, 40, 0.3, 0.7)
        for row in rows:
            row["reward"] = -5000.0 * row["update"]
            row["kl"] = -row["kl"]
    write_lines(tmp_path / "metrics.jsonl", rows)
    page = page_of(tmp_path)
    check(page, 6)
    if case == "not finite":
        assert "values that are not finite, left out of the plots: grad_norm (1), lm_loss (2)" in page
    if case == "events":
        assert "open><summary>" in page and "rolled back</li>" in page and f"step 50: rolled back to step {LONG}" in page
    if case == "a thousand events":
        assert "and 970 more" in page


def with_long_names(folder: Path) -> Path:
    """A recipe's folder with two of its stages renamed."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for row in summary["stages"]:
        new = row["name"].replace("grpo_1", f"{LONG}grpo_1").replace("cold_start", "W" * 60)
        os.rename(folder / "stages" / row["name"], folder / "stages" / new)
        row["name"] = new
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def test_long_names(tmp_path) -> None:
    check(page_of(with_long_names(write_recipe(tmp_path / LONG))), 20)


def test_no_problem_at_all(tmp_path) -> None:
    body = {"pass_at_1": None, "num_problems": 0, "samples": 8, "seconds": 1.0, "examples": []}
    (tmp_path / "eval.json").write_text(json.dumps(body), encoding="utf-8")
    page = page_of(tmp_path)
    assert "evaluated on no problem" in page
    check(page, 0)


def test_a_comparison(recipe_folder, tmp_path) -> None:
    other = write_recipe(tmp_path / LONG, seed=8)
    target = tmp_path / "compare.html"
    compare(CompareConfig(run=[str(recipe_folder), str(other)], target=str(target)))
    check(target.read_text(encoding="utf-8"), 60)


def test_labels_longer_than_their_axis_are_shortened() -> None:
    label = f"{LONG} (points)"
    for figure in (
        line_plot([Series(LONG, [(0, 1.0), (1, 2.0)])], label, label, marks=[Mark(0.5, LONG)]),
        bar_plot([Bar(LONG, 3.0)], label, label),
        heat_map([[1.0, 2.0]] * 3, label, label, "load (ratio)"),
    ):
        assert faults(figure) == []


LOOK = """<script>
const wrong = [];
if (document.documentElement.scrollWidth > innerWidth + 1) wrong.push("wider than the window");
for (const svg of document.querySelectorAll("svg[role=img]")) {
  const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")].map(one => [one, one.getBoundingClientRect()]);
  const name = svg.getAttribute("aria-label");
  texts.forEach(([one, box], index) => {
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
      wrong.push(`${name}: ${one.textContent} is cut`);
    for (const [other, place] of texts.slice(0, index))
      if (Math.min(box.right, place.right) - Math.max(box.left, place.left) > 1
          && Math.min(box.bottom, place.bottom) - Math.max(box.top, place.top) > 4)
        wrong.push(`${name}: ${one.textContent} on ${other.textContent}`);
  });
}
for (const one of document.querySelectorAll("p, dt, dd, td, th, h1, h2, li, figcaption, summary")) {
  const box = one.getBoundingClientRect(), card = one.closest(".card, header, section");
  if (box.width && card && one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display != "inline")
    wrong.push(`${one.tagName} ${one.textContent.slice(0, 40)} runs over`);
}
document.title = `${document.querySelectorAll("svg[role=img]").length} plots: ${wrong.join("; ") || "fine"}`;
</script>"""

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1400, 420])
def test_a_browser_finds_nothing_that_overlaps_or_is_cut(width, recipe_folder, tmp_path) -> None:
    other = write_recipe(tmp_path / LONG, seed=8)
    (recipe_folder / "stages" / "grpo_1" / "metrics.jsonl").open("a").write(
        '{"event": "step skipped", "update": 9, "reason": "x"}\n'
    )
    compare(CompareConfig(run=[str(recipe_folder), str(other)], target=str(tmp_path / "c.html")))
    pages = {"report": page_of(recipe_folder), "compare": (tmp_path / "c.html").read_text(encoding="utf-8")}
    pages["long"] = page_of(with_long_names(other))
    for name, page in pages.items():
        path = tmp_path / f"{name}.html"
        path.write_text(page.replace("</main>", f"</main>{LOOK}"), encoding="utf-8")
        line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        line += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/browser", "--hide-scrollbars"]
        line += [f"--window-size={width},2000", "--dump-dom", f"file://{path}"]
        shown = subprocess.run(line, capture_output=True, text=True, timeout=100).stdout
        assert re.search(r"<title>\d\d plots: fine</title>", shown), re.search(r"<title>.*?</title>", shown, re.DOTALL)
