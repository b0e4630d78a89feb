"""Checkpoints: Megatron's distributed format inside a folder that is published by one rename, with a manifest of hashes.

Owns saving and loading of tensors; what the folder holds, and how it is found and checked, is in :mod:`r1mega.train.manifest`.
Loading checks every hash first.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from r1mega.compat import megatron_writer
from r1mega.config.errors import UserError
from r1mega.train import manifest
from r1mega.train.manifest import digest, latest, read_model, read_state, resolve, verify
from r1mega.train.trainee import Trainee

__all__ = ["TrainState", "digest", "latest", "load", "read_model", "read_state", "resolve", "save", "verify"]

SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,  # moments are named after their weights, whichever part of the optimizer holds them
}


@dataclass
class TrainState:
    """Where a run stands. ``cursor``: the loader's state; ``extra``: what a command adds (RL: rollouts done)."""

    step: int = 0
    tokens: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def save(
    trainee: Trainee,
    state: TrainState,
    folder: Path,
    *,
    keep_last: int,
    tokenizer: str | None,
    parent: str | None,
    command: str,
    extra_tensors: dict[str, dict[str, torch.Tensor]] | None = None,
) -> Path:
    """Write a checkpoint of all ranks aside and publish it by rename; older ones beyond ``keep_last`` are removed.

    ``parent``: the :func:`digest` of the checkpoint that the run started from; ``command``: whose run it is. ``extra_tensors``:
    file name to tensors that every rank holds alike (RL's reference).
    """
    from megatron.core import dist_checkpointing

    mesh = trainee.mesh
    final, aside = folder / f"step-{state.step:08d}", folder / f".step-{state.step:08d}.tmp"
    if mesh.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "weights").mkdir(parents=True)
    mesh.barrier()
    rng = mesh.device.rng_state()
    sharded = _sharded(trainee, loading=False)
    dist_checkpointing.save(sharded, str(aside / "weights"), sharded_strategy=_save_strategy(), content_metadata=SHARDING)
    mesh.barrier()
    if mesh.is_first:
        if tokenizer:
            shutil.copytree(tokenizer, aside / "tokenizer")
        torch.save(rng, aside / "rng.pt")
        for name, tensors in (extra_tensors or {}).items():
            torch.save(tensors, aside / name)
        record = {**asdict(state), "model": asdict(trainee.model_config), "parent": parent, "degrees": mesh.degrees}
        record |= {"command": command, "dtype": str(trainee.dtype).removeprefix("torch.")}
        (aside / "state.json").write_text(json.dumps(record, indent=1))
        manifest.write(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync(folder)
        for old in sorted(folder.glob("step-*"))[:-keep_last]:
            shutil.rmtree(old)
    mesh.barrier()
    return final


def load(trainee: Trainee, path: str | Path, *, weights_only: bool = False) -> TrainState:
    """Load a checkpoint into a trainee of the same architecture, whatever layout wrote it. Hashes are checked first.

    ``weights_only``: leave the optimizer and the generators fresh (SFT, RL and evaluation start so). Raises UserError for a
    damaged checkpoint (the file is named) and for one of another architecture (the fields are named).
    """
    from megatron.core import dist_checkpointing

    source = resolve(path)
    failure = ""
    if trainee.mesh.is_first:
        try:
            verify(source)
            manifest.check_same_model(trainee.model_config, source)
        except UserError as error:
            failure = str(error)
    trainee.mesh.agree(failure)
    record = read_state(source)
    sharded = _sharded(trainee, loading=True, with_optimizer=not weights_only)
    loaded = dist_checkpointing.load(sharded, str(source / "weights"))
    trainee.module.load_state_dict(loaded["model"], strict=True)
    if trainee.optimizer is not None:
        if weights_only:
            trainee.optimizer.reload_model_params()
        else:
            trainee.optimizer.load_state_dict(loaded["optimizer"])
            trainee.mesh.device.set_rng_state(torch.load(source / "rng.pt", weights_only=True))
    return TrainState(record["step"], record["tokens"], record["cursor"], record["extra"])


def _sharded(trainee: Trainee, *, loading: bool, with_optimizer: bool = True) -> dict[str, Any]:
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    metadata = ensure_metadata_has_dp_cp_group(None)
    model = trainee.module.sharded_state_dict(metadata=metadata)
    sharded: dict[str, Any] = {"model": model}
    if with_optimizer and trainee.optimizer is not None:
        if loading:
            trainee.allocate_moments()
        sharded["optimizer"] = trainee.optimizer.sharded_state_dict(
            trainee.module.sharded_state_dict(metadata=metadata), is_loading=loading, metadata=SHARDING
        )
    return sharded


def _save_strategy():
    """Megatron's torch_dist writer, one file a rank."""
    megatron_writer.apply()
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    return TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)


def _sync(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
