"""The metric file: lines after the last checkpoint and half lines are dropped, other ranks write nothing."""

from __future__ import annotations

import json
from pathlib import Path

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
