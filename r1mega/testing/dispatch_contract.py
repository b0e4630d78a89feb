"""What every dispatcher must do, as one check that runs on any number of ranks: what it sends and brings back equals ``local``.

Each rank knows all ranks' tokens (they are drawn from seeds), computes with ``local`` and whole experts what must come out, and
compares. A fault on any rank is an AssertionError on all of them that names choice, case, rank and tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from r1mega.mesh import Axis
from r1mega.model.dispatch.contract import Dispatched, ExpertRanks
from r1mega.model.dispatch.local import LocalDispatcher

EXPERTS, HIDDEN, WIDTH = 8, 6, 8
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 5e-2}
ALONE = Axis(0, 1, (0,), None)  # a line of one rank never asks for its group


@dataclass(frozen=True)
class DispatchCase:
    """``route(draw, T)`` gives the bool map ``[T, E]``; ``tokens(rank)``: how many; ``top_k``: the promise that the layer makes."""

    name: str
    route: Callable[[torch.Generator, int], torch.Tensor]
    tokens: Callable[[int], int] = lambda rank: 7
    top_k: int | None = None


def _top(draw: torch.Generator, count: int, k: int = 2, experts: int = EXPERTS) -> torch.Tensor:
    chosen = torch.rand(count, EXPERTS, generator=draw)[:, :experts].topk(k, dim=1).indices
    return torch.zeros(count, EXPERTS, dtype=torch.bool).scatter_(1, chosen, True)


def _one(draw: torch.Generator, count: int) -> torch.Tensor:
    return torch.zeros(count, EXPERTS, dtype=torch.bool).index_fill_(1, torch.tensor([EXPERTS - 1]), True)


def _grouped(draw: torch.Generator, count: int) -> torch.Tensor:
    """Node-limited: two experts of each of 2 groups out of 4, as the router of DeepSeek-V3 limits them."""
    kept = torch.rand(count, 4, generator=draw).topk(2, dim=1).indices
    return torch.zeros(count, 4, dtype=torch.bool).scatter_(1, kept, True).repeat_interleave(EXPERTS // 4, dim=1)


CASES = (
    DispatchCase("top 2", _top),
    DispatchCase("top 2, promised", _top, top_k=2),
    DispatchCase("node-limited", _grouped, top_k=4),
    DispatchCase("any number of experts", lambda draw, T: torch.rand(T, EXPERTS, generator=draw) < 0.3, lambda rank: 3 + 4 * rank),
    DispatchCase("empty experts", lambda draw, T: _top(draw, T, experts=3)),
    DispatchCase("all tokens to one expert", _one, top_k=1),
    DispatchCase("no expert chosen", lambda draw, T: torch.zeros(T, EXPERTS, dtype=torch.bool)),
    DispatchCase("no tokens on the first rank", _top, lambda rank: 5 * bool(rank)),
    DispatchCase("one token on the first rank, none elsewhere", _top, lambda rank: int(not rank), top_k=2),
    DispatchCase("no tokens", _top, lambda rank: 0, top_k=2),
)


def check_dispatcher(
    choice: Any,
    expert: Axis = ALONE,
    expert_tensor: Axis = ALONE,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> None:
    """Dispatch then combine equals ``local`` on the same tokens, gradients too; rows go to chosen experts and nowhere else.

    All ranks of both axes call it together, ranks ordered ``expert_tensor`` first (:func:`expert_axes`). ``choice``: of the kind
    ``dispatcher``. Besides :data:`CASES`: two microbatches at once, and the same bits twice.
    """
    name = type(choice).__name__
    for case in CASES:
        ranks = ExpertRanks(EXPERTS, expert, expert_tensor, case.top_k)
        trial = _Trial(ranks, case, dtype, torch.device(device))
        dispatcher = choice.build(ranks)
        _agree(ranks, f"{name}, {case.name}", trial.faults(dispatcher))
        _agree(ranks, f"{name}, {case.name}, again", trial.faults_of_repetition(dispatcher))
    _agree(ranks, f"{name}, two microbatches at once", _faults_in_flight(choice, ranks, dtype, torch.device(device)))


def expert_axes(expert: int, expert_tensor: int) -> tuple[Axis, Axis]:
    """The axes ``expert`` and ``expert_tensor`` of these sizes over all ranks of the open process group; all ranks call
    together."""
    me, world = dist.get_rank(), dist.get_world_size()
    block = expert * expert_tensor
    if world % block:
        raise ValueError(f"expert_axes: expert x expert_tensor divides the ranks; got {expert} x {expert_tensor} for {world}")
    lines = {"expert": [], "expert_tensor": []}
    for start in range(0, world, block):
        lines["expert"] += [[start + part + expert_tensor * i for i in range(expert)] for part in range(expert_tensor)]
        lines["expert_tensor"] += [[start + expert_tensor * i + part for part in range(expert_tensor)] for i in range(expert)]
    found = {}
    for name, groups in lines.items():
        for ranks in groups:
            group = dist.new_group(ranks)
            if me in ranks:
                found[name] = Axis(ranks.index(me), len(ranks), tuple(ranks), group)
    return found["expert"], found["expert_tensor"]


def _agree(ranks: ExpertRanks, where: str, faults: list[str]) -> None:
    """Raise on all ranks what any found first, so that none waits for one that has gone."""
    said = [f"rank {ranks.expert.rank}/{ranks.expert_tensor.rank}: {fault}" for fault in faults[:1]]
    for axis in (ranks.expert, ranks.expert_tensor):
        if axis.size > 1:
            box: list[Any] = [None] * axis.size
            dist.all_gather_object(box, said, group=axis.group)
            said = [text for part in box for text in part]
    if said:
        raise AssertionError(f"dispatcher {where}: {said[0]}")


class _Trial:
    """One case: the tokens of all ranks, what must come out on this one, and the comparison."""

    def __init__(self, ranks: ExpertRanks, case: DispatchCase, dtype: torch.dtype, device: torch.device):
        self.ranks, self.case, self.dtype, self.device = ranks, case, dtype, device
        parts = ranks.expert_tensor.size
        self.me = ranks.expert_tensor.rank + parts * ranks.expert.rank
        self.tokens = [self._tokens(rank) for rank in range(ranks.expert.size * parts)]
        draw = torch.Generator().manual_seed(77)
        self.weight1 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=draw, dtype=torch.float64).to(device, dtype)
        self.weight2 = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=draw, dtype=torch.float64).to(device, dtype)

    def _tokens(self, rank: int):
        draw = torch.Generator().manual_seed(rank)
        count = self.case.tokens(rank)
        hidden = torch.randn(count, HIDDEN, generator=draw, dtype=torch.float64)
        hidden[:, 0] = torch.arange(count) + 20 * rank  # who a row is
        chosen = self.case.route(draw, count)
        probs = torch.rand(count, EXPERTS, generator=draw, dtype=torch.float64)
        weight = torch.randn(count, HIDDEN, generator=draw, dtype=torch.float64)
        kind = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        return hidden.to(self.device, self.dtype), probs.to(self.device, kind), chosen.to(self.device), weight.to(self.device)

    def _wanted(self) -> dict[str, torch.Tensor]:
        """This rank's output and gradients by ``local`` with whole experts; the gradients of the weights are sums over all
        ranks."""
        weights = [w.clone().requires_grad_() for w in (self.weight1, self.weight2)]
        wanted = {}
        for rank, (hidden, probs, chosen, weight) in enumerate(self.tokens):
            local = LocalDispatcher(ExpertRanks(EXPERTS, ALONE, ALONE))
            leaves = hidden.clone().requires_grad_(), probs.clone().requires_grad_()
            sent = local.dispatch(*leaves, chosen)
            output = local.combine(_experts(sent, *weights), sent.route)
            (output * weight).sum().backward()
            if rank == self.me:
                wanted = {"output": output.detach(), "gradient of hidden": leaves[0].grad, "gradient of probs": leaves[1].grad}
        here = self.ranks.local_slice
        wanted["gradient of weight1"] = _part(weights[0].grad[here], 1, 2, self.ranks.expert_tensor)
        wanted["gradient of weight2"] = _part(weights[1].grad[here], 2, 1, self.ranks.expert_tensor)
        return wanted

    def got(self, dispatcher: Any) -> tuple[Dispatched, dict[str, torch.Tensor]]:
        """What ``dispatcher`` makes of this rank's tokens."""
        hidden, probs, chosen, weight = self.tokens[self.me]
        leaves = hidden.clone().requires_grad_(), probs.clone().requires_grad_()
        weights = self.shards()
        sent = dispatcher.dispatch(*leaves, chosen)
        output = dispatcher.combine(_experts(sent, *weights), sent.route)
        (output * weight).sum().backward()
        found = {"output": output.detach(), "gradient of hidden": leaves[0].grad, "gradient of probs": leaves[1].grad}
        return sent, found | {f"gradient of weight{i + 1}": w.grad for i, w in enumerate(weights)}

    def shards(self) -> list[torch.Tensor]:
        """This rank's part of its experts' weights, as leaves."""
        here, parts = self.ranks.local_slice, self.ranks.expert_tensor
        cuts = _part(self.weight1[here], 1, 2, parts), _part(self.weight2[here], 2, 1, parts)
        return [cut.clone().requires_grad_() for cut in cuts]

    def faults(self, dispatcher: Any) -> list[str]:
        sent, found = self.got(dispatcher)
        return self._faults_of_rows(sent) + [
            fault for name, want in self._wanted().items() if (fault := _difference(name, found[name], want, self.dtype))
        ]

    def _faults_of_rows(self, sent: Dispatched) -> list[str]:
        first, e = self.ranks.local_slice.start, self.ranks.num_local_experts
        rows, counts = sent.rows_RD.detach(), sent.tokens_per_expert
        if counts.shape != (e,) or counts.dtype != torch.int64:
            return [f"tokens_per_expert: int64 [{e}]; got {counts.dtype} {list(counts.shape)}"]
        if int(counts.sum()) != len(rows) or len(sent.probs_R) != len(rows):
            return [f"rows_RD: a row and a probability a count, {int(counts.sum())}; got {len(rows)} and {len(sent.probs_R)}"]
        if rows.dtype != self.dtype:
            return [f"rows_RD: the dtype of the tokens, {self.dtype}; got {rows.dtype}"]
        for local, own in enumerate(rows.split(counts.tolist())):
            wanted = torch.cat([hidden[chosen[:, first + local], 0] for hidden, _, chosen, _ in self.tokens])
            if not torch.equal(own[:, 0].sort().values, wanted.sort().values):
                has, needs = sorted(own[:, 0].tolist()), sorted(wanted.tolist())
                return [f"rows_RD: expert {first + local} gets the tokens that chose it, {needs}; got {has}"]
        return []

    def faults_of_repetition(self, dispatcher: Any) -> list[str]:
        first, second = self.got(dispatcher)[1], self.got(dispatcher)[1]
        return [f"{name}: the same bits twice; got others" for name in first if not torch.equal(first[name], second[name])]


def _faults_in_flight(choice: Any, ranks: ExpertRanks, dtype: torch.dtype, device: torch.device) -> list[str]:
    """A pipeline's order: a second microbatch leaves before the first is back.

    The second has the first's choices in reverse order: all sizes are the same, and a mix-up is a wrong value, not a crash on one
    rank.
    """
    dispatcher = choice.build(ranks)
    case = DispatchCase("", _top, lambda rank: 4 + rank, top_k=ranks.top_k)
    trials = [_Trial(ranks, case, dtype, device) for _ in range(2)]
    trials[1].tokens = [(hidden, probs.flip(0), chosen.flip(0), weight) for hidden, probs, chosen, weight in trials[1].tokens]
    alone = [trial.got(dispatcher)[1]["output"] for trial in trials]
    sent = [dispatcher.dispatch(*trial.tokens[trial.me][:3]) for trial in trials]
    outputs = [dispatcher.combine(_experts(s, *trial.shards()), s.route) for s, trial in zip(sent, trials, strict=True)]
    return [fault for got, want in zip(outputs, alone, strict=True) if (fault := _difference("output", got.detach(), want, dtype))]


def _difference(name: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> str:
    if got is None or got.shape != want.shape:
        return f"{name}: shape {list(want.shape)}; got {None if got is None else list(got.shape)}"
    size = float(want.double().norm())
    off = float((got.double() - want.double()).norm())
    if off <= TOLERANCE[dtype] * max(size, 1.0):
        return ""
    return f"{name}: equal to local's within {TOLERANCE[dtype]:g} of its norm {size:.4g}; got a difference of {off:.4g}"


def _part(weight: torch.Tensor, dim: int, halves: int, axis: Axis) -> torch.Tensor:
    """This rank's cut along F (``dim``), of each of the ``halves`` (gate and up) on its own."""
    return torch.cat([half.chunk(axis.size, dim)[axis.rank] for half in weight.chunk(halves, dim)], dim)


def _experts(sent: Dispatched, weight1: torch.Tensor, weight2: torch.Tensor) -> torch.Tensor:
    """``down(silu(gate x) * up x * prob)`` of each expert on its rows."""
    counts = sent.tokens_per_expert.tolist()
    outputs = []
    for rows, probs, up, down in zip(sent.rows_RD.split(counts), sent.probs_R.split(counts), weight1, weight2, strict=True):
        gate, value = F.linear(rows, up).chunk(2, dim=-1)
        outputs.append(F.linear((F.silu(gate) * value * probs.unsqueeze(1)).to(rows.dtype), down))
    return torch.cat(outputs)
