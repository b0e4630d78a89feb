"""Checkpoints: Megatron's distributed format inside a folder that is published by one rename, with a manifest of hashes.

    checkpoints/step-00000100/
      weights/         Megatron-Core's distributed checkpoint: parameters, expert biases, optimizer (layout-free)
      tokenizer/       a copy of the run's tokenizer, when it has one
      state.json       step, position in the data, model config, parent
      manifest.json    sha256 and size of every other file; written last

A folder without a manifest was never finished. Loading checks every hash first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from r1mega.compat import megatron_writer
from r1mega.config.errors import UserError
from r1mega.config.model import ModelConfig, YarnConfig
from r1mega.train.trainee import Trainee

MANIFEST = "manifest.json"
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


def latest(folder: str | Path) -> Path | None:
    """The newest finished checkpoint in a run's ``checkpoints`` folder; None without one."""
    finished = [path for path in Path(folder).glob("step-*") if (path / MANIFEST).is_file()]
    return max(finished, key=lambda path: int(path.name.split("-")[1]), default=None)


def resolve(path: str | Path) -> Path:
    """A checkpoint's folder from itself, a run's folder, or its ``checkpoints`` folder. Raises UserError when there is none."""
    given = Path(path)
    for candidate in (given, latest(given), latest(given / "checkpoints")):
        if candidate is not None and (candidate / MANIFEST).is_file():
            return candidate
    raise UserError(f"checkpoint: a folder with {MANIFEST}, or a run's folder with checkpoints/; got {given}; check the path")


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint."""
    return json.loads((path / "state.json").read_text())


def read_model(path: str | Path) -> ModelConfig:
    """The architecture of a checkpoint."""
    values = read_state(resolve(path))["model"]
    return ModelConfig(**{**values, "yarn": YarnConfig(**values["yarn"])})


def digest(path: str | Path) -> str:
    """A checkpoint's identity: sha256 of its manifest."""
    return hashlib.sha256((resolve(path) / MANIFEST).read_bytes()).hexdigest()


def save(
    trainee: Trainee,
    state: TrainState,
    folder: Path,
    *,
    keep_last: int,
    tokenizer: str | None,
    parent: str | None,
    extra_tensors: dict[str, dict[str, torch.Tensor]] | None = None,
) -> Path:
    """Write a checkpoint of all ranks aside and publish it by rename; older ones beyond ``keep_last`` are removed.

    ``parent``: the :func:`digest` of the checkpoint that the run started from. ``extra_tensors``: file name to tensors that every
    rank holds alike (RL's reference).
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
        (aside / "state.json").write_text(json.dumps(record, indent=1))
        _write_manifest(aside)
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
            _check_same_model(trainee.model_config, read_model(source), source)
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


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest. Raises UserError that names the first damaged or missing file."""
    for name, entry in json.loads((path / MANIFEST).read_text())["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(f"checkpoint {path}: every file of the manifest is there; {name} is missing; use an older checkpoint")
        if file.stat().st_size != entry["bytes"]:
            raise UserError(
                f"checkpoint {path}: {name} has {entry['bytes']} bytes; got {file.stat().st_size}; use an older checkpoint"
            )
        if _sha256(file) != entry["sha256"]:
            raise UserError(f"checkpoint {path}: {name} matches its hash; got other content; use an older checkpoint")


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


def _check_same_model(wanted: ModelConfig, found: ModelConfig, source: Path) -> None:
    from r1mega.config.train import TUNABLE_MODEL_FIELDS

    free = {"name", "max_position_embeddings", "init_std", *TUNABLE_MODEL_FIELDS}
    left, right = asdict(wanted), asdict(found)
    differing = [f"{key} {right[key]} (model.{key}={left[key]})" for key in left if key not in free and left[key] != right[key]]
    if differing:
        raise UserError(
            f"checkpoint {source}: it has the run's architecture; got {', '.join(differing)}; use its model or another run name"
        )


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    with (folder / MANIFEST).open("w") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
