import json
import random
import re
from html.parser import HTMLParser

import pytest

from r1mega.config.data import ReportConfig
from r1mega.config.errors import UserError
from r1mega.report.page import duration, report
from r1mega.rl.ledger import Ledger
from tests.report.boxes import faults, figures
from tests.report.conftest import _reinforcement, write_lines
from tests.rl.ledgers import write_run, write_samples

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every end tag closes the last open one. Keeps text, links, and class and label of every plot."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.links, self.plots, self.tags = [], [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.links += [value for key, value in attrs.items() if key in ("href", "src", "xlink:href", "srcset", "data")]
        if tag == "svg" and attrs.get("role") == "img":
            self.plots.append({"label": attrs["aria-label"], "texts": {}})
        if tag == "text":
            self.kind = attrs.get("class", "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "text":
            self.plots[-1]["texts"].setdefault(self.kind, []).append(data)


def make(folder, target=None):
    target = target or folder / "report.html"
    result = report(ReportConfig(run=str(folder), target=str(target)))
    text = target.read_text(encoding="utf-8")
    return result, text, Page(text)


def test_the_page_is_complete_in_itself(recipe_folder):
    result, text, page = make(recipe_folder)
    assert result == {
        "page": str(recipe_folder / "report.html"),
        "bytes": len(text.encode()),
        "stages": 15,
        "plots": len(page.plots),
    }
    assert not re.search(r"https?:|//|url\(|@import|javascript:|\son\w+=", text)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text


def test_every_plot_has_labels_and_ticks(recipe_folder):
    _, _, page = make(recipe_folder)
    assert len(page.plots) >= 20
    for plot in page.plots:
        assert plot["texts"]["axis-x"][0] and plot["texts"]["axis-y"][0], plot["label"]
        assert len(plot["texts"]["tick"]) >= 2, plot["label"]


def test_numbers_and_plots_of_the_run_are_on_the_page(recipe_folder):
    _, _, page = make(recipe_folder)
    text = "".join(page.text)
    for expected in (
        "quickstart",
        "31.4 → 70.2 %",
        "+38.8 points",
        "+1.3 points with shuffled rewards",
        "20 min 47 s",
        "Example CPU",
        "70.2 ± 1.2",
    ):
        assert expected in text
    labels = {plot["label"] for plot in page.plots}
    assert {
        "pass@1",
        "Loss: pretrain",
        "Loss: cold_start",
        "Reward",
        "Accuracy on training problems",
        "Format",
        "Response length",
        "KL to the reference",
        "Entropy",
        "Clipped ratios",
        "Train / rollout difference, largest",
        "Expert load: pretrain",
        "Expert load: grpo_2",
        "Busiest expert, training",
        "Time per stage",
        "Time per phase of reinforcement",
    } <= labels
    assert "control (shuffled rewards)" in text and "hidden_size: 128" in text and "torch" in text


def test_answers_before_and_after_are_matched_and_escaped(recipe_folder):
    for stage, correct in (("cold_start", [False, False]), ("grpo_2", [True, False])):
        examples = [
            {
                "question": "1 < 2 & <script>x</script>?",
                "answer": "yes",
                "responses": [{"text": f"{stage}</think>", "correct": correct[0]}],
            },
            {"question": f"only in {stage}", "answer": "-", "responses": [{"text": "unmatched", "correct": True}]},
            {"question": "hard", "answer": "9", "responses": [{"text": "no idea", "correct": correct[1]}]},
            {"question": "no responses", "answer": "9", "responses": []},
        ]
        (recipe_folder / "stages" / f"eval_{stage}" / "eval.json").write_text(json.dumps({"examples": examples}), encoding="utf-8")
    _, text, page = make(recipe_folder)
    shown = "".join(page.text)
    assert "script" not in page.tags and "1 < 2 & <script>x</script>?" in shown
    assert "cold_start</think>" in shown and "grpo_2</think>" in shown and "unmatched" not in shown
    assert "of the 2 examples that both evaluations kept: 1 newly solved, 1 not solved." in shown
    assert text.count("✓ correct") == 1 and text.count("✗ wrong") == 3


def test_links_are_relative_and_lead_to_files(recipe_folder, tmp_path):
    for target in (recipe_folder / "report.html", tmp_path / "elsewhere" / "page.html"):
        _, _, page = make(recipe_folder, target)
        assert len(page.links) > 10
        assert all((target.parent / link).exists() for link in page.links)


def test_a_training_run_alone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [{"step": step, "lm_loss": 5.0 - step / 10, "tokens": 100 * step, "expert_load": [[0.5, 0.5]]} for step in range(1, 11)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 11, "lm_l', encoding="utf-8")
    _, _, page = make(folder)
    assert {plot["label"] for plot in page.plots} == {"Loss: run", "Expert load: run", "Busiest expert, training"}
    assert "Training run" in page.text and "1,000" in "".join(page.text)


def test_an_evaluation_alone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    example = {"question": "1+1", "answer": "2", "responses": [{"text": "it is 2", "correct": True}]}
    body = {"pass_at_1": 0.5, "standard_error": 0.02, "seconds": 9.0, "examples": [example]}
    (folder / "eval.json").write_text(json.dumps(body), encoding="utf-8")
    _, _, page = make(folder)
    text = "".join(page.text)
    assert "50.0 ± 2.0" in text and "it is 2" in text and [plot["label"] for plot in page.plots] == ["pass@1"]


def test_damage_is_told(recipe_folder):
    path = recipe_folder / "stages" / "grpo_1" / "metrics.jsonl"
    path.write_text("not json\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    (recipe_folder / "stages" / "late").mkdir()
    text = "".join(make(recipe_folder)[2].text)
    assert "grpo_1: 1 damaged line(s)" in text and "late: not finished" in text


def test_an_absent_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        report(ReportConfig(run=str(tmp_path / "none"), target=str(tmp_path / "report.html")))
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (8.44, "8.4 s"), (59.97, "1 min 00 s"), (185.4, "3 min 05 s"), (3720.0, "1 h 02 min"), (float("nan"), "-")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_reinforcement_run_alone(tmp_path):
    folder = tmp_path / "run"
    ids = write_run(folder / "ledger", rollouts=3)
    ledger = Ledger(folder / "ledger", 2, 0, 3, 6)
    write_samples(ledger, [6], 6, seconds=9.5, failure="<too slow>")
    lines = _reinforcement(random.Random(1), 3, 0.3, 0.5)
    for line in lines:
        line |= {
            "reward/gsm8k": 1.25, "reward/sums": 0.5, "generated_tokens_per_second": 900.0, "tokens_per_second": 400.0, "idle_share": 0.4,
            "engine_idle_share": 0.5, "push_seconds": 0.2, "push_gbps": 1.5, "dropped_groups": 0.5, "staleness": 0.2, "staleness_max": 1.0,
            "slowest_reward_seconds": 9.5, "reward_seconds": 0.4, "response_length_max": 60, "seconds_value": 0.1,
        }  # fmt: skip
    write_lines(folder / "metrics.jsonl", lines)
    (folder / "config.yaml").write_text(
        "command: rl\nchoices: {}\nconfig:\n  seed: 3\n  reward: {weights: {accuracy: 1, format: 1}}\n"
    )
    _, text, page = make(folder)
    labels = {plot["label"] for plot in page.plots}
    assert {
        "Reward by source: run", "Reward by name: run", "Response length", "Longest response", "Groups left out", "Groups without a signal",
        "Entropy", "Clipped ratios", "Staleness, mean of all tokens", "Staleness, largest", "Train / rollout difference, largest",
        "Train / rollout difference, mean", "Generation", "Throughput", "Trainer waits for responses", "Engine without work",
        "Weight push", "Weight push, speed", "Judging", "Slowest call of a reward", "Samples: run", "Time per phase of reinforcement",
    } <= labels  # fmt: skip
    assert [fault for figure in figures(text) for fault in faults(figure)] == []
    shown = "".join(page.text)
    assert "gsm8k" in shown and "Slowest rewards" in shown and "script" not in page.tags
    row = re.search(r'<tr><td data-head="reward">accuracy</td>.*?</tr>', text)[0]
    cells = re.findall(r">([^<]*)</td>", row)
    assert cells == ["accuracy", "p6", "9.5", "0", "&lt;too slow&gt;", "2.0.1", "-"]
    assert text.count('<td data-head="sample">') == 12 and ids[0][0] in shown


def test_more_sources_than_colours(tmp_path):
    lines = [{"update": step, "reward": 1.0, **{f"reward/s{source:02}": 0.1 * source for source in range(11)}} for step in (1, 2)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    _, text, page = make(tmp_path)
    assert "8 of 11 sources; metrics.jsonl has all." in text and "s07" in text and "s08" not in text
    assert "Slowest rewards" not in text and "Samples: " not in text
