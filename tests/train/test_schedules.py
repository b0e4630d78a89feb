"""Pipeline schedules as lists: every one can run and keeps its memory; what they refuse; the check sees what is wrong."""

from __future__ import annotations

import importlib
import random
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from r1mega import registry
from r1mega.cli import main
from r1mega.config.errors import UserError
from r1mega.train.pipeline.schedule import (
    MICROBATCHES_TRIED,
    Action,
    check,
    check_pipeline,
    peak_activations,
    rank_of_stage,
)
from r1mega.train.pipeline.simulate import Times, simulate

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "custom_pipeline"
NAMES = sorted(registry.choices("pipeline"))
SPLIT = [name for name in NAMES if name != "none"]


def build(name: str, num_ranks: int, **knobs):
    return registry.lookup("pipeline", name)(**knobs).build(num_ranks)


def text(actions) -> str:
    return " ".join(map(str, actions))


@dataclass(frozen=True)
class Given:
    """A pipeline of given lists."""

    placement: tuple
    lists: tuple

    def actions(self, num_microbatches: int):
        return self.lists

    def build(self, num_ranks: int):
        return self


def given(*lists: str, placement=None) -> Given:
    """``F0.1``: F of stage 0 on microbatch 1."""
    parts = [re.findall(r"([A-Z])(\d+)\.(\d+)", line) for line in lists]
    actions = tuple(tuple(Action(work, int(stage), int(microbatch)) for work, stage, microbatch in line) for line in parts)
    return Given(placement or tuple((rank,) for rank in range(len(lists))), actions)


@pytest.mark.parametrize("name", NAMES)
def test_the_contract(name) -> None:
    check_pipeline(registry.lookup("pipeline", name)())


@pytest.mark.parametrize("chunks", [3, 4])
def test_interleaved_with_more_chunks(chunks) -> None:
    check_pipeline(registry.lookup("pipeline", "interleaved")(chunks=chunks))
    pipeline = build("interleaved", 4, chunks=chunks)
    assert pipeline.placement[1] == tuple(range(1, 4 * chunks, 4)), "dealt out in turn"


@pytest.mark.parametrize("name", SPLIT)
def test_many_microbatches_on_many_ranks(name) -> None:
    check(build(name, 16), 64)
    check(build(name, 8), 256)


def test_the_names_are_those_of_the_issue() -> None:
    assert NAMES == ["1f1b", "dualpipev", "interleaved", "none", "zb1p"]


def test_lists_by_hand() -> None:
    assert [text(line) for line in build("none", 1).actions(2)] == ["F0.0 B0.0 F0.1 B0.1"]
    assert build("1f1b", 1).actions(5) == build("none", 1).actions(5)
    assert [text(line) for line in build("1f1b", 2).actions(3)] == [
        "F0.0 F0.1 B0.0 F0.2 B0.1 B0.2",
        "F1.0 B1.0 F1.1 B1.1 F1.2 B1.2",
    ]
    assert [text(line) for line in build("zb1p", 2).actions(3)] == [
        "F0.0 F0.1 I0.0 W0.0 F0.2 I0.1 W0.1 I0.2 W0.2",
        "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2",
    ]
    assert [text(line) for line in build("interleaved", 2).actions(2)] == [
        "F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1",
        "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1",
    ]
    assert [text(line) for line in build("dualpipev", 2).actions(4)] == [
        "F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 F0.3 B3.1 F3.2 B0.0 B3.2 F3.3 B0.1 B3.3 I0.2 W0.2 I0.3 W0.3",
        "F1.0 F2.0 F1.1 F2.1 F1.2 B2.0 F2.2 B1.0 F1.3 B2.1 F2.3 B1.1 B2.2 B1.2 I2.3 I1.3 W2.3 W1.3",
    ]


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_peak_activations(num_ranks) -> None:
    m, ranks = 4 * num_ranks, range(num_ranks)
    assert peak_activations(build("1f1b", num_ranks), m) == tuple(num_ranks - rank for rank in ranks)
    assert peak_activations(build("zb1p", num_ranks), m) == (num_ranks,) * num_ranks, "no rank more than 1F1B's first"
    assert peak_activations(build("dualpipev", num_ranks), m) == (2 * num_ranks + 1,) * num_ranks, "of half a rank's layers each"
    # Megatron's: chunks - 1 rounds of the ranks, two for each later rank, and the one at work.
    assert peak_activations(build("interleaved", num_ranks), m) == tuple(
        num_ranks + 2 * (num_ranks - 1 - rank) + 1 for rank in ranks
    )
    for name in SPLIT:
        few = 2 * num_ranks
        assert max(peak_activations(build(name, num_ranks), few)) <= few * len(build(name, num_ranks).placement[0])


def test_overlapping_pairs_are_a_forward_and_a_backward_of_the_other_stage() -> None:
    for num_ranks in range(1, 9):
        pipeline, m = build("dualpipev", num_ranks), 3 * num_ranks
        for rank, actions in enumerate(pipeline.actions(m)):
            pairs = [(one, other) for one, other in pairwise(actions) if one.overlaps]
            assert all(
                (one.work, other.work) == ("F", "B") and one.stage + other.stage == 2 * num_ranks - 1 for one, other in pairs
            )
            assert all(one.microbatch != other.microbatch for one, other in pairs)
            # All but the forwards that fill the pipeline, and on the last rank the one that leads to the first backward.
            filling = 2 * (num_ranks - 1 - rank) + 2 * (rank + 1) + (num_ranks - 1 - rank) + (rank == num_ranks - 1)
            assert len(pairs) == 2 * m - filling
    assert not any(
        action.overlaps for name in SPLIT if name != "dualpipev" for line in build(name, 4).actions(8) for action in line
    )


def test_dualpipev_splits_as_few_backwards_as_fill_the_tail() -> None:
    for num_ranks in range(1, 9):
        for rank, actions in enumerate(build("dualpipev", num_ranks).actions(4 * num_ranks)):
            works = [action.work for action in actions]
            assert works.count("I") == works.count("W") == 2 * (num_ranks - 1 - rank) + rank + 1
            assert works[-(rank + 1) :] == ["W"] * (rank + 1), "nothing is left to wait for"


@pytest.mark.parametrize(
    "name, num_ranks, num_microbatches, message",
    [
        (
            "none",
            4,
            1,
            "pipeline: one rank with pipeline=none, which cuts the model into no stages; got 4 ranks; use pipeline=1f1b, or one rank (parallel.pipeline=1; ranks=1 of r1mega timeline)",
        ),
        (
            "interleaved",
            4,
            6,
            "microbatches: a multiple of the 4 pipeline ranks with pipeline=interleaved; got 6; use microbatches=4 or 8",
        ),
        (
            "interleaved",
            4,
            3,
            "microbatches: a multiple of the 4 pipeline ranks with pipeline=interleaved; got 3; use microbatches=4",
        ),
        (
            "dualpipev",
            4,
            7,
            "microbatches: at least 2 for each of the 4 pipeline ranks with pipeline=dualpipev; got 7; use microbatches=8",
        ),
        ("1f1b", 4, 0, "microbatches: at least 1; got 0; use microbatches=1"),
        ("zb1p", 1, -1, "microbatches: at least 1; got -1; use microbatches=1"),
    ],
)
def test_refusals_name_the_rule_and_the_nearest_number(name, num_ranks, num_microbatches, message) -> None:
    with pytest.raises(UserError) as caught:
        build(name, num_ranks).actions(num_microbatches)
    assert str(caught.value) == message
    for near in re.findall(r"\d+", message.partition("use microbatches=")[2]):
        check(build(name, num_ranks), int(near))


def test_what_is_refused_is_what_the_rule_says() -> None:
    for num_ranks in range(1, 9):
        for m in MICROBATCHES_TRIED:
            for name, fits in (
                ("1f1b", True),
                ("zb1p", True),
                ("interleaved", m % num_ranks == 0),
                ("dualpipev", m >= 2 * num_ranks),
            ):
                try:
                    build(name, num_ranks).actions(m)
                    assert fits, (name, num_ranks, m)
                except UserError:
                    assert not fits, (name, num_ranks, m)


@pytest.mark.parametrize(
    "pipeline, message",
    [
        (given("F0.0 B0.0", "F0.0 B0.0", placement=((0,), (0,))), "placement: every stage on one rank"),
        (given("F0.0 B0.0 F1.0 B1.0 F2.0 B2.0", "", placement=((0, 1), (2,))), "placement: every stage on one rank, as many"),
        (given("F0.0 B0.0", placement=((0,), (1,))), "actions: a list a rank; got 1 for 2 ranks"),
        (given("F0.0 B0.0 B0.0"), "actions: F and B, or F, I and W, once; got ['B', 'B', 'F'] for stage 0, microbatch 0 on rank 0"),
        (given("F0.0 I0.0"), "got ['F', 'I'] for stage 0"),
        (given("F0.0 B0.0 F0.1 B0.1"), "actions: a rank works on its own stages and the step's microbatches; got F0.1 on rank 0"),
        (given("F0.0 B1.0", "F1.0 B0.0"), "got B1.0 on rank 0"),
        (given("F0.0 W0.0 I0.0"), "actions: all ranks reach their end; got ranks that wait for each other: rank 0 at W0.0"),
        (given("B0.0 F0.0"), "rank 0 at B0.0"),
        (given("F0.0 B0.0", "B1.0 F1.0"), "rank 0 at B0.0, rank 1 at B1.0"),
        (given("F2.0 F0.0 B2.0 B0.0", "F1.0 F3.0 B3.0 B1.0", placement=((0, 2), (1, 3))), "rank 0 at F2.0, rank 1 at F1.0"),
    ],
)
def test_the_check_sees_what_is_wrong(pipeline, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(pipeline, 1)


def test_the_check_sees_an_overlap_with_nothing() -> None:
    good = given("F0.0 B0.0")
    check(good, 1)
    for place in (0, 1):
        actions = [replace(action, overlaps=index == place) for index, action in enumerate(good.lists[0])]
        if place == 0:
            check(Given(good.placement, (tuple(actions),)), 1)
        else:
            with pytest.raises(ValueError, match="an F overlaps with the B after it; got B0.0, then None on rank 0"):
                check(Given(good.placement, (tuple(actions),)), 1)


def fault(judge, *arguments) -> str:
    try:
        judge(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def test_the_check_and_the_simulator_agree_on_what_can_run() -> None:
    """For hundreds of lists in which two actions have changed places."""
    rng, stuck = random.Random(0), 0
    for _ in range(400):
        num_ranks = rng.randint(2, 4)
        m, pipeline = 3 * num_ranks, build(rng.choice(SPLIT), num_ranks)
        lists = [[replace(action, overlaps=False) for action in line] for line in pipeline.actions(m)]
        line = rng.choice(lists)
        one, other = rng.sample(range(len(line)), 2)
        line[one], line[other] = line[other], line[one]
        broken = Given(pipeline.placement, tuple(map(tuple, lists)))
        said = [fault(check, broken, m), fault(simulate, broken, m, Times(1.0, 1.0, 1.0))]
        assert said[0] == said[1] and (not said[0] or "wait for each other" in said[0])
        stuck += bool(said[0])
    assert 100 < stuck < 400


def test_the_contract_rejects_wrong_choices() -> None:
    class Fickle(Given):
        """Other lists the second time."""

        turn = [0]

        def actions(self, num_microbatches):
            self.turn[0] += 1
            return self.lists[: self.turn[0]]

    one = given("F0.0 B0.0")
    check_pipeline(one, ranks=[1], microbatches=[1])
    with pytest.raises(ValueError, match="^actions: the same for the same number"):
        check_pipeline(Fickle(one.placement, one.lists * 2), ranks=[1], microbatches=[1])
    with pytest.raises(ValueError, match="^placement: a tuple of stages a rank; got 1 for 2 ranks"):
        check_pipeline(one, ranks=[2], microbatches=[1])
    with pytest.raises(ValueError, match="got \\[\\] for stage 0, microbatch 1"):
        check_pipeline(one, ranks=[1])

    class Never:
        """Refuses everything."""

        def build(self, num_ranks):
            raise UserError("no")

    with pytest.raises(ValueError, match="^build: every schedule works on one rank"):
        check_pipeline(Never())
    with pytest.raises(ValueError, match="^actions: some number of microbatches is served; got none of \\[1, 2\\] on 4 ranks"):
        check_pipeline(registry.lookup("pipeline", "dualpipev")(), ranks=[4], microbatches=[1, 2])


def test_the_example_is_a_schedule_from_outside(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    module = importlib.import_module("gpipe")
    check_pipeline(module.GPipe())
    pipeline = module.GPipe().build(4)
    assert peak_activations(pipeline, 8) == (8,) * 4, "what 1F1B is better at"
    found = simulate(pipeline, 8, Times(1.0, 1.0, 1.0))
    assert found.bubble_share == pytest.approx(simulate(build("1f1b", 4), 8, Times(1.0, 1.0, 1.0)).bubble_share)
    assert rank_of_stage(pipeline.placement) == {0: 0, 1: 1, 2: 2, 3: 3}

    words = ["timeline", "pipeline=gpipe.GPipe", "ranks=4", "microbatches=8", f"out={tmp_path}"]
    assert main(words) == 0
    assert "gpipe.GPipe, simulated, 4 ranks, 8 microbatches" in capsys.readouterr().out
    assert main([*words, "pipeline.most=4"]) == 2
    assert capsys.readouterr().err.startswith("microbatches: at most pipeline.most 4 with GPipe; got 8; use pipeline.most=8")

    source = (EXAMPLE / "gpipe.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 150
    assert source.partition("\n\n")[2].strip() in (EXAMPLE / "README.md").read_text(encoding="utf-8"), "the README shows the file"
