"""What the test of all ops does not show of token_logprobs: special values, pieces, sizes that are refused, the entropy of big logits."""

from __future__ import annotations

import pytest
import torch

from r1mega.ops import library
from r1mega.ops.token_logprobs import token_logprobs

BUILT = library.load()
NAN, INF = float("nan"), float("inf")


def test_a_row_with_nan_or_infinity_is_nan_and_the_others_are_not() -> None:
    hidden, weight = torch.ones(4, 1), torch.arange(5.0).unsqueeze(1)
    hidden[1], hidden[2] = NAN, INF  # 0 * inf is NaN, the others +inf
    got = token_logprobs(hidden, weight, torch.zeros(4, dtype=torch.int64))
    for values in got[:2]:
        assert torch.isfinite(values).tolist() == [True, False, False, True]


def test_a_logit_of_minus_infinity_has_probability_0_and_no_gradient() -> None:
    weight = torch.tensor([[1.0], [-INF], [2.0]])
    hidden = torch.ones(1, 1)
    target = torch.tensor([2])
    got, want = token_logprobs(hidden, weight, target), token_logprobs(hidden, weight[[0, 2]], torch.tensor([1]))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    weight.requires_grad_()
    result = token_logprobs(hidden, weight, target)
    (result.logprobs_T.sum() + result.entropy_T.sum()).backward()
    assert weight.grad[1].item() == 0 and torch.isfinite(weight.grad).all()


def test_the_entropy_keeps_its_digits_beside_big_logits() -> None:
    spread = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    weight = torch.cat([spread, torch.full((64, 1), 1.0)], dim=1)
    target = torch.tensor([3])
    far = token_logprobs(torch.tensor([[1.0, 4096.0]]), weight, target)
    near = token_logprobs(torch.tensor([[1.0, 0.0]]), (spread + 4096.0 - 4096.0).repeat(1, 2) * torch.tensor([1.0, 0.0]), target)
    torch.testing.assert_close(far.entropy_T, near.entropy_T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(far.logprobs_T, near.logprobs_T, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pieces_of_the_vocabulary_add_up(dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(8192, 16, generator=draw), torch.randn(20011, 16, generator=draw)
    targets = torch.randint(0, 20000, (8192,), generator=draw)
    place = torch.device("cuda")
    hidden, weight = (one.to(place, dtype).requires_grad_() for one in (hidden, weight))
    targets, grads = targets.to(place), torch.randn(2, 8192, generator=draw).to(place)

    def both(logprobs, entropy):
        return torch.autograd.grad((torch.stack([logprobs, entropy]) * grads).sum(), [hidden, weight])

    got = token_logprobs(hidden, weight, targets, 20000)
    logp = (hidden.float() @ weight[:20000].float().t()).log_softmax(-1)
    want = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    for one, other in zip(got[:2], want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(both(*got[:2]), both(*want), strict=True):
        error = torch.linalg.vector_norm(one.float() - other.float()) / torch.linalg.vector_norm(other.float())
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.skipif(not BUILT, reason=f"the C++ library is not built: {library.BUILD}")
def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, targets = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])
    with pytest.raises(IndexError, match="expected targets from 0 to 3, got 4"):
        token_logprobs(hidden, weight, targets, 4)
    with pytest.raises(ValueError, match=r"expected hidden \[T, D\] and weight \[V, D\]"):
        token_logprobs(hidden, weight[:, :2], targets)
    with pytest.raises(ValueError, match="expected num_tokens from 1 to 5, got 6"):
        token_logprobs(hidden, weight, targets, 6)
    with pytest.raises(ValueError, match="expected hidden and weight both of"):
        token_logprobs(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"expected targets \[2\] of int64"):
        token_logprobs(hidden, weight, targets.int())
