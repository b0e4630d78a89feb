"""swiglu beyond the generic test: special values, ends of the exponential, padding rows, scales' layout, messages."""

from __future__ import annotations

import math

import pytest
import torch

from r1mega.ops import library
from r1mega.ops.quantize import quantize_columns, quantize_rows
from r1mega.ops.swiglu import swiglu, swiglu_backward_quantize, swiglu_backward_quantize_columns, swiglu_quantize

BUILT = library.load()
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_gates(dtype) -> None:
    gates = [0.0, -0.0, 1.0, INF, NAN, -INF, 88.0, -88.0, 3e38, -3e38, -1e4]
    hidden = torch.tensor([[*gates, *[1.0] * len(gates)]], dtype=dtype)
    out = swiglu(hidden)[0].float().tolist()
    assert out[0] == 0 and out[1] == 0 and out[3] == INF and math.isnan(out[4]) and math.isnan(out[5])
    assert out[2] == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-6 if dtype == torch.float32 else 4e-3)
    assert out[6] == 88 and out[8] == pytest.approx(3e38, rel=4e-3)
    assert out[7] == pytest.approx(0, abs=1e-35) and out[9] == 0 and out[10] == 0


def test_the_exponential_is_as_near_as_torchs_over_its_whole_range() -> None:
    gate = torch.linspace(-86, 86, 100001)
    out = swiglu(torch.stack([gate, torch.ones_like(gate)], dim=-1))[:, 0]
    true = torch.nn.functional.silu(gate.double())
    assert ((out - true).abs() / true.abs().clamp(min=1e-37)).max() < 5e-7  # four units in the last place


def test_the_bits_of_a_number_do_not_depend_on_its_column() -> None:
    hidden = torch.randn(1, 2 * 37, generator=torch.Generator().manual_seed(1))
    one_a_row = torch.stack(hidden[0].chunk(2), dim=-1)
    assert torch.equal(swiglu(hidden)[0], swiglu(one_a_row)[:, 0])


def test_leading_dimensions_stay() -> None:
    hidden, probs = torch.randn(3, 2, 8), torch.rand(3, 2)
    torch.testing.assert_close(swiglu(hidden, probs)[2, 1], swiglu(hidden[2, 1], probs[2, 1]))
    assert swiglu(hidden[:0]).shape == (0, 2, 4)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_padding_rows_are_zeros_and_scales_are_as_products_read_them(power_of_two) -> None:
    hidden = torch.randn(6, 512, dtype=torch.bfloat16)
    grad, probs = torch.randn(6, 256, dtype=torch.bfloat16), torch.rand(6)
    hidden[4:], probs[4:] = 0, 0
    payload, scales = swiglu_quantize(hidden, None, probs, power_of_two)
    assert scales.shape == (6, 2) and scales.stride() == (1, 8) and payload[4:].float().count_nonzero() == 0
    assert torch.as_strided(scales, (2, 2), (8, 1), 6).count_nonzero() == 0, "the pad"
    values = payload.float() * scales.repeat_interleave(128, 1)
    torch.testing.assert_close(values, swiglu(hidden.float(), probs), rtol=2**-4 + 1e-6, atol=float(scales.max()) * 2**-10)
    assert not power_of_two or torch.equal(torch.exp2(scales.log2().round()), scales)
    back = swiglu_backward_quantize(grad, hidden, None, probs, power_of_two)
    assert back.payload_R2F[4:].float().count_nonzero() == 0 and back.grad_hidden_R2F[4:].count_nonzero() == 0
    assert back.scales.stride() == (1, 8) and torch.equal(back.activation_RF, swiglu(hidden, probs))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows, width, power_of_two", [(256, 384, False), (144, 128, True), (131, 256, False)])
def test_columns_are_those_of_the_bf16_results_that_are_never_written(rows, width, power_of_two, fp8, device) -> None:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, 2 * width, generator=draw).to(device, torch.bfloat16)
    grad, probs = torch.randn(rows, width, generator=draw).to(device, torch.bfloat16), torch.rand(rows, generator=draw).to(device)
    hidden[3, 5], grad[7, 9], probs[11] = NAN, INF, 0.0
    given = quantize_rows(hidden) if fp8 else (hidden, None)
    made = swiglu_backward_quantize(grad, *given, probs, power_of_two)
    columns = swiglu_backward_quantize_columns(grad, *given, probs, power_of_two)
    wanted = made.payload_R2F, made.scales, *(
        part for x in (made.grad_hidden_R2F, made.activation_RF) for part in quantize_columns(x, power_of_two)
    )  # fmt: skip
    for got, expected in zip(columns[:-1], wanted, strict=True):
        assert got.shape == expected.shape and got.stride() == expected.stride()
        assert torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
    torch.testing.assert_close(columns.grad_probs_R, made.grad_probs_R, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_block_with_a_nan_has_a_scale_that_is_not_finite_and_no_other() -> None:
    hidden = torch.randn(2, 512, dtype=torch.bfloat16)
    hidden[1, 130] = NAN
    _, scales = swiglu_quantize(hidden)
    assert torch.isfinite(scales).tolist() == [[True, True], [True, False]]


@pytest.mark.skipif(not BUILT, reason=f"the C++ library is not built: {library.BUILD}")
def test_the_checks_say_what_was_expected_and_what_came() -> None:
    ops, bf16 = torch.ops.r1mega, torch.bfloat16
    hidden = torch.zeros(2, 256, dtype=bf16)
    for call, text in (
        (lambda: ops.swiglu(torch.zeros(4), None), r"swiglu: expected hidden \[R, 2F\], got 1 dim"),
        (lambda: ops.swiglu(torch.zeros(2, 5), None), "expected hidden of an even width, gate columns then up columns, got 5"),
        (lambda: ops.swiglu(torch.zeros(2, 4), torch.zeros(3)), r"expected probs \[2\], one a row, got \[3\]"),
        (lambda: ops.swiglu_backward(torch.zeros(2, 3), torch.zeros(2, 4), None), r"expected grad \[2, 2\], got \[2, 3\]"),
        (
            lambda: ops.swiglu_quantize(hidden[:, :128], None, None, False),
            "expected F, half of hidden's width, a multiple of 128, got 64",
        ),
        (lambda: ops.swiglu_quantize(hidden.float(), None, None, False), "expected hidden of BFloat16, .* got Float"),
        (
            lambda: ops.swiglu_quantize(hidden, torch.zeros(2, 2), None, False),
            "expected hidden of Float8_e4m3fn with hidden_scales",
        ),
        (
            lambda: ops.swiglu_quantize(hidden.to(torch.float8_e4m3fn), torch.zeros(2, 1), None, False),
            r"expected hidden_scales \[2, 2\], got \[2, 1\]",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call()
