"""The metric file: lines after the last checkpoint and half lines are dropped, other ranks write nothing. Its copy on W&B."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import pytest

from r1mega.config.compose import compose
from r1mega.config.errors import UserError
from r1mega.config.run import LogConfig
from r1mega.config.train import PretrainConfig, TokenDataConfig
from r1mega.train.metrics import Metrics


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = Metrics(tmp_path, "step", 6, 0, active=True)
    for step in (1, 2, 3, 4):
        first.log({"step": step, "loss": step / 3, "expert_load": [[0.25, 1 / 3]]})
    first.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {
        "step": 1,
        "loss": 0.333333,
        "expert_load": [[0.25, 0.333333]],
    }
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 1.0}\n{"step": 2, "lo')
    again = Metrics(tmp_path, "step", 6, 2, active=True)
    assert steps(tmp_path) == [1, 2]
    again.log({"step": 3, "loss": 0.5})
    again.close()
    assert steps(tmp_path) == [1, 2, 3]
    assert list((tmp_path / "tensorboard").iterdir())


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    quiet = Metrics(tmp_path, "step", 3, 0, active=False)
    quiet.log({"step": 1})
    quiet.advance()
    quiet.close()
    assert not list(tmp_path.iterdir())


class FakeWandb(types.ModuleType):
    """Records what would go to W&B; ``fails``: names of calls that raise."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.fails = [], set()

    def _note(self, name, value) -> None:
        if name in self.fails:
            raise ConnectionError(f"{name}: no network\nsecond line")
        self.calls.append((name, value))

    def init(self, **options):
        self._note("init", options)
        return self

    def define_metric(self, name, **options) -> None:
        self._note("define_metric", (name, options))

    def log(self, values) -> None:
        self._note("log", values)

    def finish(self) -> None:
        self._note("finish", None)

    def values(self, name: str) -> list:
        return [value for kind, value in self.calls if kind == name]


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def config(**log):
    return PretrainConfig(name="mine", data=TokenDataConfig(train={"x": 1.0}), log=LogConfig(wandb=True, **log))


def test_wandb_gets_the_lines_the_config_and_the_same_run_again(wandb, tmp_path) -> None:
    folder = tmp_path / "quickstart" / "stages" / "mine"
    folder.mkdir(parents=True)
    first = Metrics(folder, "step", 6, 0, active=True, config=config(project="p"))
    first.log({"step": 1, "loss": 0.5, "expert_load": [[1.0]]})
    first.event("step skipped", 2, "spike")
    first.close()
    (options,) = wandb.values("init")
    assert (options["project"], options["name"], options["group"], options["dir"]) == ("p", "mine", "quickstart", str(folder))
    assert options["config"]["data"]["train"] == {"x": 1.0} and options["resume"] == "allow"
    assert wandb.values("log") == [{"step": 1, "loss": 0.5}, {"event": "step skipped", "step": 2, "reason": "spike"}]
    assert wandb.values("define_metric") == [("*", {"step_metric": "step"})] and wandb.values("finish") == [None]
    Metrics(folder, "step", 6, 1, active=True, config=config()).close()
    assert [one["id"] for one in wandb.values("init")] == [options["id"]] * 2 and len(options["id"]) >= 8
    Metrics(tmp_path, "step", 6, 0, active=True, config=config()).close()
    assert wandb.values("init")[2]["id"] != options["id"] and wandb.values("init")[2]["group"] is None


def test_without_the_wish_or_on_other_ranks_wandb_is_left_alone(wandb, tmp_path) -> None:
    Metrics(tmp_path, "step", 6, 0, active=True).close()
    Metrics(tmp_path, "step", 6, 0, active=True, config=PretrainConfig()).close()
    Metrics(tmp_path, "step", 6, 0, active=False, config=config()).close()
    assert wandb.calls == []


def test_a_network_that_fails_in_the_middle_is_told_once_and_the_lines_go_on(wandb, tmp_path, capsys) -> None:
    metrics = Metrics(tmp_path, "step", 6, 0, active=True, config=config())
    wandb.fails = {"log", "finish"}
    for step in (1, 2, 3):
        metrics.log({"step": step, "loss": 1.0})
    metrics.close()
    told = "log.wandb: ConnectionError log: no network; the training goes on without W&B\n"
    assert capsys.readouterr().err.count(told) == 1 and steps(tmp_path) == [1, 2, 3]
    wandb.fails = {"init"}
    again = Metrics(tmp_path, "step", 6, 3, active=True, config=config())  # a run that goes on does so without W&B too
    again.log({"step": 4, "loss": 1.0})
    again.close()
    assert "log.wandb: ConnectionError init: no network" in capsys.readouterr().err and steps(tmp_path) == [1, 2, 3, 4]


def test_a_first_start_that_fails_is_one_line_before_training(wandb, tmp_path) -> None:
    wandb.fails = {"init"}
    with pytest.raises(UserError) as caught:
        Metrics(tmp_path, "step", 6, 0, active=True, config=config())
    assert str(caught.value) == (
        "log.wandb: W&B starts; got ConnectionError init: no network; use wandb login, WANDB_MODE=offline or log.wandb=false"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_absent_package_is_one_line_that_names_the_extra_even_beside_a_folder_of_that_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(UserError) as caught:
        compose("pretrain", ["log.wandb=true", "data.train={x: 1}", "data.sequence_length=64", "trainer.steps=3000"])
    assert str(caught.value) == (
        "log.wandb: the package wandb is installed; got no such package; use log.wandb=false, or pip install 'r1mega[wandb]'"
    )
