"""Routing replay: an engine's record of experts, checked; which of it scoring and updates take; how far engine and trainer agree.

A record is ``[positions, layers, top_k]``: the experts of each token that was read, in every decoder layer. ``rl.routing_replay``:

- ``r3``: the engine's experts, in the scoring pass and in the updates (arXiv 2510.11370).
- ``r2``: the trainer's own of the scoring pass, in the updates.
- ``none``: every pass chooses for itself.

What is replayed is the set; the weights are the trainer's own scores inside it, so that the router learns. Tokens without a record
choose for themselves, and so do reference, teacher and MTP. A record takes ``layers x top_k`` bytes a token for at most 255 experts
and twice that above, on the host; a microbatch's goes to the device for its passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from r1mega.config.model import ModelConfig
from r1mega.mesh import Mesh
from r1mega.model.replay import Replay, absent, record_dtype
from r1mega.rl.batch import RolloutBatch
from r1mega.rl.engine.contract import RoutingRefused


@dataclass(frozen=True)
class RoutingShape:
    """What a record looks like. ``layers``: of the decoder, of which the first ``num_dense`` have no experts."""

    layers: int
    num_dense: int
    top_k: int
    num_experts: int

    @classmethod
    def of(cls, model: ModelConfig) -> RoutingShape:
        """A model's."""
        return cls(model.num_layers, model.first_k_dense, model.top_k, model.num_experts)

    def checked(self, experts: torch.Tensor | None, prompt_size: int, own: Sequence[bool]) -> torch.Tensor:
        """An engine's record of one response, in :func:`~r1mega.model.replay.record_dtype`, absent where it says nothing that can
        be replayed: dense layers, numbers of no expert, one expert twice (what a server's buffer holds where nobody wrote).

        ``own``: for each response token whether the policy drew it. Raises RoutingRefused unless every position that such a token
        is predicted from has a record in every layer with experts.
        """

        def refuse(rule: str, got: str) -> RoutingRefused:
            way_out = "see the server's log, or use rl.routing_replay=none engine.routed_experts=false"
            return RoutingRefused(f"engine.routed_experts: {rule}; got {got}; {way_out}")

        if experts is None:
            raise refuse("each response comes with its experts", "none")
        if tuple(experts.shape[1:]) != (self.layers, self.top_k):
            raise refuse(f"experts are [positions, {self.layers} layers, {self.top_k}]", f"{list(experts.shape)}")
        predicts = torch.tensor([False] * (prompt_size - 1) + list(own))
        wanted = int(predicts.nonzero().max()) + 1 if predicts.any() else 0
        if len(experts) < wanted:
            raise refuse(f"experts of all {wanted} positions that tokens are predicted from", f"those of {len(experts)}")
        moe = experts[:, self.num_dense :].to(torch.int16)
        ranked = moe.sort(dim=-1).values
        is_there = (
            (ranked[..., 1:] != ranked[..., :-1]).all(dim=-1) & (ranked >= 0).all(dim=-1) & (ranked < self.num_experts).all(dim=-1)
        )
        faults = (~is_there[:wanted] & predicts[:wanted, None]).nonzero()
        if len(faults):
            place, layer = faults[0].tolist()
            rule = f"{self.top_k} different experts below {self.num_experts} in every layer"
            raise refuse(rule, f"{moe[place, layer].tolist()} in layer {self.num_dense + layer} at position {place}")
        dtype = record_dtype(self.num_experts)
        record = torch.full(experts.shape, absent(dtype), dtype=dtype)
        record[:, self.num_dense :] = moe.to(dtype).where(is_there[..., None], absent(dtype))
        return record


class Scoring:
    """Routes of a scoring pass (see :class:`r1mega.train.policy.Routes`). Afterwards :meth:`agreement` says how often routers chose
    as the engine; with ``r2`` the rows have their own choices in ``replay``."""

    def __init__(self, mode: str, layers: int, device: torch.device):
        self.mode, self.layers, self._device = mode, layers, device
        self._counts_L2 = torch.zeros(layers, 2, dtype=torch.int64, device=device)

    def begin(self, batch: RolloutBatch) -> Replay:
        """The engine's record: to be taken, or to be compared with."""
        return Replay(_on(self._device, batch.routing_BSLK), forced=self.mode == "r3", keeps=self.mode == "r2")

    def end(self, batch: RolloutBatch, replay: Replay) -> None:
        """Count, and keep what was chosen."""
        for layer, counts in replay.agreement.items():
            self._counts_L2[layer] += counts
        if self.mode == "r2":
            own_BSLK = replay.own_BSLK(batch.tokens_BS, self.layers)
            if own_BSLK is None:  # a stage without experts
                return
            whole_BSLK = batch.part.gather(own_BSLK).cpu()
            for row, record in zip(batch.rows, whole_BSLK, strict=True):
                row.replay = record[: row.size - 1].clone()

    def agreement(self, mesh: Mesh) -> list[float]:
        """Over all ranks, for each layer with experts: of the tokens that have a record, the share whose experts the trainer's
        router would choose by itself, its input being that of this pass. Empty where no token has one. Called by all ranks."""
        counts = mesh.sum(self._counts_L2.clone(), "tensor", "context", "pipeline", "data").tolist()
        return [same / given for given, same in counts if given]


class Updating:
    """Routes of an update with a replay: whatever the rows' record is, is taken."""

    def __init__(self, device: torch.device):
        self._device = device

    def begin(self, batch: RolloutBatch) -> Replay:
        """The record."""
        return Replay(_on(self._device, batch.routing_BSLK), forced=True)

    def end(self, batch: RolloutBatch, replay: Replay) -> None:
        """Nothing."""


def _on(device: torch.device, routing_BSLK: torch.Tensor | None) -> torch.Tensor | None:
    return None if routing_BSLK is None else routing_BSLK.to(device, non_blocking=True)
