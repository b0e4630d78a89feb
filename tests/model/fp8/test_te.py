"""precision=fp8_te: its cases in a process with Transformer Engine (on a GPU) and in one with a stand-in (on a CPU); it is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega import device
from r1mega.config.errors import UserError
from r1mega.model.fp8 import te

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
THERE = importlib.util.find_spec("transformer_engine") is not None


def run_cases(where: str, *paths: str) -> None:
    """In a process of its own: Megatron decides at its import whether Transformer Engine is there, and keeps one mesh."""
    path = os.pathsep.join([*paths, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", str(HERE / "engine_cases.py")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "ENGINE_DEVICE": where},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


@pytest.mark.slow
@pytest.mark.skipif(THERE, reason="Transformer Engine is there")
def test_the_adapter_keeps_its_promises_with_a_stand_in() -> None:
    run_cases("cpu", str(HERE / "stand_in"))


@pytest.mark.gpu
@pytest.mark.skipif(not THERE, reason="no Transformer Engine: pip install --no-build-isolation 'r1mega[te]'")
def test_the_adapter_keeps_its_promises_with_transformer_engine() -> None:
    run_cases("cuda")


@pytest.mark.skipif(THERE, reason="Transformer Engine is there")
def test_a_missing_package_is_told_in_one_line_with_the_ways_out() -> None:
    te.require.cache_clear()
    with pytest.raises(UserError) as told:
        te.require()
    assert str(told.value) == (
        "precision.products: te takes products from Transformer Engine; got ModuleNotFoundError: No module named 'transformer_engine'; "
        "pip install --no-build-isolation 'r1mega[te]', or use precision=bf16, or precision=fp8 on a Hopper GPU"
    )


@pytest.mark.parametrize("chip", ["8.0", "8.9"])
def test_an_older_chip_is_named(monkeypatch, chip: str) -> None:
    te.require.cache_clear()
    monkeypatch.setattr(device, "gpu_capability", lambda: chip)
    with pytest.raises(UserError, match=f"compute capability 9.0 and above; got {chip}; use precision=bf16"):
        te.require()
