"""mla_rope beyond the generic test: Megatron's own numbers, messages."""

from __future__ import annotations

import pytest
import torch

from r1mega.ops import library
from r1mega.ops.mla_rope import mla_rope

BUILT = library.load()
S, B, H, NOPE, ROPE, V = 5, 2, 3, 8, 6, 4


def megatrons(query, key_value, shared_key, angles, mscale):
    """The steps of MLASelfAttention.get_query_key_value_tensors behind its projections."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    def turn(x):
        table = torch.cat([angles, angles], dim=-1)[:, None, None]
        return _apply_rotary_pos_emb_bshd(x, table, multi_latent_attention=True, mscale=mscale)

    plain, turned = query.split([NOPE, ROPE], dim=-1)
    of_key, value = key_value.split([NOPE, V], dim=-1)
    shared = turn(shared_key.unsqueeze(-2)).expand(-1, -1, H, -1)
    return torch.cat([plain, turn(turned)], dim=-1), torch.cat([of_key, shared], dim=-1), value


@pytest.mark.parametrize("mscale", [1.0, 1.3])
def test_megatrons_own_bits_in_fp32_and_its_gradients(mscale) -> None:
    draw = torch.Generator().manual_seed(3)
    shapes = ((S, B, H, NOPE + ROPE), (S, B, H, NOPE + V), (S, B, ROPE))
    leaves = [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]
    angles = torch.outer(torch.arange(S), 10000.0 ** -(torch.arange(0, ROPE, 2) / ROPE))
    ours = mla_rope(*leaves, angles.cos() * mscale, angles.sin() * mscale, NOPE)
    theirs = megatrons(*leaves, angles, mscale)
    weights = [torch.randn(out.shape, generator=draw) for out in ours]
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other) and mine.is_contiguous()
    for mine, other in zip(*(torch.autograd.grad(outs, leaves, weights) for outs in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_the_shared_keys_gradient_is_summed_in_fp32() -> None:
    bf16, heads = torch.bfloat16, 257
    shared = torch.zeros(1, 1, 2, dtype=bf16, requires_grad=True)
    none = torch.zeros(1, 1, 0, 2, dtype=bf16)
    _, key, _ = mla_rope(none, torch.zeros(1, 1, heads, 0, dtype=bf16), shared, torch.ones(1, 1), torch.zeros(1, 1), 0)
    grad = torch.ones_like(key)
    grad[0, 0, 0] = 256  # 256 + 1 is 256 in bf16
    key.backward(grad)
    assert shared.grad.flatten().tolist() == [512, 512]


@pytest.mark.skipif(not BUILT, reason=f"the C++ library is not built: {library.BUILD}")
def test_the_checks_say_what_was_expected_and_what_came() -> None:
    op = torch.ops.r1mega.mla_rope
    query, both, shared = torch.zeros(S, B, H, NOPE + ROPE), torch.zeros(S, B, H, NOPE + V), torch.zeros(S, B, ROPE)
    table = torch.zeros(S, ROPE // 2)
    for args, text in (
        ((query[0], both, shared, table, table, NOPE), r"mla_rope: expected query \[S, B, H, nope \+ rope\], got 3 dim"),
        ((query, both, shared, table[1:], table[1:], NOPE), r"expected cos and sin \[5, rope / 2\], got \[4, 3\]"),
        ((query, both, shared, table, table, NOPE + 1), r"expected query heads of nope \+ rope, 9 \+ 6, got 14"),
        ((query, both, shared[..., 1:], table, table, NOPE), r"expected shared_key \[5, 2, 6\], got \[5, 2, 5\]"),
        ((query, both[1:], shared, table, table, NOPE), r"expected key_value of query's tokens \[5, 2\]"),
        ((query, both.bfloat16(), shared, table, table, NOPE), "expected query, key_value and shared_key of one dtype"),
        ((query, both, shared, table.double(), table.double(), NOPE), "expected cos and sin of Float, got Double"),
    ):
        with pytest.raises(ValueError, match=text):
            op(*args)
