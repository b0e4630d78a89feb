"""True tensor shapes and names of V3, V2-Lite and Moonlight, few layers and experts: gigabytes, so slow."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from r1mega.config.compose import preset

BENCH = Path(__file__).resolve().parents[3] / "tools/bench/convert.py"
MODELS = {
    "deepseek_v3": {"num_layers": 2, "first_k_dense": 1, "num_experts": 4, "num_groups": 2, "topk_groups": 1, "top_k": 2},
    "deepseek_v2_lite": {"num_layers": 2, "num_experts": 6},
    "moonlight_16b": {"num_layers": 2, "num_experts": 6},
}


def bench():
    spec = importlib.util.spec_from_file_location("bench_convert", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_byte_exact_and_streams(tmp_path: Path, name: str) -> None:
    tool, model = bench(), replace(preset("model", name), **MODELS[name])
    tool.make(tmp_path / "hf", model, 2.0)
    largest = max(path.stat().st_size for path in (tmp_path / "hf").iterdir())
    for source, target in (("hf", "native"), ("native", "back")):
        _, peak, result = tool.convert(f"source={tmp_path / source}", f"target={tmp_path / target}")
        assert result["target"] == str(tmp_path / target)
        assert peak < 2 * largest, f"{target}: {peak / largest:.2f} times the largest file"
    shutil.rmtree(tmp_path / "native")
    names = 0
    for file in sorted((tmp_path / "hf").glob("*.safetensors")):
        with safe_open(file, "pt") as ours, safe_open(tmp_path / "back" / file.name, "pt") as theirs:
            assert ours.keys() == theirs.keys()
            for key in ours.keys():  # noqa: SIM118 - no mapping
                left, right = ours.get_tensor(key), theirs.get_tensor(key)
                assert left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8)), key
                names += 1
    assert names == result["tensors"]
    shutil.rmtree(tmp_path / "hf")
    shutil.rmtree(tmp_path / "back")
