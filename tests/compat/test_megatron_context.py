"""The bends of context parallelism: each works, and each is still needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.train.cases import one_rank


def group(rank: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


@pytest.fixture
def bent():
    """Ours and Megatron's own function that cuts the rotary table."""
    one_rank()
    from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding

    from r1mega.compat import megatron_context

    megatron_context.apply()
    ours = rope_utils.get_pos_emb_on_this_cp_rank
    assert rotary_pos_embedding.get_pos_emb_on_this_cp_rank is ours is yarn_rotary_pos_embedding.get_pos_emb_on_this_cp_rank
    megatron_context.apply()
    assert rope_utils.get_pos_emb_on_this_cp_rank is ours, "once"
    return ours, ours.upstream


def test_a_rank_has_the_angles_of_its_two_parts(bent) -> None:
    ours, _ = bent
    table = torch.arange(16.0).view(16, 1, 1, 1).expand(-1, -1, -1, 4)
    assert ours(table, 0, group(1, 2))[:, 0, 0, 0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert ours(table, 0, group(0, 2))[:, 0, 0, 3].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert len(ours(table, 0, group(0, 3))) == 4, "16 is no multiple of 6: 12 are cut"


@pytest.mark.skipif(torch.cuda.is_available(), reason="upstream's way works there")
def test_upstream_still_goes_to_the_gpu(bent) -> None:
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        bent[1](torch.zeros(16, 1, 1, 4), 0, group(0, 2))


def test_upstream_still_wants_a_table_that_can_be_cut(bent, monkeypatch) -> None:
    ours, upstream = bent
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    table = torch.randn(24, 1, 1, 4)
    for rank in range(3):
        assert torch.equal(upstream(table, 0, group(rank, 3)), ours(table, 0, group(rank, 3)))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        upstream(torch.randn(32, 1, 1, 4), 0, group(0, 3))
