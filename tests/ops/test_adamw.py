"""What the test of all ops does not show of adamw_: torch's AdamW takes the same steps, NaN stays where it is, what is refused."""

from __future__ import annotations

import pytest
import torch

from r1mega.ops import library
from r1mega.ops.adamw import adamw_

BUILT = library.load()
RATES = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def test_ten_steps_are_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = (40, 7), (129,)
    ours = [torch.randn(*shape, generator=draw) for shape in shapes]
    theirs = [one.clone().requires_grad_() for one in ours]
    plain = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    moments = [[torch.zeros(shape) for shape in shapes] for _ in range(2)]
    copies = [one.bfloat16() for one in ours]
    for step in range(1, 11):
        grads = [torch.randn(shape, generator=draw) for shape in shapes]
        for one, grad in zip(theirs, grads, strict=True):
            one.grad = grad * 0.5
        plain.step()
        adamw_(ours, grads, *moments, torch.tensor(step), **RATES, grad_scale=0.5, copies=copies)
    for one, other, copy in zip(ours, theirs, copies, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=2e-6, atol=2e-6)
        assert torch.equal(copy, one.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_reaches_its_own_number_alone(dtype) -> None:
    param, grad = torch.ones(20), torch.ones(20)
    grad[3] = float("nan")
    moments = [torch.zeros(20, dtype=dtype) for _ in range(2)]
    copy = torch.zeros(20, dtype=torch.bfloat16)
    adamw_([param], [grad], *([one] for one in moments), torch.tensor(1.0), **RATES, copies=[copy])
    for one in (param, *moments, copy):
        assert torch.isnan(one).nonzero().flatten().tolist() == [3]


def test_bf16_moments_are_rounded_once_and_the_step_is_of_what_they_were() -> None:
    param, exact = torch.ones(1), torch.ones(1)
    held = [torch.full((1,), value, dtype=torch.bfloat16) for value in (0.25, 0.5)]
    wide = [one.float() for one in held]
    grad = torch.full((1,), 1.2345)
    for at, moments in ((param, held), (exact, wide)):
        adamw_([at], [grad], *([one] for one in moments), torch.tensor(5), **RATES)
    assert torch.equal(param, exact)
    assert all(torch.equal(one, other.bfloat16()) for one, other in zip(held, wide, strict=True))


@pytest.mark.skipif(not BUILT, reason=f"the C++ library is not built: {library.BUILD}")
def test_what_does_not_fit_is_refused() -> None:
    one, moments = torch.zeros(4), ([torch.zeros(4)], [torch.zeros(4)])
    with pytest.raises(ValueError, match="expected step to be one number"):
        adamw_([one], [one], *moments, torch.zeros(2), **RATES)
    with pytest.raises(ValueError, match="expected a grad and two moments a parameter"):
        adamw_([one], [], *moments, torch.tensor(1), **RATES)
    with pytest.raises(ValueError, match=r"expected grads\[0\] of 4 numbers"):
        adamw_([one], [torch.zeros(5)], *moments, torch.tensor(1), **RATES)
    with pytest.raises(ValueError, match="expected all of exp_avg_sqs of one dtype"):
        adamw_([one], [one], moments[0], [torch.zeros(4, dtype=torch.bfloat16)], torch.tensor(1), **RATES)
    with pytest.raises(ValueError, match="expected params to be contiguous"):
        adamw_([torch.zeros(2, 2).t()], [one], *moments, torch.tensor(1), **RATES)
