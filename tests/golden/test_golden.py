"""Losses and gradient norms of three tiny configs, to the last bit: what changes them is meant, and written down."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("golden", ROOT / "tools" / "golden.py")
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


def test_every_config_has_its_file() -> None:
    assert sorted(golden.CONFIGS) == sorted(path.stem for path in Path(__file__).parent.glob("*.json")) and len(golden.CONFIGS) >= 3


@pytest.mark.parametrize("name", golden.CONFIGS)
def test_the_same_bits(name: str, place: Path) -> None:
    wanted = json.loads((golden.FOLDER / f"{name}.json").read_text())
    if wanted["torch"] != torch.__version__.partition("+")[0]:
        assert "R1MEGA_CI" not in os.environ, "CI compares: write the golden losses anew for this torch, tools/golden.py --write"
        pytest.skip(f"the golden losses are of torch {wanted['torch']}")
    assert golden.difference(wanted, golden.measure(name, place)) == ""
    losses = [float.fromhex(text) for text in wanted["loss"]]
    assert len(losses) == golden.STEPS and losses[-1] < losses[0] - 0.5, "a run that learns"


def test_one_bit_is_a_difference() -> None:
    wanted = {"torch": "2", "loss": [(1.0).hex(), (0.5).hex()], "grad_norm": [(2.0).hex(), (1.0).hex()]}
    assert golden.difference(wanted, wanted) == ""
    assert "loss of step 2" in golden.difference(wanted, {**wanted, "loss": [wanted["loss"][0], "0x1.0000000000001p-1"]})
    assert "install that one" in golden.difference(wanted, {**wanted, "torch": "3"})
