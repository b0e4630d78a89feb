"""The optional build of the C++ library: without torch the package installs and the explicit command says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def checkout(tmp_path) -> Path:
    """setup.py with the sources of the kernels, and an empty package."""
    for name in ("setup.py", "csrc"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    for folder in ("r1mega", "configs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "r1mega" / "__init__.py").touch()
    return tmp_path


def setup(checkout: Path, *arguments: str, torch: bool, **env: str) -> subprocess.CompletedProcess:
    if not torch:
        (checkout / "absent" / "torch").mkdir(parents=True, exist_ok=True)
        (checkout / "absent" / "torch" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
        env["PYTHONPATH"] = str(checkout / "absent")
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, env={**os.environ, "MAX_JOBS": "1", **env})


def test_without_torch_the_package_builds_without_kernels(checkout) -> None:
    done = setup(checkout, "build", torch=False)
    assert done.returncode == 0, done.stderr
    assert not list(checkout.rglob("*.so")) and list(checkout.glob("build/lib*/r1mega/__init__.py"))


def test_without_torch_the_command_says_what_is_missing(checkout) -> None:
    done = setup(checkout, "build_ext", "--inplace", torch=False)
    assert done.returncode == 1 and done.stderr.startswith("build_ext: torch can be imported; got ModuleNotFoundError")


def test_a_compiler_that_fails_fails_the_command_and_not_the_package(checkout) -> None:
    broken = {"CXX": "/bin/false", "CC": "/bin/false", "USE_NINJA": "0"}
    asked = setup(checkout, "build_ext", "--inplace", torch=True, **broken)
    assert asked.returncode != 0
    along = setup(checkout, "build", torch=True, **broken)
    assert along.returncode == 0, along.stderr
    assert not list(checkout.rglob("*.so"))


@pytest.mark.slow
def test_the_command_builds_the_library_of_this_torch_in_place(checkout) -> None:
    import torch

    done = setup(checkout, "build_ext", "--inplace", torch=True)
    assert done.returncode == 0, done.stderr
    (built,) = checkout.glob("r1mega/_C*.so")
    assert built.name == f"_C.torch-{torch.__version__}.so"
    code = f"import torch; torch.ops.load_library({str(built)!r}); print(torch.ops.r1mega.unpermute.default._schema)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.startswith("r1mega::unpermute(Tensor rows"), loaded.stderr
