"""The figures of a model card are those of its checkpoint, not of the run's end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.train.convert import card


@pytest.mark.parametrize("unit", ["step", "update"])
def test_figures_are_not_from_after_the_checkpoint(tmp_path: Path, unit: str) -> None:
    lines = [{unit: number, "rollout": number, "reward": number / 10} for number in (1, 2, 3, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| reward | 0.2 |" in card._metrics(tmp_path, {"step": 2})
    assert "| reward | 0.5 |" in card._metrics(tmp_path, {"step": 9})
    assert card._metrics(tmp_path, {"step": 0}) == ""
