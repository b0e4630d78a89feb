"""tools/bench/loss.py: means over windows, the page, what is refused; slow: two precisions trained to its end."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.train.cases import write_data

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("loss_tool", ROOT / "tools" / "bench" / "loss.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def test_means_are_over_whole_windows() -> None:
    assert tool.means([1.0, 2.0, 3.0, 6.0], 2) == [1.5, 2.5, 4.5] and tool.means([1.0], 2) == []


def test_the_page_has_both_curves_and_their_difference() -> None:
    losses = {"bf16": [3.0, 2.0, 1.0], "fp8": [3.0, 2.1, 1.0]}
    page = tool.page(losses, {"fp8": [0.02, 0.016]}, {"window": 2})
    assert page.count("<svg") >= 2 and "Difference to bf16" in page and "fp8" in page


def test_another_key_is_refused(capsys) -> None:
    assert tool.main(["speed=3"]) == 2
    assert "loss: key=value of device" in capsys.readouterr().err


@pytest.mark.slow
def test_a_missing_token_file_is_one_line(tmp_path: Path, capfd) -> None:
    given = [f"tokens={tmp_path / 'none'}", f"out={tmp_path}", "steps=2", "length=32", "precisions=fp32,bf16"]
    assert tool.main(given) == 2
    told = capfd.readouterr().err
    assert "none.json: a token file is NAME.json" in told and "Traceback" not in told


@pytest.mark.slow
def test_two_precisions_are_trained_and_compared(tmp_path: Path, capsys) -> None:
    data, out = write_data(tmp_path), tmp_path / "out"
    common = [f"tokens={data / 'text'}", f"out={out}", "steps=6", "window=3", "length=32", "batch=2", "micro=2", "limit=0.05"]
    assert tool.main([*common, "precisions=fp32,bf16"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = json.loads((out / "loss.json").read_text())
    assert 0 < told["worst_difference"]["bf16"] < 0.05 and len(kept["losses"]["fp32"]) == 6
    assert (out / "loss.html").is_file()
    assert tool.main([*common, "precisions=fp32,bf16", "limit=1e-9"]) == 1


@pytest.mark.slow
def test_all_begin_from_the_same_warm_weights(tmp_path: Path, capsys) -> None:
    data, out = write_data(tmp_path), tmp_path / "out"
    common = [f"tokens={data / 'text'}", "steps=3", "window=1", "length=32", "batch=2", "micro=2", "limit=1"]
    assert tool.main([*common, f"out={out}", "warm=3", "precisions=fp32,fp32+seed=7,bf16"]) == 0
    kept = json.loads((out / "loss.json").read_text())["losses"]
    assert kept["fp32"] == kept["fp32+seed=7"] and kept["fp32"] != kept["bf16"]
    assert abs(kept["bf16"][0] - kept["fp32"][0]) < 0.05 * kept["fp32"][0]
