"""Strategies that are wrong on purpose, for the parity kit to reject: one drops a token, one scales a gradient by 2."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from r1mega.model.dispatch import AllToAll


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class _Wrong:
    def __init__(self, right: Any):
        self._right = right

    def __getattr__(self, name: str) -> Any:
        return getattr(self._right, name)


class _Dropping(_Wrong):
    def combine(self, rows_RD, route):
        out_TD = self._right.combine(rows_RD, route)
        keep_T1 = torch.ones(len(out_TD), 1, dtype=out_TD.dtype)
        keep_T1[3] = 0
        return out_TD * keep_T1


class _Doubling(_Wrong):
    def dispatch(self, hidden_TD, probs_TE, routing_map_TE):
        sent = self._right.dispatch(hidden_TD, probs_TE, routing_map_TE)
        return dataclasses.replace(sent, probs_R=_Twice.apply(sent.probs_R))


@dataclass(frozen=True)
class DropsAToken:
    """The fourth token of each layer's call gets nothing from its experts."""

    def build(self, ranks: Any) -> Any:
        return _Dropping(AllToAll().build(ranks))


@dataclass(frozen=True)
class DoublesAGradient:
    """What the probabilities learn is twice what they should."""

    def build(self, ranks: Any) -> Any:
        return _Doubling(AllToAll().build(ranks))
