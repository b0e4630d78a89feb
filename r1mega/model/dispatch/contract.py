"""What a dispatcher is: it brings each token to the ranks of its experts, and the sum of their answers back. Imports no torch.

A choice of the kind ``dispatcher`` has ``build(ranks: ExpertRanks) -> Dispatcher``. One dispatcher serves a MoE layer; it keeps
nothing from one call to the next, since a pipeline has several microbatches between forward and backward.

:func:`r1mega.testing.dispatch_contract.check_dispatcher` runs a choice against ``local``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from r1mega.mesh import Axis


@dataclass(frozen=True)
class ExpertRanks:
    """Where the ``E`` experts of a layer are. Expert ``x`` lies in slot ``x % e`` of rank ``x // e`` of the axis ``expert``.

    ``expert``: this rank's line of ranks with different experts. ``expert_tensor``: its line of ranks that hold parts of the same
    experts, cut along ``F``. All of them have different tokens. ``top_k``: experts of each token, where all tokens have as many;
    None otherwise.
    """

    num_experts: int
    expert: Axis
    expert_tensor: Axis
    top_k: int | None = None

    @property
    def num_local_experts(self) -> int:
        """``e``: slots of a rank."""
        return self.num_experts // self.expert.size

    @property
    def local_slice(self) -> slice:
        """This rank's columns among those of all experts."""
        return slice(self.expert.rank * self.num_local_experts, (self.expert.rank + 1) * self.num_local_experts)


@dataclass(frozen=True)
class Dispatched:
    """What a rank's experts are given.

    ``rows_RD``: a row for each (token, expert) of any rank whose expert is here, sorted by local expert. ``tokens_per_expert``:
    int64 ``[e]``, sum R. ``probs_R``: the router's probability of each row. ``route``: what :meth:`Dispatcher.combine` needs to go
    back.
    """

    rows_RD: torch.Tensor
    tokens_per_expert: torch.Tensor
    probs_R: torch.Tensor
    route: Any


class Dispatcher(Protocol):
    """Both ways are differentiable: in ``hidden_TD`` and ``probs_TE``, and in ``rows_RD``. All ranks of both axes call together.

    A dispatcher may have an attribute ``is_local``: True says that its ranks have all experts, so that the layer may leave both
    ways out and hand the experts tokens (experts in FP8 quantise them on the way to their rows).

    A dispatcher whose host has to wait for the device may also have :meth:`dispatch` in two halves: ``begin``, with the same
    arguments, queues what it can without a wait and returns the rest as a function. The layer calls it through
    :func:`begin_dispatch` and lets the device compute its shared experts before the second half waits.
    """

    def dispatch(self, hidden_TD: torch.Tensor, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor) -> Dispatched:
        """This rank's tokens out, rows for its experts in. ``routing_map_TE``: bool, True where token t goes to expert e.

        T may be 0, and differ between ranks; only chosen entries of ``probs_TE`` count. Nothing is dropped, nothing padded.
        """
        ...

    def combine(self, rows_RD: torch.Tensor, route: Any) -> torch.Tensor:
        """The experts' answers (in the order of the dispatched rows) summed to each token: ``[T, D]`` on the token's rank.

        Where experts are cut along F, ``rows_RD`` are this rank's part of the answers and the sum is over the parts too.
        """
        ...


def begin_dispatch(
    dispatcher: Dispatcher, hidden_TD: torch.Tensor, probs_TE: torch.Tensor, routing_map_TE: torch.Tensor
) -> Callable[[], Dispatched]:
    """The first half of ``dispatch``, and the second as a function; all of it is the second half where there is no ``begin``.

    A class that has a ``dispatch`` of its own and inherits ``begin``, or forwards to another's, means its own.
    """
    for cls in type(dispatcher).__mro__:
        if "begin" in vars(cls):
            return dispatcher.begin(hidden_TD, probs_TE, routing_map_TE)
        if "dispatch" in vars(cls):
            break
    return lambda: dispatcher.dispatch(hidden_TD, probs_TE, routing_map_TE)
