"""The one place where ``[B, S]`` meets Megatron-Core's ``[S, B, D]``: batches in, per-token losses or logits out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1mega.model.build import without_mtp


@dataclass(frozen=True)
class TokenTensors:
    """One microbatch on the device.

    ``tokens_BS, labels_BS``: int64; ``loss_mask_BS``: float32, 0 where a token is not learnt; ``segment_ids_BS``: int32 sample
    number inside a packed row, 0 for padding, or None where each row is one causal sequence.
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    segment_ids_BS: torch.Tensor | None = None


def attention_mask(segment_ids_BS: torch.Tensor | None) -> torch.Tensor | None:
    """Bool ``[B, 1, S, S]``, True where a query may look: earlier tokens of its own sample. None stays None (plain causal)."""
    if segment_ids_BS is None:
        return None
    size = segment_ids_BS.shape[1]
    causal_SS = torch.ones(size, size, dtype=torch.bool, device=segment_ids_BS.device).tril()
    same_BSS = segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]
    return (same_BSS & causal_SS)[:, None]


def token_losses(model: torch.nn.Module, batch: TokenTensors) -> torch.Tensor:
    """Cross entropy a token, float32 ``[B, S]``, unmasked; MTP's loss rides along in the backward pass (V3 2.2)."""
    return model(
        batch.tokens_BS,
        _positions(batch.tokens_BS),
        attention_mask(batch.segment_ids_BS),
        labels=batch.labels_BS,
        loss_mask=batch.loss_mask_BS,
    )


def logits(model: torch.nn.Module, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, S, V]`` of the main head; each row one causal sequence, padded on the right."""
    inner = model
    while hasattr(inner, "module"):
        inner = inner.module
    with without_mtp(inner):
        return model(tokens_BS, _positions(tokens_BS), None)


def _positions(tokens_BS: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
