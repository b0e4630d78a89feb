"""What stands in for packages that a CPU lacks: can be imported, fails where it is used, and gives way to the real one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1mega.compat import sglang_cpu

CODE = """
import sys
import torchvision, torchvision.transforms.v2.functional as functional
from IPython.display import HTML
from torchvision.transforms import InterpolationMode
import importlib.util
kept = InterpolationMode.BICUBIC
class Mine(functional.Something): pass
assert importlib.util.find_spec("xgrammar") and torchvision.__version__ == "0.0.0"
assert importlib.util.find_spec("no_such_package") is None
import soundfile
print(soundfile.__file__ if hasattr(soundfile, "__file__") and soundfile.__file__ else "stand-in")
for used in (HTML, kept, Mine):
    try:
        used("x")
    except RuntimeError as error:
        print(str(error).partition(":")[0])
"""


def run(code: str, *folders: Path) -> list[str]:
    path = os.pathsep.join(map(str, [*folders, sglang_cpu.STAND_INS]))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )


def test_absent_packages_can_be_named_and_end_what_calls_them(tmp_path: Path) -> None:
    said = run(CODE)
    assert said[:4] == ["stand-in", "IPython.display.HTML", "torchvision.transforms.InterpolationMode.BICUBIC", "__main__.Mine"]
    (tmp_path / "soundfile.py").write_text("")
    assert run(CODE, tmp_path)[0] == str(tmp_path / "soundfile.py"), "a real package wins"


STUBS = {
    "_triton_stub.py": "import sys, types\ndef install():\n    sys.modules['triton'] = types.ModuleType('triton', 'up to 0.5.17')\n",
    "_platform_stubs.py": """import sys, types
def install_platform_stubs():
    if sys.platform != "darwin":
        return
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        sys.modules["triton"] = types.ModuleType("triton", "from 0.5.18 on")
    raise RuntimeError("what is MPS's is not for us")
""",
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="triton itself is here")
@pytest.mark.parametrize(("name", "said"), [("_triton_stub.py", "up to 0.5.17"), ("_platform_stubs.py", "from 0.5.18 on")])
def test_tritons_stand_in_is_sglangs(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/__init__.py").write_text("")
    (tmp_path / "sglang" / name).write_text(STUBS[name])
    assert run("import triton; print(triton.__doc__)", tmp_path)[0] == said


def test_the_one_function_that_is_used_writes_slots_row_by_row() -> None:
    source = (sglang_cpu.STAND_INS / "sitecustomize.py").read_text()
    space: dict = {}
    exec(re.search(r"(?m)^def assign_req_to_token_pool_cpu\(.*?(?=^\S)", source, re.S | re.M)[0], space)
    table_RS = torch.zeros(4, 6, dtype=torch.int32)
    rows, starts, ends = torch.tensor([2, 0]), torch.tensor([1, 3]), torch.tensor([3, 6])
    space["assign_req_to_token_pool_cpu"](rows, table_RS, starts, ends, torch.tensor([9, 8, 7, 6, 5]), 6)
    expected = torch.zeros(4, 6, dtype=torch.int32)
    expected[2, 1:3], expected[0, 3:6] = torch.tensor([9, 8], dtype=torch.int32), torch.tensor([7, 6, 5], dtype=torch.int32)
    assert torch.equal(table_RS, expected)


def test_the_list_is_pinned_and_holds_no_torch() -> None:
    lines = (Path(sglang_cpu.__file__).parent / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert "sglang==0.5.16" in wanted and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in wanted)
    assert not [line for line in wanted if line.startswith("torch==")], "torch is TORCH's of the Makefile"


@pytest.mark.parametrize("name", ["sgl_kernel", "torchvision", "xgrammar"])
def test_the_server_still_needs_it(name: str) -> None:
    """Remove the stand-in when this fails: SGLang no longer imports the package, or it is among what is installed."""
    site = Path(__file__).parents[2] / ".venv-sglang/lib"
    found = list(site.glob("python3*/site-packages"))
    if not found:
        pytest.skip("no .venv-sglang: make sglang")
    assert not (found[0] / name).exists()
    files = {
        "sgl_kernel": "mem_cache/allocation.py",
        "torchvision": "utils/common.py",
        "xgrammar": "entrypoints/openai/protocol.py",
    }
    assert re.search(rf"(?m)^ *(from|import) {name}\b", (found[0] / "sglang/srt" / files[name]).read_text())
