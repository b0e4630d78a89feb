"""The bends for a machine without Transformer Engine: each works, and each is still needed (in a fresh process, without them)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is there")

ROOT = Path(__file__).resolve().parents[2]
LOOK = """
import importlib, json
attention = importlib.import_module("megatron.core.transformer.multi_latent_attention")
moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
importlib.import_module("megatron.core.models.gpt")
importlib.import_module("megatron.core.optimizer")
names = ("TELinear", "TEColumnParallelLinear")
print(json.dumps({
    "classes": [isinstance(getattr(attention, name, None), type) for name in names],
    "gemm": hasattr(moe_utils, "te_general_gemm"),
}))
"""


def look(*before: str) -> tuple[dict, str]:
    """What a fresh process finds, and what it says on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*before, LOOK])], capture_output=True, text=True, cwd=ROOT, check=True, env={"PATH": ""}
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow  # of use when Megatron-Core's version changes
def test_upstream_still_lacks_the_names_and_still_warns() -> None:
    found, said = look()
    assert found == {"classes": [False, False], "gemm": False}
    assert "Apex is not installed" in said


def test_the_names_are_there_and_nothing_is_said() -> None:
    found, said = look("from r1mega.compat import megatron_plain", "assert megatron_plain.apply() and megatron_plain.apply()")
    assert found == {"classes": [True, True], "gemm": True}
    assert said == ""
