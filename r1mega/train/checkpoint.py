"""Checkpoints: Megatron's distributed format inside a folder that is published by one rename, with a manifest of hashes.

Owns saving and loading of tensors; what the folder holds, and how it is found and checked, is in :mod:`r1mega.train.manifest`.
Loading checks every hash first.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from r1mega.compat import megatron_writer
from r1mega.config.errors import UserError
from r1mega.files import published
from r1mega.mesh import Mesh
from r1mega.train import manifest, pickles
from r1mega.train.manifest import digest, latest, read_model, read_state, resolve, verify
from r1mega.train.trainee import Trainee

__all__ = [
    "TrainState",
    "clear",
    "digest",
    "latest",
    "load",
    "newest_whole",
    "read_model",
    "read_state",
    "resolve",
    "save",
    "verify",
]

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
    file name to tensors that every rank holds alike (RL's reference). Raises UserError, on all ranks, where the disk is full or
    refuses; the last checkpoint stays whole.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

    mesh = trainee.mesh
    final, aside = folder / f"step-{state.step:08d}", folder / f".step-{state.step:08d}.tmp"

    def prepare() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "weights").mkdir(parents=True)

    def describe() -> None:
        if tokenizer:
            shutil.copytree(tokenizer, aside / "tokenizer")
        torch.save(rng, aside / "rng.pt")
        for name, tensors in (extra_tensors or {}).items():
            torch.save(tensors, aside / name)
        record = {**asdict(state), "model": asdict(trainee.model_config), "parent": parent, "degrees": mesh.degrees}
        record |= {"command": command, "dtype": str(trainee.dtype).removeprefix("torch.")}
        (aside / "state.json").write_text(json.dumps(record, indent=1))

    rng = mesh.gather_everywhere(mesh.device.rng_state())
    _together(mesh, aside, prepare if mesh.is_first else None)
    try:
        _save_tensors(trainee, aside / "weights")
    except (OSError, RuntimeError, CheckpointException) as error:  # on all ranks, or on one, whose end then ends the others
        told = _unwritten(mesh, aside, error)
        if mesh.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise UserError(told) from error
    _together(mesh, aside, describe if mesh.is_first else None)
    entries = _together(mesh, aside, lambda: manifest.hashes(aside, mesh.rank, mesh.world_size))
    merged = {name: entry for part in mesh.gather_everywhere(entries) for name, entry in part.items()}
    _together(mesh, aside, (lambda: _publish(aside, merged, final, keep_last)) if mesh.is_first else None)
    mesh.agree(published(final) if mesh.is_first else "")
    return final


def _save_tensors(trainee: Trainee, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    sharded = _sharded(trainee, loading=False)
    dist_checkpointing.save(sharded, str(folder), sharded_strategy=_save_strategy(), content_metadata=SHARDING)


def _together(mesh: Mesh, aside: Path, action: Callable[[], Any] | None) -> Any:
    """Run this rank's part of a save; where it fails on one rank, all raise UserError and the unfinished folder goes.

    That gives a full disk its room back.
    """
    value, failure = None, ""
    try:
        value = action() if action else None
    except (OSError, RuntimeError) as error:  # torch.save raises the second where its file cannot grow
        failure = _unwritten(mesh, aside, error)
    try:
        mesh.agree(failure)
    except UserError:
        if mesh.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return value


def _unwritten(mesh: Mesh, aside: Path, error: BaseException) -> str:
    """What to tell of a save that the disk failed. Raises ``error`` itself where memory ran out: that is no fault of the disk."""
    if mesh.device.is_out_of_memory(error):
        raise error
    told = error.strerror if isinstance(error, OSError) else None
    if not told:  # Megatron packs what its writer met into a text
        found = re.search(r"(?:\[Errno \d+\] |Worker failure: )([^\n]+)", str(error).replace("Worker failure: [Errno", "[Errno"))
        told = found.group(1) if found else f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
        if (
            "inline_container" in told and shutil.disk_usage(aside.parent).free < 1 << 20
        ):  # torch.save does not say why it could not
            told = os.strerror(errno.ENOSPC)
    last = latest(aside.parent)
    free = shutil.disk_usage(aside.parent).free / 2**30
    return (
        f"checkpoint {aside.parent}: the disk takes what is saved; got {told} with {free:.1f} GiB free; make "
        f"room and run the same command, {f'{last.name} is whole and it goes on from there' if last else 'there is no earlier one'}"
    )


def _publish(aside: Path, entries: dict[str, dict[str, Any]], final: Path, keep_last: int) -> None:
    """Manifest, rename, and away with older ones, which go only when the new one stands.

    A run never writes the same step twice; one who does has, between two renames, neither of them under its name.
    """
    folder = aside.parent
    manifest.write(aside, entries)
    if final.exists():
        final.rename(folder / f".{final.name}.old")
    aside.rename(final)
    _sync(folder)
    for old in manifest.finished(folder)[:-keep_last]:
        old.rename(folder / f".{old.name}.old")  # at once gone for readers, whenever this process is killed
    clear(folder)


def clear(folder: Path) -> None:
    """Remove what killed processes left half written or half removed."""
    for rest in folder.glob(".step-*"):
        shutil.rmtree(rest, ignore_errors=True)


def newest_whole(mesh: Mesh, folder: Path) -> Path | None:
    """The newest checkpoint of a run whose every hash holds; None where there is none at all. Called by all ranks.

    Damaged ones after it are named on stderr and set aside as ``damaged-step-*``. Raises UserError where all are damaged: a run
    must not start anew unasked.
    """
    candidates = mesh.broadcast_object(manifest.finished(folder))
    damaged: list[tuple[Path, str]] = []
    for path in reversed(candidates):
        faults = mesh.gather_everywhere(manifest.fault_of(path, mesh.rank, mesh.world_size))
        fault = next(filter(None, faults), "")
        if not fault:
            if mesh.is_first:
                for bad, why in damaged:
                    print(
                        f"checkpoint {bad}: {why}; going on from {path.name}; the damaged one is kept as damaged-{bad.name}",
                        file=sys.stderr,
                    )
                    shutil.rmtree(folder / f"damaged-{bad.name}", ignore_errors=True)
                    bad.rename(folder / f"damaged-{bad.name}")
            mesh.barrier()
            return path
        damaged.append((path, fault))
    if damaged:
        named = "; ".join(f"{path.name}: {why}" for path, why in damaged)
        raise UserError(f"checkpoints {folder}: one at least is whole; got {named}; remove the folder to start anew")
    return None


def load(trainee: Trainee, path: str | Path, *, weights_only: bool = False, verified: bool = False) -> TrainState:
    """Load a checkpoint into a trainee of the same architecture, whatever layout wrote it. Hashes are checked first.

    ``weights_only``: leave the optimizer and the generators fresh (SFT, RL and evaluation start so). ``verified``: the hashes have
    just been checked (:func:`newest_whole`). Raises UserError for a damaged checkpoint (the file is named) and for one of another
    architecture (the fields are named).
    """
    from megatron.core import dist_checkpointing

    source, mesh = resolve(path), trainee.mesh
    failure = ""
    try:
        if not verified and manifest.fault_of(source, mesh.rank, mesh.world_size):
            verify(source)
        if mesh.is_first:
            pickles.check(source / "weights" / ".metadata", f"checkpoint {source}")
            manifest.check_same_model(trainee.model_config, source)
    except UserError as error:
        failure = str(error)
    except OSError as error:  # of this rank's host alone, it may be: the others must not wait
        failure = f"checkpoint {source}: every file is readable; got {error.strerror or error}; mend the disk or take another one"
    mesh.agree(failure)
    record = read_state(source)
    sharded = _sharded(trainee, loading=True, with_optimizer=not weights_only)
    _check_names(mesh, sharded, source, weights_only=weights_only)
    loaded = dist_checkpointing.load(sharded, str(source / "weights"))
    fault = trainee.held.load_sharded(loaded["model"])
    mesh.agree(fault and f"checkpoint {source}: gives each stage its names; got {fault}; take one of this version of r1mega")
    if trainee.optimizer is not None:
        if weights_only:
            trainee.optimizer.reload_model_params()
        else:
            trainee.optimizer.load_state_dict(loaded["optimizer"])
            states = torch.load(source / "rng.pt", weights_only=True)
            mesh.device.set_rng_state(states[mesh.rank if mesh.rank < len(states) else 0])
    return TrainState(record["step"], record["tokens"], record["cursor"], record["extra"])


def _check_names(mesh: Mesh, sharded: dict[str, Any], source: Path, *, weights_only: bool) -> None:
    """Raise UserError, on all ranks, where the checkpoint lacks a tensor that some rank asks for, or has one that none asks for."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase
    from torch.distributed import checkpoint as dcp

    asked = {entry.key for entry in nested_values(sharded) if isinstance(entry, ShardedBase)}
    wanted = {key for part in mesh.gather_everywhere(sorted(asked)) for key in part}
    failure = ""
    if mesh.is_first:
        try:
            entries = dcp.FileSystemReader(str(source / "weights")).read_metadata().state_dict_metadata
        except Exception as error:  # whatever it is, no rank may stay behind alone
            entries, failure = {}, f"checkpoint {source}: its .metadata is readable; got {error!r}; take another checkpoint"
        stored = {name.partition("/shard_")[0] for name in entries}  # objects are stored by shard
        stored = {name for name in stored if not (weights_only and name.startswith("optimizer."))}
        missing, extra = sorted(wanted - stored), sorted(stored - wanted)
        if (missing or extra) and not failure:
            told = [
                f"{word} {', '.join(names[:3])}{' and so on' if len(names) > 3 else ''}"
                for word, names in (("without", missing), ("with", extra))
                if names
            ]
            failure = (
                f"checkpoint {source}: holds exactly this model's tensors; got one {' and '.join(told)}; "
                "take one that this version of r1mega wrote for this model"
            )
    mesh.agree(failure)


def plain_tensors(path: Path, prefix: str = "", without: str | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint, whole, by key: weights, expert biases, moments, main parameters. Needs no other rank.

    Of all those whose key starts with ``prefix`` and not with ``without``.
    """
    from torch.distributed import checkpoint as dcp

    pickles.check(path / "weights" / ".metadata", f"checkpoint {path}")
    reader = dcp.FileSystemReader(str(path / "weights"))
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
        and name.startswith(prefix)
        and not (without and name.startswith(without))
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _sharded(trainee: Trainee, *, loading: bool, with_optimizer: bool = True) -> dict[str, Any]:
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    metadata = ensure_metadata_has_dp_cp_group(None)
    model = trainee.held.sharded_state_dict(metadata=metadata)
    sharded: dict[str, Any] = {"model": model}
    if with_optimizer and trainee.optimizer is not None:
        if loading:
            trainee.allocate_moments()
        sharded["optimizer"] = trainee.optimizer.sharded_state_dict(
            trainee.held.sharded_state_dict(metadata=metadata), is_loading=loading, metadata=SHARDING
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
