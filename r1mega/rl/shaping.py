"""What a rollout's lengths and rewards decide besides the advantage: pure functions, no ranks, no tokens.

Soft punishment of overlong responses and dynamic sampling are DAPO's (arXiv 2503.14476 3.4 and 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from r1mega.config.errors import UserError


def overlong_penalties(lengths: Sequence[int], max_tokens: int, cache_tokens: int, penalty: float = 1.0) -> list[float]:
    """What each response's length adds to its reward: 0 or less.

    With L_max ``max_tokens`` and L_cache ``cache_tokens``: 0 up to L_max - L_cache tokens, from there on a line that reaches
    -``penalty`` at L_max, and -``penalty`` beyond. 0 for all where ``cache_tokens`` is 0. Raises UserError for L_cache above L_max.
    """
    if cache_tokens > max_tokens:
        raise UserError(
            f"rl.overlong.cache_tokens: at most rl.sampling.max_new_tokens {max_tokens}; got {cache_tokens}; "
            f"use rl.overlong.cache_tokens={max_tokens // 5}"
        )
    if not cache_tokens:
        return [0.0] * len(lengths)
    free = max_tokens - cache_tokens
    return [-penalty * min(max(length - free, 0) / cache_tokens, 1.0) for length in lengths]


def learnable_groups(values_PG: torch.Tensor, mask_PG: torch.Tensor | None = None) -> torch.Tensor:
    """Which groups have something to learn from: bool [P], true where two counted values differ.

    ``values_PG``: [P, G], of a reward of 0 and 1 (DAPO: accuracy), where it is 0 < correct < G, or of the rewards' sum, where it is
    "not flat"; ``mask_PG``: true where the response counts (default: all). A group with fewer than two counted values is false.
    """
    values = torch.as_tensor(values_PG).double()
    mask = torch.ones_like(values, dtype=torch.bool) if mask_PG is None else torch.as_tensor(mask_PG, device=values.device).bool()
    if values.dim() != 2 or not values.shape[1]:
        raise UserError(f"dynamic sampling: values are [P, G]; got shape {tuple(values.shape)}; give one row a prompt")
    low = values.masked_fill(~mask, float("inf")).amin(dim=1)
    high = values.masked_fill(~mask, float("-inf")).amax(dim=1)
    return low < high
