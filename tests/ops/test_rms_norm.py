"""rms_norm beside torch's own function, what not-finite numbers do, and the kernels' checks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from r1mega.ops import library
from r1mega.ops.quantize import quantize_rows
from r1mega.ops.rms_norm import RMS_NORM, rms_norm, rms_norm_quantize

BUILT = library.load()


@pytest.mark.parametrize("width", [1, 7, 128, 1536, 7168])
def test_values_and_gradients_are_torchs_within_rounding(width) -> None:
    draw = torch.Generator().manual_seed(width)
    x, grad = torch.randn(2, 21, width, generator=draw), torch.randn(2, 21, width, generator=draw)
    weight = 1 + torch.randn(width, generator=draw) / 8
    results = []
    for call in (lambda x, w: rms_norm(x, w, 1e-6).y, lambda x, w: F.rms_norm(x, (width,), w, 1e-6)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = call(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def test_bf16_is_rounded_once() -> None:
    x, weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.linspace(0.5, 3, 64)
    wanted = rms_norm(x.float(), weight, 1e-6).y.bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6).y, wanted) and rms_norm(x, weight, 1e-6).rstd.dtype == torch.float32


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(2))
    clean = rms_norm(x, torch.ones(40), 1e-6).y
    x[1, 3], x[2, 7] = torch.nan, torch.inf
    y, rstd = rms_norm(x, torch.ones(40), 1e-6)
    assert torch.equal(y[[0, 3]], clean[[0, 3]]) and y[1].isnan().all() and rstd[2] == 0
    assert y[2].isnan().sum() == 1 and y[2, 7].isnan() and (y[2].nan_to_num() == 0).all()


def test_only_y_has_a_gradient_and_rstd_serves_the_backward() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    y, rstd = rms_norm(x, torch.ones(8), 1e-6)
    assert y.requires_grad and not rstd.requires_grad


@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_quantised_norm_is_the_norm_quantised(power_of_two) -> None:
    x, weight = torch.randn(9, 300, generator=torch.Generator().manual_seed(3)), torch.linspace(0.5, 2, 300)
    y, rstd = rms_norm(x, weight, 1e-6)
    got, wanted = rms_norm_quantize(x, weight, 1e-6, power_of_two), quantize_rows(y, power_of_two)
    assert torch.equal(got.payload.view(torch.uint8), wanted.payload.view(torch.uint8))
    assert torch.equal(got.scales, wanted.scales) and torch.equal(got.rstd, rstd) and got.scales.stride() == (1, 12)


@pytest.mark.skipif(not BUILT, reason=f"the C++ library is not built: {library.BUILD}")
def test_the_kernels_checks_say_what_was_expected_and_what_came() -> None:
    op, quantized, one = torch.ops.r1mega.rms_norm, torch.ops.r1mega.rms_norm_quantize, torch.ones(8)
    for call, text in (
        (lambda: op(torch.zeros(2, 8, dtype=torch.half), one, 1e-6), "expected x of bf16, fp32 or fp64, got Half"),
        (lambda: op(torch.zeros(2, 9), one, 1e-6), r"expected weight \[9\], got \[8\]"),
        (lambda: op(torch.zeros(2, 0), torch.zeros(0), 1e-6), "expected a width of 1 to 16384, got 0"),
        (lambda: op(torch.zeros(1, 16385), torch.zeros(16385), 1e-6), "expected a width of 1 to 16384, got 16385"),
        (lambda: op(torch.zeros(2, 8), one.int(), 1e-6), "expected weight of bf16 or fp32, got Int"),
        (lambda: quantized(torch.zeros(1, 2, 8), one, 1e-6, False), r"expected x \[M, D\], got 3 dimensions"),
        (
            lambda: torch.ops.r1mega.rms_norm_backward(torch.zeros(2, 8), torch.zeros(3, 8), one, torch.zeros(3)),
            r"expected grad \[3, 8\] of Float, got \[2, 8\] of Float",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_the_reference_is_differentiable_by_autograd() -> None:
    x, weight = torch.randn(3, 20, dtype=torch.float64, requires_grad=True), torch.ones(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: RMS_NORM.reference(x, w, 1e-6)[0], (x, weight))
