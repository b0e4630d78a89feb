"""Where a run comes from: ``environment.json`` in its folder, one entry a start. Imports no torch.

Owns what identifies code (version, commit, hash of the sources), machine, packages, variables and input files. In: a command's
config. Out: JSON. It ends no run: what cannot be read stands there as ``{"unreadable": why}``. It keeps no secret and no user's or
host's name: variables are chosen by name, and a name that sounds like a secret is left out.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from r1mega import __version__

FILE_NAME = "environment.json"
MOST_STARTS = 50
"""Starts kept, the newest ones."""

WRITTEN = ("out", "target", "keep")
"""Path fields that a command writes; their content is no input."""

WHOLE_BYTES = 64 << 20
"""An input of at most this size, all files together, is hashed whole."""

SAMPLES, SAMPLE_BYTES = 256, 64 << 10
"""Of a larger one: this many blocks, spread evenly over its files, and every file's name and size."""

MOST_FILES = 20_000
LISTED_FILES = 16
META_BYTES = 64 << 10

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "hydra-core",
    "omegaconf",
    "reasoning-gym",
    "math-verify",
    "ray",
    "sglang",
    "vllm",
    "deepspeed",
    "wandb",
)
VARIABLES = re.compile(
    r"(OMP|MKL|OPENBLAS|KMP|GOMP|CUDA|CUBLAS|CUDNN|NCCL|GLOO|UCX|TORCH|PYTORCH|TORCHINDUCTOR|TRITON|NVTE|MEGATRON|R1MEGA)_\w+"
    r"|PYTHONHASHSEED|LD_PRELOAD|HF_HUB_OFFLINE|WANDB_MODE"
)
SECRETS = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
GIT_SECONDS, SMI_SECONDS = 2.0, 3.0


def record(config: Any, folder: str | Path, command: str, arguments: Iterable[str] | None) -> None:
    """Add this start to ``folder/environment.json``. ``arguments``: overrides as typed; None: a ready config came from Python.

    A file that cannot be written is told on stderr, and the run goes on.
    """
    path = Path(folder) / FILE_NAME
    body = {"starts": [*starts(folder), describe(config, command, arguments)][-MOST_STARTS:]}
    aside = path.with_name(f"{FILE_NAME}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        print(f"{path}: not written ({error.strerror}); the run goes on", file=sys.stderr)


def starts(folder: str | Path) -> list[dict[str, Any]]:
    """The recorded starts of the run in ``folder``, the oldest first; empty where the file is absent or damaged."""
    try:
        found = json.loads((Path(folder) / FILE_NAME).read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []


def describe(config: Any, command: str, arguments: Iterable[str] | None) -> dict[str, Any]:
    """One start: time, command line, ranks, code, machine, packages, variables, inputs."""
    line = f"api.{command}({type(config).__name__})" if arguments is None else shlex.join(["r1mega", command, *arguments])
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "command_line": line,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "code": {**code(), "own": _told(lambda: own_modules(config))},
        "machine": _told(machine),
        "packages": versions(),
        "variables": variables(os.environ),
        "inputs": _told(lambda: inputs(config)),
    }


def _told(action: Callable[[], Any]) -> Any:
    """What ``action`` gives, or why it could not: a record of the surroundings must not end a run, whatever they are."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001
        return {"unreadable": f"{type(error).__name__}: {error}"[:200]}


def code() -> dict[str, Any]:
    """``version``, ``source`` (:func:`source_hash`), ``commit`` and ``dirty`` (None outside a git checkout of r1mega)."""
    root = Path(__file__).resolve().parent.parent
    commit, dirty = _git(root) if (root / ".git").exists() else (None, None)
    return {"version": __version__, "source": _told(source_hash), "commit": commit, "dirty": dirty}


def _git(root: Path) -> tuple[str | None, bool | None]:
    """The commit of the checkout at ``root``, and whether the package's files differ from it."""
    line = ["git", "--no-optional-locks", "-C", str(root), "status", "--porcelain=v2", "--branch", "--", "r1mega", "configs"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None, None
    rows = done.stdout.splitlines()
    commit = next((row.removeprefix("# branch.oid ") for row in rows if row.startswith("# branch.oid ")), None)
    return commit, any(not row.startswith("#") for row in rows)


def source_hash() -> str:
    """sha256 over names and contents of the package's Python files and of ``configs``; the same in a checkout and in a wheel."""
    from r1mega.config.compose import config_dir

    package, configs = Path(__file__).resolve().parent, config_dir()
    files = {f"r1mega/{path.relative_to(package).as_posix()}": path for path in package.rglob("*.py")}
    files |= {f"configs/{path.relative_to(configs).as_posix()}": path for path in configs.rglob("*.yaml")}
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{_sha256(files[name])}\0".encode())
    return digest.hexdigest()


def own_modules(config: Any) -> dict[str, str]:
    """Module to sha256 of its file, for every choice (advantage, reward, ...) that comes from outside the package."""
    reward = getattr(config, "reward", None)
    weights = [getattr(reward, "weights", {}), *getattr(reward, "by_source", {}).values()]
    names = {name.rpartition(".")[0] for each in weights for name in each if "." in name}
    names |= {type(getattr(config, field.name)).__module__ for field in dataclasses.fields(config)}
    found = {}
    for name in sorted(names - {"builtins"}):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and name.partition(".")[0] != "r1mega":
            found[name] = _sha256(Path(file))
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that matter, of those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that change how a run computes, by :data:`VARIABLES`; never one that sounds like a secret."""
    return {name: environment[name] for name in sorted(environment) if VARIABLES.fullmatch(name) and not SECRETS.search(name)}


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB, GPUs and their driver, system, Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    driver = re.search(r"\d+\.\d+(\.\d+)?", _text(Path("/proc/driver/nvidia/version")))
    return {
        "processor": _field(_text(Path("/proc/cpuinfo")), "model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "gpus": gpus(),
        **({"driver": driver[0]} if driver else {}),
        "system": f"{platform.system()} {platform.machine()}",
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def gpus() -> list[str]:
    """Names of NVIDIA GPUs, from the driver's files, else from ``nvidia-smi`` within a few seconds."""
    found = [_field(_text(path), "Model") for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    if not any(found) and shutil.which("nvidia-smi"):
        try:
            done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError):
            return []
        found = re.findall(r"^GPU \d+: (.+?) \(UUID", done.stdout, re.MULTILINE)
    return [name for name in found if name]


def _field(text: str, name: str) -> str:
    """The value of the first ``name : value`` line; empty without one."""
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def inputs(config: Any) -> dict[str, dict[str, Any]]:
    """Dotted key to {path: :func:`identity`} for every input that the config names."""
    found: dict[str, dict[str, Any]] = {}
    for key, text in input_paths(config):
        found.setdefault(key, {})[text] = _told(lambda text=text: identity(text))
    return found


def input_paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of all knobs whose unit is a path (``path``, or ``path: ...`` for a dict's keys) but the written ones."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            item, unit = getattr(value, field.name), field.metadata.get("unit", "")
            path = f"{key}.{field.name}" if key else field.name
            if unit.split(":")[0] != "path":
                yield from input_paths(item, path)
            elif field.name not in WRITTEN:
                texts = [item] if isinstance(item, str) else item or []
                yield from ((path, text) for text in texts if isinstance(text, str))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from input_paths(item, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from input_paths(item, f"{key}.{index}")


def parts_of(text: str) -> list[Path]:
    """What a path knob names: a file, a folder, or all files NAME.* (token files are named without suffix); empty: nothing."""
    path = Path(text)
    return [path] if path.exists() else sorted(path.parent.glob(f"{path.name}.*")) if path.name else []


def files_below(folder: Path) -> Iterator[Path]:
    """Files of a folder in a fixed order; hidden ones, byte code and the record of starts left out."""
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(files):
            if not name.startswith(".") and name != FILE_NAME and Path(base, name).is_file():
                yield Path(base, name)


def identity(text: str) -> dict[str, Any]:
    """What stands behind an input path.

    A checkpoint (or the folder of a run that has one): ``kind`` checkpoint, ``sha256`` of its manifest, ``weights`` (see
    :func:`weights_of`), ``step``. Else ``sha256`` over names and contents, ``how`` it was taken (``whole``, or ``sampled`` above
    :data:`WHOLE_BYTES`), ``bytes``, ``files``: hash by name where they are few, ``meta``: a token file's own record. An address, or
    a word such as ``stdlib``: ``kind`` "no local file" alone.
    """
    checkpoint = checkpoint_of(Path(text))
    if checkpoint is not None:
        return {"kind": "checkpoint", **checkpoint}
    found = parts_of(text)
    if not found:
        return {"kind": "no local file"}
    if found[0].is_dir():
        paths = list(itertools.islice(files_below(found[0]), MOST_FILES))
        names = [path.relative_to(found[0]).as_posix() for path in paths]
    else:
        paths, names = found, [path.name.removeprefix(Path(text).name) for path in found]  # the same under another name
    sizes = [path.stat().st_size for path in paths]
    whole = sum(sizes) <= WHOLE_BYTES
    each = max(SAMPLES // max(len(paths), 1), 1)
    every = max(len(paths) // SAMPLES, 1)
    hashes = [
        _sha256(path) if whole else _sampled(path, size, each if index % every == 0 else 0)
        for index, (path, size) in enumerate(zip(paths, sizes, strict=True))
    ]
    together = hashlib.sha256("".join(f"{name}\0{one}\0" for name, one in zip(names, hashes, strict=True)).encode()).hexdigest()
    record = {"kind": "folder" if found[0].is_dir() else "files", "sha256": hashes[0] if names == [""] else together}
    record |= {"how": "whole" if whole else "sampled", "bytes": sum(sizes), "num_files": len(paths)}
    if 1 < len(paths) <= LISTED_FILES:
        record["files"] = dict(zip(names, hashes, strict=True))
    metas = [path for path, name in zip(paths, names, strict=True) if name == ".json" and path.stat().st_size <= META_BYTES]
    return record | ({"meta": json.loads(metas[0].read_text(encoding="utf-8"))} if metas else {})


def checkpoint_of(path: Path) -> dict[str, Any] | None:
    """A checkpoint's folder, or the newest one of a run: ``name``, ``step``, ``degrees`` (ranks by axis), ``dtype``, ``sha256`` of
    the manifest, ``weights`` (:func:`weights_of`); None where there is none.
    """
    patterns = ("manifest.json", "step-*/manifest.json", "checkpoints/step-*/manifest.json")
    found = next((manifests[-1] for pattern in patterns if (manifests := sorted(path.glob(pattern)))), None)
    if found is None:
        return None
    text = found.read_bytes()
    state = _told(lambda: json.loads((found.parent / "state.json").read_text(encoding="utf-8")))
    kept = {key: state[key] for key in ("step", "degrees", "dtype") if key in state}
    digest = hashlib.sha256(text).hexdigest()
    return {"name": found.parent.name, **kept, "sha256": digest, "weights": weights_of(json.loads(text))}


def weights_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """File to hash of a manifest's tensors (weights and, in the same files, the optimizer's state).

    Of equal tensors written by ranks in the same layout these files are equal byte for byte; the index beside them is not.
    """
    files = manifest.get("files", {})
    return {name: entry["sha256"] for name, entry in sorted(files.items()) if re.fullmatch(r"weights/[^.].*\.distcp", name)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled(path: Path, size: int, blocks: int) -> str:
    """Hash of a file's size and of ``blocks`` pieces from its first byte to its last."""
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(blocks):
            file.seek(max(size - SAMPLE_BYTES, 0) * index // max(blocks - 1, 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
