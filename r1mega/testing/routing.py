"""Which experts each token took, put in one order whatever the layout, and where two runs disagree outside ties.

A tie: the token's worst expert taken and best expert not taken (or its worst group kept and best group dropped) score within
:data:`TIE` of each other; rounding may turn them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

TIE = 1e-5


class RouterLog:
    """Records the choices of a rank's routers in one step."""

    def __init__(self, routers: Sequence[torch.nn.Module], mesh: Any):
        self._mesh, self._tensor = mesh, mesh.axes["tensor"]
        self._routers, self._first_row, self._batches = list(routers), 0, []
        self._calls: dict[int, int] = {}
        self._entries: list[tuple[int, int, int, list[int], float]] = []

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Nothing is recorded."""
        yield

    @contextlib.contextmanager
    def recording(self, first_row: int, batches: Sequence[Any]) -> Iterator[None]:
        """Inside, each router sees ``batches`` in their order, whose rows are counted from ``first_row``."""
        self._first_row, self._batches = first_row, batches
        hooks = [router.register_forward_hook(self._note) for router in self._routers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, router: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        if not torch.is_grad_enabled():
            return
        layer, call = router.layer_number, self._calls.get(id(router), 0)
        self._calls[id(router)] = call + 1
        batch = self._batches[call]
        rows, length = batch.tokens_BS.shape
        positions = batch.part.positions(length, torch.device("cpu"))
        step = length // self._tensor.size
        positions = positions[self._tensor.rank * step : (self._tensor.rank + 1) * step]  # sequence parallel
        first = self._first_row + sum(len(before.tokens_BS) for before in self._batches[:call])
        chosen_TE = output[1].reshape(len(positions) * rows, -1).cpu()
        with torch.no_grad():
            margins = margin(router, inputs[0]).reshape(-1).tolist()
        for token, experts in enumerate(chosen_TE):
            place, row = divmod(token, rows)  # [S, B]
            entry = (layer, first + row, int(positions[place]), experts.nonzero()[:, 0].tolist(), margins[token])
            self._entries.append(entry)

    def gathered(self) -> list:
        """Every rank's choices, sorted by layer, row, position; one entry each: (layer, row, position, experts, margin)."""
        return sorted({(e[0], e[1], e[2], tuple(e[3]), e[4]) for part in self._mesh.gather_everywhere(self._entries) for e in part})


def margin(router: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """How far each token is from another choice: the smaller of the experts' and the groups' gap, float32 ``[T]``."""
    config = router.config
    scores = router.gating(hidden).reshape(-1, config.num_moe_experts).float()
    scores = scores.sigmoid() if config.moe_router_score_function == "sigmoid" else scores.softmax(-1)
    if router.expert_bias is not None:
        scores = scores + router.expert_bias
    top_k, groups, kept = config.moe_router_topk, config.moe_router_num_groups, config.moe_router_group_topk
    gap = torch.full((len(scores),), float("inf"), device=scores.device)
    if groups:
        grouped = scores.view(len(scores), groups, -1)
        by_group = grouped.topk(top_k // kept, dim=-1).values.sum(-1)
        ranked = by_group.sort(descending=True).values
        if kept < groups:
            gap = ranked[:, kept - 1] - ranked[:, kept]
        outside = torch.ones_like(by_group).scatter(1, by_group.topk(kept, dim=-1).indices, 0.0).bool()
        scores = grouped.masked_fill(outside[..., None], float("-inf")).view_as(scores)
    ranked = scores.sort(descending=True).values
    return torch.minimum(gap, ranked[:, top_k - 1] - ranked[:, top_k]) if top_k < scores.shape[1] else gap


def disagreements(ours: list, theirs: list, tie: float = TIE) -> list[str]:
    """Tokens that took other experts, by layer, row and position; ties of the reference, closer than ``tie``, do not count."""
    mine = {tuple(entry[:3]): list(entry[3]) for entry in ours}
    found = []
    for layer, row, position, experts, gap in theirs:
        got = mine.get((layer, row, position))
        if got != list(experts) and (got is None or gap > tie):
            found.append(f"router of layer {layer} sends token {position} of row {row} to {got}, not {list(experts)}")
    if len(mine) != len(theirs):
        found.append(f"routers saw {len(mine)} tokens, not {len(theirs)}")
    return found
