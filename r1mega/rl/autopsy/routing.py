"""Do engine and judge choose the same experts? From what the engine reports of each token, where it does. In: a case."""

from __future__ import annotations

import torch

from r1mega.rl.autopsy.case import Case, Finding

USUAL = 0.9
"""Share of a token's experts that engines of one model agree on even in low precision (Megatron-LM issue 4168 has 0.9)."""


def agreement(ours_TK: torch.Tensor, theirs_TK: torch.Tensor) -> float:
    """Share of the chosen experts that are the same, whatever their order. int ``[T, K]`` both."""
    same = (ours_TK[:, :, None] == theirs_TK[:, None, :]).any(-1)
    return float(same.float().mean()) if same.numel() else 1.0


def by_layer(case: Case) -> dict[int, float]:
    """MoE layer to agreement over the rows that report their experts; empty where none does."""
    sums: dict[int, list[float]] = {}
    for row in case.rows:
        if row.routed is None:
            continue
        ours = case.judge.routing(row)
        reported = row.routed.shape[1]
        # engines report every decoder layer, or the MoE layers alone
        place = {layer: layer if reported > len(ours) else idx for idx, layer in enumerate(sorted(ours))}
        for layer, experts_TK in ours.items():
            sums.setdefault(layer, []).append(agreement(experts_TK, row.routed[: len(experts_TK), place[layer]].long()))
    return {layer: sum(values) / len(values) for layer, values in sums.items()}


def reported(case: Case) -> list[Finding]:
    """The first layer in which the engine chose other experts. It says where, not why: nothing is explained by it alone."""
    shares = by_layer(case)
    low = [layer for layer in sorted(shares) if shares[layer] < USUAL]
    if not low:
        return []
    worst = ", ".join(f"{layer}: {shares[layer]:.0%}" for layer in low[:4])
    says = f"from layer {low[0]} on the engine chose other experts than the judge (the same ones in {worst}; mean {{before}} nats)"
    return [case.finding("routing", (f"model.layers.{low[0]}.mlp.gate",), [None] * len(case.rows), says, is_certain=True)]
