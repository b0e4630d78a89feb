"""``r1mega compare``: what it says of runs that differ in one thing, of runs that recorded less, and of wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from r1mega import api, provenance
from r1mega.cli import main
from r1mega.config.compose import compose
from r1mega.config.data import CompareConfig
from r1mega.config.errors import UserError
from r1mega.report.compare import compare, tables_of
from r1mega.report.differences import NOT_RECORDED, Table, names_of, pairs_of
from r1mega.report.readers import read_run
from tests.report.conftest import write_lines, write_recipe

CONFIG = {"name": "x", "out": "runs/x", "seed": 1, "optim": {"lr": 1e-3, "beta": 0.9}, "trainer": {"steps": 3}, "data": {"a": 1}}
START = {
    "time": "2026-01-01T00:00:00+00:00",
    "command_line": "r1mega pretrain",
    "ranks": 1,
    "code": {"version": "0.1.0", "source": "a" * 64, "commit": "b" * 40, "dirty": False, "own": {}},
    "machine": {"processor": "P", "cores": 2, "gpus": []},
    "packages": {"torch": "2.13.0"},
    "variables": {},
    "inputs": {
        "data.train": {"d/text": {"kind": "files", "sha256": "1" * 64, "how": "whole", "bytes": 10, "files": {".bin": "1"}}}
    },
}


def changed(value: dict, path: str, new) -> dict:
    """A copy of ``value`` with ``new`` at the slash-separated ``path``."""
    copy = json.loads(json.dumps(value))
    *parents, last = path.split("|")
    here = copy
    for name in parents:
        here = here[name]
    here[last] = new
    return copy


def make(
    folder: Path, *, config=CONFIG, starts=(START,), losses=(3.0, 2.0, 1.0), overrides=("optim.lr=1e-3",), command="pretrain"
) -> Path:
    folder.mkdir(parents=True)
    body = {"command": command, "overrides": list(overrides), "choices": {"optim": "v3"}, "config": config}
    (folder / "config.yaml").write_text(json.dumps(body), encoding="utf-8")
    if starts:
        (folder / "environment.json").write_text(json.dumps({"starts": list(starts)}), encoding="utf-8")
    lines = [{"step": step, "lm_loss": loss, "step_seconds": id(folder) % 7 + step} for step, loss in enumerate(losses, 1)]
    write_lines(folder / "metrics.jsonl", lines)
    return folder


def tables(*folders: Path) -> dict[str, Table]:
    runs = [read_run(folder) for folder in folders]
    return {table.title: table for table in tables_of(runs, pairs_of(runs))}


def rows(table: Table) -> dict[str, tuple]:
    return {row.what: (*row.values, row.note) for row in table.rows}


def test_equal_runs_differ_in_nothing(tmp_path) -> None:
    found = tables(make(tmp_path / "a"), make(tmp_path / "b"))
    for title in ("Config", "Data", "Code", "Environment"):
        assert found[title].rows == (), title
    assert found["Config"].says == "Keys the same: 5." and found["Data"].says == "Inputs the same: 1."
    assert rows(found["Agreement"]) == {"metric lines": ("-", "all 3 common lines", "")}
    assert rows(found["Results"])["Loss (nats per token)"] == ("1", "1 (=)", "")


def test_config_keys_and_where_they_came_from(tmp_path) -> None:
    config = changed(changed(CONFIG, "optim|beta", 0.95), "trainer|steps", 4)
    config["new"] = {"knob": True}
    config["out"], config["data"] = "runs/y", {"a": "runs/y/z"}
    first = changed(CONFIG, "data|a", "runs/x/z")
    overrides = ("optim.lr=1e-3", "trainer.steps=4")
    found = rows(tables(make(tmp_path / "a", config=first), make(tmp_path / "b", config=config, overrides=overrides))["Config"])
    assert found == {
        "optim.beta": ("0.9", "0.95", "optim=v3 | optim=v3"),
        "trainer.steps": ("3", "4", "default | given"),
        "new.knob": ("-", "true", "not a key of all"),
    }
    config = changed(CONFIG, "trainer|steps", 9)
    found = rows(tables(make(tmp_path / "c"), make(tmp_path / "d", config=config))["Config"])
    assert found == {"trainer.steps": ("3", "9", "given by none: another default")}


def test_data_by_content_and_by_path(tmp_path) -> None:
    key = "inputs|data.train|d/text"
    other = changed(changed(START, f"{key}|sha256", "2" * 64), f"{key}|files", {".bin": "2"})
    found = rows(tables(make(tmp_path / "a"), make(tmp_path / "b", starts=[other]))["Data"])
    (row,) = found.values()
    assert row[0].startswith("d/text [111") and row[1].startswith("d/text [222") and row[2] == "other content, files .bin"
    moved = changed(START, "inputs|data.train", {"elsewhere": START["inputs"]["data.train"]["d/text"]})
    assert rows(tables(tmp_path / "a", make(tmp_path / "c", starts=[moved]))["Data"]) == {
        "data.train": ("d/text", "elsewhere", "same content, other path")
    }
    more = changed(START, "inputs|data.train|d/more", {"kind": "no local file"})
    assert rows(tables(tmp_path / "a", make(tmp_path / "d", starts=[more]))["Data"]) == {
        "data.train": ("-", "d/more [no local file]", "not in all")
    }
    sampled = changed(START, f"{key}|how", "sampled")
    assert "Of those 1 were compared by samples." in tables(tmp_path / "a", make(tmp_path / "e", starts=[sampled]))["Data"].says


def test_a_checkpoint_as_input_is_told_by_its_tensors(tmp_path) -> None:
    def start(tensors: str, manifest: str) -> dict:
        record = {"kind": "checkpoint", "name": "step-1", "sha256": manifest, "weights": {"weights/a.distcp": tensors}}
        return changed(START, "inputs", {"init": {"base": record}})

    make(tmp_path / "a", starts=[start("1" * 64, "m")])
    assert tables(tmp_path / "a", make(tmp_path / "b", starts=[start("1" * 64, "other")]))["Data"].rows == ()
    (row,) = tables(tmp_path / "a", make(tmp_path / "c", starts=[start("2" * 64, "m")]))["Data"].rows
    assert row.note == "other content"


def test_code_and_environment_over_all_starts(tmp_path) -> None:
    later = changed(changed(START, "code|source", "c" * 64), "packages|torch", "2.14.0") | {"time": "2026-01-02"}
    later["variables"] = {"OMP_NUM_THREADS": "4"}
    found = tables(make(tmp_path / "a"), make(tmp_path / "b", starts=[START, later]))
    assert rows(found["Code"]) == {"hash of the sources": ("a" * 12, f"{'a' * 12} → {'c' * 12}", "")}
    assert rows(found["Environment"]) == {
        "package torch": ("2.13.0", "2.13.0 → 2.14.0", ""),
        "$OMP_NUM_THREADS": ("-", "4", ""),
    }
    assert rows(found["Runs"])["started"][1] == "2026-01-01T00:00:00+00:00, 2 start(s)"


def test_older_runs_say_that_they_recorded_nothing(tmp_path) -> None:
    found = tables(make(tmp_path / "a"), make(tmp_path / "b", starts=()))
    assert rows(found["Code"]) == rows(found["Environment"]) == {"environment.json": ("recorded", NOT_RECORDED, "")}
    assert rows(found["Data"]) == {"inputs": ("recorded", NOT_RECORDED, "")}
    found = tables(tmp_path / "b", make(tmp_path / "c", starts=()))
    assert NOT_RECORDED in found["Data"].says and NOT_RECORDED in found["Code"].says and found["Code"].rows == ()
    (tmp_path / "c" / "config.yaml").unlink()
    assert rows(tables(tmp_path / "a", tmp_path / "c")["Config"]) == {"config.yaml": ("recorded", NOT_RECORDED, "")}


def test_where_metric_lines_part(tmp_path) -> None:
    make(tmp_path / "a")
    found = tables(tmp_path / "a", make(tmp_path / "b", losses=(3.0, 2.5)), make(tmp_path / "c"))
    assert rows(found["Agreement"])["metric lines"][1:3] == (
        "1 of 2 common lines, then lm_loss at 2: 2 and 2.5",
        "all 3 common lines",
    )
    assert rows(found["Results"])["Loss (nats per token)"] == ("1", "2.5 (+1.5)", "1 (=)", "")


@pytest.mark.parametrize(
    ("tensors", "step", "degrees", "verdict"),
    [
        ("1", 3, {"data": 1}, "bit-equal"),
        ("2", 3, {"data": 1}, "not bit-equal"),
        ("2", 4, {"data": 1}, "another step"),
        ("2", 3, {"data": 2}, "cannot be told: other ranks"),
    ],
)
def test_final_weights(tensors, step, degrees, verdict, tmp_path) -> None:
    for name, (one, at, ranks) in {"a": ("1", 3, {"data": 1}), "b": (tensors, step, degrees)}.items():
        place = make(tmp_path / name) / "checkpoints" / f"step-{at:08d}"
        place.mkdir(parents=True)
        files = {"weights/__0_0.distcp": {"sha256": one}, "weights/.metadata": {"sha256": name}, "state.json": {"sha256": name}}
        (place / "manifest.json").write_text(json.dumps({"files": files}), encoding="utf-8")
        (place / "state.json").write_text(json.dumps({"step": at, "degrees": ranks}), encoding="utf-8")
    (row,) = tables(tmp_path / "a", tmp_path / "b")["Final checkpoints"].rows
    assert row.values[0] == "step-00000003" and row.values[1].startswith(f"step-{step:08d}, {verdict}")


def test_different_commands_are_compared_in_what_both_have(tmp_path) -> None:
    config = {"name": "y", "seed": 2, "rl": {"rollouts": 3}}
    found = tables(make(tmp_path / "a"), make(tmp_path / "b", config=config, command="rl"))
    assert rows(found["Config"]) == {"seed": ("1", "2", "given by none: another default")}
    assert rows(found["Runs"])["command"] == ("pretrain", "rl", "different commands: only what both have is compared")


def test_recipes_stage_by_stage(tmp_path) -> None:
    first, second = write_recipe(tmp_path / "a", seed=7), write_recipe(tmp_path / "b", seed=8)
    found = tables(first, second)
    assert rows(found["Config"]) == {
        "recipe: config.yaml": (NOT_RECORDED, NOT_RECORDED, ""),
        "prepare and 14 stages more: seed": ("7", "8", "given by none: another default"),
    }
    results = rows(found["Results"])
    assert (
        results["grpo_1: pass@1 (% of problems)"][:2] == ("68.3 ± 1.2", "68.3 ± 1.2 (=)")
        and "pretrain: Loss (nats per token)" in results
    )
    assert not any(name.startswith("eval_grpo_1") for name in results)
    assert rows(found["Code"])["commit"] == (NOT_RECORDED, NOT_RECORDED, "")
    single = make(tmp_path / "single")
    assert [pair.name for pair in pairs_of([read_run(first), read_run(single)]) if None not in pair.stages] == ["pretrain"]


def test_names_tell_the_runs_apart(tmp_path) -> None:
    runs = [read_run(make(tmp_path / part / "run")) for part in ("one", "two")]
    assert names_of(runs) == ["one/run", "two/run"]


def test_terminal_and_page_say_it_with_one_legend_entry_a_run(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    make(tmp_path / "one", losses=(3.0, float("nan"), 1.0))
    make(tmp_path / "two<b>", config=changed(CONFIG, "seed", 5))
    with (tmp_path / "two<b>" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step skipped", "step": 2, "reason": "spike"}\n')
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "run=one", 'run="two<b>"', "out=c"]) == 0
    shown = capsys.readouterr().out
    assert "CONFIG" in shown and max(map(len, shown.splitlines())) <= 140
    assert re.search(r"^seed +1 +5 +given", shown, re.MULTILINE)
    page = (tmp_path / "c" / "compare.html").read_text(encoding="utf-8")
    assert "<b>" not in page and "two&lt;b&gt;" in page and "step skipped</li>" in page and "//" not in page
    assert page.count('role="img"') == 2  # loss, step_seconds


@pytest.mark.parametrize("arguments", [["run=a", "run=b"], ["run=[a,b]"], ["run=a", "run=[b]"], ["run=[a]", "seed=3", "run=b"]])
def test_a_repeated_key_and_a_list_are_the_same(arguments) -> None:
    config = compose("compare", arguments)
    assert config.run == ["a", "b"] and config.target == "runs/compare/compare.html"


def test_other_commands_keep_hydras_last_value() -> None:
    assert compose("report", ["run=a", "run=b"]).run == "b"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "run: a value is needed"),
        (["run=one"], "run: two runs or more; got one; give run=A run=B"),
        (["run=[]"], "run: two runs or more; got none; give run=A run=B"),
        (["run=one", "run=./one"], "run: different runs; got ./one twice; give another folder"),
        (["run=one", "run=ones"], "run: a run's folder; got no such path ones; did you mean one?"),
        (["run=one", "run=bare"], "run: a folder with summary.json, eval.json, or lines in metrics.jsonl; got 'bare' without"),
        (["run=one", "run=x.txt"], "run: a run's folder; got a file x.txt; give its folder"),
    ],
)
def test_wrong_input_is_one_line(arguments, line, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "one")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.yaml").write_text("command: pretrain\n")
    (tmp_path / "x.txt").write_text("")
    assert main(["compare", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(line) and said.err.count("\n") == 1 and said.out == ""
    assert not (tmp_path / "runs").exists()


def test_from_python_too(tmp_path) -> None:
    make(tmp_path / "one")
    make(tmp_path / "two", config=changed(CONFIG, "seed", 5))
    config = CompareConfig(run=[str(tmp_path / "one"), str(tmp_path / "two")], target=str(tmp_path / "page.html"))
    result = api.compare(config)
    assert result["page"] == config.target and result["differences"]["Config"] == 1 and provenance.starts(tmp_path / "one")
    with pytest.raises(UserError, match="^run: two different runs or more; got"):
        compare(CompareConfig(run=[str(tmp_path / "one")] * 2))
