"""The dispatchers that come with the package: local, allgather, alltoall, deepep. Imports no torch; each builds its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1mega.config.errors import UserError
from r1mega.config.knob import knob
from r1mega.registry import register

if TYPE_CHECKING:
    from r1mega.model.dispatch.contract import Dispatcher, ExpertRanks


@register("dispatcher", "alltoall")
@dataclass(frozen=True)
class AllToAll:
    """Each row goes to the rank of its expert: one exchange of counts, then one of rows, without padding. For any layout."""

    def build(self, ranks: ExpertRanks) -> Dispatcher:
        from r1mega.model.dispatch.alltoall import AllToAllDispatcher

        return AllToAllDispatcher(ranks)


@register("dispatcher", "allgather")
@dataclass(frozen=True)
class AllGather:
    """Each rank sees all tokens and keeps those of its experts. For few ranks, or where nearly every rank wants every token."""

    def build(self, ranks: ExpertRanks) -> Dispatcher:
        from r1mega.model.dispatch.allgather import AllGatherDispatcher

        return AllGatherDispatcher(ranks)


@register("dispatcher", "local")
@dataclass(frozen=True)
class Local:
    """No communication: all experts are on every rank (parallel.expert=1 and parallel.expert_tensor=1)."""

    def build(self, ranks: ExpertRanks) -> Dispatcher:
        """Raises UserError where experts are spread over ranks."""
        for name, axis in (("expert", ranks.expert), ("expert_tensor", ranks.expert_tensor)):
            if axis.size > 1:
                raise UserError(
                    f"dispatcher: local needs all experts on each rank; got parallel.{name}={axis.size}; "
                    f"use parallel.{name}=1 or dispatcher=alltoall"
                )
        from r1mega.model.dispatch.local import LocalDispatcher

        return LocalDispatcher(ranks)


@register("dispatcher", "deepep")
@dataclass(frozen=True)
class DeepEP:
    """DeepEP's kernels over NVLink and RDMA, for bf16 on Hopper GPUs; refused, with what is missing, anywhere else."""

    sms: int = knob(
        24,
        "streaming multiprocessors that the kernels may use",
        "SMs",
        rule=lambda n: n >= 2 and n % 2 == 0,
        says="even, at least 2",
    )

    def build(self, ranks: ExpertRanks) -> Dispatcher:
        """Raises UserError, a line, where the package or the hardware is missing, or experts are cut along F."""
        from r1mega.model.dispatch.deepep import DeepEPDispatcher, refuse

        refuse(ranks)
        return DeepEPDispatcher(ranks, self.sms)
