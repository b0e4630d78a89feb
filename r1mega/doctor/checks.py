"""The list of checks: what each part is for, what is off without it, what adds it. Runs them; prints nothing.

In: requirements of the project, a folder for the disk. Out: one dict a check: ``name``, ``required``, ``state`` ("ok", "missing",
"fault"), ``found`` (a version), ``detail``, ``off`` and ``add`` (both "" where all is well). Imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.doctor.requirements import Requirement, is_checkout, requirements

PYTHONS = ((3, 11), (3, 13))
"""From the first, below the second."""

NEEDED_MEMORY_BYTES = 4 << 30  # make quickstart: two processes of at most 1.6 GiB
NEEDED_DISK_BYTES = 1 << 30  # it leaves a third of that
SHARED_MEMORY_BYTES = 1 << 30
OPEN_FILES = 4096

PARTS = {
    "torch": ("torch_product", "", "every command that runs a model"),
    "megatron-core": ("package", "megatron.core.models.gpt:GPTModel", "every command that runs a model"),
    "hydra-core": ("hydra_grammar", "", "every command but doctor"),
    "omegaconf": ("package", "omegaconf", "every command but doctor"),
    "pyyaml": ("package", "yaml", "every command but doctor"),
    "transformers": ("package", "transformers:DeepseekV3ForCausalLM", "rl, eval, chat and export"),
    "tokenizers": ("package", "tokenizers", "prepare, and every command that reads text"),
    "safetensors": ("package", "safetensors", "export"),
    "numpy": ("package", "numpy", "token files: prepare, pretrain and sft"),
    "reasoning-gym": ("package", "reasoning_gym", "generated problems, which make quickstart is made of"),
    "math-verify": ("math_answer", "", "the accuracy reward: rl and eval"),
    "tensorboard": ("package", "torch.utils.tensorboard:SummaryWriter", "pretrain, sft and rl, which write its files"),
    "tqdm": ("package", "tqdm", "pretrain, sft, rl and eval, which show progress with it"),
    "psutil": ("package", "psutil", "checkpoints, which Megatron-Core writes with it"),
    "fsspec": ("package", "fsspec", "paths that are URLs"),
    "huggingface-hub": ("package", "huggingface_hub", "hf: names of data sets, tokenizers and checkpoints"),
    "pytest": ("package", "pytest", "make test"),
    "pytest-xdist": ("package", "xdist", "make test, which runs in two workers"),
    "setuptools": ("package", "setuptools", "make test"),
    "ruff": ("package", "ruff", "make lint"),
    "pyarrow": ("package", "pyarrow.parquet", "Parquet files of text and problems; JSONL needs nothing"),
    "zstandard": ("package", "zstandard", "files that end in .zst"),
    "transformer-engine": (
        "package",
        "transformer_engine.pytorch",
        "precision=fp8_te on a GPU, whose products it does; precision=fp8 needs none of it",
    ),
    "flash-attn": ("package", "flash_attn", "device.attention=flash_attn; otherwise attention is torch's"),
    "sgl-deep-gemm": ("package", "deep_gemm", "precision=fp8 on a GPU, whose experts' products it does"),
    "sglang": (
        "package",
        "sglang",
        "nothing where .venv-sglang is there (make sglang) or engine.python names another; engine=local needs none",
    ),
    "ray": ("package", "ray", "runtime=ray of rl; with runtime=local processes are started by launch"),
    "wandb": ("package", "wandb", "log.wandb=true: metrics on Weights & Biases"),
}
"""Package to (probe, its argument, what is off without it)."""

EXTRAS = ("transformer-engine", "sgl-deep-gemm", "flash-attn", "sglang", "ray", "wandb", "pyarrow", "zstandard", "fsspec")
"""Optional ones, in the order of the table; the project's own requirements are required instead."""

TITLES = {
    "transformer-engine": "Transformer Engine",
    "sgl-deep-gemm": "DeepGEMM",
    "sglang": "SGLang",
    "ray": "Ray",
}
FUSED_ADAM = "Megatron-Core then takes its fused Adam (GPU only); r1mega is tested with torch's"
PIP = " -m pip install "
NO_ISOLATION = {"transformer-engine", "flash-attn"}
"""Packages that compile against the torch which is there."""


@dataclass(frozen=True)
class Check:
    """One line of the table. ``probe``: its name and arguments; or ``here``: a function of this process that gives a result.

    ``off``: what is off without it; ``add``: the command that adds it; ``note``: said where it works.
    """

    name: str
    required: bool
    off: str
    add: str
    probe: tuple[str, ...] = ()
    here: Callable[[], dict[str, Any]] | None = None
    requirement: Requirement | None = None
    note: str = ""


def checks(folder: Path) -> list[Check]:
    """All of them, the required ones first. ``folder``: whose disk counts."""
    wanted = requirements()
    known = {requirement.name: requirement for requirement in reversed(wanted)}  # the project's own before an extra's
    own = [requirement for requirement in wanted if not requirement.extra and requirement.name != "r1mega"]
    for_tests = [known[name] for name in ("pytest", "pytest-xdist", "setuptools") if name in known and is_checkout()]
    extras = [known.get(name, Requirement(name, name, "")) for name in EXTRAS if name not in {item.name for item in own}]
    return [
        Check("system", True, "everything: only Linux on x86-64 is tested", "use Linux on x86-64", here=_system),
        Check("Python", True, "everything", "make PYTHON=/path/to/python3.12", here=_python),
        *(_package(requirement, required=True) for requirement in own),
        *(_package(requirement, required=True) for requirement in for_tests if requirement not in own),
        Check("cores and memory", True, "make quickstart", "make quickstart PROCESSES=1", here=_memory),
        Check(
            "disk of runs/", True, "every command that writes", "free some space, or give out=FOLDER", here=lambda: _disk(folder)
        ),
        Check("GPU", False, "device=cuda: everything runs on the CPU", _gpu_way(known), ("gpu",)),
        Check(
            "C++ compiler",
            False,
            "the kernels of csrc/ cannot be built: plain torch does their work",
            _system_package("g++", "gcc-c++"),
            ("compiler",),
        ),
        Check("kernels of csrc/", False, "nothing: plain torch does their work, more slowly", _build(), ("kernels",)),
        *(_package(requirement, required=False) for requirement in extras),
        Check(
            "Apex",
            False,
            "nothing: Megatron-Core takes torch's Adam, with which r1mega is tested",
            "build it from NVIDIA's sources; the package that pip calls apex is another one",
            ("package", "apex.optimizers:FusedAdam", "apex"),
            note=FUSED_ADAM,
        ),
        Check(
            "nvcc",
            False,
            "the GPU kernels of csrc/ cannot be built: plain torch does their work; DeepGEMM needs it too",
            "install the CUDA toolkit",
            ("tool", "nvcc"),
        ),
        Check("ninja", False, "a build of csrc/ compiles every file each time", _pip("ninja"), ("tool", "ninja")),
        Check("git", False, "the commit in a run's record", _system_package("git", "git"), ("tool", "git")),
        *([_package(known["ruff"], required=False)] if "ruff" in known and is_checkout() else []),
        Check("/dev/shm", False, "NCCL between the GPUs of one machine", "docker run --shm-size=8g", here=_shared_memory),
        Check("open files", False, "many ranks on one machine", f"ulimit -n {OPEN_FILES * 16}", here=_open_files),
    ]


def examine(check: Check, timeout_seconds: float, running: set[int] | None = None) -> dict[str, Any]:
    """The result of one check, as the module's doc string has it. ``running``: see :func:`run_probe`."""
    result = check.here() if check.here else run_probe(check.probe, timeout_seconds, running)
    if result["state"] == "ok" and check.requirement and not check.requirement.admits(str(result["found"])):
        result |= {"state": "fault", "detail": f"r1mega needs {check.requirement.text}"}
    if result["state"] == "ok" and check.note:
        result["detail"] = "; ".join(filter(None, [result["detail"], check.note]))
    well = result["state"] == "ok"
    ways = {"off": "" if well else check.off, "add": "" if well else check.add}
    return {"name": check.name, "required": check.required, **result, **ways}


def examine_all(found: Sequence[Check], timeout_seconds: float) -> Iterator[dict[str, Any]]:
    """Results in order, each as soon as it and those before it are there. Nothing runs on when the caller stops, or at Ctrl-C."""
    running: set[int] = set()
    with ThreadPoolExecutor(max_workers=min(8, len(os.sched_getaffinity(0)))) as pool:
        results = [pool.submit(examine, check, timeout_seconds, running) for check in found]
        try:
            yield from (result.result() for result in results)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(result.done() for result in results):  # again: a probe may just be starting
                for group in tuple(running):
                    _kill(group)
                time.sleep(0.02)


def run_probe(probe: Sequence[str], timeout_seconds: float, running: set[int] | None = None) -> dict[str, Any]:
    """What :mod:`r1mega.doctor.probes` finds, in a process group of its own that is killed at its limit.

    ``running``: holds the group's id as long as it is there.
    """
    parent = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.append({parent!r}); from r1mega.doctor.probes import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, *probe],  # -P: a folder of the user's named like a package is not that package
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    running = set() if running is None else running
    running.add(process.pid)
    try:
        out, complaint = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return _fault(f"no answer in {timeout_seconds:g} s")
    finally:
        _kill(process.pid)  # itself where it hangs, and whatever it started
        process.wait()
        running.discard(process.pid)
    try:
        return json.loads(out)
    except ValueError:
        code = process.returncode
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        last = next(filter(str.strip, reversed(complaint.decode("utf-8", "replace").splitlines())), "").strip()
        return _fault(f"{how}{': ' + last[:120] if last else ''}")


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _package(requirement: Requirement, *, required: bool) -> Check:
    module = requirement.name.replace("-", "_")
    probe, target, off = PARTS.get(requirement.name, ("package", module, "see pyproject.toml"))
    arguments = (probe, target, requirement.name) if probe == "package" else (probe, target) if target else (probe,)
    note = FUSED_ADAM if requirement.name == "transformer-engine" else ""
    name = TITLES.get(requirement.name, requirement.name)
    return Check(name, required, off, _pip(requirement.text), arguments, requirement=requirement, note=note)


def _pip(text: str) -> str:
    python, here = sys.executable, os.getcwd() + os.sep
    shown = python.removeprefix(here) if python.startswith(here) else python
    isolation = "--no-build-isolation " if re.split(r"[\[<>=!]", text)[0] in NO_ISOLATION else ""
    return f"{shlex.quote(shown)}{PIP}{isolation}{shlex.quote(text)}"


def _build() -> str:
    if not is_checkout():
        return "pip install --no-build-isolation of a checkout"
    return f"{shlex.quote(sys.executable)} setup.py build_ext --inplace"


def _gpu_way(known: dict[str, Requirement]) -> str:
    if Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists():
        text = known["torch"].text if "torch" in known else "torch"
        return f"{_pip(text)} --force-reinstall, of a CUDA build that fits the driver"
    return "a machine with an NVIDIA GPU and its driver"


def _system_package(debian: str, fedora: str) -> str:
    return f"dnf install {fedora}" if shutil.which("dnf") and not shutil.which("apt-get") else f"apt-get install {debian}"


def _ok(found: str, detail: str = "") -> dict[str, Any]:
    return {"state": "ok", "found": found, "detail": detail}


def _fault(detail: str, found: str = "") -> dict[str, Any]:
    return {"state": "fault", "found": found, "detail": detail}


def _system() -> dict[str, Any]:
    found = f"{platform.system()} {platform.machine()}"
    return _ok(found, platform.release()) if found == "Linux x86_64" else _fault("another system than r1mega is tested on", found)


def _python() -> dict[str, Any]:
    low, high = PYTHONS
    is_right = low <= sys.version_info[:2] < high
    found = platform.python_version()
    return _ok(found, sys.executable) if is_right else _fault(f"r1mega needs 3.{low[1]} to 3.{high[1] - 1}", found)


def _memory() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    found = f"{len(os.sched_getaffinity(0))} cores, {memory / 2**30:.1f} GiB"
    if memory < NEEDED_MEMORY_BYTES:
        return _fault(f"make quickstart with two processes takes {NEEDED_MEMORY_BYTES >> 30} GiB", found)
    return _ok(found)


def _disk(folder: Path) -> dict[str, Any]:
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / 2**30:.1f} GiB free"
    if not os.access(folder, os.W_OK):
        return _fault(f"{folder} cannot be written", found)
    if free < NEEDED_DISK_BYTES:
        return _fault(f"make quickstart wants {NEEDED_DISK_BYTES >> 30} GiB", found)
    return _ok(found, str(folder))


def _shared_memory() -> dict[str, Any]:
    if not Path("/dev/shm").is_dir():
        return {"state": "missing", "found": "", "detail": ""}
    size = shutil.disk_usage("/dev/shm").total
    found = f"{size / 2**30:.1f} GiB"
    return _ok(found) if size >= SHARED_MEMORY_BYTES else _fault(f"less than {SHARED_MEMORY_BYTES >> 30} GiB", found)


def _open_files() -> dict[str, Any]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if soft == resource.RLIM_INFINITY else f"{soft} a process"
    is_enough = soft == resource.RLIM_INFINITY or soft >= OPEN_FILES
    return _ok(found) if is_enough else _fault(f"fewer than {OPEN_FILES}", found)
