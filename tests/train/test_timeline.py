"""The simulator against the formulas of DeepSeek-V3 Table 2 and against a second reckoning; recorded events; letters."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from r1mega import registry
from r1mega.config.errors import UserError
from r1mega.train.pipeline.schedule import rank_of_stage
from r1mega.train.pipeline.simulate import Times, mean_seconds, simulate
from r1mega.train.pipeline.timeline import Event, bubble_share, bubble_shares, draw_text, read_events, write_events

NAMES = ["1f1b", "interleaved", "zb1p", "dualpipev"]


def build(name: str, num_ranks: int, **knobs):
    return registry.lookup("pipeline", name)(**knobs).build(num_ranks)


def idle(found) -> list[float]:
    return [share * found.makespan for share in found.bubble_shares]


UNIFORM = [(1.0, 1.0, 1.0), (1.0, 1.0, 0.5), (2.0, 1.5, 1.25), (1.0, 2.0, 0.75), (3.0, 3.0, 1.0)]
"""F, I, W with W at most F and I."""


@pytest.mark.parametrize("f, i, w", [*UNIFORM, (1.0, 2.0, 3.0)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_1f1b_has_the_bubble_of_the_table(num_ranks, f, i, w) -> None:
    for m in (num_ranks, 2 * num_ranks + 1, 4 * num_ranks):
        found = simulate(build("1f1b", num_ranks), m, Times(f, i, w))
        assert idle(found) == pytest.approx([(num_ranks - 1) * (f + i + w)] * num_ranks)
        assert found.makespan == pytest.approx((m + num_ranks - 1) * (f + i + w))


@pytest.mark.parametrize("f, i, w", UNIFORM)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_zb1p_has_the_bubble_of_the_table(num_ranks, f, i, w) -> None:
    b = i + w
    for m in (num_ranks, 2 * num_ranks + 1, 4 * num_ranks):
        found = simulate(build("zb1p", num_ranks), m, Times(f, i, w))
        assert idle(found) == pytest.approx([(num_ranks - 1) * (f + b - 2 * w)] * num_ranks)


@pytest.mark.parametrize("f, w", [(1.0, 1.0), (1.0, 0.5), (2.0, 0.75)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_dualpipev_has_dualpipes_bubble_for_twice_the_ranks(num_ranks, f, w) -> None:
    """The table's PP counts stages, two a rank here; the picture that it describes has F = I."""
    stages, b = 2 * num_ranks, f + w
    for both in (max(f, b), 0.6 * max(f, b) + 0.4 * (f + b), f + b):
        for m in (2 * num_ranks, 3 * num_ranks + 1, 5 * num_ranks):
            found = simulate(build("dualpipev", num_ranks), m, Times(f, f, w), overlapped=both)
            assert max(idle(found)) == pytest.approx((stages / 2 - 1) * (both + b - 3 * w))
            if both == f + b:
                assert idle(found) == pytest.approx([max(idle(found))] * num_ranks)
    one_after_the_other = simulate(build("dualpipev", num_ranks), 4 * num_ranks, Times(f, f, w))
    assert idle(one_after_the_other) == pytest.approx([(num_ranks - 1) * (f + f - w)] * num_ranks)


@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaved_divides_1f1bs_bubble_by_its_chunks(chunks) -> None:
    for num_ranks in (1, 2, 4):
        found = simulate(build("interleaved", num_ranks, chunks=chunks), 2 * num_ranks, Times(1.0, 1.0, 0.5))
        assert idle(found) == pytest.approx([(num_ranks - 1) * 2.5] * num_ranks)
        whole = simulate(build("1f1b", num_ranks), 2 * num_ranks, Times(1.0 * chunks, 1.0 * chunks, 0.5 * chunks))
        assert found.bubble_share * chunks * found.makespan == pytest.approx(whole.bubble_share * whole.makespan * 1.0)


def test_zero_bubble_schedules_idle_less_than_1f1b() -> None:
    for num_ranks in (2, 4, 8):
        m = 2 * num_ranks
        usual = simulate(build("1f1b", num_ranks), m, Times(2.0, 2.0, 2.0)).bubble_share
        v = simulate(build("dualpipev", num_ranks), m, Times(1.0, 1.0, 1.0)).bubble_share
        assert v < simulate(build("zb1p", num_ranks), m, Times(2.0, 2.0, 2.0)).bubble_share < usual


def reckoned(pipeline, m: int, seconds, overlapped, message: float) -> dict[tuple[str, int, int], tuple[float, float]]:
    """Begin and end of every action by going through all lists again and again until no time moves: another way than the simulator's."""
    lists, holder, last = pipeline.actions(m), rank_of_stage(pipeline.placement), max(rank_of_stage(pipeline.placement))
    times = {("B" if one.work == "I" else one.work, one.stage, one.microbatch): (0.0, 0.0) for line in lists for one in line}
    moved = True
    while moved:
        moved = False
        for rank, line in enumerate(lists):
            free = 0.0
            skip = None
            for index, action in enumerate(line):
                if action is skip:
                    continue
                group = [action, line[index + 1]] if action.overlaps and overlapped is not None else [action]
                skip = group[-1] if len(group) == 2 else None
                begin = free
                for one in group:
                    stage, microbatch = one.stage, one.microbatch
                    if one.work == "F" and stage > 0:
                        begin = max(begin, times["F", stage - 1, microbatch][1] + message * (holder[stage - 1] != rank))
                    elif one.work in "BI":
                        begin = max(begin, times["F", stage, microbatch][1])
                        if stage < last:
                            begin = max(begin, times["B", stage + 1, microbatch][1] + message * (holder[stage + 1] != rank))
                    elif one.work == "W":
                        begin = max(begin, times["B", stage, microbatch][1])
                free = begin + (overlapped if len(group) == 2 else seconds(action))
                for one in group:
                    key = ("B" if one.work == "I" else one.work, one.stage, one.microbatch)
                    moved |= times[key] != (begin, free)
                    times[key] = (begin, free)
    return times


@pytest.mark.parametrize("name", NAMES)
def test_the_simulator_agrees_with_a_second_reckoning_for_random_times(name) -> None:
    rng = random.Random(name)
    for _ in range(25):
        num_ranks = rng.randint(1, 4)
        m = num_ranks * rng.randint(2, 3)
        pipeline = build(name, num_ranks)
        drawn: dict = {}

        def seconds(action, drawn=drawn):
            return drawn.setdefault(action, rng.uniform(0.1, 2.0))

        overlapped, message = rng.choice([None, 2.5]), rng.choice([0.0, 0.3])
        found = simulate(pipeline, m, seconds, overlapped=overlapped, message=message)
        want = reckoned(pipeline, m, seconds, overlapped, message)
        lists = pipeline.actions(m)
        for actions, events in zip(lists, found.events_by_rank, strict=True):
            for action, event in zip(actions, events, strict=True):
                key = ("B" if action.work == "I" else action.work, action.stage, action.microbatch)
                assert (event.work, event.stage, event.microbatch) == (action.work, action.stage, action.microbatch)
                assert (event.begin_seconds, event.end_seconds) == pytest.approx(want[key])


@pytest.mark.parametrize("name", NAMES)
def test_what_holds_for_any_times(name) -> None:
    rng = random.Random(name)
    for _ in range(25):
        num_ranks = rng.randint(1, 6)
        m, pipeline = 2 * num_ranks, build(name, num_ranks)
        stages = len(rank_of_stage(pipeline.placement))
        times = Times(*([rng.uniform(0.1, 2.0) for _ in range(stages)] for _ in range(3)))
        found = simulate(pipeline, m, times)
        for line, events, share in zip(pipeline.actions(m), found.events_by_rank, found.bubble_shares, strict=True):
            assert all(one.end_seconds <= other.begin_seconds + 1e-9 for one, other in pairwise(events)), "one at a time"
            assert share == pytest.approx(1 - sum(map(times, line)) / found.makespan, abs=1e-9) and -1e-9 <= share < 1
        through = sum(times.forward) + sum(times.input_grad)
        busiest = max(sum(map(times, line)) for line in pipeline.actions(m))
        assert found.makespan >= max(through, busiest) - 1e-9
        longer = simulate(pipeline, m, times, message=0.2)
        assert longer.makespan >= found.makespan - 1e-9
        assert bubble_share(found.events_by_rank) == found.bubble_share == pytest.approx(sum(found.bubble_shares) / num_ranks)
        twice = simulate(pipeline, m, lambda action, times=times: 2 * times(action))
        assert twice.bubble_shares == pytest.approx(found.bubble_shares)


def test_times_of_stages_and_of_a_whole_backward() -> None:
    found = simulate(build("1f1b", 2), 1, Times([1.0, 2.0], 0.0, 0.0, backward=[4.0, 8.0]))
    assert found.events_by_rank == (
        (Event("F", 0, 0, 0.0, 1.0), Event("B", 0, 0, 11.0, 15.0)),
        (Event("F", 1, 0, 1.0, 3.0), Event("B", 1, 0, 3.0, 11.0)),
    )
    assert found.bubble_shares == pytest.approx((10 / 15, 5 / 15)) and found.bubble_share == pytest.approx(0.5)
    late = simulate(build("1f1b", 2), 1, Times([1.0, 2.0], 0.0, 0.0, backward=[4.0, 8.0]), message=0.5)
    assert [event.begin_seconds for events in late.events_by_rank for event in events] == [0.0, 12.0, 1.5, 3.5]


def test_the_bubble_of_recorded_events() -> None:
    """Another zero of the clock, a gap before the first and after the last work, and two that run at the same time, counted once."""
    by_rank = [
        [Event("F", 0, 0, 100.0, 101.0), Event("B", 0, 0, 107.0, 110.0)],
        [Event("F", 1, 0, 101.0, 104.0), Event("B", 1, 1, 102.0, 105.0), Event("F", 2, 0, 102.5, 103.0)],
        [],
    ]
    assert bubble_shares(by_rank) == pytest.approx((0.6, 0.6, 1.0)) and bubble_share(by_rank) == pytest.approx(2.2 / 3)
    assert bubble_shares([[Event("F", 0, 0, 5.0, 5.0)]]) == (0.0,)
    with pytest.raises(ValueError, match="at least one event"):
        bubble_share([[], []])


@pytest.mark.parametrize("name", NAMES)
def test_mean_times_of_a_uniform_schedule_give_it_back(name) -> None:
    found = simulate(build(name, 3), 6, Times(1.0, 0.75, 0.5))
    again = simulate(build(name, 3), 6, mean_seconds(found.events_by_rank))
    assert again.bubble_shares == pytest.approx(found.bubble_shares) and again.makespan == pytest.approx(found.makespan)
    with pytest.raises(KeyError):
        mean_seconds([[]])(build(name, 1).actions(2)[0][0])


def record(run: Path, step: int, name: str = "zb1p", num_ranks: int = 2, m: int = 4, start: float = 1.7e9, skip=()) -> tuple:
    found = simulate(build(name, num_ranks), m, Times(0.01, 0.01, 0.008), message=0.001)
    moved = tuple(
        tuple(Event(one.work, one.stage, one.microbatch, one.begin_seconds + start, one.end_seconds + start) for one in events)
        for events in found.events_by_rank
    )
    for rank, events in enumerate(moved):
        if rank not in skip:
            write_events(run, rank, step, events)
    return moved


def test_events_are_kept_and_the_newest_step_of_all_ranks_is_read(tmp_path) -> None:
    record(tmp_path, 3)
    newest = record(tmp_path, 7, m=6)
    record(tmp_path, 9, skip=[1])
    assert (tmp_path / "timeline" / "rank1.jsonl").is_file()
    found = read_events(tmp_path)
    assert found.step == 7 and found.events_by_rank == newest
    again = record(tmp_path, 7, m=8, start=2e9)
    assert read_events(tmp_path).events_by_rank == again, "of a step that ran twice, the last"
    path = tmp_path / "timeline" / "rank1.jsonl"
    with path.open("a") as file:
        file.write('{"step": 11, "events": [["F", 0')
    assert read_events(tmp_path).step == 7, "a line cut short does not count"


def test_events_that_are_not_there_or_wrong_are_told(tmp_path) -> None:
    with pytest.raises(UserError, match=r"^run: a run that recorded its pipeline .*; run it again with profile=true$"):
        read_events(tmp_path)
    record(tmp_path, 3, num_ranks=3, skip=[1])
    with pytest.raises(UserError, match=r"timeline: a file of every rank; got none of rank 1; .* profile=true$"):
        read_events(tmp_path)
    write_events(tmp_path, 1, 5, [Event("F", 0, 0, 0.0, 1.0)])
    with pytest.raises(UserError, match=r"timeline: a step that every rank recorded; got none; "):
        read_events(tmp_path)
    path = tmp_path / "timeline" / "rank1.jsonl"
    for wrong in (
        "nonsense",
        '{"step": 3}',
        '{"step": 3, "events": [["X", 0, 0, 1.0, 2.0]]}',
        '{"step": 3, "events": [["F", 0, 0, 2.0, 1.0]]}',
        "[]",
    ):
        path.write_text(wrong + "\n")
        with pytest.raises(
            UserError, match=r"rank1.jsonl line 1: a recorded step; got '.*; remove the folder and run with profile=true$"
        ):
            read_events(tmp_path)


def test_text_has_a_line_a_rank_and_a_letter_for_what_runs_longest() -> None:
    found = simulate(build("zb1p", 2), 3, Times(1.0, 1.0, 1.0))
    assert draw_text(found.events_by_rank, 7 + 10) == "rank 0 FF.IWFIWIW\nrank 1 .FIFIWFIWW"
    twice = draw_text(found.events_by_rank, 7 + 20).splitlines()
    assert twice[1] == "rank 1 " + "".join(2 * letter for letter in ".FIFIWFIWW")
    half = [[Event("F", 0, 0, 0.0, 1.4), Event("B", 0, 0, 2.6, 4.0)]]
    assert draw_text(half, 7 + 4) == "rank 0 F..B"
    both = [[Event("F", 0, 0, 0.0, 4.0), Event("B", 1, 0, 0.0, 4.0)]]
    assert draw_text(both, 7 + 4) == "rank 0 FBFB"
    assert draw_text([[Event("F", 0, 0, 0.0, 1.0)], []], 9) == "rank 0 FF\nrank 1 .."
    for width in (1, 8, 30, 333):
        lines = draw_text(found.events_by_rank, width).splitlines()
        assert len(lines) == 2 and all(len(line) == max(width, 8) for line in lines)


def test_lines_are_json_of_plain_numbers(tmp_path) -> None:
    path = write_events(tmp_path, 0, 1, [Event("F", 0, 2, 1.5, 2.5)])
    assert json.loads(path.read_text()) == {"step": 1, "events": [["F", 0, 2, 1.5, 2.5]]}
