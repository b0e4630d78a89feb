"""What each check really does. Runs in a process of its own: a package that hangs, crashes or prints takes nothing else along.

In: ``python -c ... PROBE ARGUMENT ...``. Out: one JSON object on standard output: ``state`` ("ok", "missing", "fault"), ``found``
(a version) and ``detail`` (a line); all that a package prints goes to standard error. The top imports the standard library alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

LONGEST_DETAIL = 200

PROGRAM = """\
#include <iostream>
#include <optional>
#include <vector>
int main() { std::vector<int> numbers{20, 22}; std::optional<int> sum = numbers[0] + numbers[1];
  std::cout << *sum << std::endl; return 0; }
"""


class Missing(Exception):
    """It is not there, which is no fault."""


Result = dict[str, object]


def package(target: str, distribution: str) -> Result:
    """Import ``module`` or ``module:name``."""
    name, _, attribute = target.partition(":")
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if version or (error.name or "").partition(".")[0] != name.partition(".")[0]:
            raise
        raise Missing from error
    if attribute:
        getattr(module, attribute)
    return {"found": version or str(getattr(module, "__version__", "")) or "of unknown version"}


def hydra_grammar() -> Result:
    """Hydra's grammar needs one version of its parser's run time."""
    result = package("hydra.core.override_parser.overrides_parser", "hydra-core")
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if OverridesParser.create().parse_override("a=[1,2]").value() != [1, 2]:
        raise RuntimeError("a=[1,2] is not read as a list")
    return result


def math_answer() -> Result:
    """Its LaTeX grammar needs the same run time."""
    result = package("math_verify", "math-verify")
    from math_verify import parse, verify

    if not verify(parse(r"$\frac{1}{2}$"), parse("$0.5$")):
        raise RuntimeError("one half does not equal 0.5")
    return result


def torch_product() -> Result:
    """A product of two matrices on the CPU."""
    result = package("torch", "torch")
    import torch

    if not torch.equal(torch.ones(64, 64) @ torch.ones(64, 64), torch.full((64, 64), 64.0)):
        raise RuntimeError("a product of 64 x 64 ones is wrong")
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    return {**result, "found": torch.__version__, "detail": f"{build}; a matrix product is right"}


def gpu() -> Result:
    """Of every GPU name, capability and memory; on the first one a bf16 product and an all-reduce through NCCL."""
    driver = _driver()
    here = bool(driver) or Path("/dev/nvidiactl").exists()
    try:
        import torch
    except ImportError as error:
        raise (RuntimeError(f"driver {driver}; torch does not import: {_line(error)}") if here else Missing()) from error
    if not torch.cuda.is_available():
        if not here:
            raise Missing
        build = "sees no GPU" if torch.version.cuda else f"{torch.__version__} is a CPU build"
        raise RuntimeError(f"driver {driver or 'found'}; torch {build}")
    ones = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
    if not torch.equal(ones @ ones, torch.full_like(ones, 256.0)):
        raise RuntimeError("a bf16 product of 256 x 256 ones is wrong")
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    shown = [
        f"{device.name}, capability {device.major}.{device.minor}, {device.total_memory / 2**30:.0f} GiB" for device in devices
    ]
    kinds = [f"{shown.count(kind)} x {kind}" for kind in dict.fromkeys(shown)]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("nccl", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
        torch.distributed.all_reduce(ones)
        torch.cuda.synchronize()
        torch.distributed.destroy_process_group()
    detail = f"{'; '.join(kinds)}; NCCL {nccl}; a bf16 product is right"
    return {"found": f"driver {driver or 'unknown'}", "detail": detail, "devices": shown}


def _driver() -> str:
    """The NVIDIA driver's version, "" without one."""
    text = ""
    if Path("/proc/driver/nvidia/version").is_file():
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    elif shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found.group() if found else ""


def compiler() -> Result:
    """Compile five lines of C++17 and run them."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = named or next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])
    if not found:
        raise Missing
    version = _said([*found, "--version"])
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "program.cpp", Path(folder) / "program"
        source.write_text(PROGRAM)
        _said([*found, "-std=c++17", "-O1", str(source), "-o", str(program)])
        if _said([str(program)]).strip() != "42":
            raise RuntimeError("a compiled program gives a wrong sum")
    return {"found": f"{Path(found[0]).name} {_version(version)}", "detail": "compiles C++17 and runs it"}


def kernels() -> Result:
    """The library of csrc/: is it there, of this torch, of this source, and has it kernels for the GPU that is here?"""
    import torch

    from r1mega.ops import build, library

    path = library.library_path()
    if not path.is_file():
        if found := build.others(path):
            raise RuntimeError(f"built for torch {', '.join(found)}, this is {torch.__version__}")
        raise Missing
    if torch.cuda.is_available():
        torch.cuda.init()  # the GPU's architecture counts too
    if not library.load():
        raise RuntimeError(f"{path.name} cannot be loaded")
    held, ops = build.read_build(path), f"{len(library.all_ops())} ops"
    if held is None:
        return {"found": torch.__version__, "detail": f"{ops}; says nothing of its build"}
    return {"found": held.torch, "detail": f"{ops}; {str(held).partition(', ')[2]}"}


def tool(name: str) -> Result:
    """A program that says its version."""
    if not shutil.which(name):
        raise Missing
    return {"found": _version(_said([name, "--version"])), "detail": shutil.which(name)}


def _said(line: list[str]) -> str:
    """Standard output of a program. Raises RuntimeError with its first complaint."""
    done = subprocess.run(line, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        complaint = next(filter(str.strip, (done.stderr + done.stdout).splitlines()), "")
        raise RuntimeError(f"{Path(line[0]).name} ends with status {done.returncode}: {complaint.strip()}")
    return done.stdout


def _version(text: str) -> str:
    release = re.search(r"release (\d+(\.\d+)+)", text)  # nvcc
    found = release and release.group(1) or next(iter(re.findall(r"\b\d+(?:\.\d+)+\b", text)), "")
    return found or "of unknown version"


def _line(error: BaseException) -> str:
    text = next(filter(str.strip, str(error).splitlines()), "").strip()
    return f"{type(error).__name__}: {text}"[:LONGEST_DETAIL]


PROBES: dict[str, Callable[..., Result]] = {
    probe.__name__: probe for probe in (package, hydra_grammar, math_answer, torch_product, gpu, compiler, kernels, tool)
}


def main() -> None:
    """Run the probe that the arguments name and leave at once, without whatever the package wants to do at the end."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    name, *arguments = sys.argv[1:]
    try:
        result = {"state": "ok", "detail": "", **PROBES[name](*arguments)}
    except Missing:
        result = {"state": "missing", "found": "", "detail": ""}
    except BaseException as error:  # noqa: BLE001 - whatever a package does when it is imported is the finding
        result = {"state": "fault", "found": "", "detail": _line(error)}
    answer.write(json.dumps(result))
    answer.flush()
    os._exit(0)
