"""``accumulate_grouped_quantized_``: what its payloads mean, the bf16 op's result of the same numbers, and its checks."""

from __future__ import annotations

import pytest
import torch

from r1mega.model.fp8.products import add_grouped_rows_by_rows_
from r1mega.ops import library
from r1mega.ops.accumulate import accumulate_grouped_
from r1mega.ops.accumulate_quantized import accumulate_grouped_quantized_
from r1mega.ops.quantize import E4M3, Quantized, dequantize_rows, quantize_columns

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SUMMED_BITS = {"cpu": 2.0**-20, "cuda": 2.0**-9}
"""Relative error of fp32, and of a GPU's tensor cores."""


def operands(R: int, N: int, K: int, device: str = "cpu") -> list[Quantized]:
    draw = torch.Generator().manual_seed(R + N + K)
    return [quantize_columns(torch.randn(R, width, generator=draw).to(device)) for width in (N, K)]


def expert_ends(*blocks: int, device: str = "cpu") -> torch.Tensor:
    return (torch.tensor(blocks).cumsum(0) * 128).to(device, torch.int32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("N, K", [(48, 80), (300, 260), (13, 6)])
def test_it_is_the_product_of_what_was_quantised(N, K, overwrite, device) -> None:
    left, right = operands(640, N, K, device)
    ends = expert_ends(2, 0, 1, 1, device=device)
    rows, others = (dequantize_rows(*one, torch.float32).t() for one in (left, right))
    before = torch.randn(4, N, K, generator=torch.Generator().manual_seed(1)).to(device)
    wanted = before.clone()
    accumulate_grouped_(wanted, rows, others, ends, overwrite=overwrite)
    got = before.clone()
    add_grouped_rows_by_rows_(got, left, right, ends, overwrite)
    assert torch.linalg.vector_norm(got - wanted) <= SUMMED_BITS[device] * torch.linalg.vector_norm(wanted)
    assert torch.equal(got[1], torch.zeros_like(got[1]) if overwrite else before[1])  # the expert without rows


@pytest.mark.parametrize("device", DEVICES)
def test_each_block_of_rows_is_scaled_by_both_its_scales(device) -> None:
    """Payloads of one: a block's product is 128, times what its two scales multiply to."""
    ones = torch.ones(8, 384, device=device).to(E4M3)
    scales = [2.0 ** torch.arange(24, device=device).view(3, 8).t().remainder(7 + shift) for shift in (0, 2)]
    total = torch.zeros(2, 8, 8, device=device)
    accumulate_grouped_quantized_(total, *(Quantized(ones, one) for one in scales), expert_ends(1, 2, device=device))
    each = 128 * torch.einsum("nb,kb->bnk", *scales)
    assert torch.equal(total, torch.stack([each[0], each[1] + each[2]]))  # powers of two: exact in any order


@pytest.mark.skipif(not library.load(), reason=f"the C++ library is not built: {library.BUILD}")
def test_the_kernels_checks_say_what_was_expected_and_what_came() -> None:
    left, right = operands(256, 16, 32)
    total, ends = torch.zeros(1, 16, 32), expert_ends(2)

    def call(out=total, left=left, right=right, ends=ends):
        accumulate_grouped_quantized_(out, left, right, ends)

    short = Quantized(left.payload[:, :200], left.scales)
    for arguments, text in (
        ({"out": total.double()}, "expected out of float32, got Double"),
        ({"out": total[0]}, r"expected out of \[1, 16, 32\], got \[16, 32\]"),
        ({"out": torch.zeros(1, 32, 16).transpose(1, 2)}, "expected out to be contiguous"),
        ({"left": Quantized(left.payload.float(), left.scales)}, "expected left and right of float8_e4m3fn, got Float"),
        ({"left": short}, "expected as many columns in right as in left, 200, got 256"),
        (
            {"left": short, "right": Quantized(right.payload[:, :200], right.scales)},
            "expected a multiple of 128 columns .* got 200",
        ),
        ({"right": Quantized(right.payload, right.scales[:, :1])}, r"expected right_scales \[32, 2\] of float32, got \[32, 1\]"),
        ({"ends": ends.long()}, r"expected ends \[e\] of int32"),
        ({"ends": torch.tensor([200], dtype=torch.int32)}, "expected ends of multiples of 128 from 0 to 256 for expert 0, got 200"),
        ({"ends": torch.tensor([384], dtype=torch.int32)}, "from 0 to 256 for expert 0, got 384"),
    ):
        with pytest.raises(ValueError, match=text):
            call(**arguments)
    assert not total.any()  # a refused call has changed nothing
