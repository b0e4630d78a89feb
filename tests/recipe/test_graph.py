from pathlib import Path

import pytest

from r1mega.config.errors import UserError
from r1mega.recipe.graph import Stage, fill, plan, read_stages


def names(stages):
    return [stage.name for stage in stages]


A, B = Stage("a", "prepare"), Stage("b", "pretrain", ("a",))
C, D = Stage("c", "eval", ("b",)), Stage("d", "sft", ("b",))


def test_order_follows_needs_and_then_the_file():
    assert names(plan([D, C, B, A])) == ["a", "b", "d", "c"]
    assert names(plan([A, B, C, D])) == ["a", "b", "c", "d"]


def test_a_report_comes_last():
    assert names(plan([Stage("page", "report"), A, B])) == ["a", "b", "page"]


def test_only_takes_what_it_needs():
    assert names(plan([A, B, C, D], ["d"])) == ["a", "b", "d"]


@pytest.mark.parametrize(
    ("stages", "only", "says"),
    [
        ([A, Stage("b", "sft", ("aa",))], [], r"recipe.stages.b.needs: no such stage; got 'aa'; .*use one of a, b"),
        ([Stage("pretrain", "pretrain"), Stage("b", "sft", ("pretrian",))], [], "did you mean pretrain?"),
        ([A, B], ["bb"], r"only: no such stage; got 'bb'; did you mean b\? use one of a, b"),
        ([Stage("x", "sft", ("y",)), Stage("y", "sft", ("x",)), A], [], "got x -> y -> x;"),
        ([Stage("x", "sft", ("x",))], [], "got x -> x;"),
        ([Stage("w", "sft", ("x",)), Stage("x", "sft", ("a", "y")), Stage("y", "sft", ("x",)), A], [], "got x -> y -> x;"),
        ([A, A], [], "recipe.stages.a: names differ"),
    ],
)
def test_wrong_graphs_are_named(stages, only, says):
    with pytest.raises(UserError, match=says):
        plan(stages, only)


def test_placeholders_are_filled_and_hydra_braces_stay():
    overrides = ("init={a}/checkpoints", "data.train={{a}/text: 1.0}", "x=${out}/y", "seed={seed}", "keep={recipe}/k")
    filled = fill(Stage("b", "sft", ("a",), overrides), Path("runs/q"), 5)
    assert filled == [
        "init=runs/q/stages/a/checkpoints",
        "data.train={runs/q/stages/a/text: 1.0}",
        "x=${out}/y",
        "seed=5",
        "keep=runs/q/k",
    ]


def test_a_placeholder_of_a_stage_that_is_not_needed_is_refused():
    with pytest.raises(UserError, match=r"got \{c\}; .*add c to needs"):
        fill(Stage("b", "sft", ("a",), ("init={c}",)), Path("runs/q"), 5)


def test_reads_the_yaml_form():
    section = {
        "description": "two",
        "stages": {
            "a": {"command": "prepare"},
            "e": {"command": "export", "needs": ["a"], "overrides": ["x=1"], "copy_to": "export"},
        },
    }
    assert read_stages(section) == ("two", [Stage("a", "prepare"), Stage("e", "export", ("a",), ("x=1",), "export")])


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (None, "recipe: a recipe has stages"),
        ({"stages": {}}, "recipe: a recipe has stages"),
        ({"stagse": {}, "stages": {"a": {"command": "prepare"}}}, "recipe.stagse: unknown key"),
        ({"stages": {"a": {"comand": "prepare"}}}, "did you mean command?"),
        ({"stages": {"a": {"command": "pretrian"}}}, "did you mean pretrain?"),
        ({"stages": {"a": {"command": "chat"}}}, "recipe.stages.a.command"),
        ({"stages": {"a": "prepare"}}, "recipe.stages.a: a stage is a section"),
        ({"stages": {"a/b": {"command": "prepare"}}}, "a stage's name is a folder"),
        ({"stages": {"seed": {"command": "prepare"}}}, "no placeholder"),
        ({"stages": {"a": {"command": "prepare", "needs": "b"}}}, "recipe.stages.a.needs: a list of text"),
        ({"stages": {"a": {"command": "prepare", "overrides": [1]}}}, "recipe.stages.a.overrides: a list of text"),
        ({"stages": {"a": {"command": "prepare", "copy_to": "../x"}}}, "recipe.stages.a.copy_to"),
    ],
)
def test_wrong_sections_are_named(section, says):
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        read_stages(section)
