"""What quantisation promises besides its reference's bits: layouts, special values, the checkpoint converter's numbers, checks."""

from __future__ import annotations

import pytest
import torch

from r1mega.ops import library
from r1mega.ops.quantize import (
    E4M3,
    dequantize_rows,
    quantize_blocks,
    quantize_both,
    quantize_columns,
    quantize_rows,
    requantize_columns,
    row_scales,
)
from r1mega.train.convert import fp8

BUILT = library.load()


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def bits(payload: torch.Tensor) -> torch.Tensor:
    return payload.view(torch.uint8)


@pytest.mark.parametrize("M, padded", [(0, 0), (1, 4), (4, 4), (131, 132)])
def test_scales_lie_in_the_row_layout_with_zeros_in_its_pad(M, padded) -> None:
    scales = quantize_rows(numbers(M, 300)).scales
    empty = row_scales(M, 300)
    assert scales.shape == empty.shape == (M, 3) and scales.stride() == empty.stride()
    memory = scales.as_strided((3, padded), (max(padded, 1), 1))
    assert (memory[:, :M] > 0).all() and (memory[:, M:] == 0).all()


def test_what_is_read_back_is_within_half_a_step_of_what_went_in() -> None:
    x = numbers(130, 300) * torch.logspace(-3, 3, 130).unsqueeze(1)
    back = dequantize_rows(*quantize_rows(x), torch.float32)
    largest = torch.nn.functional.pad(x, (0, 84)).view(130, 3, 128).abs().amax(-1).repeat_interleave(128, 1)[:, :300]
    step = torch.maximum(x.abs() * 2**-4, largest / 448 * 2**-10)  # half a step of three bits, or of the smallest numbers
    assert ((back - x).abs() <= step * 1.0001).all()


def test_the_transpose_is_the_transpose() -> None:
    x = numbers(150, 270).bfloat16()
    both, columns, turned = quantize_both(x, True), quantize_columns(x, True), quantize_rows(x.t(), True)
    assert torch.equal(bits(both.payload_t), bits(turned.payload)) and torch.equal(both.scales_t, turned.scales)
    assert torch.equal(bits(columns.payload), bits(turned.payload)) and torch.equal(columns.scales, turned.scales)
    blocks = quantize_blocks(x, transposed=True)
    assert torch.equal(bits(blocks.payload_t), bits(blocks.payload).t()) and torch.equal(blocks.scales_t, blocks.scales.t())


def test_requantisation_goes_through_fp32() -> None:
    rows = quantize_rows(numbers(140, 200))
    wanted = quantize_columns(dequantize_rows(*rows, torch.float32))
    got = requantize_columns(*rows)
    assert torch.equal(bits(got.payload), bits(wanted.payload)) and torch.equal(got.scales, wanted.scales)
    through_bf16 = quantize_columns(dequantize_rows(*rows, torch.bfloat16))
    assert not torch.equal(got.scales, through_bf16.scales)


def test_a_block_that_is_not_finite_is_nan_when_read_back_and_the_others_are_not() -> None:
    x = numbers(4, 384)
    x[0, 5], x[1, 200], x[2, 300] = torch.nan, torch.inf, -torch.nan
    payload, scales = quantize_rows(x)
    assert scales[0, 0].isnan() and scales[1, 1] == torch.inf and scales[2, 2].isnan() and scales.isfinite().sum() == 9
    back = dequantize_rows(payload, scales, torch.float32).view(4, 3, 128)
    assert torch.equal(back.isnan().all(-1), ~scales.isfinite()) and torch.equal(back.isnan().any(-1), ~scales.isfinite())
    assert bits(payload)[0, 5] == bits(payload)[1, 200] == bits(payload)[2, 300] == 0x7F


def test_every_e4m3_number_comes_back() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(2, 127)
    payload, scales = quantize_rows(codes.view(E4M3).float())
    assert torch.equal(bits(payload), codes) and (scales == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_are_the_checkpoint_converters(dtype) -> None:
    """The same bits where a scale is a power of two, but for blocks of zeros; otherwise its division may fall on the other side of
    the middle between two numbers of E4M3."""
    weight = numbers(300, 400).to(dtype)
    weight[128:256, :128] = 0
    ours, theirs = quantize_blocks(weight, True), fp8.quantise(weight, power_of_two=True)
    assert torch.equal(bits(ours.payload), bits(theirs[0]))
    other = ours.scales != theirs[1]
    assert other.sum() == 1 and other[1, 0] and theirs[1][1, 0] == 1
    plain, divided = quantize_blocks(weight), fp8.quantise(weight, power_of_two=False)
    assert torch.equal(plain.scales[~other], divided[1][~other])
    apart = (bits(plain.payload).int() - bits(divided[0]).int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


@pytest.mark.skipif(not BUILT, reason=f"the C++ library is not built: {library.BUILD}")
def test_the_kernels_checks_say_what_was_expected_and_what_came() -> None:
    ops, payload = torch.ops.r1mega, torch.zeros(4, 130).to(E4M3)
    for call, text in (
        (lambda: ops.quantize_rows(torch.zeros(3), False), r"quantize_rows: expected x \[M, K\], got 1 dim"),
        (lambda: ops.quantize_both(torch.zeros(3, 4).half(), False), "quantize_both: expected x of bf16 or fp32, got Half"),
        (lambda: ops.quantize_blocks(torch.zeros(3), False, False), r"expected x \[N, K\] or \[E, N, K\], got 1 dim"),
        (lambda: ops.dequantize_rows(torch.zeros(4, 130), torch.zeros(4, 2), torch.float32), "expected payload of float8_e4m3fn"),
        (lambda: ops.dequantize_rows(payload, torch.zeros(4, 1), torch.float32), r"expected scales \[4, 2\] of fp32, got \[4, 1\]"),
        (lambda: ops.dequantize_rows(payload, torch.zeros(4, 2), torch.half), "expected a dtype of bf16 or fp32, got Half"),
        (lambda: ops.requantize_columns(payload, torch.zeros(4, 2).double(), False), "of fp32, got .* of Double"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
