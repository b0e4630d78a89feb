"""Megatron-Core 0.16.1's distributed checkpoints, planned without collectives and written in the calling process. In: a sharded state
dict. Out: this rank's plan and the torch writer that carries it out; the format on disk is Megatron's ``torch_dist``.

| bend | symptom without it | remove when |
|---|---|---|
| the writer is torch's own FileSystemWriter | Megatron's starts a manager process by spawn (the user's script runs again) and forks: a deadlock where threads hold locks | a save asks for no process |
| plans are made by each rank alone; rank 0 joins them later (:func:`finish`) | Megatron gathers and checks them while all ranks stand still; one whose memory runs out there leaves the others waiting | as above |
| the check of owners (:func:`check`) leaves out the common state | "Rank 1 common state dict differs" at a save of several ranks: the optimizer's part lies on rank 0 alone there, by design | the check knows the gathered form |
| ``gc`` of the distributed optimizer's module collects nothing | a full collection for each part of the optimizer at each save: half a second in which nothing else runs | the call is gone |
| optimizer states that no rank shares are handed out where they lie | five copies of each on the CPU by one thread, ten seconds for the moments of 0.7B weights | as above |

Versions: megatron-core 0.16.1, torch 2.13 (``prepare_global_plan``, ``write_data`` and ``finish`` of its writer are public).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

STATES = ("param", "exp_avg", "exp_avg_sq")


def apply() -> None:
    """Bend the optimizer; safe to call again."""
    from megatron.core.optimizer import distrib_optimizer

    cls = distrib_optimizer.DistributedOptimizer
    if hasattr(cls.get_parameter_state_dp_zero, "gathers"):
        return
    distrib_optimizer.gc = SimpleNamespace(collect=lambda: 0)
    gathers = cls.get_parameter_state_dp_zero

    def states(self, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False):
        if empty_data or self.data_parallel_group.size() > 1:
            return gathers(self, use_gloo_comm, empty_data, return_on_all_ranks)
        return _whole_states(self)

    states.gathers = gathers
    cls.get_parameter_state_dp_zero = states


class _Flat(dict):
    """States of one kind by the place of their parameter in the buffer; sliced as the one long tensor that Megatron makes of them."""

    def __getitem__(self, place: slice) -> torch.Tensor:
        return super().__getitem__(place.start)


def _whole_states(optimizer: Any) -> dict[Any, Any]:
    """What ``get_parameter_state_dp_zero`` gathers, where each state is whole on this rank: fp32, flat, on its device, not copied."""
    found: dict[Any, Any] = {"buckets_coalesced": True}
    for number, by_dtype in enumerate(optimizer.gbuf_ranges):
        starts = optimizer.buffers[number].param_index_map
        for dtype, buckets in by_dtype.items():
            flat = {key: _Flat() for key in STATES}
            for parameter in (parameter for bucket in buckets for parameter in bucket["param_map"]):
                tensors = optimizer._get_main_param_and_optimizer_states(parameter)
                for key in STATES:
                    flat[key][starts[parameter][0]] = tensors[key].detach().float().flatten()
            found[number] = {dtype: flat}
    return found


@dataclass
class Plan:
    """One rank's part of a save. ``values``: what each item of the plan stands for, a tensor or bytes; ``common``: what no rank
    shards, serialised; written by rank 0. ``owned``: this rank's shards without their data, for :func:`check`.
    """

    writer: Any
    plan: Any
    values: list[torch.Tensor | io.BytesIO]
    common: bytes
    owned: list[Any]

    def write(self, at_each: Callable[[], None]) -> list[Any]:
        """Write this rank's file, flush it, and give back what :func:`finish` needs. ``at_each`` is called before each tensor."""
        held = {item.index: value for item, value in zip(self.plan.items, self.values, strict=True)}

        def resolve_data(item: Any) -> Any:
            at_each()
            return held[item.index]

        if not held:
            return []
        return self.writer.write_data(self.plan, SimpleNamespace(resolve_data=resolve_data)).value()


def plan(sharded: dict[str, Any], folder: str, rank: int) -> Plan:
    """This rank's part of saving ``sharded`` into ``folder``. No collective."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.planner import SavePlan

    class Writer(FileSystemWriter):
        @property
        def checkpoint_id(self) -> str:
            """A text as in Megatron's files; torch's own is a path object, which the index would then need to be read."""
            return folder

    shards, common = save_preprocess(sharded, validate_access_integrity=False)
    owned = [shard.without_data() for shard in nested_values(shards)]
    by_key, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(shards, keep_only_main_replica=True)
    planner = strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(strategies.mcore_to_pyt_state_dict(by_key, False), is_coordinator=rank == 0)
    # no copying ahead: on a GPU that would take streams in the writer's thread, and what is written lies on the host
    writer = Writer(folder, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(rank == 0)
    made = planner.create_decentralized_global_plan(planner.create_local_plan())
    made = writer.prepare_global_plan([*(SavePlan([]) for _ in range(rank)), made])[rank]  # named after the rank
    kept = io.BytesIO()
    if rank == 0:
        torch.save(common, kept)
    return Plan(writer, made, [planner.resolve_data(item) for item in made.items], kept.getvalue(), owned)


def check(owned: Sequence[list[Any]]) -> None:
    """See that each shard has one owner, with ``owned`` of all ranks by rank. Rank 0 alone looks, and raises Megatron's error."""
    from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

    validate_sharding_integrity(owned)


def finish(writer: Any, plans: Sequence[Any], results: Sequence[list[Any]], folder: str) -> None:
    """Write the index of what all ranks have written (``plans`` and ``results`` by rank), and Megatron's mark of the format."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner

    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner({}, is_coordinator=True)
    _, metadata = planner.create_global_plan([*plans])
    writer.finish(metadata, results)
    save_config(CheckpointingConfig("torch_dist", 1), folder)
