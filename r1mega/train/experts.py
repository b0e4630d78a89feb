"""Where the experts of a run lie: the load measured since they last moved, and new places at a checkpoint.

Owns the placements of the decoder's MoE layers, for all stages on every rank; the MTP block's experts stay where they are. In:
each step's load by logical expert, the same on all ranks; out: a :class:`Proposal` where the balancer is asked, and the layers'
``placement``. Weights and moments move by a checkpoint, which is in logical order: save, :meth:`Placements.put`, load.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from r1mega import registry
from r1mega.config.errors import UserError
from r1mega.config.train import PretrainConfig, SftConfig
from r1mega.mesh import Mesh
from r1mega.model.balance import Proposal, Unmoved
from r1mega.train.trainee import Trainee


class Placements:
    """Of one run. Raises UserError where the choice of balance would never have a load to move with."""

    def __init__(self, config: PretrainConfig | SftConfig, trainee: Trainee):
        self.trainee, model = trainee, trainee.model_config
        self.num_experts, self.num_groups = model.num_experts, model.num_groups
        self.first_layer, self.num_layers = model.first_k_dense + 1, model.num_layers - model.first_k_dense
        self.num_ranks = trainee.mesh.axes["expert"].size
        self.num_nodes = _nodes(trainee.mesh, config.launch.hosts)
        self.balancer = config.balance.build()
        self.active = not isinstance(config.balance, Unmoved)
        self._reset()
        if self.active and not model.use_expert_bias:  # of a checkpoint's model; the config's has its rule
            raise UserError(
                f"model.use_expert_bias: true with balance={registry.name_of('balance', config.balance)}, whose load is what the "
                "bias counts; got false; use balance=none"
            )

    def _reset(self) -> None:
        self.placements = [tuple(range(self.num_experts))] * self.num_layers
        self._forget()

    def _forget(self) -> None:
        self.load_LE = [[0.0] * self.num_experts for _ in range(self.num_layers)]
        self.steps = 0

    def measure(self, load_LE: list[list[float]]) -> None:
        """Take a step's shares of assignments, ``StepResult.expert_load``, into account."""
        if self.active and load_LE:
            self.load_LE = [
                [held + new for held, new in zip(*rows, strict=True)] for rows in zip(self.load_LE, load_LE, strict=True)
            ]
            self.steps += 1

    def consider(self, checkpoint: int) -> Proposal | None:
        """Ask the balancer at the ``checkpoint``-th save (from 1); None where it is not its turn or nothing was measured.

        What moves lies in its new place for :meth:`state_dict` at once, and for the model with :meth:`put`.
        """
        if not (self.active and self.steps and self.balancer.due(checkpoint)):
            return None
        mean_LE = [[total / self.steps for total in row] for row in self.load_LE]
        found = self.balancer.propose(mean_LE, self.placements, self.num_ranks, self.num_nodes, self.num_groups)
        found = self.trainee.mesh.broadcast_object(found)  # one decision, whatever a balancer from outside makes of it
        if found.moves:
            self.placements = [tuple(place) for place in found.placements]
            self._forget()
        return found

    def put(self) -> None:
        """Tell this rank's MoE layers where experts lie. Their weights and moments are wrong until a checkpoint is loaded."""
        for layer, experts in self._layers():
            experts.placement = self.placements[layer - self.first_layer]

    def _layers(self) -> Iterator[tuple[int, torch.nn.Module]]:
        """The number of each decoder layer with experts in the whole model, from 1, and its experts."""
        for stage in self.trainee.stages:
            for layer in stage.decoder.layers:
                if hasattr(layer.mlp, "experts"):
                    yield layer.layer_number, layer.mlp.experts

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; JSON. Empty where nothing can move."""
        if not self.active:
            return {}
        return {"ranks": self.num_ranks, "placements": self.placements, "load": self.load_LE, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` gave, to the model too; the checkpoint is to be loaded after it.

        Places that were found for another number of ranks, and all where nothing moves (any more), are the logical order again.
        """
        self._reset()
        shape = [len(row) for row in state.get("load", ())]
        if self.active and shape == [self.num_experts] * self.num_layers:  # of another model the load itself tells
            self.load_LE, self.steps = state["load"], state["steps"]
            if state["ranks"] == self.num_ranks:
                self.placements = [tuple(place) for place in state["placements"]]
        self.put()


def _nodes(mesh: Mesh, hosts: int) -> int:
    """Hosts that the ranks of ``expert`` lie on, where each has as many neighbours of them; otherwise 1, any place is as good."""
    if mesh.world_size % hosts:
        return 1
    line, size = mesh.axes["expert"].ranks, mesh.world_size // hosts
    at = [rank // size for rank in line]
    nodes = len(set(at))
    each = len(line) // nodes
    return nodes if at == [at[index * each] for index in range(nodes) for _ in range(each)] and each * nodes == len(line) else 1
