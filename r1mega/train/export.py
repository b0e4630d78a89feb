"""``r1mega export``: a checkpoint as a Hugging Face folder (``config.json``, safetensors, tokenizer) that stock code loads.

The checkpoint is loaded whole by each rank (whatever layout wrote it) and written by the first.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from r1mega.config.errors import UserError
from r1mega.config.rl import ExportConfig
from r1mega.config.run import ParallelConfig
from r1mega.data.tokenizer import copy_tokenizer, load_tokenizer
from r1mega.device import DTYPES, open_device
from r1mega.mesh import open_mesh
from r1mega.train import checkpoint
from r1mega.train.manifest import tokenizer_of
from r1mega.train.policy import Policy


def export(config: ExportConfig) -> dict[str, Any]:
    """Write ``config.target``; returns target, number of tensors and parameters. The folder appears whole or not at all."""
    if config.parallel != ParallelConfig():
        raise UserError(
            "parallel: export loads the whole model on each rank, whatever layout wrote it; got other degrees than 1; use 1"
        )
    _check_target(Path(config.target))
    mesh = open_mesh(open_device(config.device), config.parallel, config.launch, config.seed)
    source = checkpoint.resolve(config.checkpoint)
    policy = Policy(checkpoint.read_model(source), None, mesh, config.precision.dtype)
    policy.load(source, weights_only=True)
    held = checkpoint.read_state(source).get("dtype", "float32")
    dtype = getattr(torch, held) if config.dtype == "as_is" else DTYPES[config.dtype]
    result = {"target": config.target}
    if mesh.is_first:
        tokenizer = load_tokenizer(tokenizer_of(source))
        described = policy.published_config(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        described["dtype"] = described["torch_dtype"] = str(dtype).removeprefix("torch.")
        result |= _write(Path(config.target), policy, described, dtype, config.shard_bytes, tokenizer.path)
    mesh.barrier()
    return mesh.broadcast_object(result)


def _check_target(target: Path) -> None:
    """Only an earlier export is replaced. Raises UserError for a folder with anything else in it."""
    if target.is_dir() and any(target.iterdir()):
        try:
            ours = json.loads((target / "config.json").read_text())["model_type"] == "deepseek_v3"
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise UserError(f"target: a new folder or an earlier export; got {target} with other files; use another target=")


def _write(
    target: Path, policy: Policy, described: dict[str, Any], dtype: torch.dtype, shard_bytes: int, tokenizer: Path
) -> dict[str, int]:
    from safetensors.torch import save_file

    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = parameters = 0
    for name, tensor in policy.published_tensors():
        keep = torch.float32 if name.endswith("e_score_correction_bias") else dtype  # the bias stays fp32, as published
        value = tensor.to(device="cpu", dtype=keep).clone().contiguous()
        if shards[-1] and size + value.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size, total, parameters = size + value.nbytes, total + value.nbytes, parameters + value.numel()
    where = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, aside / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (aside / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    ends = {key: described[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (aside / "generation_config.json").write_text(
        json.dumps({**ends, "do_sample": True, "temperature": 0.6, "top_p": 0.95}, indent=1)
    )
    copy_tokenizer(tokenizer, aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    return {"tensors": len(where), "parameters": parameters}
