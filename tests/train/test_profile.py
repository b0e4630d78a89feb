"""``profile=true``: a trace that tools can open and a table of functions, of some steps alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.train.pretrain import pretrain
from tests.train.cases import pretrain_config


@pytest.mark.parametrize("steps", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_a_traced_run(train_data: Path, tmp_path: Path, steps: int) -> None:
    config = pretrain_config(train_data, tmp_path / "run", steps)
    config.data.valid, config.profile = None, True
    pretrain(config)
    trace = json.loads((tmp_path / "run/profile/rank0.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    traced = min(3, steps - 2)
    assert names.count("Optimizer.step#AdamW.step") == 2 * traced, "dense and expert weights have an optimizer each"
    assert "aten::mm" in (tmp_path / "run/profile/rank0.txt").read_text()


def test_without_it_nothing_is_written(train_data: Path, tmp_path: Path) -> None:
    pretrain(pretrain_config(train_data, tmp_path / "run", 1))
    assert not (tmp_path / "run/profile").exists()
