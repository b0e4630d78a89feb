"""What a policy loss says about a microbatch: sums and maxima that add up over microbatches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class PolicyStats:
    """0-d fp64 tensors without gradient. Fields that begin with ``max_`` are reduced by MAX, the others by SUM.

    ``num_tokens``: tokens that count; ``num_clipped_low``, ``num_clipped_high``: those whose ratio was bound from below or above,
    dual clip included; ``num_dropped``: those that the correction or a sequence mask left out of the policy's term; ``weight_sum``
    and ``max_weight``: of the weights that correct the difference of trainer and engine, 1 without correction; ``kl_sum``: of k3 to
    the reference, in nats, whatever kind the loss has; ``max_ratio``: of the ratios that were not dropped. 0 without tokens.
    """

    num_tokens: torch.Tensor
    num_clipped_low: torch.Tensor
    num_clipped_high: torch.Tensor
    num_dropped: torch.Tensor
    kl_sum: torch.Tensor
    weight_sum: torch.Tensor
    max_ratio: torch.Tensor
    max_weight: torch.Tensor

    def sums(self) -> dict[str, torch.Tensor]:
        """Name to value of what SUM reduces."""
        return {name: getattr(self, name) for name in SUMS}

    def maxima(self) -> torch.Tensor:
        """fp64 [2]: what MAX reduces, in the order of :data:`MAXIMA`."""
        return torch.stack([getattr(self, name) for name in MAXIMA])

    def summary(self) -> dict[str, float]:
        """See :func:`summary`; of this microbatch alone."""
        values = {name: float(getattr(self, name)) for name in (*SUMS, *MAXIMA)}
        return {**summary(values), "num_tokens": values["num_tokens"]}


MAXIMA = tuple(field.name for field in fields(PolicyStats) if field.name.startswith("max_"))
SUMS = tuple(field.name for field in fields(PolicyStats) if field.name not in MAXIMA)


def summary(reduced: Mapping[str, float]) -> dict[str, float]:
    """Reduced sums (and maxima, where given) as what a metric line says.

    A share or mean of the counted tokens: ``clip_share`` with ``clip_share_low`` and ``clip_share_high``, ``dropped_share``, ``kl``
    (nats), ``is_weight``; the largest: ``ratio_max``, ``is_weight_max``.
    """
    tokens = max(reduced["num_tokens"], 1.0)
    low, high = reduced["num_clipped_low"] / tokens, reduced["num_clipped_high"] / tokens
    line = {
        "clip_share": low + high,
        "clip_share_low": low,
        "clip_share_high": high,
        "dropped_share": reduced["num_dropped"] / tokens,
        "kl": reduced["kl_sum"] / tokens,
        "is_weight": reduced["weight_sum"] / tokens,
    }
    shown = {"ratio_max": "max_ratio", "is_weight_max": "max_weight"}
    return line | {name: reduced[held] for name, held in shown.items() if held in reduced}
