"""The commands from Python: overrides or a ready config in, the function's result out, the config saved by rank 0."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import yaml

from r1mega import api
from r1mega.config.compose import compose, load_config, preset
from r1mega.config.data import ReportConfig
from r1mega.config.errors import UserError
from r1mega.config.rl import ExportConfig, RlConfig
from r1mega.config.schema import SCHEMAS


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Every command returns ("ran", config) in a folder of its own, alone."""
    module = types.ModuleType("r1mega_stub")
    module.act = lambda config: ("ran", config)
    monkeypatch.setitem(sys.modules, "r1mega_stub", module)
    for name, entry in list(api.COMMANDS.items()):
        made = api.Command("r1mega_stub:act", entry.about, entry.all_ranks, entry.saves)
        monkeypatch.setitem(api.COMMANDS, name, made)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "file.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "given" / "manifest.json").write_text("{}")
    (tmp_path / "given" / "state.json").write_text(json.dumps({"model": dataclasses.asdict(preset("model", "tiny"))}))
    return tmp_path


def test_every_command_is_a_function() -> None:
    assert set(api.COMMANDS) == set(SCHEMAS)
    for name in api.COMMANDS:
        assert callable(getattr(api, name)) and getattr(api, name).__doc__


def test_overrides_give_the_functions_result_and_save_the_config(stub) -> None:
    word, config = api.export("checkpoint=given", "name=one", "dtype=bf16")
    assert word == "ran" and config == compose("export", ["checkpoint=given", "name=one", "dtype=bf16"])
    body = yaml.safe_load((stub / "runs" / "one" / "config.yaml").read_text())
    assert body["overrides"] == ["checkpoint=given", "name=one", "dtype=bf16"] and body["choices"] == {
        "device": "cpu",
        "launch": "local",
        "precision": "fp32",
    }


def test_a_ready_config_runs_and_its_defaults_are_resolved(stub) -> None:
    _, config = api.export(ExportConfig(checkpoint="given", name="two"))
    assert (config.out, config.target) == ("runs/two", "runs/two/hf")
    assert load_config(stub / "runs" / "two") == config
    composed = compose("export", ["checkpoint=given"])
    assert api.run("export", composed)[1] == composed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: api.export(ReportConfig(run="given")), "export: a ExportConfig; got ReportConfig"),
        (lambda: api.export(ExportConfig(checkpoint="given", dtype="fp4")), "dtype: one of as_is, bf16, fp32, fp8; got fp4"),
        (lambda: api.export(ExportConfig(checkpoint="given", seed="soon")), "seed: a value of the key's type; got Value 'soon'"),
        (lambda: api.export(ExportConfig()), "checkpoint: a value is needed; got none"),
        (
            lambda: api.export(ExportConfig(checkpoint="given", out="${nam}")),
            "out: a value of the key's type; got Interpolation key",
        ),
        (lambda: api.export("checkpoint=nowhere"), "checkpoint: a checkpoint's folder; got no such path nowhere"),
        (lambda: api.run("exprt", []), "command: no such command; got 'exprt'; did you mean export?"),
        (lambda: api.export(3), "arguments: group=choice or key=value; got 3"),
    ],
)
def test_bad_calls_are_user_errors_and_leave_nothing(stub, call, message) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value).startswith(message)
    assert not (stub / "runs").exists()


def test_a_ready_config_without_choices_is_refused(stub) -> None:
    from r1mega.config.rl import ProblemDataConfig, RolloutConfig

    config = RlConfig(init="given", data=ProblemDataConfig(problems="given/file.jsonl"), rl=RolloutConfig(rollouts=1))
    with pytest.raises(UserError) as caught:
        api.rl(config)
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["advantage", "policy_loss", "engine", "push", "environment"]
    assert lines[0] == "advantage: a choice is needed; got null; give one of dr_grpo, grpo, reinforce++, rloo"


def test_ranks_started_by_others_join_and_only_the_first_one_writes(stub, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    asked = ("checkpoint=given", "data.problems=given/file.jsonl", "name=first")
    assert api.eval(*asked, "launch.processes=2")[0] == "ran"
    assert api.export("checkpoint=given") is None, "rank 0 reads the files"
    assert api.report("run=given") is None
    assert not (stub / "runs").exists()
    monkeypatch.setenv("RANK", "0")
    assert api.report("run=given")[0] == "ran"
    assert api.export("checkpoint=given")[0] == "ran"
    assert api.eval(*asked)[0] == "ran"
    assert sorted(path.parent.name for path in (stub / "runs").rglob("*.yaml")) == ["export", "first"]


def test_report_and_chat_leave_the_runs_config_alone(stub) -> None:
    assert api.report("run=given")[0] == "ran" and api.chat("checkpoint=given")[0] == "ran"
    assert not (stub / "runs").exists()


def test_a_ready_config_does_not_start_ranks(stub) -> None:
    config = compose("export", ["checkpoint=given", "launch.processes=2"])
    with pytest.raises(UserError, match="^launch.processes: 1 for a ready config"):
        api.run("export", config)


def test_every_command_names_a_function_that_exists() -> None:
    """Read, not imported: the functions' rooms are heavy."""
    for name, entry in api.COMMANDS.items():
        module, _, function = entry.target.partition(":")
        path = Path(api.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert function in found, f"{name}: {entry.target}"
