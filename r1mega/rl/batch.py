"""Responses to microbatches: prompt and response in one row, padded on the right, rows of like length together.

Positions are those of predictions: column s predicts token s + 1, so ``targets_BS`` is the row moved by one and ``mask_BS`` is true
where the target is a response token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from r1mega.rl.types import Completion


@dataclass
class RolloutRow:
    """One response with all that training needs of it. ``old`` and ``ref``: float32 log-probabilities of the response tokens."""

    prompt: list[int]
    completion: Completion
    advantage: float = 0.0
    old: torch.Tensor | None = None
    ref: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.completion.token_ids)


@dataclass
class RolloutBatch:
    """One microbatch: ``tokens_BS, targets_BS`` int64, ``mask_BS`` bool, ``rollout_BS, old_BS, ref_BS, advantage_B`` float32."""

    rows: list[RolloutRow]
    tokens_BS: torch.Tensor
    targets_BS: torch.Tensor
    mask_BS: torch.Tensor
    rollout_BS: torch.Tensor
    old_BS: torch.Tensor
    ref_BS: torch.Tensor
    advantage_B: torch.Tensor

    def split(self, values_BS: torch.Tensor) -> list[torch.Tensor]:
        """Values at the response tokens, a tensor a row."""
        return [row_S[mask_S] for row_S, mask_S in zip(values_BS, self.mask_BS, strict=True)]


def microbatches(rows: Sequence[RolloutRow], size: int, pad_id: int, device: torch.device) -> list[RolloutBatch]:
    """Rows sorted by length and cut into microbatches of ``size``."""
    ordered = sorted(rows, key=lambda row: row.size)
    return [_batch(ordered[start : start + size], pad_id, device) for start in range(0, len(ordered), size)]


def _batch(rows: list[RolloutRow], pad_id: int, device: torch.device) -> RolloutBatch:
    width = max(row.size for row in rows)
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    values = torch.zeros(3, len(rows), width - 1)
    for idx, row in enumerate(rows):
        response = row.completion.token_ids
        tokens[idx, : row.size] = torch.tensor(row.prompt + response)
        place = slice(len(row.prompt) - 1, row.size - 1)
        mask[idx, place] = True
        values[0, idx, place] = torch.tensor(row.completion.logprobs)
        for channel, held in ((1, row.old), (2, row.ref)):
            if held is not None:
                values[channel, idx, place] = held.cpu()
    advantage = torch.tensor([row.advantage for row in rows], dtype=torch.float32)
    parts = [tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, *values.unbind(0), advantage]
    return RolloutBatch(rows, *(part.to(device) for part in parts))
