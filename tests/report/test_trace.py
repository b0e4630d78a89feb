"""The samples of an rl run as a trace for Chrome, by ``r1mega timeline``, and as a plot."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from r1mega import api
from r1mega.cli import main
from r1mega.report.samples import Seen, history_of, phases, seen
from r1mega.report.spans import MOST_ROWS, sample_plot
from r1mega.report.trace import trace
from r1mega.rl.ledger import History, Ledger
from tests.report.boxes import faults
from tests.report.test_timeline import recorded_run
from tests.rl.ledgers import CLOCK, write_drop, write_run, write_samples, write_use


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three rollouts of two questions, one question dropped in the last, one that waits."""
    write_run(tmp_path / "run/ledger", rollouts=3)
    ledger = Ledger(tmp_path / "run/ledger", 2, 0, 3, 6)
    write_samples(ledger, [6, 7], 6)
    write_drop(ledger, 3, [6])
    return tmp_path / "run"


def slices(told: dict) -> list[dict]:
    return [event for event in told["traceEvents"] if event["ph"] == "X"]


def test_a_trace_says_when_what_happened_to_each_sample(run: Path) -> None:
    history = History(run / "ledger")
    told = json.loads(json.dumps(trace(seen(history), phases(history))))
    mine = [event for event in slices(told) if event["args"].get("sample") == "1.0.6"]
    assert [(event["cat"], event["ts"], event["dur"]) for event in mine] == [
        ("generate", 2e6, 2e6), ("judge", 4e6, 0.5e6), ("wait", 4.5e6, 15.5e6),
    ]  # fmt: skip
    assert {event["name"] for event in mine} == {"p2 2.0"} and {event["pid"] for event in mine} == {1}
    assert mine[0]["args"] == {
        "sample": "1.0.6", "source": "source0", "prompt_tokens": 3, "tokens": 3, "weights": [[2, 0, 3]], "finish_reason": "stop",
        "reward": 0.0, "fate": "used", "rollout": 2, "update": 3, "advantage": 1.0, "reward_seconds": {"accuracy": 0.25},
    }  # fmt: skip
    waiting = [event["cat"] for event in slices(told) if event["args"].get("fate") == "waiting"]
    assert waiting == ["generate", "judge"] * 2, "what waits has not ended"
    trainer = [event for event in slices(told) if event["pid"] == 0]
    assert [(event["name"], event["ts"], event["dur"]) for event in trainer if event["args"]["rollout"] == 2] == [
        ("trainer waits", 11e6, 5e6), ("training", 16e6, 3e6), ("weight push", 19e6, 1e6),
    ]  # fmt: skip
    names = {event["args"]["name"] for event in told["traceEvents"] if event["ph"] == "M"}
    assert {"trainer", "rank 0", "samples of rank 0", "lane 0"} <= names and told["otherData"] == {"began": CLOCK}


def test_what_overlaps_lies_in_lanes_of_its_own(run: Path) -> None:
    told = slices(trace(seen(History(run / "ledger")), []))
    by_lane = defaultdict(list)
    for event in told:
        by_lane[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in by_lane.values():
        spans.sort()
        assert all(left[1] <= right[0] + 1e-3 for left, right in zip(spans, spans[1:], strict=False))
    moments = sorted({edge for spans in by_lane.values() for span in spans for edge in span})
    most = max(sum(start <= moment < end for spans in by_lane.values() for start, end in spans) for moment in moments)
    assert len(by_lane) == most, "no more lanes than needed"


def test_the_command(run: Path, tmp_path, capsys) -> None:
    told = api.timeline(f"run={run}", "rollouts=2")
    said = capsys.readouterr().out
    assert told == {"trace": str(run / "timeline.json"), "samples": 4 + 4 + 2 + 2, "rollouts": [2, 3]}
    body = json.loads((run / "timeline.json").read_text())
    assert {event["args"]["rollout"] for event in slices(body) if event["pid"]} == {2, 3, None}
    row = next(line.split("  ") for line in said.splitlines() if line.startswith("2 "))
    assert [cell.strip() for cell in row if cell.strip()] == ["2", "4", "2, 2", "0.5, 0.5", "15, 15.5", "0 updates", "18"]
    assert "2 samples not used yet" in said and f"timeline: {run / 'timeline.json'}" in said
    assert api.timeline(f"run={run}", "rollouts=0", f"target={tmp_path / 'all.json'}")["rollouts"] == [1, 2, 3]
    assert (tmp_path / "all.json").is_file()


def test_a_pipeline_that_was_recorded_is_drawn_too(tmp_path) -> None:
    run = recorded_run(tmp_path, "launch.processes=2", "parallel.pipeline=2")
    write_run(run / "ledger")
    told = api.timeline(f"run={run}", f"target={tmp_path / 'mine.svg'}")
    assert told["step"] == 12 and Path(told["svg"]) == tmp_path / "mine.svg" and Path(told["trace"]) == run / "timeline.json"


def test_a_ledger_without_a_sample_is_told(tmp_path, capsys) -> None:
    Ledger(tmp_path / "run/ledger", 1, 0, 0, 0)
    assert main(["timeline", f"run={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err == (
        f"run: a run that has judged samples; got {tmp_path / 'run'}, whose ledger has none yet; wait for its first\n"
    )
    assert history_of(tmp_path) is None


def drawn(samples: list[Seen], trainer=()) -> str:
    figure = sample_plot(samples, trainer, title="Samples: run")
    assert faults(figure) == []
    return figure


def test_the_plot(run: Path) -> None:
    history = History(run / "ledger")
    samples = seen(history)
    figure = drawn(samples, phases(history))
    by_class = {kind: path.count("z") for kind, path in re.findall(r'<path class="(bar c\d)" d="([^"]*)"/>', figure)}
    assert by_class == {"bar c0": 16, "bar c1": 16, "bar c7": 12, "bar c4": 2}, "generated, judged, waiting, then dropped"
    assert all(
        name in figure for name in ("generated", "judged", "waiting until used", "waiting, then dropped", "training (trainer)")
    )
    assert figure.count("<title>rollout ") == 9 and "Rollouts 1 to 3." in figure
    assert "trainer" not in drawn(samples) and sample_plot([], phases(history)) == ""


def test_of_many_samples_some_are_drawn(tmp_path) -> None:
    ledger = Ledger(tmp_path / "ledger", 1, 0, 0, 0)
    items = list(range(700))
    write_use(ledger, 1, items, write_samples(ledger, items, 0, tokens=[1]), time=CLOCK + 800.0)
    figure = drawn(seen(History(tmp_path / "ledger")))
    kept = len(re.findall("M", re.search(r'<path class="bar c0" d="([^"]*)"/>', figure)[1]))
    assert kept == 467 <= MOST_ROWS and "One of 3 samples is drawn." in figure and "1.4k" not in figure and len(figure) < 100_000
