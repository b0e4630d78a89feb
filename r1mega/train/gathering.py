"""Whole tensors out of what ranks hold: every weight and expert bias by its native name, gathered as it is walked.

In: a trainee on any layout. Out: ``(name, whole tensor)`` in one order on all ranks: on every rank, or on the first alone. The plan
is the layout's own, the one that checkpoints are written by (Megatron's sharded state), so that no layout needs a rule of its own
here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from r1mega.model.names import native_shapes
from r1mega.train.saving import sharded
from r1mega.train.trainee import Trainee


@dataclass(frozen=True)
class Region:
    """What one rank holds of a whole tensor: ``owner`` the rank, ``start`` and ``extent`` a number an axis."""

    name: str
    owner: int
    start: tuple[int, ...]
    extent: tuple[int, ...]
    dtype: torch.dtype

    @property
    def slices(self) -> tuple[slice, ...]:
        """The region as an index of the whole tensor."""
        return tuple(slice(first, first + size) for first, size in zip(self.start, self.extent, strict=True))


def whole_tensors(trainee: Trainee, *, everywhere: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Each native tensor, whole, on the device. Called by all ranks and walked by them to its end, in step.

    ``everywhere`` False: the first rank alone gets them, the others yield nothing. Holds one tensor at a time besides the weights.
    """
    mesh = trainee.mesh
    if mesh.world_size == 1:
        held = dict(trainee.named_tensors())
        yield from ((name, held[name]) for name in native_shapes(trainee.model_config) if name in held)
        return
    own = [(region, tensor) for region, tensor, is_copy in held_regions(trainee) if not is_copy]
    mine = {(region.name, region.start): tensor for region, tensor in own}
    regions: dict[str, list[Region]] = {}
    for part in mesh.gather_everywhere([region for region, _ in own]):
        for region in part:
            regions.setdefault(region.name, []).append(region)
    takes_part = everywhere or mesh.is_first
    for name, shape in native_shapes(trainee.model_config).items():
        if name not in regions:
            continue  # the tied head, which the name table leaves out
        pieces = sorted(regions[name], key=lambda region: region.start)
        # one owner of all of it, and this is it: nothing to copy
        whole = mine.get((name, pieces[0].start)) if len(pieces) == 1 else None
        if whole is None and takes_part:
            whole = torch.empty(shape, dtype=pieces[0].dtype, device=mesh.device.torch_device)
        for region in pieces:
            _move(mesh, region, mine.get((name, region.start)), whole, everywhere)
        if takes_part:
            yield name, whole


def _move(mesh, region: Region, mine: torch.Tensor | None, whole: torch.Tensor | None, everywhere: bool) -> None:
    """Bring one region from its owner to where it is wanted."""
    is_owner = region.owner == mesh.rank
    if not everywhere and not is_owner and not mesh.is_first:
        return
    if is_owner and whole is not mine and whole is not None:
        whole[region.slices] = mine
    if not everywhere and region.owner == 0:
        return
    piece = mine.contiguous() if is_owner else torch.empty(region.extent, dtype=region.dtype, device=mesh.device.torch_device)
    if everywhere:
        dist.broadcast(piece, src=region.owner)
    elif is_owner:
        dist.send(piece, dst=0)
    else:
        dist.recv(piece, src=region.owner)
    if not is_owner:
        whole[region.slices] = piece


def held_regions(trainee: Trainee) -> Iterator[tuple[Region, torch.Tensor, bool]]:
    """What this rank holds, as views of its weights, and whether another rank holds the same and is the one to give it."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = sharded(trainee, loading=False, with_optimizer=False)
    apply_factories(state)
    names = set(native_shapes(trainee.model_config))
    for entry in nested_values(state):
        if not isinstance(entry, ShardedTensor) or entry.key not in names:
            continue
        replica = entry.replica_id if isinstance(entry.replica_id, tuple) else (entry.replica_id,)
        units = entry.prepend_axis_num
        extent, tensor = (1,) * units + tuple(entry.local_shape), entry.data.detach()[(None,) * units]
        yield Region(entry.key, trainee.mesh.rank, tuple(entry.global_offset), extent, tensor.dtype), tensor, any(replica)


def take_parts(trainee: Trainee, whole: Mapping[str, torch.Tensor]) -> None:
    """Copy this rank's parts out of whole tensors by native name, copies that others hold too included."""
    for region, tensor, _ in held_regions(trainee):
        tensor.copy_(whole[region.name][region.slices])
