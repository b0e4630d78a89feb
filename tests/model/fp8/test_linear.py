"""A linear layer with FP8 products: near the layer in its own format, gradients where they belong, one rank as two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from r1mega.model.fp8.linear import Fp8Linear, fits
from r1mega.model.fp8.weights import Recipe, kept_weights, quantized
from r1mega.model.gradients import WeightGradients
from r1mega.testing.ranks import run_ranks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PLAIN = Recipe()
FP8_ERROR = 0.05
"""Of a product of random numbers: E4M3 has a relative error of up to 1/16 a number, and they average out."""


def draw(*shape: int, seed: int, device="cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.float() - true.float()).norm() / true.float().norm())


def run(x, weight, recipe=PLAIN, store: WeightGradients | None = None):
    x = x.detach().requires_grad_()
    if store is None:
        out = Fp8Linear.apply(x, weight, False, False, None, recipe)
        out.backward(draw(*out.shape, seed=9, device=out.device))
    else:
        with store.collect("all"):
            out = Fp8Linear.apply(x, weight, False, False, None, recipe)
            out.backward(draw(*out.shape, seed=9, device=out.device))
    return out.detach(), x.grad


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("rows", [(256,), (3, 50), (1, 1)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_values_and_gradients_are_near_those_of_the_plain_layer(device, rows, power_of_two) -> None:
    """Whatever the number of rows: the products want whole blocks, the caller need not."""
    x, start = draw(*rows, 384, seed=1, device=device), draw(256, 384, seed=2, device=device)
    weight = torch.nn.Parameter(start.clone())
    out, grad_x = run(x, weight, Recipe(power_of_two))
    plain, plain_weight = x.float().requires_grad_(), start.float().requires_grad_()
    want = F.linear(plain, plain_weight)
    want.backward(draw(*out.shape, seed=9, device=device).float())
    assert out.dtype == grad_x.dtype == weight.grad.dtype == torch.bfloat16 and out.shape == want.shape
    for found, true in ((out, want), (grad_x, plain.grad), (weight.grad, plain_weight.grad)):
        assert error(found, true) < FP8_ERROR


@pytest.mark.parametrize("device", DEVICES)
def test_the_weights_gradient_is_added_to_the_fp32_buffer_now_or_later(device) -> None:
    x, start = draw(128, 128, seed=1, device=device), draw(256, 128, seed=2, device=device)
    alone = torch.nn.Parameter(start.clone())
    run(x, alone)
    held = torch.nn.Parameter(start.clone())
    held.main_grad = torch.ones(256, 128, device=device)
    run(x, held)
    late = torch.nn.Parameter(start.clone())
    late.main_grad = torch.ones(256, 128, device=device)
    store = WeightGradients()
    run(x, late, store=store)
    assert held.grad is None and late.grad is None and torch.equal(late.main_grad, torch.ones_like(late.main_grad))
    store.run("all")
    torch.testing.assert_close(held.main_grad, late.main_grad, rtol=0, atol=0)
    torch.testing.assert_close((held.main_grad - 1).bfloat16().float(), alone.grad.float(), rtol=1e-2, atol=1e-2)


def test_a_weight_is_quantised_once_while_it_does_not_change() -> None:
    weight = torch.nn.Parameter(draw(128, 128, seed=2))
    first = quantized(weight, Recipe())
    assert quantized(weight, Recipe())[0].payload is not first[0].payload  # nobody said that it stays
    with kept_weights():
        kept = quantized(weight, Recipe())
        with kept_weights():
            assert quantized(weight, Recipe()) is kept
        assert quantized(weight, Recipe()) is kept
    with torch.no_grad():
        weight.mul_(2)
    assert not torch.equal(quantized(weight, Recipe())[0].scales, kept[0].scales)


def test_the_transposed_weight_is_the_same_numbers() -> None:
    forward, backward = quantized(draw(256, 384, seed=2), Recipe())
    assert torch.equal(forward.payload.view(torch.uint8).t(), backward.payload.view(torch.uint8))
    assert torch.equal(forward.scales.t(), backward.scales)


def test_only_whole_blocks_fit() -> None:
    assert fits((256, 128)) and fits((4, 256, 128)) and not fits((576, 7168)) and not fits((128, 64))


def of_a_rank() -> tuple[bool, ...]:
    """Column-parallel on two ranks against one: the input's rows spread over the ranks, or all rows on both."""
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    x, start = draw(192, 2, 128, seed=1), draw(128, 128, seed=2)  # the same weight on both ranks
    alone, shared = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    for one in (alone, shared):
        one.main_grad = torch.zeros(128, 128)
    out, grad_x = run(x, alone)
    own = x[96 * rank : 96 * (rank + 1)].detach().requires_grad_()
    found = Fp8Linear.apply(own, shared, True, True, group, Recipe())
    found.backward(draw(*found.shape, seed=9))
    both = 2 * grad_x[96 * rank : 96 * (rank + 1)].float()  # both ranks give the same part
    result = torch.equal(found, out), torch.equal(shared.main_grad, alone.main_grad), torch.equal(own.grad.float(), both)
    whole, third = x[:50].detach().requires_grad_(), torch.nn.Parameter(start.clone())  # 100 rows: not whole blocks
    out, grad_x = run(x[:50], torch.nn.Parameter(start.clone()))
    found = Fp8Linear.apply(whole, third, True, False, group, Recipe())
    found.backward(draw(*found.shape, seed=9))
    result += torch.equal(found, out), torch.equal(whole.grad.float(), 2 * grad_x.float())  # both ranks' parts are summed
    dist.destroy_process_group()
    return result


def test_two_ranks_gather_rows_in_fp8_or_sum_gradients_and_give_the_bits_of_one() -> None:
    assert run_ranks(of_a_rank, 2) == [(True,) * 5] * 2
