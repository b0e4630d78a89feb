"""Where ranks are: named axes over the processes, the sole maker of process groups, and the few collectives that the rest needs.

``open_mesh`` is called once a process; a second call with the same degrees returns the same mesh, so that one process can run
many stages. Everything takes the mesh as an argument; only Megatron-Core reads its own globals, which are made here.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from r1mega.config.errors import UserError
from r1mega.config.run import LaunchConfig, ParallelConfig
from r1mega.device import Device
from r1mega.mesh import rendezvous, watch

AXES = ("data", "tensor", "pipeline", "context", "expert", "expert_tensor", "expert_data")
"""The first four multiply to the world; the last three, with pipeline, cut the same ranks anew for the routed experts."""


@dataclass(frozen=True)
class Axis:
    """This rank's line along one axis: its place, the length, the ranks on it, their group."""

    rank: int
    size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """Ranks by named axes (:data:`AXES`)."""

    device: Device
    parallel: ParallelConfig
    rank: int
    world_size: int
    axes: dict[str, Axis]
    stages_per_rank: int = 1
    _edges: dict[tuple[int, int], dist.ProcessGroup] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes shared files and prints."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of a batch this rank sees."""
        return self.axes["data"].rank

    @property
    def data_size(self) -> int:
        """Into how many parts a batch is cut."""
        return self.axes["data"].size

    @property
    def degrees(self) -> dict[str, int]:
        """Axis name to size, of the axes that a user chooses and of data."""
        return {axis: self.axes[axis].size for axis in AXES if axis != "expert_data"}

    def megatron_groups(self) -> Any:
        """Megatron-Core's collection of the same groups. It shares no embedding: :mod:`r1mega.train.gradients` does."""
        from megatron.core.process_groups_config import ProcessGroupCollection

        groups = ProcessGroupCollection.use_mpu_process_groups()
        groups.embd = None
        return groups

    def connect(self, pairs: Iterable[tuple[int, int]]) -> dict[tuple[int, int], dist.ProcessGroup]:
        """A group for each directed pair of ranks ``(source, target)``; called by all ranks, each with pairs of its own.

        One direction of messages a group: what is sent on it is received in the order of sending, whatever the backend.
        """
        everyone = {pair for part in self.gather_everywhere(sorted(set(pairs))) for pair in part}
        for source, target in sorted(everyone):
            if source != target and (source, target) not in self._edges:
                self._edges[source, target] = group = dist.new_group([source, target])
                # NCCL connects two ranks at their first message and blocks until both are there; so now, all in one order
                if not self.device.is_cpu and self.rank in (source, target):
                    token = torch.zeros(1, device=self.device.torch_device)
                    dist.send(token, target, group=group) if self.rank == source else dist.recv(token, source, group=group)
        return self._edges

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Any, axis: str = "data") -> list[Any]:
        """Every value along ``axis``, in the order of the axis, on every rank of it."""
        line = self.axes[axis]
        if line.size == 1:
            return [value]
        box = [None] * line.size
        dist.all_gather_object(box, value, group=line.group)
        return box

    def gather_everywhere(self, value: Any) -> list[Any]:
        """Every rank's value in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        box = [None] * self.world_size
        dist.all_gather_object(box, value)
        return box

    def sum(self, values: torch.Tensor, *axes: str) -> torch.Tensor:
        """Sum over the named axes (data alone without a name), in place; any shape."""
        for axis in axes or ("data",):
            if self.axes[axis].size > 1:
                dist.all_reduce(values, group=self.axes[axis].group)
        return values

    def sum_everywhere(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place; any shape."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def sum_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that see tokens of this pipeline stage (tensor, context, data), in place; any shape."""
        return self.sum(values, "tensor", "context", "data")

    def max(self, values: torch.Tensor, *axes: str) -> torch.Tensor:
        """Maximum over the named axes (data alone without a name), in place; any shape."""
        for axis in axes or ("data",):
            if self.axes[axis].size > 1:
                dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.axes[axis].group)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank when ``flag`` is on one."""
        if self.world_size == 1:
            return flag
        return bool(self.sum_everywhere(torch.tensor(float(flag), device=self.device.torch_device)).item())

    def agree(self, failure: str) -> None:
        """Raise on all ranks together when any rank brings a failure text; an empty text is no failure."""
        for rank, text in enumerate(self.gather_everywhere(failure)):
            if text:
                raise UserError(text if self.world_size == 1 else f"rank {rank}: {text}")


_open: Mesh | None = None


def open_mesh(device: Device, parallel: ParallelConfig, launch: LaunchConfig, seed: int, stages_per_rank: int = 1) -> Mesh:
    """Join the process group (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; alone without them) and name its axes.

    ``stages_per_rank``: model chunks a pipeline rank holds. Raises UserError when the degrees do not divide the world, when this
    process already holds a mesh of other degrees, or for a GPU after a CPU.
    """
    global _open
    from r1mega.compat import (
        megatron_adam,
        megatron_balance,
        megatron_context,
        megatron_cpu,
        megatron_mtp,
        megatron_plain,
        megatron_tensor,
    )

    megatron_plain.apply()
    megatron_adam.apply()
    megatron_tensor.apply()
    megatron_balance.apply()
    megatron_mtp.apply()
    megatron_context.apply()
    from megatron.core import parallel_state, tensor_parallel

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    _check_degrees(parallel, world)
    if _open is None:
        if megatron_cpu.is_applied() and not device.is_cpu:
            raise UserError(
                f"device.kind: a process that has had a mesh on cpu stays there, Megatron-Core with it; got {device.kind}; "
                "start a process of its own for it"
            )
        if not dist.is_initialized():
            timeout = datetime.timedelta(seconds=launch.timeout_seconds)
            meeting = rendezvous.meet(launch)
            store = rendezvous.fresh_store(meeting, "mesh")
            dist.init_process_group(device.backend, store=store, rank=rank, world_size=world, timeout=timeout)
            watch.start(meeting, launch.stall_timeout_seconds)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=stages_per_rank if stages_per_rank > 1 and parallel.pipeline > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            create_gloo_process_groups=True,
        )
        if device.is_cpu:
            megatron_cpu.apply()
        _open = Mesh(device, parallel, rank, world, _axes(), stages_per_rank)
    elif (_open.parallel, _open.device, _open.stages_per_rank) != (parallel, device, stages_per_rank):
        raise UserError(
            f"parallel: a process keeps one mesh; got {parallel} with {stages_per_rank} stages a rank on {device.kind} after "
            f"{_open.parallel} with {_open.stages_per_rank} on {_open.device.kind}; start a process of its own for the other layout"
        )
    seed += 100_003 * _open.axes["pipeline"].rank  # stages are not copies of each other
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    return _open


def _check_degrees(parallel: ParallelConfig, world: int) -> None:
    """The last line of defence: commands have checked their configs before (:mod:`r1mega.config.rules`)."""
    dense = parallel.tensor * parallel.pipeline * parallel.context
    if world % dense:
        raise UserError(
            f"parallel: tensor x pipeline x context divides the number of processes; got {dense} for {world}; "
            f"use launch.processes={dense} or a multiple of it"
        )
    sparse = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if world % sparse:
        raise UserError(
            f"parallel: expert x expert_tensor x pipeline divides the number of processes; got {sparse} for {world}; "
            f"use launch.processes={sparse} or a multiple of it"
        )


def _axes() -> dict[str, Axis]:
    """The axes of the groups that Megatron-Core has just made."""
    from megatron.core import parallel_state as made

    groups = {
        "data": made.get_data_parallel_group(),
        "tensor": made.get_tensor_model_parallel_group(),
        "pipeline": made.get_pipeline_model_parallel_group(),
        "context": made.get_context_parallel_group(),
        "expert": made.get_expert_model_parallel_group(),
        "expert_tensor": made.get_expert_tensor_parallel_group(),
        "expert_data": made.get_expert_data_parallel_group(),
    }
    return {
        name: Axis(group.rank(), group.size(), tuple(dist.get_process_group_ranks(group)), group) for name, group in groups.items()
    }


def close_mesh() -> None:
    """Leave the process group; for tests and for programs that go on with another layout."""
    global _open
    from megatron.core import parallel_state

    if _open is not None:
        watch.stop()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        _open = None


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank of the open mesh; the value itself when none is open."""
    return value if _open is None else _open.broadcast_object(value)


def barrier() -> None:
    """Wait for all ranks of the open mesh, when one is open."""
    if _open is not None:
        _open.barrier()
