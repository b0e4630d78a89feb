"""Weight gradients that go straight to Megatron's fp32 buffer, or there later, and what a shared weight's other users return."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from r1mega.model.gradients import WeightGradients, clear_forgotten, forget
from r1mega.model.linear import _SplitLinear

TOKENS = torch.tensor([[0, 3, 3], [5, 1, 0]])


def backward(weight: torch.nn.Parameter, store: WeightGradients | None = None, split: bool = True) -> None:
    """A tied embedding and head, as loss of two microbatches."""
    for scale in (1.0, 0.5):
        hidden = torch.tanh(F.embedding(TOKENS, weight))
        logits = _SplitLinear.apply(hidden, weight, False, False, None) if split else F.linear(hidden, weight)
        loss = scale * logits.float().square().sum()
        if store is None:
            loss.backward()
        else:
            with store.collect(scale):
                loss.backward()


@pytest.mark.parametrize("deferred", [False, True])
def test_a_shared_weight_gets_both_of_its_gradients_once(deferred) -> None:
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    want = torch.nn.Parameter(start.clone())
    backward(want, split=False)
    weight = torch.nn.Parameter(start.clone())
    weight.main_grad = torch.full((6, 4), 2.0)  # what is there already stays
    store = WeightGradients() if deferred else None
    backward(weight, store)
    for key in (1.0, 0.5) if deferred else ():
        before = weight.main_grad.clone()
        store.run(key)
        assert not torch.equal(before, weight.main_grad)
    torch.testing.assert_close(weight.main_grad - 2 + weight.grad, want.grad, atol=1e-5, rtol=1e-5)
    embedding = torch.nn.Parameter(start.clone())
    for scale in (1.0, 0.5):  # Megatron's hook adds what is returned: the embedding's part alone
        hidden = torch.tanh(F.embedding(TOKENS, embedding))
        (scale * F.linear(hidden, embedding.detach()).square().sum()).backward()
    torch.testing.assert_close(weight.grad, embedding.grad, atol=1e-5, rtol=1e-5)


def test_the_buffer_sums_products_of_bf16_that_nobody_has_rounded() -> None:
    weight = torch.nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    weight.main_grad = torch.zeros(1, 1)
    x = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)  # 257 is 256 in bf16
    _SplitLinear.apply(x, weight, False, False, None).sum().backward()
    assert weight.main_grad.item() == 257 and weight.grad is None


def test_a_buffer_of_another_type_gets_the_gradient_as_it_was() -> None:
    weight = torch.nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    weight.main_grad = torch.zeros(1, 1, dtype=torch.bfloat16)
    _SplitLinear.apply(torch.ones(3, 1, dtype=torch.bfloat16), weight, False, False, None).sum().backward()
    assert weight.grad.item() == 3 and weight.main_grad.item() == 0  # Megatron's hook adds it


@pytest.mark.parametrize("deferred", [False, True])
def test_the_first_gradient_of_a_step_overwrites_what_was_forgotten(deferred) -> None:
    """NaN in the buffer is never read; a weight that no pass used has a gradient of 0."""
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weight, plain, unused = (torch.nn.Parameter(start.clone()) for _ in range(3))
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    plain.main_grad = torch.zeros(6, 4)
    for one in (weight, unused):
        one.main_grad = torch.full((6, 4), float("nan"))
    forget([weight, unused])
    for one in (weight, plain):
        store = WeightGradients()
        for scale in (1.0, 0.5):
            loss = scale * _SplitLinear.apply(hidden, one, False, False, None).square().sum()
            with store.collect(scale) if deferred else contextlib.nullcontext():
                loss.backward()
        for scale in (1.0, 0.5) if deferred else ():
            store.run(scale)
    clear_forgotten([weight, unused])
    assert torch.equal(weight.main_grad, plain.main_grad) and torch.equal(unused.main_grad, torch.zeros(6, 4))
    clear_forgotten([weight])
    assert weight.main_grad.abs().max() > 0, "what a pass has summed stays"
