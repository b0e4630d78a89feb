"""Where ranks are: named axes over the processes, the sole maker of process groups, and the few collectives that the rest needs.

``open_mesh`` is called once a process; a second call with the same degrees returns the same mesh, so that one process can run
many stages. Everything takes the mesh as an argument; only Megatron-Core reads its own globals, which are made here.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from r1mega.config.errors import UserError
from r1mega.config.run import LaunchConfig, ParallelConfig
from r1mega.device import Device


@dataclass(frozen=True)
class Mesh:
    """Ranks by axis. ``degrees``: axis name to size (data, tensor, pipeline, context, expert)."""

    device: Device
    parallel: ParallelConfig
    rank: int
    world_size: int
    data_rank: int
    data_size: int

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes shared files and prints."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the loss is computed."""
        from megatron.core import parallel_state

        return parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    @property
    def degrees(self) -> dict[str, int]:
        """Axis name to size."""
        sizes = {axis: getattr(self.parallel, axis) for axis in ("tensor", "pipeline", "context", "expert")}
        return {"data": self.data_size, **sizes}

    def data_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same part of the model and see different samples."""
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_group()

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

    def gather_objects(self, value: Any) -> list[Any]:
        """Every data rank's value, in the order of the data axis, on every rank. One entry a data rank."""
        if self.data_size == 1:
            return [value]
        box = [None] * self.data_size
        dist.all_gather_object(box, value, group=self.data_group())
        return box

    def gather_everywhere(self, value: Any) -> list[Any]:
        """Every rank's value in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        box = [None] * self.world_size
        dist.all_gather_object(box, value)
        return box

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the data axis, in place; any shape."""
        if self.data_size > 1:
            dist.all_reduce(values, group=self.data_group())
        return values

    def sum_everywhere(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place; any shape."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def sum_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that see tokens of this pipeline stage (data, context, tensor), in place; any shape."""
        if self.world_size > 1:
            from megatron.core import parallel_state

            dist.all_reduce(values, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Maximum over the data axis, in place; any shape."""
        if self.data_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.data_group())
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


def open_mesh(device: Device, parallel: ParallelConfig, launch: LaunchConfig, seed: int) -> Mesh:
    """Join the process group (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; alone without them) and name its axes.

    Raises UserError when the degrees do not divide the world, or when this process already holds a mesh of other degrees.
    """
    global _open
    from r1mega.compat import megatron_adam, megatron_balance, megatron_plain, megatron_tensor

    megatron_plain.apply()
    megatron_adam.apply()
    megatron_tensor.apply()
    megatron_balance.apply()
    from megatron.core import parallel_state, tensor_parallel

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    ranks_per_replica = parallel.tensor * parallel.pipeline * parallel.context
    if world % ranks_per_replica:
        raise UserError(
            f"parallel: tensor x pipeline x context divides the number of processes; got {ranks_per_replica} for {world}; "
            f"use launch.processes={ranks_per_replica} or a multiple of it"
        )
    if _open is None:
        if not dist.is_initialized():
            timeout = datetime.timedelta(seconds=launch.timeout_seconds)
            store = _meeting_place(rank, world, timeout)
            dist.init_process_group(device.backend, store=store, rank=rank, world_size=world, timeout=timeout)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,  # Gloo cannot gather the uneven sizes that more would bring
            create_gloo_process_groups=True,
        )
        if device.is_cpu:
            from r1mega.compat import megatron_cpu

            megatron_cpu.apply()
        _open = Mesh(
            device, parallel, rank, world, parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        )
    elif (_open.parallel, _open.device) != (parallel, device):
        raise UserError(
            f"parallel: a process keeps one mesh; got {parallel} on {device.kind} after {_open.parallel} on {_open.device.kind}; "
            "start a process of its own for the other layout"
        )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    return _open


_store: dist.Store | None = None
_meetings = 0


def _meeting_place(rank: int, world: int, timeout: datetime.timedelta) -> dist.Store:
    """Where ranks find each other. One store a process, as its port is taken once; each mesh has its own names in it."""
    global _store, _meetings
    if _store is None:
        alone = world == 1 and "MASTER_ADDR" not in os.environ
        _store = dist.HashStore() if alone else next(dist.rendezvous("env://", rank, world, timeout=timeout))[0]
        _store.set_timeout(timeout)
    _meetings += 1
    return dist.PrefixStore(f"mesh-{_meetings}", _store)


def close_mesh() -> None:
    """Leave the process group; for tests and for programs that go on with another layout."""
    global _open
    from megatron.core import parallel_state

    if _open is not None:
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
