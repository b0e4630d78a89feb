"""The mesh: alone in this process, and its collectives and layouts on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from r1mega.config.errors import UserError
from r1mega.config.run import DeviceConfig, LaunchConfig, ParallelConfig
from r1mega.device import Device, open_device
from r1mega.mesh import Mesh, barrier, broadcast_object, close_mesh, open_mesh
from r1mega.testing.ranks import run_ranks


def opened(seed: int = 1, **degrees: int) -> Mesh:
    return open_mesh(open_device(DeviceConfig(threads=1)), ParallelConfig(**degrees), LaunchConfig(timeout_seconds=60), seed)


@pytest.fixture
def alone():
    close_mesh()
    yield opened()
    close_mesh()


def test_one_rank(alone: Mesh) -> None:
    assert alone.degrees == {"data": 1, "tensor": 1, "pipeline": 1, "context": 1, "expert": 1, "expert_tensor": 1}
    assert (alone.rank, alone.world_size, alone.data_rank, alone.data_size) == (0, 1, 0, 1)
    assert alone.is_first and all(axis.size == 1 and axis.ranks == (0,) for axis in alone.axes.values())
    value = {"a": 1}
    assert alone.broadcast_object(value) is value and broadcast_object(value) is value and alone.gather_objects(value) == [value]
    assert alone.sum(torch.tensor([2.0])) == alone.max(torch.tensor([2.0])) == alone.sum_everywhere(torch.tensor([2.0])) == 2
    alone.barrier(), barrier()
    alone.agree("")
    with pytest.raises(UserError, match="^no such file$"):
        alone.agree("no such file")


def test_the_same_degrees_give_the_same_mesh_and_seed_it_again(alone: Mesh) -> None:
    drawn = [(opened(seed), torch.rand(1).item()) for seed in (7, 7, 8)]
    assert all(mesh is alone for mesh, _ in drawn)
    assert drawn[0][1] == drawn[1][1] != drawn[2][1]


def test_degrees_that_do_not_divide_the_processes_are_refused(alone: Mesh) -> None:
    with pytest.raises(UserError, match="parallel: .* divides the number of processes; got 6 for 1; use launch.processes=6"):
        opened(tensor=2, pipeline=3)


def test_another_layout_in_the_same_process_is_refused(alone: Mesh) -> None:
    with pytest.raises(UserError, match="expert x expert_tensor x pipeline divides the number of processes; got 2 for 1"):
        opened(expert=2)
    with pytest.raises(
        UserError, match=r"parallel: a process keeps one mesh; got ParallelConfig\(.*stages='EtL'.*\) with 1 stages a rank"
    ):
        open_mesh(alone.device, ParallelConfig(stages="EtL"), LaunchConfig(), 1)


def test_a_gpu_after_a_cpu_is_refused(alone: Mesh) -> None:
    """Megatron would make tables on the CPU for a model that lies on the GPU."""
    close_mesh()
    with pytest.raises(UserError, match="^device.kind: a process that has had a mesh on cpu stays there, .*; got cuda; start a"):
        open_mesh(Device("cuda", torch.device("cuda", 0), "nccl"), ParallelConfig(), LaunchConfig(), 1)
    assert not dist.is_initialized()
    assert opened().device.is_cpu


def test_without_a_mesh_nothing_is_shared() -> None:
    close_mesh()
    barrier()
    assert broadcast_object(3) == 3


def two_ranks() -> dict[str, Any]:
    """One rank's side of everything that two ranks do; a second layout after the first."""
    mesh = opened()
    rank, seen = mesh.rank, {"degrees": mesh.degrees, "data": (mesh.data_rank, mesh.data_size), "first": mesh.is_first}
    seen["broadcast"] = mesh.broadcast_object(f"from {rank}"), broadcast_object([rank])
    seen["gather"] = mesh.gather_objects({"rank": rank})
    seen["sum"] = mesh.sum(torch.tensor([1.0 + rank, 10.0])).tolist()
    seen["max"] = mesh.max(torch.tensor([float(rank), -1.0])).tolist()
    seen["everywhere"] = mesh.sum_everywhere(torch.tensor([1 + rank])).tolist()
    mesh.barrier()
    mesh.agree("")
    seen["failures"] = []
    for failing in (0, 1):
        try:
            mesh.agree("trouble" if rank == failing else "")
        except UserError as error:
            seen["failures"].append(str(error))
    for degrees in ({"tensor": 3}, {"tensor": 2}):
        try:
            opened(**degrees)
        except UserError as error:
            seen["failures"].append(str(error).split(";")[1])
    close_mesh()
    mesh = opened(tensor=2)
    seen["tensor"] = mesh.degrees, mesh.data_size, mesh.gather_objects(rank), mesh.sum(torch.tensor([rank])).tolist()
    seen["tensor_everywhere"] = (
        mesh.sum_everywhere(torch.tensor([1 + rank])).tolist(),
        mesh.sum_stage(torch.tensor([1 + rank])).tolist(),
    )
    close_mesh()
    mesh = opened(pipeline=2)
    seen["line"], seen["stage"] = mesh.axes["pipeline"], mesh.sum_stage(torch.tensor([1 + rank])).tolist()
    seen["line"] = seen["line"].rank, seen["line"].ranks
    groups = mesh.connect([(0, 1)] if rank == 0 else [(1, 0)])
    seen["edges"] = sorted(groups), mesh.connect([]) is groups
    works = [dist.isend(torch.tensor([10 + rank]), dst=1 - rank, group=groups[rank, 1 - rank])]
    got = torch.zeros(1, dtype=torch.long)
    works.append(dist.irecv(got, src=1 - rank, group=groups[1 - rank, rank]))
    [work.wait() for work in works]
    seen["received"] = got.item()
    return seen


def test_two_ranks() -> None:
    ranks = run_ranks(two_ranks, 2)
    for rank, seen in enumerate(ranks):
        assert seen["degrees"] == {"data": 2, "tensor": 1, "pipeline": 1, "context": 1, "expert": 1, "expert_tensor": 1}
        assert seen["data"] == (rank, 2) and seen["first"] == (rank == 0)
        assert seen["broadcast"] == ("from 0", [0])
        assert seen["gather"] == [{"rank": 0}, {"rank": 1}]
        assert seen["sum"] == [3.0, 20.0] and seen["max"] == [1.0, -1.0] and seen["everywhere"] == [3]
        assert seen["failures"][:2] == ["rank 0: trouble", "rank 1: trouble"]
        assert seen["failures"][2] == " got 3 for 2" and "a process keeps" not in seen["failures"][3]
        assert "tensor=2" in seen["failures"][3] and len(seen["failures"]) == 4
        degrees, data_size, gathered, summed = seen["tensor"]
        assert degrees == {"data": 1, "tensor": 2, "pipeline": 1, "context": 1, "expert": 1, "expert_tensor": 1} and data_size == 1
        assert gathered == [rank] and summed == [rank], "ranks of one data shard hold the same"
        assert seen["tensor_everywhere"] == ([3], [3])
        assert seen["line"] == (rank, (0, 1)) and seen["stage"] == [1 + rank]
        assert seen["edges"] == ([(0, 1), (1, 0)], True) and seen["received"] == 11 - rank
