"""What became of a tensor: the trainer's content against the engine's, in words. And the changes that a search may assume.

In: fp32 or other tensors under published names. Out: :class:`Change`; quantised copies. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from r1mega.ops.quantize import BLOCK, quantize_blocks

BIAS = "e_score_correction_bias"
EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(\w+)\.weight")
E4M3_STEP = 2.0**-4
"""Largest relative rounding of a normal E4M3 number."""


@dataclass(frozen=True)
class Change:
    """``kind``: of the finding that it makes; ``what``: in words, of the tensor ``name``; ``rank``: the lower the more definite."""

    name: str
    kind: str
    what: str
    rank: int


def rounded_fp8(weight: torch.Tensor, power_of_two: bool = False) -> torch.Tensor:
    """A matrix as an engine in FP8 has it: E4M3 in blocks of 128x128, read back in fp32."""
    made = quantize_blocks(weight.float().contiguous(), power_of_two)
    return made.payload.float() * spread(made.scales, weight)


def scales_of(weight: torch.Tensor) -> torch.Tensor:
    """The blocks' scales, each number's."""
    return spread(quantize_blocks(weight.float().contiguous()).scales, weight)


def spread(scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[ceil(N/128), ceil(K/128)]`` to ``[N, K]``."""
    whole = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return whole[: weight.shape[0], : weight.shape[1]]


def described(
    name: str,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    older: Mapping[int, Mapping[str, torch.Tensor]],
) -> Change:
    """What ``theirs`` is to ``ours``. ``weights``: all of the trainer's; ``older``: version to those of earlier checkpoints."""
    ours, theirs = ours.float(), theirs.float()
    layer = name.split(".")[2] if name.startswith("model.layers.") else ""
    if name.endswith(BIAS):
        if not theirs.any():
            return Change(name, "routing", f"the expert bias of layer {layer} is missing (all 0)", 0)
        if torch.equal(theirs.sort().values, ours.sort().values):
            return Change(name, "routing", f"the expert bias of layer {layer} is permuted", 0)
    if found := EXPERT.fullmatch(name):
        for other, tensor in weights.items():
            same = EXPERT.fullmatch(other)
            if same and other != name and same[1] == found[1] and same[3] == found[3] and torch.equal(tensor.float(), theirs):
                return Change(name, "routing", f"expert {found[2]} of layer {layer} has the {found[3]} of expert {same[2]}", 0)
    for version, tensors in sorted(older.items(), reverse=True):
        if name in tensors and torch.equal(tensors[name].to(theirs.dtype), theirs):
            return Change(name, "weights", f"{name} is that of version {version}", 0)
    if not theirs.any():
        return Change(name, "weights", f"{name} is all 0", 1)
    factor = scaled(ours, theirs)
    if factor is not None:
        return Change(name, "quantisation", f"{name} is scaled by {factor:.3g}: a wrong scale", 1)
    if ours.ndim == 2 and torch.equal(theirs, ours.bfloat16().float()):
        return Change(name, "rounding", f"{name} is rounded to bf16", 3)
    if ours.ndim == 2 and fits_fp8(ours, theirs):
        return Change(name, "quantisation", f"{name} is rounded to FP8", 3)
    if ours.shape == theirs.shape and torch.equal(theirs.flatten().sort().values, ours.flatten().sort().values):
        return Change(name, "weights", f"{name} has its numbers in another order", 1)
    distance = float((theirs - ours).norm() / ours.norm().clamp(min=1e-30))
    return Change(name, "weights", f"{name} is another one ({distance:.2g} of its norm away)", 2)


def scaled(ours: torch.Tensor, theirs: torch.Tensor) -> float | None:
    """The factor, other than 1, that makes one of the other up to FP8's rounding; None where there is none."""
    if ours.ndim != 2:
        return None
    worst = None
    for down in range(0, ours.shape[0], BLOCK):
        for across in range(0, ours.shape[1], BLOCK):
            left, right = (tensor[down : down + BLOCK, across : across + BLOCK] for tensor in (ours, theirs))
            factor = float((left * right).sum() / (left * left).sum().clamp(min=1e-30))
            if abs(factor) < 1e-12 or (right / factor - left).norm() > E4M3_STEP * left.norm():
                return None
            if worst is None or abs(factor - 1) > abs(worst - 1):
                worst = factor
    return worst if worst is not None and abs(worst - 1) > 0.05 else None


def fits_fp8(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Is it ours in E4M3, with the blocks' own scales or with powers of two? A few numbers may be rounded the other way."""
    for power_of_two in (False, True):
        made = rounded_fp8(ours, power_of_two)
        if float(((made - theirs).abs() <= 1e-4 * made.abs()).float().mean()) > 0.99:
            return True
    return False
