"""``r1mega timeline``: the drawing of a schedule that ran or was simulated, the table beside it, and what the command refuses."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from r1mega import api
from r1mega.cli import main
from r1mega.config.compose import composition, save_config
from r1mega.config.errors import UserError
from r1mega.config.tools import TimelineConfig
from r1mega.report.plot import WIDTH, text_width
from r1mega.report.timeline import ROW, draw_svg
from r1mega.train.pipeline.simulate import Times, simulate
from tests.train.test_timeline import NAMES, build, record

SVG = "{http://www.w3.org/2000/svg}"


def shapes(svg: str) -> tuple[ET.Element, list[ET.Element], list[ET.Element]]:
    """The root, the boxes of events and the texts."""
    root = ET.fromstring(svg)
    boxes = [rect for rect in root.iter(f"{SVG}rect") if rect.get("class", "").startswith("box")]
    return root, boxes, list(root.iter(f"{SVG}text"))


@pytest.mark.parametrize("name", NAMES)
def test_svg_has_a_box_an_event_in_its_place(name) -> None:
    found = simulate(build(name, 3), 6, Times(0.001, 0.001, 0.0005))
    root, boxes, texts = shapes(draw_svg(found.events_by_rank, title="a <b> & c"))
    assert len(boxes) == sum(map(len, found.events_by_rank)) and root.find(f"{SVG}title").text == "a <b> & c"
    back = [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "idle" and float(rect.get("height")) > 12]
    assert len(back) == 3
    left, width = float(back[0].get("x")), float(back[0].get("width"))
    expected = [event for events in found.events_by_rank for event in events]
    for event, box in zip(expected, boxes, strict=True):
        assert box.get("class").split()[1] == event.work
        assert float(box.get("x")) == pytest.approx(left + event.begin_seconds / found.makespan * width, abs=0.02)
        assert float(box.get("width")) == pytest.approx(
            (event.end_seconds - event.begin_seconds) / found.makespan * width, abs=0.02
        )
        assert f"stage {event.stage}, microbatch {event.microbatch}, " in box.find(f"{SVG}title").text
    said = [text.text for text in texts]
    assert {"rank 0", "rank 2", "idle", "forward", "time since the step began (ms)"} <= set(said)
    assert {f"{100 * share:.0f}%" for share in found.bubble_shares} <= set(said)
    assert ("input gradient" in said) == (name in ("zb1p", "dualpipev")) and ("whole backward" in said) == (name != "zb1p")
    assert ("paler: every second stage of a rank" in said) == (name in ("interleaved", "dualpipev"))


def bounds(text: ET.Element) -> tuple[float, float]:
    wide, x = text_width(text.text), float(text.get("x"))
    start = {"start": x, "middle": x - wide / 2, "end": x - wide}[text.get("text-anchor")]
    return start, start + wide


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_ranks", [1, 4, 16])
def test_svg_texts_neither_overlap_nor_leave_the_picture_and_numbers_fit_their_boxes(name, num_ranks) -> None:
    for scale in (1e-6, 0.01, 40.0):
        found = simulate(build(name, num_ranks), 2 * num_ranks, Times(scale, scale, scale))
        root, boxes, texts = shapes(draw_svg(found.events_by_rank))
        height = float(root.get("viewBox").split()[3])
        plain = [text for text in texts if "num" not in text.get("class", "")]
        for text in plain:
            low, high = bounds(text)
            assert -0.5 <= low and high <= WIDTH + 0.5 and 8 <= float(text.get("y")) <= height, text.text
        for one, other in ((one, other) for index, one in enumerate(plain) for other in plain[:index]):
            if abs(float(one.get("y")) - float(other.get("y"))) < 12:
                (a, b), (c, d) = bounds(one), bounds(other)
                assert b <= c + 0.5 or d <= a + 0.5, (one.text, other.text)
        for text in (text for text in texts if "num" in text.get("class", "")):
            size = float((re.search(r"font-size:([\d.]+)px", text.get("style", "")) or [0, 8.5])[1])
            wide, x = text_width(text.text) * size / 12.5, float(text.get("x"))
            holds = [box for box in boxes if abs(float(box.get("x")) + float(box.get("width")) / 2 - x) < 0.02]
            assert any(wide <= float(box.get("width")) for box in holds), text.text


def test_overlapped_pairs_share_the_row() -> None:
    found = simulate(build("dualpipev", 2), 6, Times(1.0, 1.0, 1.0), overlapped=2.5)
    _, boxes, _ = shapes(draw_svg(found.events_by_rank))
    halves = [box for box in boxes if float(box.get("height")) == ROW / 2]
    pairs = sum(action.overlaps for line in build("dualpipev", 2).actions(6) for action in line)
    assert len(halves) == 2 * pairs and {box.get("class").split()[1] for box in halves} == {"F", "B"}
    _, boxes, _ = shapes(draw_svg(simulate(build("dualpipev", 2), 6, Times(1.0, 1.0, 1.0)).events_by_rank))
    assert {float(box.get("height")) for box in boxes} == {ROW}


def test_a_step_of_many_events_is_a_small_file() -> None:
    found = simulate(build("zb1p", 8), 600, Times(1.0, 1.0, 1.0))
    svg = draw_svg(found.events_by_rank)
    root = ET.fromstring(svg)
    assert len(svg) < 600_000 and sum(path.get("d").count("z") for path in root.iter(f"{SVG}path")) == 3 * 8 * 600


def test_the_command_simulates(tmp_path, capsys) -> None:
    words = [
        "timeline",
        "pipeline=zb1p",
        "ranks=4",
        "microbatches=8",
        "forward=1",
        "input_grad=1",
        "weight_grad=1",
        f"out={tmp_path}",
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith("zb1p, simulated, 4 ranks, 8 microbatches\nrank 0 FFF") and "F forward, I input gradient" in said
    assert "\nmean         11.1 %\n" in said and "27 ms" in said
    assert "zb1p, simulated" in (tmp_path / "timeline.svg").read_text()
    result = api.timeline("pipeline=dualpipev", "ranks=2", "microbatches=4", "overlapped=2", f"target={tmp_path / 'v.svg'}")
    assert result["svg"] == str(tmp_path / "v.svg") and Path(result["svg"]).is_file()
    assert max(result["bubble_shares"]) * result["makespan_ms"] == pytest.approx(2 + 2 - 3)
    again = api.timeline("ranks=2", "microbatches=2", "forward=2", "backward=3", "message=0.5", f"out={tmp_path}")
    assert again["makespan_ms"] == pytest.approx(3 * 5 + 2 * 0.5 + 0.5 * 0)
    assert api.timeline(TimelineConfig(ranks=1, out=str(tmp_path)))["bubble_share"] == pytest.approx(0.0)


def recorded_run(tmp_path: Path, *words: str, **how) -> Path:
    run = tmp_path / "run"
    made = composition("pretrain", ["data.train={a:1}", "trainer.steps=1", "pipeline=zb1p", f"out={run}", *words])
    save_config(made.config, run, choices=made.choices)
    record(run, 12, **how)
    return run


def test_the_command_draws_what_ran_beside_the_simulation(tmp_path, capsys) -> None:
    run = recorded_run(tmp_path, "launch.processes=2", "parallel.pipeline=2")
    result = api.timeline(f"run={run}")
    said = capsys.readouterr().out
    assert (
        said.startswith(f"zb1p, step 12 of {run}, 2 ranks, 4 microbatches\n") and "recorded  simulated from the mean times" in said
    )
    assert result["step"] == 12 and Path(result["svg"]) == run / "timeline.svg" and (run / "timeline.svg").is_file()
    exact = simulate(build("zb1p", 2), 4, Times(0.01, 0.01, 0.008))
    assert result["simulated_bubble_share"] == pytest.approx(exact.bubble_share, abs=1e-4), "of the work alone"
    assert result["bubble_share"] > result["simulated_bubble_share"], "what was recorded waited for messages too"
    rows = [line for line in said.splitlines() if line.startswith("mean")]
    assert [float(number) for number in re.findall(r"[\d.]+", rows[0])] == pytest.approx(
        [100 * result["bubble_share"], 100 * result["simulated_bubble_share"]], abs=0.06
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["run=nowhere"], "run: a run's folder; got nowhere, which is none; give the out= of a training"),
        (
            ["run=."],
            "run: a run that recorded its pipeline in timeline/rank0.jsonl and so on; got ., which has no such file; run it again with profile=true",
        ),
        (
            ["pipeline=zb2p"],
            "pipeline: no such choice; got 'zb2p'; did you mean zb1p? use one of 1f1b, dualpipev, interleaved, none, zb1p",
        ),
        (
            ["pipeline=interleaved", "microbatches=6"],
            "microbatches: a multiple of the 4 pipeline ranks with pipeline=interleaved; got 6; use microbatches=4 or 8",
        ),
        (
            ["pipeline=dualpipev", "ranks=8"],
            "microbatches: at least 2 for each of the 8 pipeline ranks with pipeline=dualpipev; got 8; use microbatches=16",
        ),
        (
            ["pipeline=none"],
            "pipeline: one rank with pipeline=none, which cuts the model into no stages; got 4 ranks; use pipeline=1f1b, or one rank (parallel.pipeline=1; ranks=1 of r1mega timeline)",
        ),
        (["pipeline=interleaved", "pipeline.chunks=1"], "pipeline.chunks: at least 2; got 1; use pipeline.chunks=2"),
        (["forward=-1"], "forward: at least 0; got -1.0; use forward=1.0"),
        (["backward=-1"], "backward: at least 0; got -1.0; use a value at least 0"),
        (["microbatches=0"], "microbatches: at least 1; got 0; use microbatches=8"),
        (["ranks=four"], "ranks: a whole number (ranks); got 'four'; for example ranks=4"),
    ],
)
def test_wrong_input_is_one_line(words, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["timeline", *words]) == 2
    assert capsys.readouterr().err == message + "\n"
    assert list(tmp_path.iterdir()) == []


def test_events_of_another_layout_are_told(tmp_path) -> None:
    run = recorded_run(tmp_path, "launch.processes=2", "parallel.pipeline=2", num_ranks=3)
    with pytest.raises(
        UserError, match=r"run: events of its parallel.pipeline ranks; got events of 3 with parallel.pipeline=2 in its config; "
    ):
        api.timeline(f"run={run}")
    run = recorded_run(tmp_path / "other", "launch.processes=2", "parallel.pipeline=2", name="1f1b")
    with pytest.raises(UserError, match="run: events of every work of its schedule; got none of input gradient on stage 1; "):
        api.timeline(f"run={run}")
    assert not (run / "timeline.svg").exists()
