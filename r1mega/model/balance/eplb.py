"""Expert placement from measured load, as pure functions on plain numbers; deterministic, ties go to the lower index.

After DeepSeek's EPLB (arXiv 2412.19437, section 3.4; github.com/deepseek-ai/EPLB describes both policies). Hierarchical, where the
groups of node-limited routing divide over the nodes: whole groups to nodes, redundant experts inside each node, then slots to
ranks, so that a token's kept groups lie on few nodes. Global otherwise: one node. On top of its greedy packing: swaps that lower
the busiest rank, and without redundancy the plain order where that is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from r1mega.config.errors import UserError


class Balance(NamedTuple):
    """``slots_LP``: the expert of each of P slots, sorted by rank, P / ranks a rank. ``replicas_LE``: slots of an expert, sum P.
    ``slots_of_LE``: the slots of an expert in ascending order.
    """

    slots_LP: list[list[int]]
    replicas_LE: list[list[int]]
    slots_of_LE: list[list[list[int]]]


def balance_experts(
    load_LE: Sequence[Sequence[float]], num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int
) -> Balance:
    """Place ``num_replicas`` (P, at least E) slots of the E experts on ranks so that the busiest rank has little.

    ``load_LE``: load by layer and expert, 0 or more, any unit; an expert's load is split evenly over its slots. ``num_groups``:
    groups of the router (experts of a group are neighbours). Raises UserError where the numbers do not divide.
    """
    num_experts = len(load_LE[0]) if load_LE else 0
    _check(load_LE, num_experts, num_replicas, num_groups, num_nodes, num_ranks)
    nodes, groups = (num_nodes, num_groups) if num_groups % num_nodes == 0 else (1, 1)
    slots_LP, replicas_LE, slots_of_LE = [], [], []
    for load in load_LE:
        slots = _one_layer([float(value) for value in load], num_replicas, groups, nodes, num_ranks)
        of: list[list[int]] = [[] for _ in range(num_experts)]
        for slot, expert in enumerate(slots):
            of[expert].append(slot)
        slots_LP.append(slots)
        replicas_LE.append([len(own) for own in of])
        slots_of_LE.append(of)
    return Balance(slots_LP, replicas_LE, slots_of_LE)


def rank_loads(load_E: Sequence[float], slots_P: Sequence[int], num_ranks: int) -> list[float]:
    """Each rank's load under a placement; an expert's load is split evenly over its slots."""
    replicas = [0] * len(load_E)
    for expert in slots_P:
        replicas[expert] += 1
    size = len(slots_P) // num_ranks
    return [sum(load_E[x] / replicas[x] for x in slots_P[rank * size : (rank + 1) * size]) for rank in range(num_ranks)]


def balancedness(load_E: Sequence[float], slots_P: Sequence[int], num_ranks: int) -> float:
    """Mean over maximum of the ranks' loads: 1 where all have the same, 1 / ranks where one has everything; 1 without load."""
    loads = rank_loads(load_E, slots_P, num_ranks)
    return sum(loads) / num_ranks / max(loads) if max(loads) > 0 else 1.0


def replicate(load: Sequence[float], num_replicas: int) -> list[int]:
    """Slots an expert: one each, then each further one to the expert with most load a slot. The largest share is the least
    possible."""
    count = [1] * len(load)
    for _ in range(num_replicas - len(load)):
        count[max(range(len(load)), key=lambda x: (load[x] / count[x], -x))] += 1
    return count


def pack(weights: Sequence[float], num_bins: int) -> list[list[int]]:
    """Items to bins of the same number of items: the heaviest first, each into the lightest bin with room; then swaps."""
    room = len(weights) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        open_bins = [b for b in range(num_bins) if len(bins[b]) < room]
        bins[min(open_bins, key=lambda b: (sum(weights[i] for i in bins[b]), b))].append(item)
    while _swap(weights, bins):
        pass
    return [sorted(own) for own in bins]


def _swap(weights: Sequence[float], bins: list[list[int]]) -> bool:
    """Exchange the pair of items that lowers the heavier of the busiest bin and another the most; False where none does."""
    loads = [sum(weights[i] for i in own) for own in bins]
    top = max(range(len(bins)), key=lambda b: (loads[b], -b))
    best = (loads[top] * (1 - 1e-9), -1, -1, -1)  # a gain within rounding is none, and could go round in circles
    for other in range(len(bins)):
        for i, mine in enumerate(bins[top]):
            for j, theirs in enumerate(bins[other] if other != top else []):
                gone = weights[mine] - weights[theirs]
                best = min(best, (max(loads[top] - gone, loads[other] + gone), other, i, j))
    _, other, i, j = best
    if other < 0:
        return False
    bins[top][i], bins[other][j] = bins[other][j], bins[top][i]
    return True


def _one_layer(load: list[float], num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int) -> list[int]:
    group_size, ranks_per_node = len(load) // num_groups, num_ranks // num_nodes
    group_load = [sum(load[g * group_size : (g + 1) * group_size]) for g in range(num_groups)]
    slots: list[int] = []
    for groups in pack(group_load, num_nodes):
        experts = [g * group_size + i for g in groups for i in range(group_size)]
        count = replicate([load[x] for x in experts], num_replicas // num_nodes)
        copies = [(x, load[x] / n) for x, n in zip(experts, count, strict=True) for _ in range(n)]
        for own in pack([share for _, share in copies], ranks_per_node):
            slots += [copies[i][0] for i in own]
    plain = list(range(len(load)))
    if num_replicas == len(load) and balancedness(load, plain, num_ranks) >= balancedness(load, slots, num_ranks):
        return plain
    return slots


def _check(load_LE, num_experts, num_replicas, num_groups, num_nodes, num_ranks) -> None:
    rules = (
        ("load_LE", all(len(load) == num_experts for load in load_LE), "as many experts in every layer", [len(x) for x in load_LE]),
        (
            "load_LE",
            all(0 <= value < float("inf") for load in load_LE for value in load),
            "loads are finite and at least 0",
            "another",
        ),
        ("num_replicas", num_replicas >= num_experts, f"at least one slot for each of {num_experts} experts", num_replicas),
        ("num_ranks", num_replicas % num_ranks == 0, f"divides num_replicas {num_replicas}", num_ranks),
        ("num_nodes", num_ranks % num_nodes == 0, f"divides num_ranks {num_ranks}", num_nodes),
        ("num_groups", num_experts % num_groups == 0, f"divides the {num_experts} experts", num_groups),
    )
    for name, holds, rule, got in rules:
        if not holds:
            raise UserError(f"balance.{name}: {rule}; got {got}; change one of the two")
