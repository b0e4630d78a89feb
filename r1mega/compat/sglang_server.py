"""How an SGLang server is started on each device: arguments, environment, memory tags, and what its interpreter has. No torch.

SGLang is not imported: a server is a process of another interpreter, which :func:`installed` asks in a process of its own.

| bend | symptom without it | remove when |
|---|---|---|
| without flashinfer: its switch off, Triton for attention and experts, torch for sampling | the import of sglang looks for flashinfer's FP4 and ends; or the first request does | SGLang falls back by itself |
| ``grammar_backend`` none | xgrammar is wanted at the start, though nothing is ever constrained | it is loaded when used |
| ``skip_server_warmup`` | a request with text before the first push, which a server without tokenizer refuses | the warm-up sends token ids |
| HF_HUB_OFFLINE | minutes of retries on a machine without a network: the model is a folder | - |

Versions: sglang 0.5.16, 0.5.23.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from r1mega.compat import sglang_cpu
from r1mega.config.errors import UserError

TAGS = ("kv_cache", "weights", "cuda_graph")
"""What /release_memory_occupation can give back."""
WEIGHTS = "weights"
KEY_VALUES = "kv_cache"

COMMON = {"grammar_backend": "none", "skip_server_warmup": True, "skip_tokenizer_init": True, "host": "127.0.0.1"}
PADDED = {"intermediate_size": "model.ffn_size", "moe_intermediate_size": "model.moe_ffn_size"}
"""Widths that a server on a CPU pads, as config.json and as the config calls them."""
PADDING = 32
CPU_SIZES = {"mem_fraction_static": 0.3, "max_total_tokens": 65536, "max_running_requests": 32}
PLAIN_GPU = {"attention_backend": "triton", "sampling_backend": "pytorch", "moe_runner_backend": "triton"}

QUESTION = """
import ast, importlib.metadata as metadata, importlib.util, json
from pathlib import Path
found = importlib.util.find_spec("sglang")
known = []
folder = Path(found.submodule_search_locations[0], "srt") if found else None
for file in [folder / "server_args.py", *sorted(folder.glob("arg_groups/fields/*.py"))] if folder else ():
    for node in ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else ():
        if isinstance(node, ast.ClassDef) and (node.name == "ServerArgs" or file.parent.name == "fields"):
            known += [one.target.id for one in node.body if isinstance(one, ast.AnnAssign)]
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
print(json.dumps({"sglang": version("sglang") or (found and "?"), "flashinfer": version("flashinfer-python"), "arguments": known or None}))
"""


def installed(python: str, timeout_seconds: float = 60) -> dict[str, Any]:
    """``sglang`` and ``flashinfer``: versions of that interpreter, None without; ``arguments``: names of server arguments, None
    where they cannot be read. SGLang is found, not imported. Raises UserError for an interpreter that does not run."""
    try:
        done = subprocess.run([python, "-c", QUESTION], capture_output=True, text=True, timeout=timeout_seconds, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise UserError(
            f"engine.python: an interpreter that has sglang; got {python} ({said[-1] if said else type(error).__name__}); "
            "make sglang makes one for a CPU"
        ) from error


def is_accelerated(device: str) -> bool:
    """Whether a torch device is not the CPU."""
    return not device.startswith("cpu")


def check_widths(device: str | None, hf_config: dict[str, Any], tp_size: int, where: str) -> None:
    """A server on a CPU pads each expert's and FFN's width to a multiple of 32 a rank and leaves in the padding what lay there.

    ``device``: None where a server does not say. Raises UserError that names a width of ``hf_config`` which would be padded.
    """
    if device is None or is_accelerated(device):
        return
    multiple = PADDING * tp_size
    for key, name in PADDED.items():
        width = hf_config.get(key) or 0
        if width % multiple:
            nearest = -(-width // multiple) * multiple
            raise UserError(
                f"{name}: a multiple of {multiple} for {where}, whose CPU kernels pad to it; got {width}; use {nearest}, or engine=local"
            )


def arguments(device: str, found: dict[str, Any]) -> dict[str, Any]:
    """Server arguments for a torch device; ``found``: of :func:`installed`. All of them can be given otherwise."""
    if not is_accelerated(device):
        return COMMON | sglang_cpu.ARGUMENTS | CPU_SIZES
    return COMMON | {"device": "cuda"} | ({} if found["flashinfer"] else PLAIN_GPU)


def environment(device: str, found: dict[str, Any]) -> dict[str, str]:
    """The environment of a server's processes: this one's, changed where the device needs it."""
    made = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONSTARTUP"):
        made.pop(name, None)  # a trainer's rank is none of the server's
    for name in [name for name in made if name.startswith("TORCHELASTIC_")]:
        del made[name]
    if not is_accelerated(device):
        path = [str(sglang_cpu.STAND_INS), *filter(None, [os.environ.get("PYTHONPATH")])]
        return made | sglang_cpu.ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path)}
    return made if found["flashinfer"] else made | {"SGLANG_IS_FLASHINFER_AVAILABLE": "false"}


def flags(values: dict[str, Any]) -> list[str]:
    """Arguments as SGLang's command line has them: a true one is its flag alone, a false or null one is left out."""
    made: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        made.append(f"--{name.replace('_', '-')}")
        if value is True:
            continue
        if isinstance(value, list | tuple):
            made += [str(one) for one in value]
        else:
            made.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return made
