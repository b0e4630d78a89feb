"""Masks of packed rows, and that a packed sample's losses are those of the sample alone."""

from __future__ import annotations

import torch

from tests.train.cases import MODEL, one_rank


def test_attention_mask_by_hand() -> None:
    one_rank()
    from r1mega.model.forward import attention_mask

    assert attention_mask(None) is None
    mask = attention_mask(torch.tensor([[1, 1, 2, 2, 0]], dtype=torch.int32))
    assert mask.shape == (1, 1, 5, 5) and mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_a_packed_sample_has_the_losses_of_the_sample_alone() -> None:
    mesh = one_rank()
    from r1mega.model.forward import TokenTensors, token_losses
    from r1mega.train.trainee import Trainee

    model = Trainee(MODEL, None, mesh, "fp32").model.eval()
    draw = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, MODEL.vocab_size, (length,), generator=draw) for length in (7, 5, 9)]

    def losses(parts: list[torch.Tensor], packed: bool) -> torch.Tensor:
        tokens = torch.cat(parts)[None]
        labels = torch.cat([part.roll(-1) for part in parts])[None]
        ids = torch.cat([torch.full((len(part),), number + 1) for number, part in enumerate(parts)])[None].int()
        batch = TokenTensors(tokens, labels, torch.ones(tokens.shape), ids if packed else None)
        with torch.no_grad():
            return token_losses(model, batch)[0]

    alone = [losses([sample], packed=False) for sample in samples]
    packed = losses(samples, packed=True).split([len(sample) for sample in samples])
    for want, got in zip(alone, packed, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)  # rotary positions run on: only differences count
    assert (losses(samples, packed=False)[7:] - torch.cat(alone)[7:]).abs().max() > 1e-3, (
        "without the mask they would see each other"
    )


def test_a_context_ranks_part_of_a_batch_by_hand() -> None:
    one_rank()
    from r1mega.model.context import ALONE, ContextPart
    from r1mega.model.forward import TokenTensors

    tokens = torch.arange(8)[None]
    mask = torch.tensor([[0.0, 1, 1, 0, 0, 0, 0, 1]])
    ids = torch.tensor([[1, 1, 1, 2, 2, 2, 0, 0]], dtype=torch.int32)
    whole = TokenTensors(tokens, tokens + 1, mask, ids)
    assert whole.cut(ALONE) is whole and whole.num_learnt == 3
    outer, inner = (whole.cut(ContextPart(rank, 2, object())) for rank in range(2))
    assert outer.tokens_BS.tolist() == [[0, 1, 6, 7]] and inner.tokens_BS.tolist() == [[2, 3, 4, 5]]
    assert outer.labels_BS.tolist() == [[1, 2, 7, 8]] and inner.loss_mask_BS.tolist() == [[1, 0, 0, 0]]
    assert outer.num_learnt == inner.num_learnt == 3, "of the whole rows: the balance loss weighs by it"
    assert int(outer.loss_mask_BS.sum()) == 2 and outer.segment_ids_BS is ids and outer.part.parts == (0, 3)
