"""The bend of Megatron's import: the compiler stays away, and without the bend it still comes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

SAYS = "import sys, torch; real = torch.compile; {}import r1mega.train.trainee; print('torch._dynamo' in sys.modules, torch.compile is real)"
APPLIED = (
    "from r1mega.compat import megatron_jit; megatron_jit.apply(); megatron_jit.apply(); assert 'megatron' not in sys.modules; "
)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is something to compile for")
@pytest.mark.parametrize("first, said", [(APPLIED, "False True"), pytest.param("", "True True", marks=pytest.mark.slow)])
def test_who_imports_the_compiler(first: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", SAYS.format(first)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().splitlines()[-1] == said, done.stderr
