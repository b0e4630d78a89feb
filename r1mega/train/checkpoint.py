"""Checkpoints: Megatron's distributed format inside a folder that is published by one rename, with a manifest of hashes.

Owns loading of tensors, which checks every hash first. Saving them is :mod:`r1mega.train.saving`'s; what the folder holds, and how
it is found and checked, :mod:`r1mega.train.manifest`'s.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from r1mega.config.errors import UserError
from r1mega.mesh import Mesh
from r1mega.train import manifest, pickles
from r1mega.train.gathering import take_parts
from r1mega.train.lineage import Lineage
from r1mega.train.manifest import digest, latest, read_model, read_state, resolve, verify
from r1mega.train.saving import Saver, TrainState, clear, sharded
from r1mega.train.trainee import Trainee

__all__ = [
    "TrainState",
    "clear",
    "digest",
    "latest",
    "load",
    "load_reference",
    "newest_whole",
    "read_model",
    "read_state",
    "resolve",
    "save",
    "verify",
]


def save(
    trainee: Trainee,
    state: TrainState,
    folder: Path,
    *,
    keep_last: int,
    tokenizer: str | None,
    parent: str | None,
    command: str,
    reference: Callable[[], AbstractContextManager[None]] | None = None,
) -> Path:
    """Write one checkpoint of all ranks and wait for it; see :class:`r1mega.train.saving.Saver`, which runs use.

    ``parent``: the :func:`digest` of the checkpoint before it; ``command``: whose it is. Raises UserError, on all ranks, where the
    disk is full or refuses; the last checkpoint stays whole.
    """
    lineage = Lineage(command, tip=parent)
    with Saver(trainee.mesh, folder, lineage, background=False, keep_last=keep_last, tokenizer=tokenizer) as saver:
        path = saver.begin(trainee, state, reference)
        saver.wait()
    return path


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
    sharded_state = sharded(trainee, loading=True, with_optimizer=not weights_only)
    _check_names(mesh, sharded_state, source, weights_only=weights_only)
    loaded = dist_checkpointing.load(sharded_state, str(source / "weights"))
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


def load_reference(trainee: Trainee, path: str | Path) -> bool:
    """Put the reference policy of a checkpoint, whose hashes hold, in the place of the trainee's weights; not into its optimizer.

    False where the checkpoint has none. Called by all ranks. Raises UserError for a damaged one.
    """
    from megatron.core import dist_checkpointing

    checkpoint, mesh = resolve(path), trainee.mesh
    source, failure = checkpoint / "reference", ""
    old = checkpoint / "reference.pt"  # whole: before it was saved by shards
    has_one, is_old = mesh.broadcast_object((source.is_dir(), old.is_file()))
    if is_old:
        take_parts(trainee, torch.load(old, weights_only=True, map_location="cpu", mmap=True))
        return True
    if not has_one:
        return False
    try:
        if mesh.is_first:
            pickles.check(source / ".metadata", f"checkpoint {checkpoint}, reference")
    except UserError as error:
        failure = str(error)
    mesh.agree(failure)
    loaded = dist_checkpointing.load(sharded(trainee, loading=True, with_optimizer=False), str(source))
    fault = trainee.held.load_sharded(loaded["model"])
    mesh.agree(fault and f"checkpoint {checkpoint}: its reference gives each stage its names; got {fault}; start again from init")
    return True


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
