"""The one place where ``[B, S]`` meets Megatron-Core's ``[S, B, D]``: batches in, per-token losses or logits out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from r1mega.model.build import without_mtp
from r1mega.model.context import ALONE, ContextPart
from r1mega.model.outputs import Hidden
from r1mega.model.replay import Replay


@dataclass(frozen=True)
class TokenTensors:
    """One microbatch on the device.

    ``tokens_BS, labels_BS``: int64; ``loss_mask_BS``: float32, 0 where a token is not learnt; ``segment_ids_BS``: int32 sample
    number inside a packed row, 0 for padding, or None where each row is one causal sequence. With several context ranks, after
    :meth:`cut`, the first three hold this rank's parts, ``[B, S / C]``; ``segment_ids_BS`` stays whole; ``learnt``: learnt tokens
    of the whole rows; ``part``: which parts they are.
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    segment_ids_BS: torch.Tensor | None = None
    part: ContextPart = ALONE
    learnt: int | None = None

    def cut(self, part: ContextPart) -> TokenTensors:
        """This context rank's part of whole rows. Raises ValueError for a length that cannot be cut so."""
        if part.size == 1:
            return self
        own = {name: part.cut(getattr(self, name)) for name in ("tokens_BS", "labels_BS", "loss_mask_BS")}
        return replace(self, **own, part=part, learnt=self.num_learnt)

    @property
    def num_learnt(self) -> int:
        """Learnt tokens of the whole rows, the other context ranks' parts included."""
        return int(self.loss_mask_BS.sum()) if self.learnt is None else self.learnt


def attention_mask(segment_ids_BS: torch.Tensor | None) -> torch.Tensor | None:
    """Bool ``[B, 1, S, S]``, True where a query may look: earlier tokens of its own sample. None stays None (plain causal)."""
    if segment_ids_BS is None:
        return None
    size = segment_ids_BS.shape[1]
    causal_SS = torch.ones(size, size, dtype=torch.bool, device=segment_ids_BS.device).tril()
    same_BSS = segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]
    return (same_BSS & causal_SS)[:, None]


def token_losses(model: torch.nn.Module, batch: TokenTensors) -> torch.Tensor:
    """Cross entropy a token, float32 ``[B, S]``, unmasked; MTP's loss rides along in the backward pass (V3 2.2).

    With several context ranks those of this rank's parts. A stage without the head gives its hidden states.
    """
    # Context ranks make their masks block by block, from the sample numbers.
    mask = attention_mask(batch.segment_ids_BS) if batch.part.size == 1 else batch.segment_ids_BS
    return model(
        batch.tokens_BS,
        _positions(batch.tokens_BS, batch.part),
        mask,
        labels=batch.labels_BS,
        loss_mask=batch.loss_mask_BS,
    )


def logits(
    model: torch.nn.Module, tokens_BS: torch.Tensor, part: ContextPart = ALONE, replay: Replay | None = None
) -> torch.Tensor:
    """Logits of the main head, float32 ``[B, S, V]``; each row one causal sequence, padded on the right.

    V is without the rows of ``vocab_padding``, which are no tokens; of several tensor ranks each has its own part of V. With
    several context ranks ``tokens_BS`` and the logits are those of this rank's parts. A stage without the head gives its hidden
    states. ``replay``: what the routers are told and tell.
    """
    inner = _stage(model)
    with _alone(inner, replay):
        output = model(tokens_BS, _positions(tokens_BS, part), None)
    return output[..., : _num_tokens(inner, output.shape[-1])].float() if inner.post_process else output


def whole_logits(
    model: torch.nn.Module, tokens_BS: torch.Tensor, part: ContextPart = ALONE, replay: Replay | None = None
) -> torch.Tensor:
    """:func:`logits` with all of V on every tensor rank; the gradient goes back to the ranks' own parts."""
    inner = _stage(model)
    group = inner.pg_collection.tp
    if not inner.post_process or group.size() == 1:
        return logits(model, tokens_BS, part, replay)
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    with _alone(inner, replay):
        own = model(tokens_BS, _positions(tokens_BS, part), None)
    whole = gather_from_tensor_model_parallel_region(own, group=group)
    return whole[..., : whole.shape[-1] - getattr(inner, "vocab_padding", 0)].float()


def hidden(
    model: torch.nn.Module, tokens_BS: torch.Tensor, part: ContextPart = ALONE, replay: Replay | None = None
) -> Hidden | torch.Tensor:
    """What :func:`logits` are made of, with one tensor rank: the head's input and the head. A stage without it as there."""
    inner = _stage(model)
    if not inner.post_process:
        return logits(model, tokens_BS, part, replay)
    with _alone(inner, replay), inner.without_logits():
        output_BSD = model(tokens_BS, _positions(tokens_BS, part), None)
    weight_VD = inner.head_weight()
    return Hidden(output_BSD, weight_VD, _num_tokens(inner, len(weight_VD)))


@contextlib.contextmanager
def _alone(stage: torch.nn.Module, replay: Replay | None) -> Iterator[None]:
    """The main head's forward pass, without MTP, with a microbatch's routing."""
    with without_mtp(stage), contextlib.nullcontext() if replay is None else replay.at(stage):
        yield


def _stage(model: torch.nn.Module) -> torch.nn.Module:
    while not hasattr(model, "decoder"):  # wrappers: DDP's, and a rank's stages
        model = model.module if hasattr(model, "module") else model.stages[0]
    return model


def _num_tokens(stage: torch.nn.Module, width: int) -> int:
    """Of the head's ``width`` columns on this tensor rank, those that are tokens: padding is at the end of the last ranks'."""
    padding = getattr(stage, "vocab_padding", 0)
    if not padding:
        return width
    behind = width * (stage.pg_collection.tp.size() - 1 - stage.pg_collection.tp.rank())
    return width - min(width, max(0, padding - behind))


def _positions(tokens_BS: torch.Tensor, part: ContextPart) -> torch.Tensor:
    return part.positions(tokens_BS.shape[1], tokens_BS.device).expand_as(tokens_BS)
