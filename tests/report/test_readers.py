import json

import pytest

from r1mega.config.errors import UserError
from r1mega.report.readers import StageRun, read_metrics, read_run


def test_a_half_last_line_is_left_out_and_a_broken_one_inside_is_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n\n{"step": 3, "loss": 1.0}\n{"step": 4, "los', encoding="utf-8")
    lines, events, bad = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 3] and bad == 1 and events == ()


def test_of_a_step_written_twice_the_last_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [(1, 3.0), (2, 2.0), (3, 9.0), (2, 2.5), (3, 1.5)]
    path.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in rows), encoding="utf-8")
    lines, _, bad = read_metrics(path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 3.0), (2, 2.5), (3, 1.5)] and bad == 0


def test_events_are_no_lines_and_lie_where_the_lines_lie(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 3, "loss": 1.0},
        {"event": "step skipped", "step": 3, "reason": "spike"},
        {"event": "rollback"},
        {"event": "x", "step": "?"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines, events, bad = read_metrics(path)
    assert lines == (rows[0],) and events == ((3.0, rows[1]), (0.0, rows[2]), (0.0, rows[3])) and bad == 0
    rows = [{"rollout": 1, "update": 4}, {"rollout": 3, "update": 12}, *({"event": "e", "rollout": number} for number in (3, 2))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [place for place, _ in read_metrics(path)[1]] == [12.0, 8.0]


def test_values_that_are_not_finite_are_counted(tmp_path):
    metrics = ({"step": 1, "x": float("nan"), "y": 1.0}, {"step": 2, "x": float("inf"), "y": float("-inf")}, {"step": 3, "x": 2})
    assert StageRun("a", "sft", tmp_path, metrics=metrics).not_finite() == {"x": 2, "y": 1}


def test_points_skip_what_is_no_finite_number(tmp_path):
    metrics = ({"step": 1, "x": 2}, {"step": 2, "x": float("nan")}, {"step": 3}, {"step": 4, "x": None}, {"step": 5, "x": 3.0})
    stage = StageRun("a", "sft", tmp_path, metrics=metrics)
    assert stage.points("x", 10.0) == [(1.0, 20.0), (5.0, 30.0)]
    assert stage.total("x") == 5.0 and stage.loads() == []


def test_loads_want_one_length_a_row(tmp_path):
    metrics = (
        {"step": 1, "expert_load": [[0.5, 0.5], [1.0]]},
        {"step": 2, "expert_load": [[0.25, 0.75]]},
        {"step": 3, "expert_load": 4},
    )
    assert StageRun("a", "sft", tmp_path, metrics=metrics).loads() == [(2.0, [[0.25, 0.75]])]


def test_recipe_run_in_order_with_controls_and_figures(recipe_folder):
    run = read_run(recipe_folder)
    assert (run.name, run.kind, run.seed, run.seconds) == ("quickstart", "recipe", 7, 1247.3)
    assert [stage.name for stage in run.stages][:3] == ["prepare", "pretrain", "eval_pretrain"]
    assert [stage.name for stage in run.evaluated()] == ["pretrain", "cold_start", "grpo_1", "control", "sft_2", "grpo_2"]
    assert [stage.name for stage in run.stages if stage.is_control and stage.is_rl] == ["control"]
    before, after = run.before_and_after()
    assert (before.name, after.name) == ("cold_start", "grpo_2")
    assert after.figures["pass_at_1"] == 0.702 and len(after.tested["examples"]) == 5


def test_a_recipe_that_still_runs(recipe_folder):
    home = recipe_folder / "stages" / "grpo_3"
    home.mkdir()
    (home / "metrics.jsonl").write_text('{"update": 1, "reward": 0.5}\n{"upd', encoding="utf-8")
    last = read_run(recipe_folder).stages[-1]
    assert (last.name, last.command, last.seconds, len(last.metrics)) == ("grpo_3", "rl", None, 1)


def test_a_report_is_no_stage_of_the_page(recipe_folder):
    (recipe_folder / "stages" / "page").mkdir()
    stages = "{recipe: {stages: {page: {command: report}}}}"
    (recipe_folder / "config.yaml").write_text(f"command: recipe\nconfig: {stages}\n", encoding="utf-8")
    assert "page" not in [stage.name for stage in read_run(recipe_folder).stages]


def test_single_runs(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "metrics.jsonl").write_text('{"step": 1, "tokens": 10}\n{"step": 2, "tokens": 20}\n', encoding="utf-8")
    (tmp_path / "t" / "config.yaml").write_text("command: sft\nchoices: {}\nconfig:\n  seed: 3\n", encoding="utf-8")
    run = read_run(tmp_path / "t")
    assert (run.kind, run.seed, run.stages[0].tokens, run.before_and_after()) == ("training", 3, 20.0, None)
    assert run.stages[0].command == "sft"
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "eval.json").write_text('{"pass_at_1": 0.5, "seconds": 2.0}', encoding="utf-8")
    run = read_run(tmp_path / "e")
    assert (run.kind, run.stages[0].figures, run.seconds) == ("evaluation", {"pass_at_1": 0.5}, 2.0)


@pytest.mark.parametrize(
    "content", [None, {}, {"metrics.jsonl": ""}, {"metrics.jsonl": "{half"}, {"eval.json": "[1, 2"}, {"summary.json": "{"}]
)
def test_nothing_to_show_is_an_error(tmp_path, content):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"^run: .+; got .+; .+$"):
        read_run(folder)
